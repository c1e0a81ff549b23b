"""Output on the terminal: with rich where it is installed, else as plain text."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

try:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Table
except ImportError:  # then tables are plain text
    Console: Any = None


class Bar:
    """Progress of a case."""

    def __init__(self, update: Callable[..., object] = lambda **_: None) -> None:
        self._update = update

    def stage(self, text: str) -> None:
        self._update(now=text)

    def rounds(self, rounds: int, share: float) -> None:
        self._update(completed=min(share, 1.0), now=f"{rounds} rounds")


class Screen:
    def __init__(self, width: int | None = None) -> None:
        self.width = width or shutil.get_terminal_size().columns
        self.console = Console(width=width) if Console else None
        if not Console:
            print("plain tables and no progress bar: rich is not installed (pip install rich)")

    def say(self, text: str, style: str = "") -> None:
        if self.console:
            self.console.print(escape(text), style=style, soft_wrap=True)
        else:
            print(text)

    def table(
        self, title: str, header: Sequence[str], rows: list[list[str]], styles: Sequence[str] = ()
    ) -> None:
        """styles: of each row."""
        if not self.console:
            widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
            print(title)
            for row in (header, *rows):
                first, *rest = (x.rjust(w) for x, w in zip(row, widths, strict=True))
                print("  ".join([first.strip().ljust(widths[0]), *rest]))
            return
        table = Table(title=title, title_justify="left", title_style="bold", show_edge=False)
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left", no_wrap=True)
        for i, row in enumerate(rows):
            table.add_row(*map(escape, row), style=styles[i] if styles else None)
        self.console.print(table)

    @contextmanager
    def progress(self, text: str) -> Iterator[Bar]:
        if not self.console:
            print(text, flush=True)
            yield Bar()
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[now]}"))
        with Progress(*columns, console=self.console, transient=True) as bars:
            yield Bar(partial(bars.update, bars.add_task(text, total=1.0, now="")))
