# The compiled module, for type checkers. csrc/cpu/bind.cpp and csrc/cuda/bind.cpp have the rest.
from typing import Any

def __getattr__(name: str) -> Any: ...
