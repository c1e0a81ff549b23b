"""dcpo demo: its arguments, and how it ends."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dcpo_kernels.demo.stages import Demo
from dcpo_kernels.train.config import recipes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, methods = parser.add_argument, list(recipes())
    add("--output-dir", type=Path, default=Path("dcpo-demo"), help="for problems, metrics, plots")
    add("--seed", type=int, default=0)
    add("--minutes", type=float, default=5.0, help="of wall clock; training stops before it")
    add("--steps", type=int, default=60, help="training steps of each method")
    two = {"nargs": "+", "default": ["grpo", "dcpo"]}
    add("--methods", **two, choices=methods, metavar="METHOD", help=", ".join(methods))
    add("--problems", type=int, default=1024, help="problems to train on")
    add("--heldout", type=int, default=256, help="problems to evaluate on")
    add("--samples", type=int, default=8, help="k of the sampled Avg@k at the end")
    add("--warmup-problems", type=int, default=3072)
    add("--warmup-steps", type=int, default=1100, help="supervised steps before")
    add("--prompts-per-step", type=int, default=64)
    add("--group-size", type=int, default=8, help="responses to a prompt")
    add("--minibatches", type=int, default=4, help="updates per rollout")
    add("--learning-rate", type=float, default=3e-4)
    add("--hidden-size", type=int, default=64)
    add("--layers", type=int, default=2)
    add("--vocab-size", type=int, default=32768, help="the embedding is padded to this many rows")


def main(args: argparse.Namespace) -> int:
    try:
        demo = Demo(args)
    except (ValueError, OSError) as error:
        print(f"dcpo demo: {error}", file=sys.stderr)
        return 2
    status = 0
    try:
        try:
            demo.run()
        except KeyboardInterrupt:
            demo.say_stopped("interrupted")
            status = 130
        except OSError as error:  # such as a disk that is full by now
            demo.say_stopped(f"stopped: {error}")
            status = 1
        demo.finish()
    except OSError as error:
        print(f"dcpo demo: results in {args.output_dir} are not complete: {error}", file=sys.stderr)
        return 1
    return status
