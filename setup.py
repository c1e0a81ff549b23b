"""Builds the compiled module with CMake and Ninja. Everything else is in pyproject.toml.

Environment: DCPO_CUDA=AUTO|ON|OFF, DCPO_CUDA_ARCHS="90-real;100" or native, CUDA_HOME, CUDACXX.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

COMPILERS = ("c++", "g++", "clang++", "icpx")  # as CMake looks for one


def check_tools() -> None:
    """One sentence about what is missing, before CMake says it in a hundred lines."""
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    if not any(map(shutil.which, named or COMPILERS)):
        tried = f"CXX={named[0]}" if named else ", ".join(COMPILERS)
        raise SystemExit(
            f"dcpo-kernels needs a C++17 compiler, and there is none on PATH (tried {tried}); "
            "install one, such as g++ or clang++, or name it in CXX"
        )
    for tool in ("cmake", "ninja"):
        if not shutil.which(tool):
            raise SystemExit(
                f"dcpo-kernels needs {tool} to build, which is not on PATH; pip brings it, unless "
                "called with --no-build-isolation"
            )


def run(command: list[str], env: dict[str, str], failed: str) -> None:
    if subprocess.run(command, env=env).returncode:
        raise SystemExit(f"dcpo-kernels: {failed}; what went wrong is said above")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        check_tools()
        import pybind11

        source = Path(__file__).resolve().parent
        build = Path(self.build_temp).resolve()
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "DCPO_CUDA": os.environ.get("DCPO_CUDA", "AUTO"),
            "DCPO_CUDA_ARCHS": os.environ.get("DCPO_CUDA_ARCHS", ""),
        }
        configure = [f"-D{name}={value}" for name, value in options.items()]

        env = dict(os.environ)
        cuda_home = env.get("CUDA_HOME")  # torch's name for it, which CMake does not know
        if cuda_home and Path(cuda_home, "bin/nvcc").is_file():
            env.setdefault("CUDACXX", f"{cuda_home}/bin/nvcc")

        # A build folder that another environment configured (an isolated one that is gone, another
        # CUDA) starts afresh; the same environment compiles only what changed.
        stamp = build / "configured-with"
        wanted = "\n".join([*configure, env.get("CUDACXX", ""), env["PATH"]])
        fresh = [] if stamp.is_file() and stamp.read_text() == wanted else ["--fresh"]
        build.mkdir(parents=True, exist_ok=True)
        command = ["cmake", "-G", "Ninja", "-S", str(source), "-B", str(build), *configure, *fresh]
        run(command, env, "CMake found no way to build (a C++17 compiler that works is needed)")
        stamp.write_text(wanted)
        failed = "the kernels don't compile here (DCPO_CUDA=OFF leaves out the CUDA kernels)"
        run(["cmake", "--build", str(build)], env, failed)


setup(ext_modules=[Extension("dcpo_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
