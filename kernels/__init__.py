"""Triton kernels. Imported as dcpo_kernels.kernels, and only by dcpo_kernels/backends/triton.py."""
