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
    facts["compiled"] = {"present": True, "compiler": _C.compiler, "cuda": _C.cuda}
    facts["compiled"]["cuda_archs"] = _C.cuda_archs.split()
    threads = torch.get_num_threads()
    facts["cpu"] = {"isas": _C.cpu_isas(), "isa": _C.cpu_isa(), "threads": threads}
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
    lines = [(name, version or "not installed") for name, version in facts["versions"].items()]
    compiled = facts["compiled"]
    if compiled["present"]:
        archs = f"CUDA for {' '.join(compiled['cuda_archs'])}" if compiled["cuda"] else "no CUDA"
        lines.append(("compiled module", f"{compiled['compiler']}, {archs}"))
        cpu = facts["cpu"]
        threads = f"{cpu['threads']} threads"
        lines.append(("CPU", f"{cpu['isa']} in use, of {', '.join(cpu['isas'])}; {threads}"))
    else:
        lines.append(("compiled module", f"none: {compiled['reason']}"))
    if cuda := facts.get("cuda"):
        driver = f"driver for CUDA {_cuda(cuda['driver'])}" if cuda["driver"] else "no driver"
        lines.append(("CUDA", f"runtime {_cuda(cuda['runtime'])}, {driver}"))
        for i, device in enumerate(cuda["devices"]):
            major, minor = device["capability"]
            text = (
                f"{device['name']}, sm_{major}{minor}, "
                f"{device['multiprocessors']} multiprocessors, "
                f"{device['total_bytes'] / 2**30:.0f} GiB, "
                f"L2 {device['l2_bytes'] / 2**20:.0f} MiB, "
                f"shared {device['shared_bytes'] / 2**10:.0f} KiB per block"
            )
            lines.append((f"GPU {i}", text))
            for vocab, plan in device.get("fused in bf16", {}).items():
                lines.append(("", f"(V = {vocab:,} in bf16: {plan})"))
    for row in facts["backends"]:
        lines.append((f"{row['tensor']} tensors", f"{row['backend'] or 'none'}: {row['reason']}"))
        for other in row["others"]:
            if other["backend"] != row["backend"]:
                can = "also there" if other["available"] else "not there"
                lines.append(("", f"({other['backend']} {can}: {other['reason']})"))
    return "\n".join(f"{name:<16}{text}" for name, text in lines)


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
