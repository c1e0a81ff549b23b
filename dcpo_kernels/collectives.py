"""What goes over torch.distributed, and the error where it does not."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

GRACE = 1.0  # seconds in which the other ranks notice a failure too


def size(name: str, group: Any) -> int:
    """Ranks of a group; None: all there are, one where there is no torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    ranks = dist.get_world_size(group)
    if ranks < 1:
        raise ValueError(f"{name} is one that rank {dist.get_rank()} is no part of")
    return ranks


def gathered(name: str, local: Tensor, group: Any) -> Tensor:
    """[ranks, ..]: the tensor of each rank, in rank order."""
    ranks = size("group", group)
    if ranks == 1 or local.numel() == 0:
        return local[None]
    of_ranks = local.new_empty(ranks * local.numel())
    # its name since torch 2.13, and before
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with named(name, group):
        all_gather(of_ranks, local.reshape(-1), group=group)
    return of_ranks.view(ranks, *local.shape)


def check_same(name: str, group: Any, device: torch.device, **numbers: int) -> None:
    """ValueError, on every rank, where these are not the same on all of them: the next collective
    would hang, or mix up memory."""
    if device.type != "cpu" and os.environ.get("DCPO_KERNELS_CHECK") != "1":
        return
    own = torch.tensor(list(numbers.values()), device=device)
    of_ranks = gathered(name, own, group).tolist()
    for what, *of_rank in zip(numbers, *of_ranks, strict=True):
        for rank, number in enumerate(of_rank):
            if number != of_rank[0]:
                raise ValueError(
                    f"{name}: {what} is {number} on rank {rank} of the group and {of_rank[0]} on "
                    "rank 0"
                )


@contextmanager
def named(name: str, group: Any) -> Iterator[None]:
    """A collective that fails says which of ours it was, on which rank, and who did not come.

    The backend names a socket. Those that it failed for write their ranks into the store, which
    costs nothing as long as nothing fails. (NCCL fails in its watchdog, past this.)
    """
    try:
        yield
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        own = dist.get_rank()
        try:
            store: Any = dist.distributed_c10d._get_default_store()
            key = f"dcpo_kernels/{name}/{hash(tuple(ranks))}"
            store.append(key, f"{own} ")
            time.sleep(GRACE)
            came = {int(rank) for rank in store.get(key).split()}
            absent = [rank for rank in ranks if rank not in came]
            who = f"rank {', '.join(map(str, absent))} did not" if absent else "all ranks did"
        except RuntimeError:  # it went down with the rank that held it
            who = "the process that held the store did not, or others"
        raise RuntimeError(
            f"{name} failed on rank {own}, one of {len(ranks)}: {who} come to it, or came with "
            f"another shape ({error})"
        ) from error
