"""Run from outside the checkout: is the installed package whole, do its kernels compute?"""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import dcpo_kernels as dk

assert Path(dk.__file__).is_relative_to(sys.prefix), f"{dk.__file__} is not the installed package"
top_level = metadata.distribution("dcpo-kernels").read_text("top_level.txt")
assert top_level == "dcpo_kernels\n", f"installs {top_level}"
assert Path(dk.__file__).with_name("py.typed").is_file(), "type checkers would ignore the package"

torch.manual_seed(0)
logits = torch.randn(6, 1003, dtype=torch.float32)
target_ids = torch.randint(1003, (6,))
gradients = []
for backend in ("cpu", "reference"):
    x = logits.clone().requires_grad_()
    out = dk.policy_loss(
        x,
        target_ids,
        old_logprobs=torch.full((6,), -7.0),
        advantages=torch.tensor([1.0, -1.0]),
        lengths=torch.tensor([4, 2]),
        backend=backend,
    )
    out.loss.backward()
    gradients.append(x.grad)
torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
assert gradients[0].abs().max() > 0

dcpo = Path(sys.executable).with_name("dcpo")
info = json.loads(subprocess.check_output([dcpo, "info", "--json"]))
assert info["compiled"]["present"] and info["versions"]["torch"] == torch.__version__
cuda = " ".join(info["compiled"]["cuda_archs"]) or "none"
print(f"works: torch {torch.__version__}, {info['cpu']['isa']}, CUDA {cuda}")
