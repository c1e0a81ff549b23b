"""A GPU for Triton that isn't there: everything it asks of a driver but the launch.

Importing this (in a process of its own, without TRITON_INTERPRET) makes Triton compile for sm_90
and makes backend="triton" accept CPU tensors. What is compiled is what a GPU would get; what is
launched does nothing, and its results are whatever memory held.
"""

from __future__ import annotations

import os

assert os.environ.get("TRITON_INTERPRET") != "1"

import triton
from triton.backends.compiler import GPUTarget

from dcpo_kernels.backends import triton as backend


class Driver:
    def __init__(self, target: GPUTarget):
        self.target = target
        self.utils = self
        self.launches: list[tuple] = []  # grid and arguments, while `recording`
        self.recording = False

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def load_binary(self, name, kernel, shared, device):
        return (None, None, 0, 0, 1024)[: 4 if triton.__version__ < "3.4" else 5]

    def unload_module(self, module):
        pass

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            if self.recording:
                self.launches.append(((x, y, z), source.fn.__name__, arguments))

        return launch


driver = Driver(GPUTarget("cuda", 90, 32))
triton.runtime.driver.set_active(driver)
backend.unavailable = lambda device: ""


def use(kind: str, arch: int | str, warp: int) -> None:
    driver.target = GPUTarget(kind, arch, warp)
    backend._device = lambda index: backend.Device(132, warp, 50 << 20)  # an H200


use("cuda", 90, 32)
