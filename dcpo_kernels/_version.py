import torch

__version__ = "0.1.0"

OLDEST_TORCH = (2, 6)  # as in pyproject.toml

if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
    raise ImportError(
        f"dcpo_kernels needs torch {'.'.join(map(str, OLDEST_TORCH))} or later; this is torch "
        f"{torch.__version__}"
    )
