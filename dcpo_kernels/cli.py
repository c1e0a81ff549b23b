"""The command line: dcpo demo | bench | info."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

from dcpo_kernels._version import __version__

# Name: (module with add_arguments(parser) and main(args) -> exit status, the extra that it needs,
# help). A module is imported when its command is called: no command waits for another's imports.
_COMMANDS = {
    "demo": ("dcpo_kernels.demo.cli", "train", "train a small model with GRPO and with DCPO"),
    "bench": ("dcpo_kernels.bench.cli", "bench", "time the kernels beside plain PyTorch"),
    "info": (
        "dcpo_kernels.info",
        "",
        "what is installed and built, and which tensor gets which backend",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # the locale of a terminal may know ASCII alone
        sys.stdout.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(
        prog="dcpo", description="Policy-gradient losses for RLVR, fused into one pass."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    parsers = {name: commands.add_parser(name, help=c[2]) for name, c in _COMMANDS.items()}

    name = argv[0] if argv else ""
    if name not in parsers:
        name = parser.parse_args(argv).command  # --help and errors end here
    path, extra, parsers[name].description = _COMMANDS[name]
    try:
        module = importlib.import_module(path)
        module.add_arguments(parsers[name])
        return module.main(parser.parse_args(argv))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "dcpo_kernels" or not extra:
            raise
        remedy = f"pip install 'dcpo-kernels[{extra}]'"
        print(f"dcpo {name} needs {error.name}, not installed here: {remedy}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
