"""The operators around the vocabulary kernel, token_weights, decide and finish: every backend says
what the reference says."""

from __future__ import annotations

import itertools
import os
import subprocess

import emulator
import pytest
import torch
from backends import CPU, SLOW, needs_kernels, use
from problems import CODES, OBJECTIVES, pairs
from torch import Tensor

import dcpo_kernels as dk
from dcpo_kernels import backends, ops
from dcpo_kernels.metrics import Summary
from dcpo_kernels.objective import AGGREGATIONS, KL_ESTIMATORS
from dcpo_kernels.ops.records import Grouping, RatioGroups, Read, Responses, Results, Tokens

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=[*CPU[:1], *SLOW])
def backend(request):
    with use(request.param) as name:
        yield name


def assert_same(found, expected, rtol: float = 0.0, atol: float = 0.0) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def grouping(**given) -> Grouping:
    """Packed rows, all of which count, as counted here."""
    nothing = dict.fromkeys(Grouping._fields)
    switches = {"skip_by_response": False, "skip_whole_responses": False, "aggregation": 1}
    return Grouping(**{**nothing, **switches, **given})


# ---- token_weights ------------------------------------------------------------------------------

MANY = torch.arange(3000) * 7 % 5  # lengths from 0 to 4
FAR = 2**62
LAYOUTS: dict[str, tuple[tuple[int, ...], Tensor | None, bool]] = {  # rows, lengths, with a mask
    "packed": ((24,), integers(6, 0, 1, 9, 8), False),
    "packed with holes": ((24,), integers(6, 0, 1, 9, 8), True),
    "padded": ((4, 7), None, False),
    "padded with holes": ((4, 7), None, True),
    "a response of many rows": ((5000,), integers(5000), True),
    "rows of many warps": ((3, 1100), None, True),
    "many responses": ((int(MANY.sum()) + 3,), MANY, False),
    "many responses with holes": ((int(MANY.sum()) + 3,), MANY, True),
    "one long among many": ((5200,), torch.cat([MANY[:30], integers(5000), MANY[:30]]), True),
    "all empty": ((3,), integers(0, 0), False),
    "no response": ((5,), integers(), False),
    "no row": ((0,), integers(0, 0, 0), True),
    "no batch": ((0, 4), None, False),
    "no time": ((4, 0), None, True),
    "too long": ((12,), integers(5, 20, 3), False),
    "too short": ((12,), integers(5, 2), True),
    "negative": ((12,), integers(5, -3, 4, -20, 9), True),
    "sum wraps": ((12,), integers(3, FAR, FAR, FAR, FAR, 4), False),
    "sum wraps to more": ((12,), integers(3, FAR, FAR, FAR, FAR - 2, 4, 9), True),
}
SKIPS = {  # by response, whole responses
    "nothing": None,
    "tokens": (False, False),
    "by response": (True, False),
    "whole responses": (False, True),
    "whole responses by response": (True, True),
}


def token_weights_case(layout: str, aggregation: str = "token-mean", skip: str = "nothing"):
    """like, grouping, values."""
    shape, lengths, with_mask = LAYOUTS[layout]
    count = shape[0] if lengths is None else len(lengths)
    longest = {"max_length": 9000} if aggregation == "seq-mean-token-sum-norm" else {}
    mask = torch.rand(shape) < 0.6 if with_mask else None
    options = {}
    if (skipped := SKIPS[skip]) is not None:
        by_response, whole = skipped
        zeros = torch.randn((count,) if by_response else shape)
        zeros[torch.rand(zeros.shape) < (0.5 if by_response else 0.8)] = 0.0
        options = {
            "skip_zero": zeros,
            "skip_by_response": by_response,
            "skip_whole_responses": whole,
        }
    places = {"aggregation": AGGREGATIONS.index(aggregation)}
    g = grouping(mask=mask, lengths=lengths, **places, **longest, **options)
    return torch.empty(shape), g, [torch.randn(count), torch.randn(count)]


@pytest.mark.parametrize(
    "case",
    pairs(layout=tuple(LAYOUTS), aggregation=AGGREGATIONS, skip=tuple(SKIPS)),
    ids=lambda c: str(c.values()),
)
def test_token_weights(case, backend):
    like, g, values = token_weights_case(**case)
    found = ops.token_weights(like, *g, values, backend)
    assert_same(found, ops.token_weights(like, *g, values, "reference"))
    offsets = found[2]
    assert offsets[0] == 0 and (offsets.diff() >= 0).all() and offsets[-1] <= like.numel()


@pytest.mark.parametrize("count", [0, 1, 4])
def test_values_are_spread(count, backend):
    values = list(torch.randn(count, 3))
    g = grouping(lengths=integers(2, 0, 4))
    *_, spread = ops.token_weights(torch.empty(6), *g, values, backend)
    assert_same(spread, [x[[0, 0, 2, 2, 2, 2]] for x in values])


def test_mask_of_bytes(backend):
    like, g, values = token_weights_case("padded")
    mask = torch.tensor([0, 1, 2, 255, 0, 4, 0], dtype=torch.uint8).repeat(4, 1)
    found = ops.token_weights(like, *g._replace(mask=mask), values, backend)
    assert_same(found, ops.token_weights(like, *g._replace(mask=mask != 0), values, backend))


def launched(backend: str, like: Tensor, g: Grouping, values: list[Tensor]):
    """What the backend alone makes of totals that the operator doesn't let pass on a CPU."""
    assert g.lengths is not None
    count = len(g.lengths)
    responses = Responses(
        weights=torch.empty_like(like),
        mask=torch.empty_like(like, dtype=torch.bool),
        offsets=torch.empty(count + 1, dtype=torch.int64),
        lengths=torch.empty(count, dtype=torch.int64),
    )
    spread = [torch.empty_like(like) for _ in values]
    backends.kernels(backend).token_weights(g, values, responses, spread)
    return responses.weights


NAMED = {  # the aggregations that a total is for; 24 tokens, 4 responses, 9 in the longest
    "num_responses": ("seq-mean-token-mean", 4),
    "num_tokens": ("token-mean", 24),
    "max_length": ("seq-mean-token-sum-norm", 9),
}


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("name", NAMED)
def test_totals(name, on_device, backend):
    aggregation, counted = NAMED[name]
    like, g, values = token_weights_case("packed", aggregation)
    wrong = (counted - 1, 0, -1, -100)
    for total in (counted, counted + 100, *wrong, *([NAN, -INF, 0.5, INF] if on_device else [])):
        given = {name: total}
        if on_device:  # in the place of a number that would be wrong
            given = {name: 1, f"{name}_on_device": torch.tensor(float(total))}
        arguments = like, g._replace(**given), values
        found = launched(backend, *arguments)
        assert_same(found, launched("reference", *arguments))
        assert bool(found.isnan().all()) == (not total >= counted)
    with pytest.raises(ValueError, match=name):
        ops.token_weights(like, *g._replace(**{name: counted - 1}), values, backend)


# ---- decide -------------------------------------------------------------------------------------

EXTRAS = {"kl_coef": 0.3, "entropy_coef": 0.2}
ESTIMATORS = {  # each to the reference and to the old policy
    f"{kl} and {old_kl}": dk.dapo(
        kl_coef=0.3, kl_estimator=kl, old_kl_coef=0.2, old_kl_estimator=old_kl
    )
    for kl, old_kl in zip(KL_ESTIMATORS, reversed(KL_ESTIMATORS), strict=True)
}
DECIDED = {
    name: make()
    for name, make in {**OBJECTIVES, "icepop": lambda: dk.icepop(0.7, 1.3)}.items()
    if not make().beyond_target
}
DECIDED |= {f"{name} with terms": OBJECTIVES[name](**EXTRAS) for name in ("dcpo", "gspo", "sapo")}
DECIDED |= {f"dapo with {name}": objective for name, objective in ESTIMATORS.items()}
DECIDED["icepop with terms"] = dk.icepop(0.7, 1.3, **EXTRAS)


def decide_case(lengths, by_response=False, rest=0, drift=0.4, spread=True):
    """Rows of responses and some after them. A third of them have weight 0 and hold NaN."""
    rows = int(lengths.sum()) + rest
    logprobs, weights = -2 * torch.rand(rows) - 0.01, torch.rand(rows) + 0.5
    drifts = drift * torch.randn(rows)
    apart = 2 * drift * torch.linspace(-1, 1, len(lengths))  # far enough to be clipped as a whole
    drifts[: rows - rest] += apart.repeat_interleave(lengths)
    tokens = Tokens(
        old_logprobs=(logprobs + drifts).clamp(max=-0.001),
        advantages=torch.randn(rows),
        weights=weights,
        ref_logprobs=logprobs + torch.randn(rows),
        importance_weights=torch.rand(rows) + 0.5,
        log_ratio=None if by_response else 0.1 * torch.randn(rows),
        entropy_weights=torch.rand(rows) + 0.5,
    )
    unread = torch.rand(rows) < 0.3
    for x in filter(torch.is_tensor, (logprobs, *tokens)):
        x[unread] = NAN
    weights[unread] = 0.0
    offsets = torch.cat([integers(0), lengths.cumsum(0)])
    groups = RatioGroups(by_response, by_response and spread, offsets, lengths)
    return Read(logprobs, torch.rand(rows)), tokens, groups


def assert_decides_as_the_reference(backend, read, tokens, numbers, groups) -> list[Tensor]:
    arguments = (*read, *tokens, *numbers, *groups)
    found = ops.decide(*arguments, backend)
    expected = ops.decide(*arguments, "reference")
    assert_same(found, expected, rtol=2e-5, atol=2e-6)
    unread = tokens.weights == 0
    for x, nothing in zip(found, (0, 1, 0, 0, 0), strict=True):
        assert not x.numel() or (x[unread] == nothing).all()
    return found


LEVELS = [(False, False), (True, False), (True, True)]  # by_response, spread


@pytest.mark.parametrize("name", DECIDED)
def test_decide(name, backend):
    objective = DECIDED[name]
    levels = [(False, False)] if objective.divergence != "none" else LEVELS
    for by_response, spread in levels:
        lengths = integers(40, 0, 1, 70, 300, 20, 30, 20)
        read, tokens, groups = decide_case(lengths, by_response, rest=7, spread=spread)
        arguments = backend, read, tokens, objective.numbers, groups
        *_, clipped, g, h = assert_decides_as_the_reference(*arguments)
        assert (h.numel() > 0) == (objective.entropy_coef != 0)
        assert (g != 0).any()
        if CODES[name.split()[0]] != {0} and objective.penalty_coef == 0:
            assert len(clipped.unique()) > 1


@pytest.mark.parametrize("name", ["gspo", "dcpo", "icepop"])
@pytest.mark.parametrize("by_response", [False, True])
def test_decide_without_what_is_optional(name, by_response, backend):
    objective = DECIDED[name]
    read, tokens, groups = decide_case(integers(20, 9), by_response)
    read = read._replace(entropy=None)
    tokens = Tokens(*tokens[:3], None, None)
    arguments = objective.numbers, groups
    assert_decides_as_the_reference(backend, read, tokens, *arguments)
    tokens = tokens._replace(old_logprobs=None)
    _, ratio, *_ = assert_decides_as_the_reference(backend, read, tokens, *arguments)
    assert (ratio == 1).all()


@pytest.mark.parametrize("lengths", [MANY, integers(5000), integers(0, 0), integers()], ids=len)
def test_decide_by_response(lengths, backend):
    if backend == "triton":  # a program per response, 15 ms each in the interpreter
        lengths = lengths[:300]
    read, tokens, groups = decide_case(lengths, True, rest=5)
    arguments = backend, read, tokens, DECIDED["gspo with terms"].numbers, groups
    _, ratio, *_ = assert_decides_as_the_reference(*arguments)
    live = tokens.weights != 0
    first = live & (torch.arange(len(live)) < lengths[:1].sum())
    assert len(ratio[first].unique()) <= 1


@pytest.mark.parametrize("name", DECIDED)
def test_decide_at_the_edges(name, backend):
    """Log-ratios beyond what exp holds, probabilities of 0 and 1, NaN: in their own rows."""
    objective = DECIDED[name]
    for by_response in [False] if objective.divergence != "none" else [False, True]:
        new = torch.tensor([-1.0, -90.0, -0.01, -INF, -INF, -1.0, NAN, -1.0, 0.0, 0.0, -30.0, -1.0])
        old = torch.tensor([-1.0, -0.1, -70.0, -1.0, -INF, -INF, -1.0, NAN, 0.0, -1.0, 0.0, -1.5])
        rows = 2 * len(new)
        tokens = Tokens(
            old_logprobs=old.repeat_interleave(2),
            advantages=torch.tensor([1.0, -1.0]).repeat(len(new)),
            weights=torch.full((rows,), 0.5),
            ref_logprobs=torch.linspace(-50, 0, rows),
            importance_weights=None,
        )
        read = Read(new.repeat_interleave(2), torch.ones(rows))
        lengths = torch.full((len(new),), 2)
        groups = RatioGroups(by_response, by_response, torch.arange(0, rows + 1, 2), lengths)
        assert_decides_as_the_reference(backend, read, tokens, objective.numbers, groups)


def test_decide_says_what_is_missing(backend):
    read, tokens, groups = decide_case(integers(4))
    tokens = tokens._replace(ref_logprobs=None)
    numbers = dk.dcpo(kl_coef=0.1).numbers
    with pytest.raises(ValueError, match="ref_logprobs"):
        ops.decide(*read, *tokens, *numbers, *groups, backend)
    numbers = dk.dcpo(entropy_coef=0.1).numbers
    with pytest.raises(ValueError, match="entropy"):
        ops.decide(read.logprobs, None, *tokens, *numbers, *groups, backend)
    numbers = dk.dppo("topk_tv").numbers
    with pytest.raises(ValueError, match="topk_tv"):
        ops.decide(*read, *tokens, *numbers, *groups, backend)
    numbers = dk.cispo(score_centering=True).numbers
    with pytest.raises(ValueError, match="score_centering takes more"):
        ops.decide(*read, *tokens, *numbers, *groups, backend)


# ---- finish -------------------------------------------------------------------------------------


def finish_case(lengths: Tensor, rest: int = 0, with_entropy: bool = True):
    rows = int(lengths.sum()) + rest
    weights = torch.where(torch.rand(rows) < 0.7, torch.rand(rows), 0.0)
    read = weights != 0
    counted = (read | (torch.rand(rows) < 0.5)) & (torch.arange(rows) < rows - rest)
    results = Results(
        token_loss=torch.randn(rows) * read,
        logprobs=-torch.rand(rows) * read,
        entropy=torch.rand(rows if with_entropy else 0),
        ratio=torch.where(read, (0.3 * torch.randn(rows)).exp(), 1.0),
        clipped=(torch.randint(0, 5, (rows,)) * read).to(torch.int8),
    )
    offsets = torch.cat([integers(0), lengths.cumsum(0)])
    ends = offsets.tolist()
    counts = [int(counted[a:b].sum()) for a, b in itertools.pairwise(ends)]
    responses = Responses(weights, counted, offsets, integers(*counts))
    return results, responses


def assert_finishes_as_the_reference(backend, results, responses) -> Summary:
    found = ops.finish(*results, *responses, backend)
    assert_same(found, ops.finish(*results, *responses, "reference"), rtol=2e-5, atol=1e-4)
    loss, _, summary = found
    assert_same(summary[0], loss)
    return Summary(*summary.tolist())


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [integers(6, 0, 1, 9, 8), MANY, integers(5000), integers(0, 0), integers()],
    ids=["few", "many", "long", "empty", "none"],
)
@pytest.mark.parametrize("rest", [0, 5])
def test_finish(lengths, rest, with_entropy, backend):
    results, responses = finish_case(lengths, rest, with_entropy)
    summary = assert_finishes_as_the_reference(backend, results, responses)
    read = responses.weights != 0
    assert summary.tokens == responses.lengths.sum() and summary.tokens_read == read.sum()
    ratios = results.ratio[read] if read.any() else torch.ones(1)
    assert (summary.ratio_min, summary.ratio_max) == (float(ratios.min()), float(ratios.max()))
    sides = [summary.clip_high, summary.clip_low, summary.clip_cap, summary.clip_region]
    assert sides == [int((results.clipped[read] == side).sum()) for side in range(1, 5)]


def test_finish_of_rows_that_are_not_read(backend):
    results, responses = finish_case(integers(6, 9))
    for x in (results.token_loss, results.logprobs, results.entropy, responses.weights):
        x.zero_()
    results.ratio.fill_(1.0)
    summary = assert_finishes_as_the_reference(backend, results, responses)
    assert (summary.loss, summary.tokens_read) == (0, 0)
    assert (summary.ratio_min, summary.ratio_max, summary.kl_sum) == (1, 1, 0)


@pytest.mark.parametrize("row", [0, 7, 14])
def test_finish_says_nan(row, backend):
    """Of the loss and its own response; of no count and no other response."""
    results, responses = finish_case(integers(6, 0, 9))
    responses.weights[row] = 0.5
    for x in (results.token_loss, results.logprobs, results.ratio):
        x[row] = NAN
    summary = assert_finishes_as_the_reference(backend, results, responses)
    for name in ("loss", "logprob_sum", "ratio_sum", "ratio_min", "ratio_max", "kl_sum"):
        assert getattr(summary, name) != getattr(summary, name)
    response_loss = ops.finish(*results, *responses, backend)[1]
    assert response_loss.isnan().tolist() == [row < 6, False, row >= 6]


def test_a_response_is_the_same_bits_alone_and_among_others(backend):
    lengths, numbers = torch.cat([integers(900), MANY[:40], integers(2100)]), dk.gspo().numbers
    read, tokens, groups = decide_case(lengths, True)
    results, responses = finish_case(lengths)
    decided = ops.decide(*read, *tokens, *numbers, *groups, backend)
    response_loss = ops.finish(*results, *responses, backend)[1]

    rows = slice(900 + int(MANY[:40].sum()), None)  # of the last response
    read = Read(*(x[rows] for x in read if x is not None))
    tokens = Tokens(*(None if x is None else x[rows] for x in tokens))
    groups = RatioGroups(True, True, integers(0, 2100), integers(2100))
    assert_same(
        ops.decide(*read, *tokens, *numbers, *groups, backend), tuple(x[rows] for x in decided)
    )
    results = Results(*(x[rows] for x in results))
    weights, mask, _, counts = responses
    responses = Responses(weights[rows], mask[rows], groups.offsets, counts[-1:])
    assert_same(ops.finish(*results, *responses, backend)[1], response_loss[-1:])


# ---- under sanitizers ---------------------------------------------------------------------------

STRESS = ("cuda.cpp", "hopper.cpp", "cuda/responses.cu", "cpu/responses.cpp")


def stress(*arguments: int, flags: tuple[str, ...] = (), **variables: str):
    program = emulator.build("stress_responses", ("stress_responses.cpp", *STRESS), *flags)
    env = {**os.environ, **variables}
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, env=env)


def test_random_batches_under_address_and_undefined_behaviour_sanitizers():
    done = stress(0, 25, flags=("-fsanitize=address,undefined", "-fno-sanitize-recover=all"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "25 batches agree" in done.stdout


def test_a_missing_barrier_would_be_noticed():
    without = {"DCPO_EMU_WITHOUT_SYNCTHREADS": "1"}
    assert all(stress(seed, 1, **without).returncode == 1 for seed in range(3))


# ---- as torch sees them -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_kernels)])
def test_opcheck(name):
    like, g, values = token_weights_case("packed with holes", skip="whole responses")
    torch.library.opcheck(ops.token_weights, (like, *g, values, name))
    like, g, values = token_weights_case("padded", "seq-mean-token-sum-norm")
    torch.library.opcheck(ops.token_weights, (like, *g, values, name))
    for by_response in (False, True):
        for numbers in (dk.gspo(**EXTRAS).numbers, dk.grpo().numbers):
            read, tokens, groups = decide_case(integers(5, 0, 4), by_response)
            torch.library.opcheck(ops.decide, (*read, *tokens, *numbers, *groups, name))
    for with_entropy in (False, True):
        results, responses = finish_case(integers(5, 0, 4), 2, with_entropy)
        torch.library.opcheck(ops.finish, (*results, *responses, name))


@needs_kernels
def test_what_the_compiled_module_is_passed():
    """Exactly the fields, by their names, and float32."""
    from dcpo_kernels.backends import _compiled

    results, responses = finish_case(integers(5))
    named = {**results._asdict(), **responses._asdict()}
    given = {name: x.data_ptr() for name, x in named.items()}
    given |= {"rows": 5, "count": 1, "loss": 0, "response_loss": 0, "summary": 0}
    missing = {name: value for name, value in given.items() if name != "ratio"}
    with pytest.raises(TypeError, match="missing argument ratio"):
        _compiled.C.cpu_finish(**missing)
    with pytest.raises(TypeError, match="unknown argument ratios"):
        _compiled.C.cpu_finish(**given, ratios=0)
    with pytest.raises(TypeError, match="argument count can't be 'many'"):
        _compiled.C.cpu_finish(**{**given, "count": "many"})
    like, g, values = token_weights_case("packed")
    with pytest.raises(TypeError, match=r"values must be torch.float32, got torch.float64"):
        ops.token_weights(like, *g, [values[0].double()], "cpu")
    with pytest.raises(TypeError, match="at most 4 values"):
        ops.token_weights(like, *g, values * 3, "cpu")
