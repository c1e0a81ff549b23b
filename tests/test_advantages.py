"""Smooth advantage standardization against the golden values, step by step; what it remembers,
forgets, merges and refuses."""

from __future__ import annotations

import enum
import math
import statistics
import uuid

import golden
import numpy as np
import pytest
import torch

import dcpo_kernels as dk

CASES = golden.load("sas.json")["cases"]
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


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool],
)
def test_results_are_float32_whatever_the_rewards_are(dtype):
    for function in (dk.SmoothAdvantage(), dk.group_advantage):
        out = function(torch.tensor([1, 0, 1, 0], dtype=dtype), [7, 7, 8, 8])
        assert out.dtype == torch.float32 and out.tolist() == [1, -1, 1, -1]
        assert not out.requires_grad
    reward = torch.tensor([1.0, 0.0], requires_grad=True)
    assert not dk.SmoothAdvantage()(reward, [1, 1]).requires_grad


IDS = {
    "strings": ["a", "a", "b"],
    "a tuple of numbers": (1, 1, 2),
    "numbers of any size": [2**100, 2**100, -(2**63)],
    "floats": [0.5, 0.5, 1.5],
    "bools and None": [True, True, None],
    "bytes": [b"\xff", b"\xff", b"a"],
    "tuples": [("x", (1, None)), ("x", (1, None)), ()],
    "a tensor": torch.tensor([5, 5, 6]),
    "a tensor of floats": torch.tensor([5.0, 5, 6]),
    "an array": np.array([5, 5, 6]),
    "an array of strings": np.array(["a", "a", "b"]),
    "an array of objects": np.array(["a", "a", 1], dtype=object),
    "tensors": [torch.tensor(5), torch.tensor(5), torch.tensor(6)],
    "tensors [1]": list(torch.tensor([[5], [5], [6]])),
    "scalars of numpy": list(np.array([5, 5, 6], dtype=np.uint16)),
    "strings of numpy": list(np.array(["a", "a", "b"])),
    "a tensor's elements in tuples": [("x", i) for i in torch.tensor([5, 5, 6])],
    "numpy's scalars in tuples": [(i, "x") for i in np.array([5, 5, 6])],
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_any_ids(ids, tmp_path):
    """What the first call accepts, torch.load reads back; a tensor is the id that it holds."""
    rewards = torch.tensor([1.0, 0.0, 1.0])
    assert dk.group_advantage(rewards, ids).tolist() == [1, -1, 0]
    sas = dk.SmoothAdvantage()
    assert sas(rewards, ids).tolist() == [1, -1, 0] and len(sas) == 2
    assert sas.statistics(ids[0]) == (1, 2, 0.5, 0.5)
    torch.save(sas.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = dk.SmoothAdvantage()
    again.load_state_dict(state)
    assert_same_state(again.state_dict(), sas.state_dict())
    assert torch.equal(again(rewards, ids), sas(rewards, ids)) and len(sas) == 2


class Split(enum.IntEnum):
    TRAIN = 1


UNSAVED = [uuid.uuid4(), frozenset("ab"), Split.TRAIN, b"", np.datetime64("2026-01-01"), 1j]


@pytest.mark.parametrize("unsaved", UNSAVED, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("part", [False, True])
def test_ids_that_no_state_could_hold_are_refused_at_once(unsaved, part):
    ids = [("a", unsaved) if part else unsaved] * 2
    sas = dk.SmoothAdvantage()
    with pytest.raises(TypeError, match="which no saved state can hold"):
        sas([0.0, 1.0, 0.0, 1.0], ["a", "a", *ids])
    assert len(sas) == 0
    assert dk.group_advantage([0.0, 1.0], ids).tolist() == [-1, 1]


def test_ids_that_name_nothing():
    for function in (dk.SmoothAdvantage(), dk.group_advantage):
        for nan in (NAN, torch.tensor(NAN), np.float32(NAN), ("a", NAN)):
            with pytest.raises(ValueError, match="an id is NaN"):
                function([0.0, 1.0], ["a", nan])
        with pytest.raises(ValueError, match="an id is NaN"):
            function([0.0, 1.0], torch.tensor([1.0, NAN]))
        with pytest.raises(TypeError, match=r"one value, got shape \[2\]"):
            function([0.0, 1.0], list(torch.zeros(2, 2)))


def test_equal_ids_are_one_prompt():
    """As everywhere in Python."""
    sas = dk.SmoothAdvantage()
    assert sas([0.0, 1.0, 0.0], [1, 1.0, "1"]).tolist() == [-1, 1, 0]
    assert sas.statistics(np.int64(1)).count == 2 and sas.statistics("1").count == 1


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


@pytest.mark.parametrize("before", [[0.0, 1.0], [1e300] * 2])
def test_a_spread_too_large_for_a_double_is_refused(before):
    """A state would hold it as infinite, and be refused."""
    sas = dk.SmoothAdvantage()
    sas(before, ["a", "a"])
    kept = sas.state_dict()
    for rewards in ([1e300, -1e300], [0.0, 1e300]):
        with pytest.raises(ValueError, match="'a' are too large"):
            sas([0.0, 1.0, *rewards], ["new", "new", "a", "a"])
        with pytest.raises(ValueError, match="'a' are too large"):
            dk.group_advantage(rewards, ["a", "a"])
    if before[0]:
        with pytest.raises(ValueError, match="'a' are too large"):
            sas([0.0, 0.0], ["a", "a"])  # equal ones, far from those before
    assert_same_state(sas.state_dict(), kept)


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
    for wrong in (2, -1, 0.5, 5, "1"):
        with pytest.raises(ValueError, match=f"ddof={wrong!r} must be 0 or 1"):
            dk.SmoothAdvantage(wrong)
        with pytest.raises(ValueError, match=f"ddof={wrong!r} must be 0 or 1"):
            dk.group_advantage([1.0, 0.0], ["a", "a"], ddof=wrong)
    for wrong in (0, -1, 1.5, 2.0, INF, "2"):
        with pytest.raises(ValueError, match=f"max_prompts={wrong!r} must be a whole number"):
            dk.SmoothAdvantage(max_prompts=wrong)
    assert type(dk.SmoothAdvantage(np.int64(1), np.int64(3)).state_dict()["ddof"]) is int


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
    "too few visits": (STATE | {"visits": STATE["visits"][:2]}, "one entry per prompt"),
    "a prompt too many": (STATE | {"prompt_ids": [*"abcd"]}, "one entry per prompt"),
    "a prompt twice": (STATE | {"prompt_ids": [*"aab"]}, "one entry per prompt"),
    "text for numbers": (STATE | {"mean": [*"xyz"]}, "mean of the state holds no numbers"),
    "nothing for numbers": (STATE | {"count": None}, "count of the state holds no numbers"),
    "columns of another shape": (STATE | {"mean": torch.zeros(3, 2)}, "mean"),
    "one number for all": (STATE | {"variance": 1.0}, "variance"),
    "NaN": (STATE | {"mean": torch.tensor([0.0, NAN, 0.0])}, "'b'"),
    "a negative spread": (STATE | {"variance": torch.tensor([0.1, 0.1, -0.1])}, "'c'"),
    "no visit": (STATE | {"visits": torch.tensor([0, 1, 1])}, "'a'"),
    "half a visit": (STATE | {"visits": torch.tensor([1.5, 1, 1])}, "'a'"),
    "a negative count": (STATE | {"count": torch.tensor([2, -2, 2])}, "'b'"),
    "half a response": (STATE | {"count": torch.tensor([2.5, 2, 2])}, "'a'"),
    "fewer responses than visits": (STATE | {"visits": torch.tensor([2, 1, 9])}, "'c'"),
    "an infinite spread": (STATE | {"variance": torch.tensor([0.1, 0.1, INF])}, "'c'"),
    "equal ids": (STATE | {"prompt_ids": [1, True, "c"]}, "one entry per prompt"),
    "NaN as an id": (STATE | {"prompt_ids": [NAN, "b", "c"]}, "an id is NaN"),
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


def test_a_state_of_lists_and_of_old_ids():
    """Whatever a state went through: JSON, or a version that kept the ids as they came."""
    sas = visited()
    state = {k: x.tolist() if torch.is_tensor(x) else x for k, x in sas.state_dict().items()}
    again = dk.SmoothAdvantage()
    again.load_state_dict(state | {"prompt_ids": [np.str_(x) for x in state["prompt_ids"]]})
    assert_same_state(again.state_dict(), sas.state_dict())
    assert {type(x) for x in again.state_dict()["prompt_ids"]} == {str}


# ---- where it runs ------------------------------------------------------------------------------


def steps(sas):
    """What makes a tensor: new prompts, a growing table, a state, a merge, forgetting."""
    out = [sas(torch.tensor([0.0, 1.0] * n, device="cpu"), [*range(n)] * 2) for n in (2, 3, 9)]
    other = dk.SmoothAdvantage()
    other.load_state_dict(STATE)
    sas.merge(other.state_dict())
    again = dk.SmoothAdvantage(max_prompts=3)
    again.load_state_dict(sas.state_dict())
    out.append(again(torch.tensor([0.0, 1.0], device="cpu"), torch.tensor([1, 1], device="cpu")))
    out.append(dk.group_advantage(torch.tensor([0.0, 1.0], device="cpu"), ["a", "a"]))
    return out


def test_another_default_device():
    expected = steps(dk.SmoothAdvantage())
    with torch.device("meta"):  # as torch.set_default_device, which would stay
        sas = dk.SmoothAdvantage()
        found = steps(sas)
        assert sas([0.0, 1.0], [1, 1]).device.type == "meta"
        assert dk.group_advantage([0.0, 1.0], [1, 1]).device.type == "meta"
        statistics_of_1 = sas.statistics(1)
    assert statistics_of_1.visits == 4
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == "cpu" and torch.equal(a, b)


def test_inference_mode_comes_and_goes():
    """A table made in inference mode could not be written outside of it."""
    expected = steps(dk.SmoothAdvantage())
    sas = dk.SmoothAdvantage()
    with torch.inference_mode():
        sas(torch.tensor([0.0, 1.0]), ["a", "a"])
        loaded = dk.SmoothAdvantage()
        loaded.load_state_dict(sas.state_dict())
        for a, b in zip(steps(dk.SmoothAdvantage()), expected, strict=True):
            assert torch.equal(a, b)
    assert torch.equal(
        sas(torch.tensor([1.0, 1.0]), ["a", "a"]), loaded(torch.tensor([1.0, 1.0]), ["a", "a"])
    )


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
