"""What ranks do in tests/test_vocab_parallel.py, where each has some of the vocabulary: each case
runs on all of them at once, and compares what they get with what one process gets."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backends import CPU, use
from linear_cases import VOCAB, Case, rows
from parallel_cases import ALL_GATHER, case_of, counted
from problems import OBJECTIVES, problem
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

import dcpo_kernels as dk
from dcpo_kernels.collectives import gathered

CASES: dict[str, Callable[[], None]] = {}
cases = functools.partial(case_of, CASES)
PADDING = 3
CUTS = {2: (0, 14, VOCAB), 4: (0, 14, 14, 30, VOCAB)}  # of four ranks one has nothing


def own() -> slice:
    cuts, rank = CUTS[dist.get_world_size()], dist.get_rank()
    return slice(cuts[rank], cuts[rank + 1])


def shard() -> dk.VocabShard:
    return dk.VocabShard(dist.group.WORLD, own().start, own().stop - own().start)


def columns(x: Tensor, dim: int = -1, junk: float = 50.0) -> Tensor:
    """This rank's, and padding that must not win."""
    part = x.movedim(dim, -1)[..., own()]
    padded = torch.cat([part, part.new_full((*part.shape[:-1], PADDING), junk)], -1)
    return padded.movedim(-1, dim).contiguous()


def close(found: Any, wanted: Any) -> None:
    for one, two in zip(found, wanted, strict=True):
        assert (one is None) == (two is None)
        if one is not None and one.numel():
            torch.testing.assert_close(one.detach(), two.detach(), rtol=2e-5, atol=5e-6)


def same_on_all_ranks(*tensors: Tensor) -> None:
    for x in tensors:
        of_ranks = gathered("a result", x.detach().contiguous(), None)
        for other in of_ranks:
            assert torch.equal(other.nan_to_num(7), x.detach().nan_to_num(7))


def whole_gradient(mine: Tensor, like: Tensor, dim: int = -1) -> None:
    """A gradient of columns is that part of the whole, and 0 in the padding."""
    part, padding = mine.movedim(dim, -1).split([own().stop - own().start, PADDING], -1)
    torch.testing.assert_close(part, like.movedim(dim, -1)[..., own()], rtol=2e-5, atol=5e-6)
    assert (padding == 0).all()


@cases(*((name,) for name in OBJECTIVES))
def logits(name: str) -> None:
    p = problem(OBJECTIVES[name](entropy_coef=0.05), layout="padded", temperature="response")
    arguments = {**p.arguments, "with_entropy": True, "backend": "cpu"}
    leaf = p.logits.clone().requires_grad_()
    wanted = dk.policy_loss(leaf, **arguments)
    (gradient,) = torch.autograd.grad(2 * wanted.loss, leaf)
    if "old_logits" in arguments:
        arguments["old_logits"] = columns(arguments["old_logits"])
    for inplace in (False, True):
        mine = columns(p.logits).requires_grad_()
        given = mine * 1 if inplace else mine
        out = dk.policy_loss(given, **arguments, inplace=inplace, vocab_group=shard())
        close(out, wanted)
        same_on_all_ranks(*(x for x in out if x is not None and x.is_floating_point()))
        whole_gradient(torch.autograd.grad(2 * out.loss, mine)[0], gradient)


def by_hand(tokens: dk.TokenValues) -> Tensor:
    assert tokens.entropy is not None
    ratio = (tokens.logprobs - tokens.old_logprobs).exp()
    return -(ratio * tokens.advantages) - 0.1 * tokens.entropy


@cases()
def a_function_as_objective() -> None:
    arguments = {**problem(dk.dcpo()).arguments, "objective": by_hand, "with_entropy": True}
    p = problem(dk.dcpo())
    leaf, mine = p.logits.clone().requires_grad_(), columns(p.logits).requires_grad_()
    wanted = dk.policy_loss(leaf, **arguments)
    out = dk.policy_loss(mine, **arguments, vocab_group=shard())
    close(out, wanted)
    (gradient,) = torch.autograd.grad(wanted.loss, leaf)
    whole_gradient(torch.autograd.grad(out.loss, mine)[0], gradient)


@cases(("packed",), ("padded",))
def log_probabilities(layout: str) -> None:
    p = problem(dk.dcpo(), layout=layout)
    ids = torch.stack([p.arguments["target_ids"].clamp(min=0)] * 2, -1)
    ids[..., 1] = (ids[..., 1] + 11) % VOCAB
    given: dict[str, Any] = {"mask": p.counts, "temperature": 0.7, "with_entropy": True}
    for targets in (ids, ids[..., 1]):
        leaf, mine = p.logits.clone().requires_grad_(), columns(p.logits).requires_grad_()
        wanted = dk.selected_logprobs(leaf, targets, **given)
        found = dk.selected_logprobs(mine, targets, **given, vocab_group=shard())
        close(found, wanted)
        upstream = [torch.randn(x.shape) for x in wanted if x is not None]
        (gradient,) = torch.autograd.grad(wanted, leaf, upstream)
        whole_gradient(torch.autograd.grad(found, mine, upstream)[0], gradient)


@cases(("dcpo",), ("gspo",))
def sampling_replay(name: str) -> None:
    p = problem(OBJECTIVES[name](entropy_coef=0.05), layout="padded")
    target = p.arguments["target_ids"]
    kept = torch.stack([target, (target + 5) % VOCAB, (target + 20) % VOCAB, target * 0 - 1], -1)
    arguments = {**p.arguments, "kept_ids": torch.where(p.counts[..., None], kept, -1)}
    leaf, mine = p.logits.clone().requires_grad_(), columns(p.logits).requires_grad_()
    wanted = dk.policy_loss(leaf, **arguments)
    out = dk.policy_loss(mine, **arguments, vocab_group=shard())
    close(out, wanted)
    (gradient,) = torch.autograd.grad(wanted.loss, leaf)
    whole_gradient(torch.autograd.grad(out.loss, mine)[0], gradient)


@cases()
def peaked_rows_and_masked_columns() -> None:
    """A probability of 1 - 1e-7 keeps its digits, and a part of a row may be -inf."""
    rows = torch.randn(24, VOCAB)
    rows[:8, 3] += 20
    rows[8:16, 20:] = -torch.inf
    rows[16:, :16] = -torch.inf
    ids = torch.tensor([3] * 8 + [5] * 8 + [30] * 8)
    given: dict[str, Any] = {"with_entropy": True, "backend": "reference"}
    leaf = rows.double().requires_grad_()
    wanted = dk.selected_logprobs(leaf, ids, **given)
    (gradient,) = torch.autograd.grad([x.sum() for x in wanted if x is not None], leaf)
    mine = columns(rows).requires_grad_()
    found = dk.selected_logprobs(mine, ids, with_entropy=True, vocab_group=shard())
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=2e-6, atol=1e-9)
    (own_gradient,) = torch.autograd.grad([x.sum() for x in found if x is not None], mine)
    whole_gradient(own_gradient, gradient.float())


@cases(*((name,) for name in OBJECTIVES if not OBJECTIVES[name]().needs_old_logits))
def hidden_states(name: str) -> None:
    case = Case(OBJECTIVES[name](entropy_coef=0.05), layout="padded", temperature="token")
    of_kept = [{}]
    if name in ("dcpo", "gspo"):
        target = case.arguments["target_ids"]
        kept = torch.stack([target, (target + 5) % VOCAB, target * 0 - 1], -1)
        of_kept += [{"kept_ids": torch.where(case.problem.counts[..., None], kept, -1)}]
    for more in of_kept:
        for memory in (rows(5), None):
            wanted, gradients = case.run("cpu", 2.0, memory_limit=memory, **more)
            base, weight, bias = case.leaves()
            mine, own_bias = (columns(x.detach(), 0, 9.0).requires_grad_() for x in (weight, bias))
            out = dk.linear_policy_loss(
                case.problem.view(base),
                mine,
                bias=own_bias,
                memory_limit=memory,
                vocab_group=shard(),
                **case.arguments,
                **more,
            )
            close(out, wanted)
            found = torch.autograd.grad(2 * out.loss, (base, mine, own_bias))
            of_hidden = case.problem.view(found[0])
            torch.testing.assert_close(of_hidden, gradients[0], rtol=2e-5, atol=5e-6)
            same_on_all_ranks(of_hidden)
            whole_gradient(found[1], gradients[1], 0)
            whole_gradient(found[2], gradients[2], 0)


@cases(("reference",), *((name,) for name in CPU))
def every_backend(name: str) -> None:
    p = problem(dk.dcpo(entropy_coef=0.05), dtype=torch.bfloat16)
    with use(name) as backend:
        leaf, mine = p.logits.clone().requires_grad_(), columns(p.logits).requires_grad_()
        wanted = dk.policy_loss(leaf, **p.arguments, backend=backend)
        out = dk.policy_loss(mine, **p.arguments, backend=backend, vocab_group=shard())
        close(out, wanted)
        (gradient,) = torch.autograd.grad(wanted.loss, leaf)
        (found,) = torch.autograd.grad(out.loss, mine)
        width = own().stop - own().start
        torch.testing.assert_close(found[:, :width], gradient[:, own()], rtol=8e-3, atol=1e-6)


@cases()
def dtensors() -> None:
    """As tensor parallelism hands them over, cut as torch.chunk cuts."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = problem(dk.gspo())
    leaf = p.logits.clone().requires_grad_()
    wanted = dk.policy_loss(leaf, **p.arguments)
    (gradient,) = torch.autograd.grad(wanted.loss, leaf)
    mine = distribute_tensor(p.logits.clone(), mesh, [Shard(1)]).requires_grad_()
    out = dk.policy_loss(mine, **p.arguments)
    close(out, wanted)
    (found,) = torch.autograd.grad(out.loss, mine)
    torch.testing.assert_close(found.full_tensor(), gradient, rtol=2e-5, atol=5e-6)


def language_model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes, **heads)).eval()


def responses(seed: int) -> tuple[Tensor, dict[str, Any]]:
    """Token ids [3, 6] and what a loss is told of them."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (3, 7), generator=draw)
    mask = torch.arange(6) >= torch.randint(0, 3, (3, 1), generator=draw)
    old, advantages = torch.randn(2, 3, 6, generator=draw)
    given = {"target_ids": ids[:, 1:], "old_logprobs": old - 4, "advantages": advantages}
    return ids[:, :-1], {**given, "mask": mask}


@cases()
def a_head_that_fsdp2_and_tensor_parallelism_both_shard() -> None:
    """Three optimizer steps of a transformers model beside one process's."""
    ranks = dist.get_world_size()
    copies, place = ranks // 2, dist.get_rank() // 2
    mesh = init_device_mesh("cpu", (copies, 2), mesh_dim_names=("data", "vocab"))
    data, vocab = mesh["data"], mesh["vocab"]
    one, ours = language_model(), language_model()
    weight = distribute_tensor(ours.lm_head.weight.detach(), vocab, [Shard(0)])
    ours.lm_head.weight = torch.nn.Parameter(weight)
    for part in (*ours.model.layers, ours.model, ours.lm_head):
        fully_shard(part, mesh=data)
    steps = [torch.optim.AdamW(m.parameters(), 1e-2, eps=1e-3) for m in (one, ours)]
    for at in range(3):
        for other in range(copies):
            ids, given = responses(10 * at + other)
            (dk.policy_loss(one(ids).logits, **given).loss / copies).backward()
        ids, given = responses(10 * at + place)
        hidden = ours.model(ids).last_hidden_state
        group = {"vocab_group": vocab.get_group()}
        dk.linear_policy_loss(hidden, ours.lm_head.weight, **given, **group).loss.backward()
        for step in steps:
            step.step()
            step.zero_grad()
        for theirs, mine in zip(one.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(mine.full_tensor(), theirs, rtol=2e-5, atol=1e-5)


@cases()
def bytes_that_travel() -> None:
    """The table of docs/scaling.md: four floats per token at most, and on a CPU a few integers."""
    p = problem(dk.dcpo(entropy_coef=0.1))
    mine = columns(p.logits).requires_grad_()
    introduced = (ALL_GATHER, 5 * 8)
    with counted() as sent:
        dk.policy_loss(mine, **p.arguments, vocab_group=shard()).loss.backward()
    assert sent == [introduced, (ALL_GATHER, 4 * 4 * len(p.logits))]
    case = Case(dk.dcpo(), bias=False)
    base, weight, _ = case.leaves()
    mine = columns(weight.detach(), 0).requires_grad_()
    with counted() as sent:
        out = dk.linear_policy_loss(base, mine, vocab_group=shard(), **case.arguments)
        out.loss.backward()
    size = -(-base.numel() // dist.get_world_size())
    assert sent == [
        introduced,
        (ALL_GATHER, 3 * 4 * len(base)),
        ("all_to_all_single", 4 * size * dist.get_world_size()),
        (ALL_GATHER, 4 * size),
    ]


# ---- ranks that go wrong ------------------------------------------------------------------------


@cases()
def ranks_that_disagree() -> None:
    rank = dist.get_rank()
    p = problem(dk.dcpo())
    mine = columns(p.logits)
    objective = dk.dcpo() if rank else dk.grpo()
    with pytest.raises(ValueError, match=r"was called with objective=.* something else"):
        arguments = {**p.arguments, "objective": objective}
        dk.policy_loss(mine, **arguments, vocab_group=shard())
    given = dk.VocabShard(dist.group.WORLD, 0, 3)
    with pytest.raises(ValueError, match="are not one vocabulary, each id once"):
        dk.policy_loss(mine, **p.arguments, vocab_group=given)
    with pytest.raises(ValueError, match=r"VocabShard\.width=99 is not of the"):
        dk.policy_loss(mine, **p.arguments, vocab_group=dk.VocabShard(dist.group.WORLD, 0, 99))
    with pytest.raises(IndexError, match="outside the vocabulary of 37"):
        arguments = {**p.arguments, "target_ids": p.arguments["target_ids"] * 0 + VOCAB}
        dk.policy_loss(mine, **arguments, vocab_group=shard())
    if rank == 0:
        p = problem(dk.dcpo(), lengths=(6, 0, 1))
    with pytest.raises(ValueError, match="was called with tokens="):
        dk.policy_loss(columns(p.logits), **p.arguments, vocab_group=shard())


@cases()
def a_rank_that_is_killed() -> None:
    """The last case: there is one rank less."""
    p = problem(dk.grpo())
    group = dist.new_group(timeout=timedelta(seconds=2))
    given = dk.VocabShard(group, own().start, own().stop - own().start)
    dk.policy_loss(columns(p.logits), **p.arguments, vocab_group=given)
    if dist.get_rank() == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="arguments of a vocabulary over ranks failed on rank"):
        dk.policy_loss(columns(p.logits), **p.arguments, vocab_group=given)
    assert time.monotonic() - start < 30
