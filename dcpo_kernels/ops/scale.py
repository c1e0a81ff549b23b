"""scale_: the finished gradient times the upstream gradient, which is read where it lies: no wait,
and no work for 1."""

from __future__ import annotations

from dcpo_kernels import backends
from dcpo_kernels.ops.library import define


def _launch(x, scale, backend):
    if x.numel():
        backends.kernels(backend, x.device.type).scale(x, scale)


def _fake(x, scale, backend):
    pass


# scale: one float32
scale_ = define("scale_(Tensor(a!) x, Tensor scale, str backend) -> ()", _launch, _fake)
