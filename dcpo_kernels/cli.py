"""The command line: dcpo demo | bench | info."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from dcpo_kernels._version import __version__

# Name: (module with add_arguments(parser) and main(args) -> exit status, the extra that it needs,
# help). A module is imported when its command is called: no command waits for another's imports.
_COMMANDS = {
    "demo": ("dcpo_kernels.train.demo", "train", "train a small model with GRPO and with DCPO"),
    "bench": ("dcpo_kernels.bench.cli", "bench", "time the kernels beside plain PyTorch"),
}
_INFO = "what is installed, what was built, and which backend each kind of tensor gets"


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="dcpo", description="Policy-gradient losses for RLVR, fused into one pass."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    info = commands.add_parser("info", help=_INFO, description=_INFO)
    info.add_argument("--json", action="store_true", help="for a machine to read")
    info.set_defaults(run=_info)
    others = {name: commands.add_parser(name, help=c[2]) for name, c in _COMMANDS.items()}

    name = argv[0] if argv else ""
    if name not in others:
        args = parser.parse_args(argv)
        return args.run(args)
    path, extra, others[name].description = _COMMANDS[name]
    try:
        module = importlib.import_module(path)
        module.add_arguments(others[name])
        return module.main(parser.parse_args(argv))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "dcpo_kernels":
            raise
        remedy = f"pip install 'dcpo-kernels[{extra}]'"
        print(f"dcpo {name} needs {error.name}, not installed here: {remedy}", file=sys.stderr)
        return 1


def _info(args: argparse.Namespace) -> int:
    try:
        facts = collect()
    except (ValueError, RuntimeError) as error:  # a DCPO_KERNELS_* variable that can't be honoured
        print(f"dcpo info: {error}", file=sys.stderr)
        return 1
    print(json.dumps(facts, indent=2) if args.json else _text(facts))
    return 0


def collect() -> dict[str, Any]:
    """Everything that decides which kernels run here, as `dcpo info --json` prints it."""
    import torch

    from dcpo_kernels import backends

    facts: dict[str, Any] = {
        "versions": {
            "dcpo-kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _installed("triton"),
            "numpy": _installed("numpy"),
        },
        "compiled": {"present": False},
        # First: loading the backends is what makes DCPO_KERNELS_CPU_ISA count.
        "backends": backends.explain(),
    }
    try:
        from dcpo_kernels import _C
    except ImportError as error:
        facts["compiled"]["reason"] = str(error)
        return facts
    facts["compiled"] = {
        "present": True,
        "compiler": _C.compiler,
        "cuda": _C.cuda,
        "cuda_archs": _C.cuda_archs.split(),
    }
    facts["cpu"] = {
        "isas": _C.cpu_isas(),
        "isa": _C.cpu_isa(),
        "threads": torch.get_num_threads(),
    }
    if _C.cuda:
        facts["cuda"] = {**_C.cuda_versions(), "devices": _C.cuda_devices()}
    return facts


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _text(facts: dict[str, Any]) -> str:
    lines = [
        f"{name:<16}{version or 'not installed'}" for name, version in facts["versions"].items()
    ]

    compiled = facts["compiled"]
    if compiled["present"]:
        archs = f"CUDA for {' '.join(compiled['cuda_archs'])}" if compiled["cuda"] else "no CUDA"
        lines.append(f"{'compiled module':<16}{compiled['compiler']}, {archs}")
        cpu = facts["cpu"]
        lines.append(
            f"{'CPU':<16}{cpu['isa']} in use, of {', '.join(cpu['isas'])}; {cpu['threads']} threads"
        )
    else:
        lines.append(f"{'compiled module':<16}missing: {compiled['reason']}")

    if "cuda" in facts:
        cuda = facts["cuda"]
        driver = f"driver for CUDA {_cuda(cuda['driver'])}" if cuda["driver"] else "no driver"
        lines.append(f"{'CUDA':<16}runtime {_cuda(cuda['runtime'])}, {driver}")
        for i, device in enumerate(cuda["devices"]):
            major, minor = device["capability"]
            lines.append(
                f"{f'GPU {i}':<16}{device['name']}, sm_{major}{minor}, "
                f"{device['multiprocessors']} multiprocessors, "
                f"{device['total_bytes'] / 2**30:.0f} GiB, "
                f"L2 {device['l2_bytes'] / 2**20:.0f} MiB, "
                f"shared {device['shared_bytes'] / 2**10:.0f} KiB a block"
            )

    for row in facts["backends"]:
        lines.append(f"{row['tensor'] + ' tensors':<16}{row['backend']}: {row['reason']}")
        for other in row["others"]:
            if other["backend"] != row["backend"]:
                can = "also there" if other["available"] else "not there"
                lines.append(f"{'':<16}({other['backend']} {can}: {other['reason']})")
    return "\n".join(lines)


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


if __name__ == "__main__":
    sys.exit(main())
