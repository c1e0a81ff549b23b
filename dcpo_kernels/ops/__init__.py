"""The operators, one a file: schema, fake, launch. Importing this registers them with torch.

They take and return plain tensors, laid out by the records of records.py, and know nothing of
autograd; losses.py wraps them. `backend` is a name for `backends.kernels`.
"""

from dcpo_kernels.ops.decide import decide
from dcpo_kernels.ops.finish import finish
from dcpo_kernels.ops.fused import fused, fused_
from dcpo_kernels.ops.linear_fused import linear_fused
from dcpo_kernels.ops.linear_gather import linear_gather, linear_gather_gradient
from dcpo_kernels.ops.linear_row_gradient import linear_row_gradient
from dcpo_kernels.ops.linear_row_stats import linear_row_stats
from dcpo_kernels.ops.multiply import multiply_
from dcpo_kernels.ops.row_gradient import row_gradient, row_gradient_
from dcpo_kernels.ops.row_stats import row_stats
from dcpo_kernels.ops.token_weights import token_weights

__all__ = [
    "decide",
    "finish",
    "fused",
    "fused_",
    "linear_fused",
    "linear_gather",
    "linear_gather_gradient",
    "linear_row_gradient",
    "linear_row_stats",
    "multiply_",
    "row_gradient",
    "row_gradient_",
    "row_stats",
    "token_weights",
]
