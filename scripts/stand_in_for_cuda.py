"""Makes a torch built for CUDA importable without NVIDIA's libraries, for tests on a CPU.

For each library that torch links, an empty one with the same symbols is compiled into torch's own
folder; every function returns an error. The CUDA runtime and the driver are left out: the first is
small enough to be real (nvidia-cuda-runtime-cu12), the second is loaded only where there is one.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path


def output(*command: object) -> str:
    return subprocess.run(map(str, command), check=True, capture_output=True, text=True).stdout


folder = next(Path(sys.prefix).glob("lib/python3*/site-packages/torch/lib"))
needed: set[str] = set()
undefined: set[str] = set()  # name, or name@library where the library versions its symbols
for library in folder.glob("*.so*"):
    dynamic = output("readelf", "-dW", library)
    needed.update(re.findall(r"NEEDED.*\[(lib(?:cu|nccl|nvrtc)\S+)\]", dynamic))
    undefined.update(line.split()[-1] for line in output("nm", "-Du", library).splitlines())

for soname in needed - {"libcudart.so.12", "libcuda.so.1"}:
    prefix = soname[3:].split(".")[0]
    versioned = {name.split("@")[0] for name in undefined if name.endswith("@" + soname)}
    plain = {name for name in undefined if re.fullmatch(rf"{prefix}[A-Z]\w+", name)}
    code = "".join(f"int {name}(void) {{ return 1; }}\n" for name in versioned | plain)
    command = ["gcc", "-shared", "-fPIC", "-xc", "-", "-o", str(folder / soname)]
    command += [f"-Wl,-soname,{soname}"]
    with tempfile.NamedTemporaryFile("w", suffix=".map") as versions:
        if versioned:
            versions.write(f"{soname} {{ {' '.join(name + ';' for name in versioned)} }};")
            versions.flush()
            command += [f"-Wl,--version-script={versions.name}"]
        subprocess.run(command, input=code, text=True, check=True)
