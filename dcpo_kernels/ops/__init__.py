"""The vocabulary-sized operators, one a file: schema, fake, launch. Importing this registers them
with torch.

They take and return plain tensors and know nothing of autograd; losses.py wraps them. `backend` is
a name for `backends.choose`.
"""

from dcpo_kernels.ops.fused import fused, fused_
from dcpo_kernels.ops.row_gradient import row_gradient, row_gradient_
from dcpo_kernels.ops.row_stats import row_stats
from dcpo_kernels.ops.scale import scale_

__all__ = ["fused", "fused_", "row_gradient", "row_gradient_", "row_stats", "scale_"]
