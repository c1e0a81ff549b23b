"""Batches and sequences over ranks: gloo, on one machine. `make check-parallel` has 4 of them."""

from __future__ import annotations

import os

import parallel_cases
import pytest
import ranks
import torch

import dcpo_kernels as dk

RANKS = int(os.environ.get("RANKS", "2"))
pytestmark = pytest.mark.xdist_group("parallel")  # one worker starts the ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return ranks.run("parallel_cases", RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", parallel_cases.CASES)
def test_ranks_are_one_process(results, case):
    of_ranks = results.get(case, {})
    expected = dict.fromkeys(range(RANKS), "")
    if case == "a rank that is killed":
        expected[RANKS - 1] = f"rank {RANKS - 1} ended in it"
    assert of_ranks == expected, "\n".join(filter(None, of_ranks.values())) or "it did not run"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_process_alone_needs_no_group(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    totals = dk.global_normalizers([3, 0, 2], device=device)
    assert totals == (2, 5, 1) and totals.num_tokens.device.type == device
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]], device=device)
    assert dk.global_normalizers(mask, async_op=True).wait() == (1, 2, 1)
    assert dk.whole_responses(mask).response_lengths.tolist() == [2, 0]
    whole = dk.whole_responses(
        torch.tensor([2, 0, 2], device=device),
        mask=torch.tensor([1, 1, 0, 1], device=device),
        objective=dk.gspo(),
        logprobs=torch.tensor([1.0, 2.0, torch.nan, 5.0], device=device),
        old_logprobs=torch.tensor([0.0, 0.5, 3.0, 1.0], device=device),
    )
    assert whole.response_lengths.tolist() == [2, 0, 1]
    assert whole.response_log_ratio is not None
    assert whole.response_log_ratio.tolist() == [1.25, 0.0, 4.0]
    # lengths that are a list, and values per response
    logprobs = torch.tensor([1.0, 2.0, -3.0], device=device)
    given = {"logprobs": logprobs, "old_logprobs": torch.zeros_like(logprobs)}
    given["advantages"] = torch.tensor([[1.0], [1.0], [-1.0]], device=device)
    clipped = dk.whole_responses([2, 0, 1], objective=dk.gmpo(1.0, 1.5), **given)
    assert clipped.response_lengths.tolist() == [2, 0, 1]
    assert clipped.response_log_ratio is not None
    assert clipped.response_log_ratio.tolist() == [1.25, 0.0, -1.0]


# ---- layouts ------------------------------------------------------------------------------------


def test_zigzag_is_that_of_torch():
    torch_has = pytest.importorskip(
        "torch.distributed.tensor.experimental._context_parallel._load_balancer"
    )
    for world in (1, 2, 4):
        ours = [dk.context_rows([48], "zigzag", rank=r, world=world) for r in range(world)]
        theirs = torch_has._HeadTailLoadBalancer(48, world, "cpu")._generate_indices()
        assert torch.equal(torch.cat([here.rows for here in ours]), theirs[0].long())
        lengths = [16, 8, 0, 24]
        ours = [dk.context_rows(lengths, "zigzag", rank=r, world=world) for r in range(world)]
        theirs = torch_has._PerDocumentHeadTailLoadBalancer([lengths], world, "cpu")
        rows = theirs._generate_indices()[0]  # document after document, rank after rank
        documents = rows.split(lengths)
        for rank, here in enumerate(ours):
            parts = [part.chunk(world)[rank] if len(part) else part for part in documents]
            assert torch.equal(here.rows, torch.cat(parts))
            assert here.mask.all() and here.lengths.tolist() == [len(part) for part in parts]


def test_padding_is_that_of_slime():
    """A sequence of 5 in 4 chunks of 2; a batch of 8 rows over 3 ranks, 3 each."""
    here = [dk.context_rows([5, 3], "zigzag", rank=r, world=2) for r in range(2)]
    assert [x.rows.tolist() for x in here] == [[0, 1, -1, -1, 5, -1], [2, 3, 4, -1, 6, 7]]
    assert [x.lengths.tolist() for x in here] == [[4, 2], [4, 2]]
    here = [dk.context_rows([5, 0, 3], "contiguous", rank=r, world=3) for r in range(3)]
    assert [x.rows.tolist() for x in here] == [[0, 1, 2], [3, 4, 5], [6, 7, -1]]
    assert [x.lengths.tolist() for x in here] == [[3, 0, 0], [2, 0, 1], [0, 0, 3]]
    for layout in ("contiguous", "zigzag"):
        x = dk.context_rows([5, 3], layout, rank=1, world=2, multiple=8)
        assert len(x.rows) == len(x.mask) == x.lengths.sum() == 8
        assert torch.equal(x.mask, x.rows >= 0)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("lengths", [[], [0], [1], [7, 0, 2, 13], [0, 4, 0]])
def test_every_row_is_on_one_rank(layout, lengths):
    for world in (1, 2, 3, 8):
        here = [
            dk.context_rows(lengths, layout, rank=r, world=world, multiple=2) for r in range(world)
        ]
        assert len({len(x.rows) for x in here}) == 1
        rows = torch.cat([x.rows[x.mask] for x in here])
        assert torch.equal(rows.sort().values, torch.arange(sum(lengths)))
        for x in here:  # they belong to the sequence that they are counted with
            owner = torch.arange(len(lengths)).repeat_interleave(x.lengths)
            whole = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths).long())
            assert len(owner) == len(x.rows)
            assert torch.equal(owner[x.mask], whole[x.rows[x.mask]])


MISTAKES = {
    "layout": (lambda: dk.context_rows([1], "striped", rank=0, world=2), "layout='striped'"),
    "rank": (lambda: dk.context_rows([1], "zigzag", rank=2, world=2), r"rank=2 must be in 0\.\.1"),
    "lengths": (lambda: dk.global_normalizers(torch.ones(3)), "lengths must be integers"),
    "mask": (lambda: dk.global_normalizers([2, 2], mask=torch.ones(3)), "add up to 4, but there"),
    "two masks": (
        lambda: dk.global_normalizers(torch.ones(2, 3), mask=torch.ones(2, 3)),
        "is a mask already",
    ),
    "context": (
        lambda: dk.global_normalizers([1], context_group=object()),  # pyright: ignore
        "pass group too",
    ),
    "logprobs": (lambda: dk.whole_responses([1], objective=dk.gspo()), "logprobs is missing"),
    "advantages": (
        lambda: dk.whole_responses([1], objective=dk.gmpo(), logprobs=torch.zeros(1)),
        "advantages is missing",
    ),
    "rows": (
        lambda: dk.whole_responses([2], objective=dk.gspo(), logprobs=torch.zeros(1)),
        "lengths add up to 2, but there are 1 rows",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case):
    call, words = MISTAKES[case]
    with pytest.raises(ValueError, match=words):
        call()
