"""Memory traffic of the plain formulas, for --roofline: what a GPU of a given bandwidth could do
with them at best. An operation reads its inputs once and writes its outputs once, as if nothing
stayed in a cache and nothing was read twice."""

from __future__ import annotations

import logging
import warnings
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class EagerTraffic(TorchDispatchMode):
    """Counts every operation that eager PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = [r.alias_info for r in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in returns)
        if not view:
            # of its first argument gather reads only as much as it returns, next to nothing here
            read = args[1:] if func is torch.ops.aten.gather.default else args
            leaves = tree_leaves((read, kwargs, out))
            self.bytes += sum(x.nbytes for x in leaves if isinstance(x, torch.Tensor))
        return out


class CompiledTraffic:
    """Counts what Inductor says its kernels access, of whatever is compiled inside."""

    bytes: int | None = None  # None: this torch keeps no such count

    def __enter__(self) -> CompiledTraffic:
        from torch._inductor import config, metrics

        self._stack = ExitStack()
        self._stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        # Inductor counts neither a cached graph nor anything while its metrics are not logged.
        self._stack.enter_context(config.patch(force_disable_caches=True))
        log = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")
        before = log.level, log.propagate
        log.setLevel(logging.INFO)
        log.propagate = False
        log.addHandler(quiet := logging.NullHandler())
        self._stack.callback(log.removeHandler, quiet)
        self._stack.callback(
            lambda: (log.setLevel(before[0]), setattr(log, "propagate", before[1]))
        )
        metrics.reset()
        self._metrics = metrics
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self.bytes = self._metrics.num_bytes_accessed or None


def of(name: str) -> Any:
    """What counts a row's traffic; nothing for rows that have a model of their own."""
    counters = {"eager": EagerTraffic, "torch.compile": CompiledTraffic}
    return counters.get(name, nullcontext)()
