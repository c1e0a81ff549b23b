"""dcpo bench: measures operators and peers on this machine, and says how far each is from the
limit."""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from dcpo_kernels.bench import compare, machine, readme, roofline, table, timing, watch
from dcpo_kernels.bench import record as records
from dcpo_kernels.bench.graphs import CudaClock
from dcpo_kernels.bench.harness import Plan, run_case
from dcpo_kernels.bench.implementations import BACKENDS
from dcpo_kernels.bench.operators import operators
from dcpo_kernels.bench.peers import PEERS
from dcpo_kernels.bench.shapes import DTYPES, MODELS, OBJECTIVES, Case, positive, vocab_of
from dcpo_kernels.files import check_writable


def _list(known: Any = None, of: Callable[[str], Any] = str) -> Callable[[str], list[Any]]:
    """An argument type: names (of `known`) or numbers, separated by commas."""

    def parse(text: str) -> list[Any]:
        parts = [part for part in text.split(",") if part and part != "none"]
        for part in parts:
            if known is not None and part not in known:
                raise argparse.ArgumentTypeError(f"{part!r} is not one of {', '.join(known)}")
        try:
            return [of(part) for part in parts]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share in 0..1")
    return value


def _amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 up")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = ", ".join(f"{name} {vocab}" for name, vocab in MODELS.items())
    known = operators()
    what = "; ".join(f"{name}: {operator.title}" for name, operator in known.items())
    add = parser.add_argument_group("what").add_argument
    add("operators", nargs="*", metavar="operator", help=f"{what} (default: fused)")
    add("--objective", type=_list(OBJECTIVES), default=["dcpo"], help=", ".join(OBJECTIVES))
    add("--tokens", type=_list(of=positive), default=[256], help="rows of logits, e.g. 256,4096")
    add("--vocab", type=_list(of=vocab_of), default=[MODELS["qwen2.5"]], help=f"number or {models}")
    add("--dtype", type=_list(DTYPES), default=["bf16"], help=", ".join(DTYPES))
    add("--masked", type=_share, default=0.0, help="share of tokens that don't count")
    add("--zero-advantage", type=_share, default=0.0, help="share of tokens with advantage 0")
    add("--suite", choices=["readme"], help="what the README shows; rewrites it from the results")
    add = parser.add_argument_group("how").add_argument
    add("--device", choices=["cpu", "cuda"], help="(default: cuda where there is a GPU)")
    add(
        "--backend",
        type=_list(BACKENDS),
        default=[name for name in BACKENDS if name != "reference"],
        help=f"ours and plain PyTorch: {', '.join(BACKENDS)}",
    )
    add("--peers", type=_list(PEERS), default=list(PEERS), help=f"{', '.join(PEERS)}, or none")
    add("--seconds", type=_amount, default=20.0, help="of timing a case (default: %(default)s)")
    add = parser.add_argument_group("what is said of it").add_argument
    add("--baseline", default="torch.compile", help="row that others are compared with")
    add("--json", type=Path, help="keep environment, command, commit and every sample")
    add("--load", type=Path, help="show this record, measure nothing")
    add("--compare", type=Path, metavar="OLD", help="SAME, FAST, SLOW or AMBIGUOUS against OLD")
    add("--plot", type=Path, metavar="FOLDER", help="draw PNGs there")
    add(
        "--roofline",
        type=_amount,
        metavar="GB/s",
        help="predict each row on a GPU of this bandwidth",
    )


def main(args: argparse.Namespace) -> int:
    console = Console()
    try:
        for path in filter(None, (args.json, args.plot and args.plot / "time.png")):
            check_writable(path)
        old = records.load(args.compare) if args.compare else None
        if args.suite:  # before minutes of measuring
            if not (machine.ROOT / "pyproject.toml").exists():
                raise records.BadRecord("--suite writes into the repository: use a checkout")
            readme.around_table(machine.ROOT)
        record = records.load(args.load) if args.load else _measure(args, console)
        table.show(console, record["rows"], args.baseline)
        if args.roofline:
            roofline.show(console, record["rows"], args.roofline)
        if old is not None:
            compare.show(console, record, old)
        if args.plot:
            from dcpo_kernels.bench import plots

            for path in plots.draw(record["rows"], args.baseline, args.plot):
                console.print(f"drawn: {path}")
        wrong = [r for r in record["rows"] if r["status"] == "wrong" and r["kind"] != "peer"]
        for row in wrong:
            console.print(f"[red]WRONG: {row['name']} of {table.case_of(row).describe()}[/]")
        if args.suite and not wrong and record["complete"]:
            if not args.load:
                name = readme.result_file(record)
                records.save(record, machine.ROOT / "bench" / "results" / name)
            for path in readme.write(machine.ROOT):
                console.print(f"written: {path}")
    except (records.BadRecord, OSError) as error:
        print(f"dcpo bench: {error}", file=sys.stderr)
        return 2
    if wrong:
        return 1
    return 0 if record["complete"] else 130


def _cases(args: argparse.Namespace, device: str) -> list[Case]:
    if args.suite:
        return readme.suite(device)
    known = operators()
    names = args.operators or ["fused"]
    for name in names:
        if name not in known:
            raise records.BadRecord(f"operator {name!r} is not one of {', '.join(known)}")
    return [
        Case(name, objective, tokens, vocab, dtype, device, args.zero_advantage, args.masked)
        for name in names
        for objective in (args.objective if known[name].takes_objective else [""])
        for tokens, vocab, dtype in itertools.product(args.tokens, args.vocab, args.dtype)
    ]


def _measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    there = torch.cuda.is_available()
    device = args.device or ("cuda" if there else "cpu")
    if device == "cuda" and not there:
        raise records.BadRecord("--device cuda: torch sees no GPU here")
    cases, known = _cases(args, device), operators()
    skipped, gpu, watching = [], None, watch.CpuWatch
    if device == "cuda":
        clock = CudaClock()
        nvml, handle, reason = watch.open_gpu()
        if nvml is None:
            skipped.append(f"state of the GPU: {reason}")
            gpu = {"name": torch.cuda.get_device_name(), "driver": "unknown"}
        else:
            gpu = watch.gpu_state(nvml, handle)
            watching = functools.partial(watch.GpuWatch, nvml, handle)
    else:
        clock = timing.CpuClock()
        if not there:
            skipped.append("everything on a GPU: torch sees none here")
    record = records.new(clock.cache, gpu, skipped)
    for text in skipped:
        console.print(f"skipped {text}")
    plan = Plan(args.backend, args.peers, args.seconds, clock, watching, args.roofline is not None)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[now]}"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: keep what there is
    finished = True
    with Progress(*columns, console=console, transient=True) as bars:
        for i, case in enumerate(cases):
            bar = _Bar(bars, f"{i + 1}/{len(cases)} {case.describe()}")
            try:
                finished = run_case(case, known[case.operator], plan, bar, record["rows"])
            except (ValueError, TypeError, RuntimeError, MemoryError) as error:  # in the inputs
                why = f"{error}".partition("\n")[0] or "not enough memory"
                raise records.BadRecord(f"{case.describe()}: {why}") from error
            record["complete"] = finished and i + 1 == len(cases)
            try:
                if args.json:
                    records.save(record, args.json)
            except OSError as error:  # what was measured is still shown
                console.print(f"{args.json} can't be written: {error}", style="red", soft_wrap=True)
                finished = record["complete"] = False
            if not finished:
                break
            bars.remove_task(bar.task)
    if not finished:
        console.print("[yellow]interrupted: this is what was measured until then[/]")
    return record


class _Bar:
    def __init__(self, bars: Progress, text: str) -> None:
        self.bars, self.task = bars, bars.add_task(text, total=1.0, now="")

    def stage(self, text: str) -> None:
        self.bars.update(self.task, now=text)

    def rounds(self, rounds: int, share: float) -> None:
        self.bars.update(self.task, completed=min(share, 1.0), now=f"{rounds} rounds")
