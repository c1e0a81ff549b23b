"""What ranks do in tests/test_parallel.py: each case runs on all of them at once, and compares what
they get together with what one process gets."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from problems import OBJECTIVES, problem
from torch import Tensor, nn

import dcpo_kernels as dk
from dcpo_kernels import collectives
from dcpo_kernels.objective import AGGREGATIONS, WHOLE_RESPONSE

LENGTHS = (6, 0, 1, 9, 8)  # of 4 ranks one has nothing but the response without tokens
VOCAB, WIDTH, IDS = 37, 8, 16
LAYOUTS = ("packed", "padded")
CUTS = ("contiguous", "zigzag")
NAMES = {**OBJECTIVES, "luspo": dk.luspo}
SOME = ("dcpo", "gspo", "dppo-topk_kl")
# policy_loss takes parts of a response where its log-ratio is all there is to know of the others.
CUTTABLE = [name for name in NAMES if NAMES[name]().surrogate not in WHOLE_RESPONSE]

CASES: dict[str, Callable[[], None]] = {}


def cases(*settings: Any):
    """The function is a case, or one for each of these."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        for given in settings or [()]:
            name = " ".join([function.__name__.replace("_", " "), *given])
            CASES[name] = functools.partial(function, *given)
        return function

    return add


# ---- a model, a batch, and what a rank has of it ------------------------------------------------


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(IDS, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.layer(self.embedding(ids)))
        return hidden, self.head(hidden)


class Share(NamedTuple):
    """How what is there of a batch becomes what a rank has of it."""

    of_tokens: Callable[[Tensor], Tensor]
    of_responses: Callable[[Tensor], Tensor]
    grouping: dict[str, Tensor]  # where it is not made by these


class Batch(NamedTuple):
    ids: Tensor  # [N] or [B, T], the model's input
    base: Tensor  # [.., V]; logits are base + the model's, so that ratios are those of the problem
    arguments: dict[str, Any]  # of policy_loss

    def loss(self, model: nn.Module, linear: bool = False, **options: Any) -> dk.PolicyLoss:
        arguments = {**self.arguments, **options}
        hidden, logits = model(self.ids)
        if not linear:
            return dk.policy_loss(self.base + logits, **arguments)
        hidden = torch.cat([hidden, self.base], -1)  # the same logits, as one product
        weight = torch.cat([getattr(model, "module", model).head.weight, torch.eye(VOCAB)], 1)
        return dk.linear_policy_loss(hidden, weight, **arguments)

    def share(self, share: Share) -> Batch:
        rows = self.ids.shape
        arguments = {
            key: (share.of_tokens if x.shape[: len(rows)] == rows else share.of_responses)(x)
            if torch.is_tensor(x)
            else x
            for key, x in self.arguments.items()
        }
        base = share.of_tokens(self.base)
        return Batch(share.of_tokens(self.ids), base, {**arguments, **share.grouping})

    @property
    def grouping(self) -> dict[str, Tensor]:
        """What the helpers are told of it."""
        mask, lengths = (self.arguments.get(key) for key in ("mask", "lengths"))
        given = {"lengths_or_mask": lengths, "mask": mask}
        return {"lengths_or_mask": mask} if lengths is None else given

    def dealt(self, rank: int, ranks: int) -> Share:
        """The responses of one rank."""
        of_responses = lambda x: x[rank::ranks]  # noqa: E731
        lengths = self.arguments.get("lengths")
        if lengths is None:
            return Share(of_responses, of_responses, {})
        index = torch.arange(len(lengths)).repeat_interleave(lengths)
        return Share(lambda x: x[index % ranks == rank], of_responses, {})

    def cut(self, layout: str, rank: int, ranks: int) -> Share:
        """One rank's part of every response."""
        mask, lengths = (self.arguments.get(key) for key in ("mask", "lengths"))
        given = [mask.shape[1]] if lengths is None else lengths
        here = dk.context_rows(given, layout, rank=rank, world=ranks, multiple=5)
        if lengths is None:
            mask = mask[:, here.rows] & here.mask
            return Share(lambda x: x[:, here.rows], lambda x: x, {"mask": mask})
        grouping = {"mask": here.mask, "lengths": here.lengths}
        return Share(lambda x: x[here.rows], lambda x: x, grouping)


@functools.cache
def batch_of(name: str, aggregation: str, layout: str, seed: int = 0) -> Batch:
    p = problem(
        NAMES[name](aggregation=aggregation),
        layout=layout,
        lengths=LENGTHS,
        vocab=VOCAB,
        advantages="response",
        seed=seed,
    )
    rows = p.logits.shape[:-1]
    base = torch.where(p.counts[..., None], p.logits, 0.0)
    return Batch(torch.arange(rows.numel()).view(rows) % IDS, base, p.arguments)


def gradient_of(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@functools.cache
def of_one_process(name: str, aggregation: str, layout: str) -> tuple[dk.PolicyLoss, Tensor]:
    """The loss of the whole batch, and its gradient in every parameter."""
    model = Policy()
    out = batch_of(name, aggregation, layout).loss(model)
    out.loss.backward()
    return out, gradient_of(model)


def where() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)


def assert_one_process(
    out: dk.PolicyLoss,
    model: nn.Module,
    scale: int,
    share: Share,
    expected: tuple[dk.PolicyLoss, Tensor],
) -> None:
    """The losses add up, and gradients that are averaged are those of one process."""
    (out.loss * scale).backward()
    found = torch.cat([out.loss.detach()[None], gradient_of(model) / dist.get_world_size()])
    dist.all_reduce(found)
    whole, gradient = expected
    close(found[0], whole.loss.detach())
    close(found[1:], gradient)
    counts = out.mask.to(out.token_loss.dtype)
    close(out.token_loss, share.of_tokens(whole.token_loss) * counts)


def totals_of(totals: dk.Normalizers) -> dict[str, Tensor]:
    return {"num_responses": totals.num_responses, "num_tokens": totals.num_tokens}


# ---- batches over ranks -------------------------------------------------------------------------


@cases(*((aggregation, layout) for aggregation in AGGREGATIONS for layout in LAYOUTS))
def batches(aggregation: str, layout: str) -> None:
    rank, ranks = where()
    for i, name in enumerate(NAMES):
        batch = batch_of(name, aggregation, layout)
        share = batch.dealt(rank, ranks)
        mine, model = batch.share(share), Policy()
        totals = dk.global_normalizers(**mine.grouping)
        assert totals == (4, sum(LENGTHS), ranks)
        out = mine.loss(model, i % 2 == 1, **totals_of(totals), loss_scale=totals.scale)
        expected = of_one_process(name, aggregation, layout)
        assert_one_process(out, model, totals.scale, share, expected)


@cases(("dcpo", "packed"), ("grpo", "padded"), ("gspo", "packed"))
def micro_batches(name: str, layout: str) -> None:
    """One collective for a step of several, on its way during the first forward pass."""
    rank, ranks = where()
    whole = batch_of(name, "seq-mean-token-mean", layout)
    mine = whole.share(whole.dealt(rank, ranks))
    parts = [mine.share(mine.dealt(i, 2)) for i in range(2)]
    given = {
        key: None if values[0] is None else list(values)
        for key in mine.grouping
        if (values := [part.grouping[key] for part in parts])
    }
    with counted() as traffic:
        pending = dk.global_normalizers(**given, async_op=True)
    assert traffic == [("all_reduce", 16)]
    model, losses = Policy(), []
    for part in parts:
        totals = pending.wait()
        assert totals == (4, sum(LENGTHS), ranks)
        losses.append(part.loss(model, **totals_of(totals)).loss)
        (losses[-1] * totals.scale).backward()
    found = torch.cat([sum(losses).detach()[None], gradient_of(model) / ranks])
    dist.all_reduce(found)
    out, gradient = of_one_process(name, "seq-mean-token-mean", layout)
    close(found, torch.cat([out.loss.detach()[None], gradient]))


@cases()
def counts_of_a_batch() -> None:
    rank, ranks = where()
    lengths, mask = [3, 0, 2], torch.tensor([1, 0, 1, 0, 0])
    assert dk.global_normalizers(lengths) == (2 * ranks, 5 * ranks, ranks)
    assert dk.global_normalizers(lengths, mask=mask) == (ranks, 2 * ranks, ranks)
    assert dk.global_normalizers(lengths, mask=mask[None]) == (ranks, 2 * ranks, ranks)
    assert dk.global_normalizers([lengths, [1]]) == (3 * ranks, 6 * ranks, ranks)
    assert dk.global_normalizers(lengths, averaged=False).scale == 1
    own, _ = groups(1)
    assert dk.global_normalizers(lengths, group=own) == (2, 5, 1)
    # Ranks without responses come too, and a batch without any token has a loss of 0.
    assert dk.global_normalizers([4] if rank == 0 else []) == (1, 4, ranks)
    nothing = dk.global_normalizers([0, 0])
    assert nothing[:2] == (1, 1)
    batch = batch_of("grpo", "token-mean", "padded")
    empty = torch.zeros_like(batch.arguments["mask"])
    assert batch.loss(Policy(), mask=empty, **totals_of(nothing)).loss == 0


def steps(name: str, layout: str, wrap: Callable[[nn.Module], nn.Module], linear: bool) -> None:
    """Three steps of an optimizer, beside one process's."""
    rank, ranks = where()
    one, model = Policy(), Policy()
    model = wrap(model)
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=0.02, eps=1e-3) for m in (one, model)
    ]  # eps: a gradient of rounding errors is no step
    for seed in range(3):
        batch = batch_of(name, "seq-mean-token-mean", layout, seed)
        mine = batch.share(batch.dealt(rank, ranks))
        totals = dk.global_normalizers(**mine.grouping)
        batch.loss(one).loss.backward()
        (mine.loss(model, linear, **totals_of(totals)).loss * totals.scale).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), one.parameters(), strict=True):
        ours = ours.full_tensor() if hasattr(ours, "full_tensor") else ours
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=5e-6)
    assert (torch.cat([p.flatten() for p in one.parameters()]) != start()).float().mean() > 0.9


def start() -> Tensor:
    return torch.cat([p.flatten() for p in Policy().parameters()])


@cases(("dcpo", "packed"), ("gspo", "padded"))
def under_ddp(name: str, layout: str) -> None:
    steps(name, layout, nn.parallel.DistributedDataParallel, linear=False)


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model.layer, model):
        fully_shard(part, mesh=mesh)
    return model


@cases(("dcpo", "packed"), ("gspo", "padded"))
def under_fsdp2(name: str, layout: str) -> None:
    steps(name, layout, sharded, linear=False)


@cases()
def under_fsdp2_from_hidden_states() -> None:
    """The head's weight is a DTensor, whose gradient is averaged like the others."""
    rank, ranks = where()
    one, model = Policy(), sharded(Policy())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.02, eps=1e-3) for m in (one, model)]
    for seed in range(3):
        batch = batch_of("grpo", "token-mean", "packed", seed)
        mine = batch.share(batch.dealt(rank, ranks))
        totals = dk.global_normalizers(**mine.grouping)
        dk.policy_loss(one(batch.ids)[1], **batch.arguments).loss.backward()
        hidden, _ = model(mine.ids)
        out = dk.linear_policy_loss(
            hidden, model.head.weight, **mine.arguments, **totals_of(totals)
        )
        (out.loss * totals.scale).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs, rtol=2e-5, atol=5e-6)


# ---- sequences over ranks -----------------------------------------------------------------------


def whole_of(mine: Batch, group: Any = None) -> dk.WholeResponses:
    """Log-probabilities beforehand, where they are wanted."""
    objective, given = mine.arguments["objective"], {}
    if objective.by_response:
        with torch.no_grad():
            logits = mine.base + Policy()(mine.ids)[1]
        ids, mask = mine.arguments["target_ids"], mine.arguments.get("mask")
        given["logprobs"], _ = dk.selected_logprobs(logits, ids, mask=mask)
        given |= {key: mine.arguments[key] for key in ("old_logprobs", "advantages")}
    return dk.whole_responses(**mine.grouping, objective=objective, group=group, **given)


@cases(*((cut, layout, a) for cut in CUTS for layout in LAYOUTS for a in AGGREGATIONS))
def sequences(cut: str, layout: str, aggregation: str) -> None:
    rank, ranks = where()
    for i, name in enumerate(CUTTABLE):
        batch, model = batch_of(name, aggregation, layout), Policy()
        share = batch.cut(cut, rank, ranks)
        mine = batch.share(share)
        whole = whole_of(mine)
        assert whole.response_lengths.tolist() == list(LENGTHS)
        out = mine.loss(model, linear=i % 2 == 1, **whole._asdict())
        expected = of_one_process(name, aggregation, layout)
        assert_one_process(out, model, ranks, share, expected)


@cases(*((cut, layout) for cut in CUTS for layout in LAYOUTS))
def ratios_of_whole_responses(cut: str, layout: str) -> None:
    """Also of the objectives that add up something else, from values per token and response."""
    rank, ranks = where()
    for name in ("gspo", "luspo", "gmpo", "vespo"):
        batch = batch_of(name, "token-mean", layout)
        out, _ = of_one_process(name, "token-mean", layout)
        whole = whole_of(batch.share(batch.cut(cut, rank, ranks)))
        assert whole.response_log_ratio is not None
        ratio = whole.response_log_ratio.clamp(-20, 20).exp()
        at = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
        ratios = out.ratio[out.mask]
        for i, n in enumerate(LENGTHS):
            if n:
                torch.testing.assert_close(ratio[i], ratios[at[i]], rtol=1e-5, atol=1e-6)
            else:
                assert ratio[i] == 1


@cases()
def the_same_bits_on_all_ranks() -> None:
    """Parts are added in rank order, whatever a backend's reduction does."""
    rank, ranks = where()
    draw = torch.Generator().manual_seed(rank)
    logprobs, mask = torch.randn(2, 64, 33, generator=draw)
    mask = mask > -0.5
    # One for which another order is another number, as soon as there are three ranks.
    logprobs[0], mask[0, 0] = 0, True
    logprobs[0, 0] = (1e20, -1e20, 1.0, 2.0)[rank]
    given = {"objective": dk.gspo(), "old_logprobs": torch.zeros(64, 33)}
    found = [dk.whole_responses(mask, logprobs=logprobs, **given) for _ in range(2)]
    parts = torch.where(mask, logprobs, 0.0).double().sum(1)
    of_ranks: list[Any] = [None] * ranks
    dist.all_gather_object(of_ranks, (found, parts, mask.sum(1)))
    in_order, lengths = torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.int64)
    for _, of_rank, counts in of_ranks:
        in_order, lengths = in_order + of_rank, lengths + counts
    expected = (in_order / lengths).float()
    for both, *_ in of_ranks:
        for whole in both:
            assert torch.equal(whole.response_log_ratio, expected)
            assert torch.equal(whole.response_lengths, lengths)


def groups(size: int) -> tuple[Any, Any]:
    """This rank's of the groups of `size` neighbours, and of those across them."""
    rank, ranks = where()
    own: list[Any] = [None, None]
    blocks = [list(range(first, first + size)) for first in range(0, ranks, size)]
    across = [list(range(first, ranks, size)) for first in range(size)]
    for i, members in enumerate((blocks, across)):
        for members_of in members:
            group = dist.new_group(members_of)
            if rank in members_of:
                own[i] = group
    return own[0], own[1]


@cases(("dcpo", "token-mean"), ("gspo", "seq-mean-token-mean"), ("dcpo", "only-token-mean"))
def batches_and_sequences(name: str, aggregation: str) -> None:
    """Both at once: pairs of ranks share responses, and averages go over all ranks."""
    rank, ranks = where()
    pair, across = groups(2)
    batch, model = batch_of(name, aggregation, "packed"), Policy()
    dealt = batch.dealt(rank // 2, ranks // 2)
    its = batch.share(dealt)
    cut = its.cut("zigzag", rank % 2, 2)
    mine = its.share(cut)
    whole = whole_of(mine, pair)
    totals = dk.global_normalizers(whole.response_lengths, group=across, context_group=pair)
    assert totals == (4, sum(LENGTHS), ranks)
    out = mine.loss(model, **whole._asdict(), **totals_of(totals))
    share = Share(lambda x: cut.of_tokens(dealt.of_tokens(x)), lambda x: x, {})
    expected = of_one_process(name, aggregation, "packed")
    assert_one_process(out, model, totals.scale, share, expected)


# ---- what travels -------------------------------------------------------------------------------

# its name since torch 2.13, and before
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """The collectives that are called, and the bytes that this rank puts in."""
    messages: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, place in (("all_reduce", 0), (ALL_GATHER, 1)):

            def call(run, name, place, *args, **options):
                messages.append((name, args[place].numel() * args[place].element_size()))
                return run(*args, **options)

            run = getattr(dist, name)
            patch.setattr(dist, name, functools.partial(call, run, name, place))
        yield messages


@cases()
def bytes_that_travel() -> None:
    """The table of docs/scaling.md."""
    lengths, values = [3, 4, 0, 2, 9], torch.zeros(18)
    gspo = {"objective": dk.gspo(), "logprobs": values, "old_logprobs": values}
    with counted() as messages:
        dk.global_normalizers(lengths)
    assert messages == [("all_reduce", 16)]
    with counted() as messages:
        dk.whole_responses(lengths)
    assert messages == [(ALL_GATHER, n) for n in (16, 8 * len(lengths))]
    with counted() as messages:
        dk.whole_responses(lengths, **gspo)
    assert messages == [(ALL_GATHER, n) for n in (16, 16 * len(lengths))]
    with counted() as messages:
        batch = batch_of("gspo", "token-mean", "packed")
        batch.loss(Policy(), num_responses=torch.tensor(9), num_tokens=torch.tensor(99))
    assert messages == []


# ---- a rank that goes wrong ---------------------------------------------------------------------


@cases()
def ranks_that_disagree() -> None:
    rank, _ = where()
    with pytest.raises(ValueError, match="responses is 4 on rank 1 of the group and 3 on rank 0"):
        dk.whole_responses([2] * (3 + (rank == 1)))
    objective = dk.gspo() if rank == 0 else dk.dcpo()
    with pytest.raises(ValueError, match="surrogate is -1 on rank 1 of the group and 0 on rank 0"):
        dk.whole_responses([2], objective=objective, logprobs=torch.zeros(2))


@contextmanager
def failing(words: str, within: float) -> Iterator[None]:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=words):
        yield
    assert time.monotonic() - start < within


def impatient() -> Any:
    return dist.new_group(timeout=timedelta(seconds=1))


@cases()
def a_rank_that_does_not_come() -> None:
    """As one that raised, and caught it, does not."""
    rank, ranks = where()
    group = impatient()
    if rank != ranks - 1:
        words = f"global_normalizers failed on rank {rank}, .*: rank {ranks - 1} did not come"
        with failing(words, within=1 + collectives.GRACE + 5):
            dk.global_normalizers([1], group=group)
    dist.barrier()


@cases()
def a_rank_that_is_killed() -> None:
    """The last case: there is one rank less."""
    rank, ranks = where()
    if rank == ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with failing(f"rank {ranks - 1} did not come to it", within=collectives.GRACE + 20):
        dk.global_normalizers([1])
