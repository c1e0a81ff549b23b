"""The rows of a case of `dcpo bench linear`: the bare products, plain PyTorch, ours, the peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dcpo_kernels as dk
from dcpo_kernels.bench.linear_inputs import RESPONSES, Batch, Problem, problem
from dcpo_kernels.linear import default_limit
from dcpo_kernels.ops import head as products
from dcpo_kernels.ops.records import Head

Loss = Callable[[Tensor, Tensor], Tensor]  # of hidden states and weight
# GSPO's own bounds are narrower than what 16-bit logits move the mean ratio of a response by.
GSPO = partial(dk.gspo, 0.2, 0.2)
PRODUCTS, PLAIN = "three products", "plain PyTorch"


class LinearCall:
    """A loss and its gradients, forward and backward."""

    def __init__(self, batch: Batch, loss: Loss) -> None:
        self.batch, self.loss, self.source = batch, loss, batch.hidden

    def restore(self) -> None:
        pass

    def __call__(self) -> tuple[Tensor, Tensor]:
        leaves = [x.detach().requires_grad_() for x in (self.batch.hidden, self.batch.weight)]
        of_hidden, of_weight = torch.autograd.grad(self.loss(*leaves), leaves)
        return of_hidden, of_weight


class Products:
    """The ceiling: the logits, and a matrix of their shape taken to both gradients, into memory
    that is already there."""

    def __init__(self, batch: Batch) -> None:
        self.hidden, self.weight = batch.rows, batch.weight
        self.logits = self.hidden.new_empty(len(self.hidden), len(self.weight))
        self.results = torch.empty_like(self.hidden), torch.empty_like(self.weight)
        self.source = self.hidden

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.logits, *self.results))

    def restore(self) -> None:
        pass

    def __call__(self) -> None:
        of_hidden, of_weight = self.results
        torch.mm(self.hidden, self.weight.t(), out=self.logits)
        torch.mm(self.logits, self.weight, out=of_hidden)
        torch.mm(self.logits.t(), self.hidden, out=of_weight)


@dataclass(frozen=True)
class Way:
    """A row of the table."""

    name: str
    kind: str  # "ours", "plain", "peer" or "products"
    make: Callable[[], LinearCall | Products] | None  # None: `note` says why not
    problem: Problem | None = None  # what is right; None: nothing is compared
    note: str = ""
    version: str = ""
    predicted_bytes: int | None = None  # peak memory beyond the inputs, by the rule


def ways(batch: Batch, chunks: Sequence[int], peers: Sequence[str]) -> list[Way]:
    """plain PyTorch stands before all that is compared with it."""
    own = problem(batch, dk.dcpo())
    return [
        Way(PRODUCTS, "products", lambda: Products(batch)),
        *_plain(own),
        *_ours(own, chunks),
        *(_peer(peer, batch) for peer in (CROSS_ENTROPY, *(PEERS[name] for name in peers))),
    ]


# ---- plain PyTorch ------------------------------------------------------------------------------


def _plain(of: Problem) -> list[Way]:
    batch, ids = of.batch, of.batch.target_ids

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        log_p = torch.log_softmax(F.linear(hidden, weight).float(), -1)
        return of.of_logprobs(log_p.gather(-1, ids[..., None]).squeeze(-1))

    def from_logits(hidden: Tensor, weight: Tensor) -> Tensor:
        return dk.policy_loss(F.linear(hidden, weight), ids, inplace=True, **of.arguments).loss

    return [
        Way(PLAIN, "plain", lambda: LinearCall(batch, plain), of),
        Way("F.linear, dk.policy_loss", "ours", lambda: LinearCall(batch, from_logits), of),
    ]


# ---- ours ---------------------------------------------------------------------------------------


def _ours(own: Problem, chunks: Sequence[int]) -> list[Way]:
    batch = own.batch
    default = _parts(batch, default_limit(batch.weight))
    limits = {_parts(batch, limit): limit for limit in (limit_of(batch, n) for n in chunks)}
    limits.setdefault(default, None)
    rows = []
    for parts, limit in limits.items():
        name = f"ours, {parts} chunk{'s' * (parts > 1)}{' (default)' * (parts == default)}"
        rows.append(_our_way(name, own, memory_limit=limit))
    whole = {"memory_limit": limit_of(batch, 1)}
    masked, zero = problem(batch, dk.dcpo(), masked=True), problem(batch, dk.dcpo(), zero=True)
    rows += [
        _our_way("ours, half the rows masked", masked, **whole),
        _our_way("ours, half the rows with advantage 0", zero, **whole),
        _our_way("ours, gspo", problem(batch, GSPO()), **whole),
    ]
    if batch.hidden.dtype != torch.float32:
        whole = {"memory_limit": limit_of(batch, 1, wide=True), "logits_dtype": torch.float32}
        rows.append(_our_way("ours, float32 logits", own, **whole))
    return rows


def limit_of(batch: Batch, chunks: int, wide: bool = False) -> int:
    """memory_limit for so many chunks. wide: float32 logits, and their gradient beside them."""
    size = batch.hidden.itemsize
    per_logit = 4 + size if wide and size < 4 else size
    return -(-batch.case.tokens // chunks) * batch.case.vocab * per_logit


def _parts(batch: Batch, limit: int) -> int:
    head = Head(batch.weight, None, False, limit)
    return len(products.chunks(batch.case.tokens, batch.rows, head))


def _our_way(name: str, of: Problem, **options: Any) -> Way:
    """options: memory_limit and logits_dtype of `linear_policy_loss`."""
    batch = of.batch

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        given = {**of.arguments, **options}
        return dk.linear_policy_loss(hidden, weight, batch.target_ids, **given).loss

    predicted = predicted_bytes(of, **options)
    return Way(name, "ours", lambda: LinearCall(batch, loss), of, predicted_bytes=predicted)


def predicted_bytes(
    of: Problem, memory_limit: int | None = None, logits_dtype: torch.dtype | None = None
) -> int:
    """A chunk of logits, the sum of the weight's gradient where chunks of 16 bits are added up, and
    both gradients."""
    batch = of.batch
    weight, size = batch.weight, batch.hidden.itemsize
    wide = logits_dtype == torch.float32 and size < 4
    head = Head(weight, None, wide, memory_limit or default_limit(weight))
    parts = products.chunks(int(of.mask.sum()), batch.rows, head)
    most = max(part.stop - part.start for part in parts)
    logits = most * len(weight) * (4 + size if wide else size)
    few = 2 if weight.device.type == "cpu" else 1  # need no float32 beside them
    sums = 4 * weight.numel() if len(parts) > few and size < 4 else 0
    return logits + sums + batch.hidden.nbytes + weight.nbytes


# ---- peers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearPeer:
    name: str
    distribution: str  # as pip knows it
    objective: Callable[[], dk.Objective] | None  # None: it has the cross entropy alone
    loss: Callable[[Problem], Loss]  # imports it
    note: str = ""


def _peer(peer: LinearPeer, batch: Batch) -> Way:
    of = problem(batch, peer.objective() if peer.objective else None)
    try:
        version = metadata.version(peer.distribution)
    except metadata.PackageNotFoundError:
        why = f"not installed (pip install {peer.distribution})"
        return Way(peer.name, "peer", None, note=why)
    try:
        loss = peer.loss(of)
    except (ImportError, AttributeError) as error:
        return Way(peer.name, "peer", None, note=f"can't be imported: {error}", version=version)
    return Way(peer.name, "peer", lambda: LinearCall(batch, loss), of, peer.note, version)


def _torch(of: Problem) -> Loss:
    # Its own choice is a power of 2 of rows, so few that it takes ten times as long.
    size = -(-of.batch.case.tokens // 2)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=size)
    ids = of.batch.target_ids.flatten()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden.flatten(0, 1), weight, ids, options=options)

    return loss


def _trl(of: Problem) -> Loss:
    """What the model that add_fused_lm_head has patched does behind its backbone."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    ids = of.batch.target_ids
    rest = (None, ids.flatten(), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logprobs, *_ = ChunkedLogProbFunction.apply(hidden.flatten(0, 1), weight, *rest)
        return of.of_logprobs(logprobs.view(ids.shape))

    return loss


def _verl(of: Problem) -> Loss:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    head = FusedLinearForPPO()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logprobs, _ = head(hidden, weight, of.batch.target_ids)
        return of.of_logprobs(logprobs)

    return loss


def _liger(of: Problem) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    assert of.objective is not None
    # Nothing to gain from compiling a few operations per token. By default a chunk is a response,
    # and adds to the whole gradient of the weight.
    head = LigerFusedLinearGRPOLoss(
        chunk_size=RESPONSES // 2,
        beta=0.0,
        use_ref_model=False,
        compiled=False,
        epsilon_low=of.objective.eps_low,
        epsilon_high=of.objective.eps_high,
        loss_type="dapo",
    )

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        given = {"old_per_token_logps": of.batch.old_logprobs}
        mask = of.mask.float()
        return head(hidden, weight, of.batch.target_ids, mask, of.advantages, **given)[0]

    return loss


CROSS_ENTROPY = LinearPeer(
    "linear_cross_entropy, torch", "torch", None, _torch, "in 2 chunks; no policy loss"
)
PEERS = {
    peer.name: peer
    for peer in (
        LinearPeer("trl", "trl", dk.dcpo, _trl, "its log-probs, our loss in PyTorch"),
        LinearPeer(
            "verl", "verl", dk.dcpo, _verl, "its log-probs and entropy, our loss in PyTorch"
        ),
        LinearPeer("liger", "liger-kernel", dk.dapo, _liger, "its DAPO loss, in 2 chunks"),
    )
}
