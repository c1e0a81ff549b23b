"""Builds csrc/cuda for a CPU (tests/emulator), and makes backend="cuda" run there.

Kept under build/ until a source changes.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
EMULATOR = ROOT / "tests" / "emulator"  # first on the include path
KERNELS = ("cuda/streaming.cu", "cuda/fused_resident.cu", "cuda/multiply.cu", "cuda/responses.cu")
COMMON = (*KERNELS, "cuda.cpp", "hopper.cpp")
STRESS = (*COMMON, "stress.cpp", "cpu/rows_portable.cpp")
MODULE = (*COMMON, "module.cpp", "cuda/bind.cpp")


def build(name: str, sources: tuple[str, ...], *flags: str) -> Path:
    """A program, or with -shared a module, of these sources."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here to build the emulated kernels with")
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(p for f in (CSRC, EMULATOR) for p in f.rglob("*") if p.is_file()):
        digest.update(path.read_bytes())
    builds = ROOT / "build" / "emulator"
    current = builds / digest.hexdigest()[:16]
    for old in builds.glob("*"):
        if old != current:
            shutil.rmtree(old, ignore_errors=True)
    folder = current / ("-".join(flag.lstrip("-") for flag in flags) or "plain")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # another process may be at it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / name).exists():
            compile_in(folder, name, sources, flags)
    return folder / name


def compile_in(folder: Path, name: str, sources: tuple[str, ...], flags: tuple[str, ...]) -> None:
    include = [f"-I{path}" for path in (EMULATOR, CSRC, pybind11.get_include())]
    include += [f"-I{sysconfig.get_path('include')}"]
    # Contraction would give lanes what no GPU does, and the sanitizers want line numbers.
    options = ["-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden"]
    options += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]

    def compiled(source: str) -> Path:
        object_ = folder / (source.replace("/", "-") + ".o")
        if not object_.exists():
            found = next(f for f in (EMULATOR / source, CSRC / source) if f.exists())
            command = ["g++", *options, *flags, *include, "-x", "c++", "-c", str(found)]
            partial = object_.with_suffix(".tmp")
            subprocess.run([*command, "-o", str(partial)], check=True)
            partial.rename(object_)
        return object_

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    partial = folder / f"{name}.tmp"
    subprocess.run(
        ["g++", *flags, *map(str, objects), "-pthread", "-o", str(partial)]
        + (["-shared"] if name.endswith(".so") else []),
        check=True,
    )
    partial.rename(folder / name)


@functools.cache
def module() -> ModuleType:
    path = build("_emu.so", MODULE)
    spec = importlib.util.spec_from_file_location("_emu", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@contextmanager
def installed() -> Iterator[ModuleType]:
    """For as long as it lasts backend="cuda" takes CPU tensors and runs in the emulator."""
    from dcpo_kernels import backends
    from dcpo_kernels.backends import cuda

    emulated = module()
    emulated.set()
    candidates = {**backends._CANDIDATES, "cpu": (*backends._CANDIDATES["cpu"], "cuda")}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "C", emulated)
            patch.setattr(cuda, "_where", lambda x: {"device": 0, "stream": 0})
            patch.setattr(backends, "_CANDIDATES", candidates)
            patch.setattr(cuda, "unavailable", lambda device: "")
            backends.unavailable.cache_clear()
            yield emulated
    finally:
        backends.unavailable.cache_clear()
