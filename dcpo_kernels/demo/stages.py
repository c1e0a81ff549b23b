"""What the demo does: problems, warm-up, evaluation, training, evaluation, report."""

from __future__ import annotations

import argparse
import copy
import io
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from dcpo_kernels import __version__, backends
from dcpo_kernels.demo import report
from dcpo_kernels.demo.arithmetic import MAX_NEW_TOKENS, Sum, as_problems, make_sums, make_tokenizer
from dcpo_kernels.demo.plots import plot
from dcpo_kernels.demo.progress import progress
from dcpo_kernels.demo.timing import loss_seconds
from dcpo_kernels.demo.warmup import PADDED_STEPS, make_model, warm_up
from dcpo_kernels.files import check_writable, written_whole
from dcpo_kernels.train.config import recipes
from dcpo_kernels.train.data import Problem, read_problems, write_problems
from dcpo_kernels.train.evaluate import evaluate
from dcpo_kernels.train.loop import read_metrics, train
from dcpo_kernels.train.step import Trainer

OPERANDS = 4
RESULTS = ("table.txt", "curves.png", "results.json")
WARMUP_SHARE = 0.35  # of the time: no more, or nothing is left to see
CURVE_PROBLEMS, CURVE_SAMPLES = 128, 4  # what the accuracy between the steps is measured on


class Demo:
    """The stages in order; `results` holds what they measured, on disk after each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out: Path = args.output_dir
        self.started = time.monotonic()
        self.console = Console()
        if not self.console.is_terminal:
            self.console.width = 120
        same = ("prompts_per_step", "group_size", "minibatches", "learning_rate", "seed")
        ready = recipes(
            micro_batch_size=64,
            max_new_tokens=MAX_NEW_TOKENS,
            **{name: getattr(args, name) for name in same},
        )
        self.configs = {name: ready[name] for name in dict.fromkeys(args.methods)}
        self.tokenizer = make_tokenizer()
        of_demo: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "seed": args.seed}
        self.evaluate = partial(evaluate, tokenizer=self.tokenizer, **of_demo)
        for option, least, most in (
            ("minutes", 0, 1e6),
            ("steps", 0, 10**6),
            ("problems", args.prompts_per_step, 10**7),
            ("heldout", 1, 10**7),
            ("samples", 1, 10**6),
            ("warmup_problems", 1, 10**7),
            ("warmup_steps", 0, 10**6),
            ("hidden_size", 1, 2**13),
            ("layers", 1, 2**7),
            ("vocab_size", len(self.tokenizer), 2**20),
        ):
            if not least <= getattr(args, option) <= most:
                name = "--" + option.replace("_", "-")
                bound = f"at least {least}" if getattr(args, option) < least else f"at most {most}"
                raise ValueError(f"{name} {getattr(args, option)} must be {bound}")
        sizes = (args.warmup_problems, args.problems, args.heldout)
        sums = iter(make_sums(sum(sizes), OPERANDS, args.seed))
        self.sums = [list(islice(sums, size)) for size in sizes]
        logs = [f"{name}/metrics.jsonl" for name in self.configs]
        for name in ("train.parquet", "heldout.parquet", *RESULTS, *logs):
            check_writable(self.out / name)
        self.results: dict[str, Any] = {
            "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "environment": {
                "dcpo-kernels": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "machine": platform.machine(),
                "threads": torch.get_num_threads(),
                "backend": backends.choose("auto", "cpu"),
            },
            "stopped": [],
            "seconds": {},
        }

    def run(self) -> None:
        with self.stage("problems"):
            warmup, train_on, heldout = self.make_problems()
        with self.stage("warm-up"):
            model = self.warmed_up(warmup)
        with self.stage("evaluation before"):
            self.results["before"] = self.evaluated(model, heldout, "evaluation, before")
        with self.stage("training"):
            trainers = self.trained(model, train_on, heldout)
        with self.stage("evaluation after"):
            after = self.results["after"] = {}
            for name, trainer in trainers.items():
                after[name] = self.evaluated(trainer.model, heldout, f"evaluation, {name}")
        with self.stage("loss beside plain PyTorch"):
            ran = {name: trainer for name, trainer in trainers.items() if trainer.last}
            self.results["loss_seconds"] = {name: loss_seconds(t) for name, t in ran.items()}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.results["seconds"][name] = time.monotonic() - start
            _write(self.out / "results.json", json.dumps(self.results, indent=2) + "\n")

    def make_problems(self) -> tuple[list[Sum], list[Problem], list[Problem]]:
        """To warm up with, to train on, held out: disjoint. The last two go through parquet."""
        warmup, train_on, heldout = self.sums
        read = []
        for name, part, first in (("train", train_on, 0), ("heldout", heldout, len(train_on))):
            write_problems(self.out / f"{name}.parquet", as_problems(part, first))
            read.append(read_problems(self.out / f"{name}.parquet"))
        example = read[1][0]
        self.console.print(
            f"{len(read[0])} problems to train on, {len(read[1])} held out, such as "
            f"{example.prompt[0]['content']!r}: {example.ground_truth}",
            highlight=False,
        )
        return warmup, *read

    def warmed_up(self, sums: list[Sum]) -> Any:
        args = self.args
        torch.manual_seed(args.seed)
        model = make_model(self.tokenizer, args.hidden_size, args.layers)
        planned = args.warmup_steps + PADDED_STEPS
        with progress(self.console, "supervised warm-up", planned) as advance:
            made = warm_up(
                model,
                self.tokenizer,
                sums,
                steps=args.warmup_steps,
                vocab_size=args.vocab_size,
                seed=args.seed,
                deadline=self.started + 60 * args.minutes * WARMUP_SHARE,
                advance=advance,
            )
        if made < planned:
            self.say_stopped(f"the time budget ended the warm-up after {made} of {planned} steps")
        return model

    def evaluated(self, model: Any, heldout: list[Problem], title: str) -> dict[str, Any]:
        done = {}
        with progress(self.console, title, 2 * len(heldout)) as advance:
            for kind, k, T in (("greedy", 1, 0.0), ("sampled", self.args.samples, 1.0)):
                how = {"samples": k, "temperature": T, "advance": lambda n: advance(n, "")}
                done[kind] = self.evaluate(model, problems=heldout, **how)._asdict()
                advance(0, f"{kind} accuracy {100 * done[kind]['accuracy']:.1f} %")
        return done

    def trained(
        self, model: Any, problems: list[Problem], heldout: list[Problem]
    ) -> dict[str, Trainer]:
        """All methods from copies of one model, a step each in turn."""
        args = self.args
        for name in self.configs:  # of an earlier run in the same place
            (self.out / name / "metrics.jsonl").unlink(missing_ok=True)
        trainers = {
            name: Trainer(copy.deepcopy(model), self.tokenizer, problems, config)
            for name, config in self.configs.items()
        }

        def curve(model: Any) -> dict[str, float]:
            part = heldout[:CURVE_PROBLEMS]
            done = self.evaluate(model, problems=part, samples=CURVE_SAMPLES)
            return {"heldout_accuracy": done.accuracy}

        after = 15 + 2 * len(trainers) * self.results["seconds"]["evaluation before"]
        with progress(self.console, " and ".join(trainers), args.steps) as advance:
            train(
                trainers,
                self.out,
                steps=args.steps,
                deadline=self.started + 60 * args.minutes - after,
                evaluate_every=max(1, args.steps // 10),
                evaluation=curve,
                advance=advance,
            )
        made = min(trainer.steps for trainer in trainers.values())
        if made < args.steps:
            self.say_stopped(f"the time budget ended training after {made} of {args.steps} steps")
        return trainers

    def say_stopped(self, what: str) -> None:
        self.results["stopped"].append(what)
        self.console.print(what, style="yellow")

    def finish(self) -> None:
        """Table and plots from whatever has been measured."""
        histories = {name: read_metrics(self.out / name / "metrics.jsonl") for name in self.configs}
        rows = report.make_rows(self.results, histories)
        steps = ", ".join(f"{len(history)} {name}" for name, history in histories.items())
        notes = (
            f"Steps made: {steps}. Wall clock: {time.monotonic() - self.started:.0f} s.",
            report.verdict(rows, list(histories)),
            *(f"Note: {what}." for what in self.results["stopped"]),
        )

        def show(console: Console) -> None:
            console.print(report.make_table(rows, list(histories)))
            for note in filter(None, notes):
                console.print(note, highlight=False)

        try:
            with self.stage("report"):
                plot(self.out / "curves.png", self.results, histories)
            text = io.StringIO()
            show(Console(file=text, width=120))
            _write(self.out / "table.txt", text.getvalue())
        finally:
            show(self.console)
        self.console.print(
            f"Everything is in {self.out}: {', '.join(RESULTS)}, */metrics.jsonl", highlight=False
        )


def _write(path: Path, text: str) -> None:
    with written_whole(path) as new:
        new.write_text(text, encoding="utf-8")
