"""A progress bar on a terminal; in a log a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

EVERY = 10.0  # seconds between lines

Advance = Callable[[int, str], None]


@contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Advance]:
    """Gives advance(steps, text), to be told of steps done and the text to show beside them."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total, text="")
            yield lambda steps, text="": bar.update(task, advance=steps, text=text)
        return

    start = said = time.monotonic()
    done, latest = 0, ""

    def say() -> None:
        elapsed = time.monotonic() - start
        console.print(f"{title:<22} {done}/{total} {elapsed:5.1f} s  {latest}", highlight=False)

    def advance(steps: int, text: str = "") -> None:
        nonlocal said, done, latest
        done, latest = done + steps, text or latest
        if time.monotonic() - said >= EVERY and done < total:
            said = time.monotonic()
            say()

    try:
        yield advance
    finally:
        say()
