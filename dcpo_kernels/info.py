"""dcpo info: what is installed, what was built, and which backend each kind of tensor gets."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib import metadata
from typing import Any

from dcpo_kernels._version import __version__

VOCABS = (32000, 128256, 151936, 262144)  # of well-known models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for a machine to read")


def main(args: argparse.Namespace) -> int:
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
    from dcpo_kernels.backends import _compiled, cuda

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
    _C = _compiled.C
    if _C is None:
        facts["compiled"]["reason"] = _compiled.missing
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
        if not backends.unavailable("cuda", "cuda"):
            for i, device in enumerate(facts["cuda"]["devices"]):
                device["fused in bf16"] = {v: cuda.plan(v, 2, i) for v in VOCABS}
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
        lines.append(f"{'compiled module':<16}none: {compiled['reason']}")

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
            for vocab, plan in device.get("fused in bf16", {}).items():
                lines.append(f"{'':<16}(V = {vocab:,} in bf16: {plan})")

    for row in facts["backends"]:
        lines.append(f"{row['tensor'] + ' tensors':<16}{row['backend'] or 'none'}: {row['reason']}")
        for other in row["others"]:
            if other["backend"] != row["backend"]:
                can = "also there" if other["available"] else "not there"
                lines.append(f"{'':<16}({other['backend']} {can}: {other['reason']})")
    return "\n".join(lines)


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
