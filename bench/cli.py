"""dcpo bench: measures operators and peers on this machine, and says how far each is from the
limit."""

from __future__ import annotations

import argparse
import itertools
import math
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dcpo_kernels.bench import (
    compare,
    linear,
    machine,
    readme,
    records,
    roofline,
    table,
    timing,
    watch,
)
from dcpo_kernels.bench.graphs import CudaClock
from dcpo_kernels.bench.harness import Plan, run_case
from dcpo_kernels.bench.implementations import BACKENDS, VARIANTS
from dcpo_kernels.bench.linear import LinearRecord
from dcpo_kernels.bench.operators import operators
from dcpo_kernels.bench.peers import PEERS
from dcpo_kernels.bench.records import Record, Row
from dcpo_kernels.bench.screen import Bar, Screen
from dcpo_kernels.bench.shapes import DTYPES, MODELS, OBJECTIVES, Case, positive, vocab_of
from dcpo_kernels.bench.suites import SUITES
from dcpo_kernels.files import check_writable

DEFAULT = [name for name in BACKENDS if name != "reference"]


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


def _number(what: str, below: float) -> Callable[[str], float]:
    """An argument type: a number from 0 up."""

    def parse(text: str) -> float:
        value = float(text)
        if not 0 <= value < below:
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    return parse


_share, _amount = _number("a share in 0..1", 1.0), _number("a number from 0 up", math.inf)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = ", ".join(f"{name} {vocab}" for name, vocab in MODELS.items())
    known = operators()
    what = "; ".join(f"{name}: {operator.title}" for name, operator in known.items())
    what += f"; linear: {linear.TITLE}, alone"
    add = parser.add_argument_group("what").add_argument
    add("operators", nargs="*", metavar="operator", help=f"{what} (default: fused)")
    add("--objective", type=_list(OBJECTIVES), default=["dcpo"], help=", ".join(OBJECTIVES))
    add("--tokens", type=_list(of=positive), help="rows of logits, e.g. 256,4096 (default: 256)")
    what = f"number or {models} (default: qwen2.5)"
    add("--vocab", type=_list(of=vocab_of), help=what)
    add("--dtype", type=_list(DTYPES), help=f"{', '.join(DTYPES)} (default: bf16)")
    shapes = ", ".join("x".join(map(str, shape)) for shape in linear.SHAPES["cpu"])
    what = f"linear: of the hidden states (default: tokens x width x vocab {shapes}, bf16 and fp32)"
    add("--width", type=_list(of=positive), help=what)
    what = "linear: that memory_limit holds the logits in (default: 1,2,4)"
    add("--chunks", type=_list(of=positive), help=what)
    add("--masked", type=_share, default=0.0, help="share of tokens that don't count")
    add("--zero-advantage", type=_share, default=0.0, help="share of tokens with advantage 0")
    add(
        "--suite",
        choices=SUITES,
        help="readme: what the README shows, which is rewritten from the results; gpu, gpu-sweep: "
        "every way to launch the GPU kernels, at two shapes and along vocabulary and tokens",
    )
    add = parser.add_argument_group("how").add_argument
    add("--device", choices=["cpu", "cuda"], help="(default: cuda where there is a GPU)")
    ways = (*BACKENDS, *VARIANTS)
    add("--backend", type=_list(ways), help=f"ours and plain PyTorch: {', '.join(ways)}")
    add("--peers", type=_list(PEERS), help=f"{', '.join(PEERS)}, or none")
    add("--seconds", type=_amount, default=20.0, help="of timing per case (default: %(default)s)")
    add = parser.add_argument_group("what is said of it").add_argument
    add("--baseline", default="torch.compile", help="row that others are compared with")
    add("--json", type=Path, help="keep environment, command, commit and every sample")
    add("--load", type=Path, help="show this record, measure nothing")
    add("--compare", type=Path, metavar="OLD", help="SAME, FAST, SLOW or AMBIGUOUS against OLD")
    add("--plot", type=Path, metavar="FOLDER", help="draw PNGs there")
    what = "predict each row on a GPU of this bandwidth"
    add("--roofline", type=_amount, metavar="GB/s", help=what)


def main(args: argparse.Namespace) -> int:
    try:
        for path in filter(None, (args.json, args.plot and args.plot / "time.png")):
            check_writable(path)
        return (_linear if "linear" in args.operators else _operators)(args, Screen())
    except (records.BadRecord, OSError) as error:
        print(f"dcpo bench: {error}", file=sys.stderr)
        return 2


def _operators(args: argparse.Namespace, screen: Screen) -> int:
    if args.width or args.chunks:
        raise records.BadRecord("--width and --chunks go with linear")
    write = args.suite == "readme"
    old = records.load(args.compare) if args.compare else None
    if write:  # before minutes of measuring
        if not (machine.ROOT / "pyproject.toml").exists():
            raise records.BadRecord("--suite readme writes into the repository: use a checkout")
        readme.around_tables(machine.ROOT)
    record = records.load(args.load) if args.load else _measure(args, screen)
    table.show(screen, record.rows, args.baseline)
    if args.roofline:
        roofline.show(screen, record.rows, args.roofline)
    if old is not None:
        compare.show(screen, record, old)
    if args.plot:
        _plot(args, screen, record)
    wrong = [row for row in record.rows if row.status == "wrong" and row.kind != "peer"]
    for row in wrong:
        screen.say(f"WRONG: {row.name} of {row.case.describe()}", "red")
    if write and not wrong and record.complete:
        if not args.load:
            name = readme.result_file(record)
            records.save(record, machine.ROOT / "bench" / "results" / name)
        for path in readme.write(machine.ROOT):
            screen.say(f"written: {path}")
    if wrong:
        return 1
    return 0 if record.complete else 130


def _linear(args: argparse.Namespace, screen: Screen) -> int:
    linear.check_arguments(args)
    old = records.load(args.compare, LinearRecord) if args.compare else None
    if args.load:
        return linear.show(screen, records.load(args.load, LinearRecord), old)
    host = _host(args, screen, capture=False)
    cases = linear.cases(args, host.device)
    peers = list(linear.PEERS) if args.peers is None else args.peers
    plan = Plan([], peers, args.seconds, host.clock, host.watching)
    record = records.new(host.clock.cache, host.gpu, host.skipped, LinearRecord)
    chunks = args.chunks or linear.CHUNKS
    record = _each(cases, partial(linear.run_case, chunks=chunks, plan=plan), record, args, screen)
    return linear.show(screen, record, old)


def _plot(args: argparse.Namespace, screen: Screen, record: Record) -> None:
    try:
        from dcpo_kernels.bench import plots
    except ModuleNotFoundError as error:
        screen.say(f"nothing drawn: {error.name} is not installed (pip install {error.name})")
        return
    for path in plots.draw(record.rows, args.baseline, args.plot):
        screen.say(f"drawn: {path}")


def _cases(args: argparse.Namespace, device: str) -> list[Case]:
    if args.suite:
        return SUITES[args.suite](device)
    known = operators()
    names = args.operators or ["fused"]
    for name in names:
        if name not in known:
            raise records.BadRecord(f"operator {name!r} is not one of {', '.join(known)}, linear")
    of = partial(Case, device=device, zero_advantage=args.zero_advantage, masked=args.masked)
    shapes = (args.tokens or [256], args.vocab or [MODELS["qwen2.5"]], args.dtype or ["bf16"])
    return [
        of(operator=name, objective=objective, tokens=tokens, vocab=vocab, dtype=dtype)
        for name in names
        for objective in (args.objective if known[name].takes_objective else [""])
        for tokens, vocab, dtype in itertools.product(*shapes)
    ]


class Host(NamedTuple):
    """What is measured on, and how."""

    device: str
    clock: timing.Clock
    watching: Callable[[], watch.CpuWatch | watch.GpuWatch]
    gpu: dict[str, Any] | None
    skipped: list[str]


def _host(args: argparse.Namespace, screen: Screen, capture: bool = True) -> Host:
    there = torch.cuda.is_available()
    device = args.device or ("cuda" if there else "cpu")
    if device == "cuda" and not there:
        raise records.BadRecord("--device cuda: torch sees no GPU here")
    skipped, gpu, watching = [], None, watch.CpuWatch
    if device == "cuda":
        clock = CudaClock(capture=capture)
        nvml, handle, reason = watch.open_gpu()
        if nvml is None:
            skipped.append(f"state of the GPU: {reason}")
            gpu = {"name": torch.cuda.get_device_name(), "driver": "unknown"}
        else:
            gpu = watch.gpu_state(nvml, handle)
            watching = partial(watch.GpuWatch, nvml, handle)
    else:
        clock = timing.CpuClock()
        if not there:
            skipped.append("everything on a GPU: torch sees none here")
    for text in skipped:
        screen.say(f"skipped {text}")
    return Host(device, clock, watching, gpu, skipped)


def _measure(args: argparse.Namespace, screen: Screen) -> Record:
    host = _host(args, screen)
    cases, known = _cases(args, host.device), operators()
    of_gpus = args.suite in ("gpu", "gpu-sweep")
    names = args.backend
    if names is None:
        names = ["cuda", "triton", *VARIANTS] if of_gpus else DEFAULT
    peers = args.peers
    if peers is None:
        peers = [] if of_gpus else list(PEERS)
    counts = args.roofline is not None
    plan = Plan(names, peers, args.seconds, host.clock, host.watching, counts)

    def run(case: Case, progress: Bar, rows: list[Row]) -> bool:
        return run_case(case, known[case.operator], plan, progress, rows)

    record = records.new(host.clock.cache, host.gpu, host.skipped)
    return _each(cases, run, record, args, screen)


def _each(
    cases: Sequence[Any],
    run: Callable[..., bool],
    record: records.Kind,
    args: argparse.Namespace,
    screen: Screen,
) -> records.Kind:
    """The record with the rows of all cases, written after each of them."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: keep what there is
    for i, case in enumerate(cases):
        with screen.progress(f"{i + 1}/{len(cases)} {case.describe()}") as bar:
            try:
                finished = run(case, progress=bar, rows=record.rows)
            except (ValueError, TypeError, RuntimeError, MemoryError) as error:  # in the inputs
                why = f"{error}".partition("\n")[0] or "not enough memory"
                raise records.BadRecord(f"{case.describe()}: {why}") from error
        record = replace(record, complete=finished and i + 1 == len(cases))
        try:
            if args.json:
                records.save(record, args.json)
        except OSError as error:  # what was measured is still shown
            screen.say(f"{args.json} can't be written: {error}", "red")
            record, finished = replace(record, complete=False), False
        if not finished:
            screen.say("interrupted: this is what was measured until then", "yellow")
            break
    return record
