"""A head whose weight is sharded over ranks, as FSDP2 leaves it."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import dcpo_kernels as dk

VOCAB, WIDTH, TOKENS = 53, 16, 12


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids):
        return torch.tanh(self.layer(self.embedding(ids)))


def data(rank):
    """Of one rank: ids, targets, old log-probs, advantages."""
    draw = torch.Generator().manual_seed(rank)
    ids, targets = torch.randint(0, VOCAB, (2, TOKENS), generator=draw)
    old, advantages = torch.randn(2, TOKENS, generator=draw)
    return ids, targets, old - 4, advantages


def rank_of(rank, world, port):
    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(
        "gloo", where, rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = Model(), init_device_mesh("cpu", (world,))
    for part in (model.layer, model.head, model):
        fully_shard(part, mesh=mesh)
    ids, *rest = data(rank)
    head = model.head
    assert type(head.weight).__name__ == "DTensor"
    options = {"bias": head.bias, "lengths": [5, 7], "memory_limit": 4 * VOCAB * 4}
    dk.linear_policy_loss(model(ids), head.weight, *rest, **options).loss.backward()

    one = Model()  # that sees what all ranks do
    for other in range(world):
        ids, *rest = data(other)
        loss = dk.policy_loss(one.head(one(ids)), *rest, lengths=[5, 7]).loss
        (loss / world).backward()
    for (name, ours), theirs in zip(model.named_parameters(), one.parameters(), strict=True):
        gradient = ours.grad.full_tensor()
        torch.testing.assert_close(gradient, theirs.grad, msg=lambda m, name=name: f"{name}: {m}")
    dist.destroy_process_group()


def test_a_sharded_weight_is_gathered_and_its_gradient_averaged():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_of, args=(2, port), nprocs=2)
