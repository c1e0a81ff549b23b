"""The compiled module's CPU kernels. Arguments were checked and results allocated by the
operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcpo_kernels.backends import _compiled
from dcpo_kernels.backends._compiled import C


def unavailable(device: str = "cpu") -> str:
    return _compiled.missing


def fused(*records: Any) -> None:
    C.cpu_fused(**_compiled.fused_arguments(*records), threads=torch.get_num_threads())


def row_stats(*records: Any) -> None:
    C.cpu_stats(**_compiled.row_stats_arguments(*records), threads=torch.get_num_threads())


def row_gradient(*records: Any) -> None:
    C.cpu_gradient(**_compiled.row_gradient_arguments(*records), threads=torch.get_num_threads())


def token_weights(*records: Any) -> None:
    C.cpu_token_weights(**_compiled.token_weights_arguments(*records))


def decide(*records: Any) -> None:
    C.cpu_decide(**_compiled.decide_arguments(*records))


def finish(*records: Any) -> None:
    C.cpu_finish(**_compiled.finish_arguments(*records))


def multiply_(x: Tensor, factor: Tensor) -> None:
    C.cpu_multiply(**_compiled.multiply_arguments(x, factor), threads=torch.get_num_threads())
