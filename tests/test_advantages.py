"""Smooth advantage standardization against the golden values, step by step; what it remembers,
forgets, merges and refuses."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from conftest import load_golden

import dcpo_kernels as dk

CASES = load_golden("sas.json")["cases"]
INF, NAN = math.inf, math.nan


def flat(step):
    """{prompt: rewards} as one batch, the prompts' responses interleaved."""
    pairs = [(i, prompt, r) for prompt, rewards in step.items() for i, r in enumerate(rewards)]
    pairs.sort(key=lambda item: item[0])
    return [r for *_, r in pairs], [prompt for _, prompt, _ in pairs]


def by_prompt(advantages, prompts):
    out = {prompt: [] for prompt in prompts}
    for advantage, prompt in zip(advantages.tolist(), prompts, strict=True):
        out[prompt].append(advantage)
    return out


# ---- golden -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"ddof={c['ddof']}, {len(c['steps'])} steps")
@pytest.mark.parametrize("through_state", [False, True])
def test_golden(case, through_state, tmp_path):
    """Every advantage of every step and the final statistics; again with a new object from a saved
    state before each step."""
    sas = dk.SmoothAdvantage(case["ddof"])
    for step, expected in zip(case["steps"], case["advantages"], strict=True):
        if through_state:
            torch.save(sas.state_dict(), tmp_path / "sas.pt")
            sas = dk.SmoothAdvantage(case["ddof"])
            sas.load_state_dict(torch.load(tmp_path / "sas.pt", weights_only=True))
        rewards, prompts = flat(step)
        found = by_prompt(sas(torch.tensor(rewards, dtype=torch.float64), prompts), prompts)
        assert found.keys() == expected.keys()
        for prompt, advantages in expected.items():
            assert found[prompt] == pytest.approx(advantages, rel=1e-6, abs=1e-7), prompt
    assert len(sas) == len(case["statistics"])
    for prompt, expected in case["statistics"].items():
        found = sas.statistics(prompt)
        assert (found.visits, found.count) == (expected["visits"], expected["count"])
        assert found.mean == pytest.approx(expected["mean"], rel=1e-12)
        assert found.std == pytest.approx(expected["std"], rel=1e-12, abs=0)


def test_golden_covers_both_spreads_and_equal_rewards():
    assert {case["ddof"] for case in CASES} == {0, 1}
    assert any(s["std"] == 0 for case in CASES for s in case["statistics"].values())


# ---- against pooled rewards ---------------------------------------------------------------------


def test_statistics_are_those_of_all_rewards():
    """Merging step by step is the mean and spread of everything seen (ddof 0)."""
    sas, seen = dk.SmoothAdvantage(), {}
    draw = torch.Generator().manual_seed(1)
    for _ in range(12):
        prompts = torch.randint(5, (40,), generator=draw).tolist()
        rewards = torch.randn(40, generator=draw, dtype=torch.float64) + 100
        sas(rewards, prompts)
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            seen.setdefault(prompt, []).append(reward)
    for prompt, rewards in seen.items():
        found = sas.statistics(prompt)
        assert found.count == len(rewards)
        assert found.mean == pytest.approx(statistics.fmean(rewards), rel=1e-13)
        assert found.std == pytest.approx(statistics.pstdev(rewards), rel=1e-10)


def test_first_visit_is_plain_standardization():
    rewards, prompts = torch.tensor([1.0, 0, 0, 1, -1, -1]), ["a", "b", "a", "b", "a", "b"]
    first = dk.SmoothAdvantage()(rewards, prompts)
    assert torch.equal(first, dk.group_advantage(rewards, prompts))


def test_the_blend_nearer_to_zero_is_taken():
    """DCPO eq. 7 by hand, two visits of one prompt."""
    sas = dk.SmoothAdvantage()
    sas([0.0, 0.0, 1.0, 1.0], ["p"] * 4)
    found = sas([1.0, 1.0, 1.0, 0.0], ["p"] * 4).tolist()
    step = [(r - 0.75) / math.sqrt(3 / 16) for r in (1, 1, 1, 0)]
    total = [(r - 5 / 8) / math.sqrt(15 / 64) for r in (1, 1, 1, 0)]
    s1 = [t / 2 + n / 2 for t, n in zip(total, step, strict=True)]
    assert found == pytest.approx(s1, rel=1e-6)  # at the second visit both blends are the same
    found = sas([1.0, 0.0, 0.0, 0.0], ["p"] * 4).tolist()
    step = [(r - 0.25) / math.sqrt(3 / 16) for r in (1, 0, 0, 0)]
    total = [(r - 0.5) / 0.5 for r in (1, 0, 0, 0)]
    blends = [(t / 3 + 2 * n / 3, n / 3 + 2 * t / 3) for t, n in zip(total, step, strict=True)]
    assert found == pytest.approx([min(pair, key=abs) for pair in blends], rel=1e-6)


def test_a_group_of_equal_rewards_learns_from_its_history():
    sas = dk.SmoothAdvantage()
    sas([0.0, 1.0], ["p", "p"])
    again = sas([1.0, 1.0], ["p", "p"])
    assert (again > 0).all()
    assert torch.equal(dk.group_advantage([1.0, 1.0], ["p", "p"]), torch.zeros(2))


# ---- exactly zero -------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -0.7, 1e-300, 1e300, 123456.789, 0.0])
@pytest.mark.parametrize("ddof", [0, 1])
def test_equal_rewards_have_no_spread(reward, ddof):
    """0.1 sixteen times, and again: a sum that rounds would leave noise over noise. A list is taken
    in double precision, so that it equals the float64 tensor of another visit."""
    sas = dk.SmoothAdvantage(ddof)
    visits = count = 0
    for n in (16, 2, 3, 7, 1000):
        for rewards in (torch.full((n,), reward, dtype=torch.float64), [reward] * n):
            visits, count = visits + 1, count + n
            assert (sas(rewards, ["p"] * n) == 0).all()
            assert sas.statistics("p") == (visits, count, reward, 0.0)
            assert (dk.group_advantage(rewards, ["p"] * n, ddof=ddof) == 0).all()
            assert (dk.group_advantage(rewards, ["p"] * n, normalize=False) == 0).all()


def test_equal_rewards_beside_others():
    rewards = [0.1] * 16 + [0.1, 0.3] * 8
    prompts = ["same"] * 16 + ["other"] * 16
    sas = dk.SmoothAdvantage()
    for _ in range(3):
        advantages = sas(rewards, prompts)
        assert (advantages[:16] == 0).all() and (advantages[16:] != 0).all()
    assert sas.statistics("same").std == 0


# ---- rewards and ids ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_results_are_float32_whatever_the_rewards_are(dtype):
    for function in (dk.SmoothAdvantage(), dk.group_advantage):
        out = function(torch.tensor([1, 0, 1, 0], dtype=dtype), [7, 7, 8, 8])
        assert out.dtype == torch.float32 and out.tolist() == [1, -1, 1, -1]
        assert not out.requires_grad
    reward = torch.tensor([1.0, 0.0], requires_grad=True)
    assert not dk.SmoothAdvantage()(reward, [1, 1]).requires_grad


@pytest.mark.parametrize(
    "ids",
    [
        ["a", "a", "b"],
        (1, 1, 2),
        [("x", 1), ("x", 1), ("y", 2)],
        torch.tensor([5, 5, 6]),
        np.array([5, 5, 6]),
        np.array(["a", "a", "b"]),
    ],
    ids=lambda ids: f"{type(ids).__name__} of {type(ids[0]).__name__}",
)
def test_any_ids(ids, tmp_path):
    rewards = torch.tensor([1.0, 0.0, 1.0])
    assert dk.group_advantage(rewards, ids).tolist() == [1, -1, 0]
    sas = dk.SmoothAdvantage()
    assert sas(rewards, ids).tolist() == [1, -1, 0] and len(sas) == 2
    torch.save(sas.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = dk.SmoothAdvantage()
    again.load_state_dict(state)
    assert torch.equal(again(rewards, ids), sas(rewards, ids))


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
@pytest.mark.parametrize("ddof", [0, 1])
def test_a_broken_reward_is_refused_and_nothing_counted(broken, ddof):
    sas = dk.SmoothAdvantage(ddof)
    sas([0.0, 1.0], ["a", "a"])
    before = sas.state_dict()
    with pytest.raises(ValueError, match=rf"rewards\[3\] is {broken}, of prompt_id 'b'"):
        sas([0.0, 1.0, 1.0, broken], ["a", "a", "b", "b"])
    assert_same_state(sas.state_dict(), before)
    with pytest.raises(ValueError, match=rf"rewards\[0\] is {broken}, of group_id 3"):
        dk.group_advantage([broken], [3])


def assert_same_state(one, two):
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]) if torch.is_tensor(value) else value == two[key], key


def test_other_mistakes():
    sas = dk.SmoothAdvantage(ddof=1)
    sas([0.0, 1.0], ["a", "a"])
    before = sas.state_dict()
    for arguments, error, words in (
        (([1.0, 0.0], ["a"]), ValueError, "prompt_ids .* 1 ids for 2 rewards"),
        ((torch.zeros(2, 2), ["a", "b"]), ValueError, r"rewards must be \[R\].* \[2, 2\]"),
        (([1.0, 0.0, 1.0], ["a", "a", "b"]), ValueError, "prompt 'b' has one response.*ddof=1"),
        (([1.0], [["a"]]), TypeError, "unhashable"),
    ):
        with pytest.raises(error, match=words):
            sas(*arguments)
        assert_same_state(sas.state_dict(), before)
    with pytest.raises(KeyError):
        sas.statistics("never")
    for wrong in (2, -1, 0.5):
        with pytest.raises(ValueError, match=f"ddof={wrong} must be 0 or 1"):
            dk.SmoothAdvantage(wrong)
    with pytest.raises(ValueError, match="max_prompts=0"):
        dk.SmoothAdvantage(max_prompts=0)


def test_nothing_at_all():
    sas = dk.SmoothAdvantage(1)
    assert sas(torch.zeros(0), []).shape == (0,) and len(sas) == 0
    assert dk.group_advantage([], []).shape == (0,)
    assert_same_state(sas.state_dict(), dk.SmoothAdvantage(1).state_dict())


# ---- state --------------------------------------------------------------------------------------


def visited(ddof=0, **options):
    sas = dk.SmoothAdvantage(ddof, **options)
    sas([0.0, 1.0, 0.3, 0.4], ["a", "a", "b", "b"])
    sas([1.0, 1.0, 0.2, 0.9], ["a", "a", "c", "c"])
    return sas


def test_a_state_is_a_copy():
    sas = visited()
    state = sas.state_dict()
    kept = {key: x.clone() if torch.is_tensor(x) else x for key, x in state.items()}
    other = dk.SmoothAdvantage()
    other.load_state_dict(state)
    other([0.0, 5.0], ["a", "new"])
    sas([0.5, 0.6], ["b", "b"])
    assert_same_state(state, kept)


STATE = visited().state_dict()
REFUSED = {
    "nothing": ({}, "lacks ddof, prompt_ids, "),
    "no mean": ({k: v for k, v in STATE.items() if k != "mean"}, "lacks mean"),
    "another ddof": (STATE | {"ddof": 1}, "ddof=1, this object has ddof=0"),
    "too few visits": (STATE | {"visits": STATE["visits"][:2]}, "one entry a prompt"),
    "a prompt too many": (STATE | {"prompt_ids": [*"abcd"]}, "one entry a prompt"),
    "a prompt twice": (STATE | {"prompt_ids": [*"aab"]}, "one entry a prompt"),
    "text for numbers": (STATE | {"mean": [*"xyz"]}, ""),
    "columns of another shape": (STATE | {"mean": torch.zeros(3, 2)}, "mean"),
    "NaN": (STATE | {"mean": torch.tensor([0.0, NAN, 0.0])}, "'b'"),
    "a negative spread": (STATE | {"variance": torch.tensor([0.1, 0.1, -0.1])}, "'c'"),
    "no visit": (STATE | {"visits": torch.tensor([0, 1, 1])}, "'a'"),
    "no response": (STATE | {"count": torch.tensor([2, 2, 0])}, "'c'"),
}


@pytest.mark.parametrize("state, words", REFUSED.values(), ids=REFUSED)
def test_refused_states_change_nothing(state, words):
    sas = visited()
    sas([0.1, 0.9], ["z", "z"])
    before = sas.state_dict()
    with pytest.raises(ValueError, match=words):
        sas.load_state_dict(state)
    assert_same_state(sas.state_dict(), before)


# ---- bounded memory, several ranks --------------------------------------------------------------


def test_the_least_recently_visited_is_forgotten():
    sas = dk.SmoothAdvantage(max_prompts=2)
    sas([0.0, 1.0, 0.0, 1.0], ["a", "a", "b", "b"])
    sas([0.0, 1.0], ["a", "a"])
    sas([0.0, 1.0], ["c", "c"])
    assert sas.state_dict()["prompt_ids"] == ["a", "c"]
    with pytest.raises(KeyError):
        sas.statistics("b")
    assert sas.statistics("a").visits == 2
    sas([0.5, 1.0], ["b", "b"])
    assert sas.statistics("b") == (1, 2, 0.75, 0.25)  # as if for the first time
    # A batch with more prompts than that: all get their advantages
    out = sas([0.0, 1.0] * 3, ["x", "x", "y", "y", "z", "z"])
    assert out.tolist() == [-1, 1] * 3 and len(sas) == 2


def test_bounded_and_unbounded_agree_while_nothing_is_forgotten():
    bounded, free = dk.SmoothAdvantage(max_prompts=50), dk.SmoothAdvantage()
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        prompts = torch.randint(50, (64,), generator=draw).tolist()
        rewards = torch.randint(2, (64,), generator=draw).double()
        assert torch.equal(bounded(rewards, prompts), free(rewards, prompts))


def test_ranks_that_visited_different_prompts_merge():
    start = visited().state_dict()
    ranks = [dk.SmoothAdvantage() for _ in range(2)]
    alone = dk.SmoothAdvantage()
    for sas in (*ranks, alone):
        sas.load_state_dict(start)
    ranks[0]([0.0, 1.0], ["a", "a"])
    ranks[1]([0.0, 0.5, 1.0, 2.0], ["b", "b", "new", "new"])
    alone([0.0, 1.0, 0.0, 0.5, 1.0, 2.0], ["a", "a", "b", "b", "new", "new"])
    ranks[0].merge(ranks[1].state_dict(), start)
    for prompt in ("a", "b", "c", "new"):
        assert ranks[0].statistics(prompt) == alone.statistics(prompt)

    before = ranks[0].state_dict()
    ranks[1]([1.0, 0.0], ["a", "a"])
    with pytest.raises(ValueError, match="prompt 'a' was visited on both sides"):
        ranks[0].merge(ranks[1].state_dict(), start)
    assert_same_state(ranks[0].state_dict(), before)


# ---- group_advantage ----------------------------------------------------------------------------


@pytest.mark.parametrize("ddof", [0, 1])
def test_group_advantage(ddof):
    groups = {"a": [1.0, 0.0, 0.0, 0.5], "b": [2.0, 2.0, 2.0], "c": [0.1, 0.7], "one": [3.0]}
    rewards, ids = flat(groups)
    found = by_prompt(dk.group_advantage(torch.tensor(rewards), ids, ddof=ddof), ids)
    centred = by_prompt(dk.group_advantage(rewards, ids, normalize=False), ids)
    for name, values in groups.items():
        mean = statistics.fmean(values)
        assert centred[name] == pytest.approx([r - mean for r in values], abs=1e-7)
        if len(set(values)) == 1:
            assert found[name] == [0.0] * len(values)
            continue
        spread = (statistics.stdev if ddof else statistics.pstdev)(values)
        assert found[name] == pytest.approx([(r - mean) / spread for r in values], rel=1e-6)
