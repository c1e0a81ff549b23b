"""Every mistake gives its error from Python, before a kernel runs and with nothing written; the
message names the argument, what came and what is needed."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from conftest import KERNELS, needs_kernels, on_backends, on_kernels

import dcpo_kernels as dk
from dcpo_kernels import backends
from dcpo_kernels.objective import MAX_K

N, V, B, T = 6, 11, 2, 3
PACKED = {
    "logits": torch.randn(N, V),
    "target_ids": torch.arange(N),
    "old_logprobs": -torch.rand(N),
    "advantages": torch.randn(N),
    "lengths": [4, 2],
}
PADDED = {
    "logits": torch.randn(B, T, V),
    "target_ids": torch.arange(N).view(B, T),
    "old_logprobs": -torch.rand(B, T),
    "advantages": torch.randn(B),
    "mask": torch.ones(B, T),
}
TOPK = {
    "objective": dk.dppo("topk_tv"),
    "topk_ids": torch.arange(2).repeat(N, 1),
    "topk_logprobs": -torch.ones(N, 2),
}
FULL = {"objective": dk.dppo("tv"), "old_logits": torch.randn(N, V)}
GONE = object()  # leave the argument out

# what is changed: base, changes, error, and what its message says
MISTAKES = {
    # logits
    "logits no tensor": (
        PACKED,
        {"logits": [[0.0]]},
        TypeError,
        "logits must be a tensor, got list",
    ),
    "logits 1-d": (PACKED, {"logits": torch.zeros(V)}, ValueError, "logits [N, V] [B, T, V] [11]"),
    "logits 4-d": (PACKED, {"logits": torch.zeros(1, 1, 1, V)}, ValueError, "logits [1, 1, 1, 11]"),
    "no vocabulary": (
        PACKED,
        {"logits": torch.zeros(N, 0)},
        ValueError,
        "logits vocabulary [6, 0]",
    ),
    "logits integers": (
        PACKED,
        {"logits": torch.zeros(N, V).long()},
        TypeError,
        "logits bfloat16 float16 float32 int64",
    ),
    "logits transposed": (
        PACKED,
        {"logits": torch.zeros(V, N).T},
        ValueError,
        "logits contiguous vocabulary strides [1, 6]",
    ),
    # scalars
    "temperature 0": (PACKED, {"temperature": 0.0}, ValueError, "temperature 0.0 > 0"),
    "temperature < 0": (PACKED, {"temperature": -1}, ValueError, "temperature -1 > 0"),
    "temperature NaN": (PACKED, {"temperature": float("nan")}, ValueError, "temperature nan > 0"),
    "temperature inf": (PACKED, {"temperature": float("inf")}, ValueError, "temperature inf"),
    "temperature 0 in float32": (PACKED, {"temperature": 1e-50}, ValueError, "temperature 1e-50"),
    "temperature text": (PACKED, {"temperature": "1"}, TypeError, "temperature '1'"),
    "temperature None": (PACKED, {"temperature": None}, TypeError, "temperature None"),
    "temperature shape": (
        PACKED,
        {"temperature": torch.ones(5)},
        ValueError,
        "temperature [6] [2] [5]",
    ),
    "temperature integers": (
        PACKED,
        {"temperature": torch.ones(N).long()},
        TypeError,
        "temperature float32 int64",
    ),
    "temperature 0 for a token": (
        PADDED,
        {"temperature": torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])},
        ValueError,
        "temperature[1, 1] 0.0 > 0",
    ),
    "no backend": (PACKED, {"backend": "gpu"}, ValueError, "backend 'gpu' auto reference cpu"),
    "objective a function": (
        PACKED,
        {"objective": dk.dcpo},
        TypeError,
        "objective dcpo() function",
    ),
    "objective a name": (PACKED, {"objective": "dcpo"}, TypeError, "objective dcpo() 'dcpo'"),
    # which tokens belong together
    "no grouping": (PACKED, {"lengths": GONE}, ValueError, "mask lengths neither"),
    "lengths of padded logits": (PADDED, {"lengths": [6]}, ValueError, "lengths packed padded"),
    "mask with packed": (
        PACKED,
        {"lengths": GONE, "mask": torch.ones(N)},
        ValueError,
        "mask [6, 11]",
    ),
    "lengths with padded": (
        PADDED,
        {"mask": GONE, "lengths": [3, 3]},
        ValueError,
        "lengths [2, 3, 11]",
    ),
    "mask shape": (PADDED, {"mask": torch.ones(B, T + 1)}, ValueError, "mask [2, 3] [2, 4]"),
    "mask dtype": (PADDED, {"mask": torch.ones(B, T).cfloat()}, TypeError, "mask bool complex64"),
    "mask a list": (PADDED, {"mask": [[1, 1, 1]] * 2}, TypeError, "mask [2, 3] list"),
    "mask device": (PADDED, {"mask": torch.ones(B, T, device="meta")}, ValueError, "mask meta cpu"),
    "lengths too short": (PACKED, {"lengths": [4, 1]}, ValueError, "lengths 5 6"),
    "lengths too long": (PACKED, {"lengths": torch.tensor([4, 3])}, ValueError, "lengths 7 6"),
    "lengths < 0": (PACKED, {"lengths": [6, -2, 2]}, ValueError, "lengths[1] -2 0"),
    "lengths > rows": (PACKED, {"lengths": [1, 7, -2]}, ValueError, "lengths[1] 7 6"),
    "lengths whose sum wraps": (
        PACKED,
        {"lengths": torch.tensor([2**62, 2**62, 2**62, 2**62, 6])},
        ValueError,
        "lengths[0] 4611686018427387904 6",
    ),
    "lengths too large for a tensor": (PACKED, {"lengths": [2**70]}, TypeError, "lengths integers"),
    "lengths floats": (
        PACKED,
        {"lengths": [4.0, 2.0]},
        ValueError,
        "lengths integers [R] float32 [2]",
    ),
    "lengths bools": (PACKED, {"lengths": torch.ones(N) > 0}, ValueError, "lengths integers bool"),
    "lengths 2-d": (PACKED, {"lengths": [[4, 2]]}, ValueError, "lengths integers [R] [1, 2]"),
    "lengths text": (PACKED, {"lengths": "42"}, (TypeError, ValueError), "lengths"),
    "a response split": (
        PACKED,
        {"lengths": [4, 5], "objective": dk.gspo()},
        ValueError,
        "lengths 9 6 gspo whole",
    ),
    # one value a token
    "ids shape": (PACKED, {"target_ids": torch.arange(5)}, ValueError, "target_ids [6] [5]"),
    "ids 2-d": (PADDED, {"target_ids": torch.arange(N)}, ValueError, "target_ids [2, 3] [6]"),
    "ids floats": (
        PACKED,
        {"target_ids": torch.zeros(N)},
        TypeError,
        "target_ids int64 int32 float32",
    ),
    "ids int16": (
        PACKED,
        {"target_ids": torch.arange(N).short()},
        TypeError,
        "target_ids int64 int16",
    ),
    "ids a list": (PACKED, {"target_ids": list(range(N))}, TypeError, "target_ids tensor [6] list"),
    "ids device": (
        PACKED,
        {"target_ids": torch.arange(N, device="meta")},
        ValueError,
        "target_ids meta cpu",
    ),
    "old shape": (
        PACKED,
        {"old_logprobs": torch.zeros(N, 1)},
        ValueError,
        "old_logprobs [6] [6, 1]",
    ),
    "old integers": (
        PACKED,
        {"old_logprobs": torch.arange(N)},
        TypeError,
        "old_logprobs float32 int64",
    ),
    "old a list": (PACKED, {"old_logprobs": [0.0] * N}, TypeError, "old_logprobs tensor list"),
    "advantages shape": (
        PACKED,
        {"advantages": torch.zeros(5)},
        ValueError,
        "advantages [6] [2] [5]",
    ),
    "advantages scalar": (
        PACKED,
        {"advantages": torch.tensor(1.0)},
        ValueError,
        "advantages [6] [2] []",
    ),
    "advantages integers": (
        PACKED,
        {"advantages": torch.tensor([1, -1])},
        TypeError,
        "advantages float32 int64",
    ),
    "advantages a number": (PACKED, {"advantages": 1.0}, TypeError, "advantages tensor float"),
    "advantages device": (
        PADDED,
        {"advantages": torch.ones(B, device="meta")},
        ValueError,
        "advantages meta cpu",
    ),
    "importance shape": (
        PACKED,
        {"importance_weights": torch.ones(N, V)},
        ValueError,
        "importance_weights [6] [2] [6, 11]",
    ),
    "importance a list": (
        PACKED,
        {"importance_weights": [1.0, 1.0]},
        TypeError,
        "importance_weights tensor list",
    ),
    # what an objective needs
    "no reference": (
        PACKED,
        {"objective": dk.grpo(kl_coef=0.1)},
        ValueError,
        "ref_logprobs grpo 0.1",
    ),
    "reference shape": (
        PACKED,
        {"objective": dk.grpo(kl_coef=0.1), "ref_logprobs": torch.zeros(V)},
        ValueError,
        "ref_logprobs [6] [11]",
    ),
    "no max_length": (PACKED, {"objective": dk.dr_grpo()}, ValueError, "max_length"),
    "no topk_ids": (PACKED, TOPK | {"topk_ids": GONE}, ValueError, "topk_tv topk_ids [6, 'K']"),
    "no topk_logprobs": (
        PACKED,
        TOPK | {"topk_logprobs": GONE},
        ValueError,
        "topk_tv topk_logprobs",
    ),
    "topk rows": (
        PACKED,
        TOPK | {"topk_ids": torch.zeros(5, 2).long()},
        ValueError,
        "topk_ids [6, 'K'] [5, 2]",
    ),
    "topk 1-d": (PACKED, TOPK | {"topk_ids": torch.arange(N)}, ValueError, "topk_ids [6, 'K'] [6]"),
    "topk too many": (
        PACKED,
        TOPK | {"topk_logprobs": torch.zeros(N, MAX_K + 1)},
        ValueError,
        f"topk_logprobs 1..{MAX_K} [6, {MAX_K + 1}]",
    ),
    "topk none": (
        PACKED,
        TOPK | {"topk_ids": torch.zeros(N, 0).long()},
        ValueError,
        f"topk_ids 1..{MAX_K} [6, 0]",
    ),
    "topk differ": (
        PACKED,
        TOPK | {"topk_logprobs": torch.zeros(N, 3)},
        ValueError,
        "topk_ids [6, 2] topk_logprobs [6, 3]",
    ),
    "topk floats": (
        PACKED,
        TOPK | {"topk_ids": torch.zeros(N, 2)},
        TypeError,
        "topk_ids int64 float32",
    ),
    "topk a list": (PACKED, TOPK | {"topk_ids": [[0, 1]] * N}, TypeError, "topk_ids [6, 'K'] list"),
    "topk device": (
        PACKED,
        TOPK | {"topk_logprobs": torch.zeros(N, 2, device="meta")},
        ValueError,
        "topk_logprobs meta cpu",
    ),
    "topk for another": (
        PACKED,
        {"topk_ids": torch.zeros(N, 2).long()},
        ValueError,
        "topk_ids topk_logprobs 'none'",
    ),
    "no old_logits": (PACKED, FULL | {"old_logits": GONE}, ValueError, "'tv' old_logits [6, 11]"),
    "old_logits shape": (
        PACKED,
        FULL | {"old_logits": torch.zeros(N, V + 1)},
        ValueError,
        "old_logits [6, 11] [6, 12]",
    ),
    "old_logits dtype": (
        PACKED,
        FULL | {"old_logits": torch.zeros(N, V).long()},
        TypeError,
        "old_logits bfloat16 float16 float32 int64",
    ),
    "old_logits device": (
        PACKED,
        FULL | {"old_logits": torch.zeros(N, V, device="meta")},
        (ValueError, RuntimeError),
        "meta",
    ),
    # totals of the whole batch
    "no responses": (PACKED, {"num_responses": 0}, ValueError, "num_responses 0 > 0"),
    "tokens < 0": (PACKED, {"num_tokens": -3}, ValueError, "num_tokens -3 > 0"),
    "tokens NaN": (PACKED, {"num_tokens": float("nan")}, ValueError, "num_tokens nan > 0"),
    "tokens text": (PACKED, {"num_tokens": "6"}, TypeError, "num_tokens number '6'"),
    "tokens [R]": (PACKED, {"num_tokens": torch.ones(2)}, ValueError, "num_tokens one [2]"),
    # the scale of the loss
    "loss_scale 0": (PACKED, {"loss_scale": 0.0}, ValueError, "loss_scale 0.0 > 0"),
    "loss_scale inf": (PACKED, {"loss_scale": float("inf")}, ValueError, "loss_scale inf finite"),
    "loss_scale text": (PACKED, {"loss_scale": "1"}, TypeError, "loss_scale number '1'"),
    "loss_scale [R]": (PACKED, {"loss_scale": torch.ones(2)}, ValueError, "loss_scale one [2]"),
    "old_logits strides": (
        PACKED,
        FULL | {"old_logits": torch.zeros(V, N).T},
        ValueError,
        "old_logits contiguous strides [1, 6]",
    ),
    "old_logits an array": (
        PACKED,
        FULL | {"old_logits": np.zeros((N, V), np.float32)},
        TypeError,
        "old_logits tensor ndarray",
    ),
    "old_logits for another": (
        PACKED,
        {"old_logits": torch.zeros(N, V)},
        ValueError,
        "old_logits tv kl 'none'",
    ),
}


def merged(base, changes):
    return {key: value for key, value in (base | changes).items() if value is not GONE}


@on_kernels(*KERNELS[:1])
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistake(mistake, use_backend, monkeypatch):
    base, changes, error, words = mistake

    def no_kernel(*_):
        raise AssertionError("a kernel was about to run")

    monkeypatch.setattr(backends, "kernels", no_kernel)
    arguments = merged({"backend": use_backend} | base, changes)
    kept = {key: x.clone() for key, x in arguments.items() if torch.is_tensor(x) and not x.is_meta}
    with pytest.raises(error) as caught:
        dk.policy_loss(**arguments)
    for word in re.findall(r"\[[^\]]*\]|[^\s\[\]]+(?:\[[^\]]*\])?", words):
        assert word in str(caught.value), f"{word!r} is missing from: {caught.value}"
    for key, copy in kept.items():
        assert torch.equal(arguments[key], copy)


@pytest.mark.parametrize("base", [PACKED, PADDED, PACKED | TOPK, PACKED | FULL])
def test_without_the_mistake(base):
    assert dk.policy_loss(**base).loss.isfinite()


@on_backends("reference")
def test_the_reference_checks_too(use_backend):
    """Except for what it can do: float64, and any stride."""
    can = {"logits transposed", "old_logits strides"}
    for name, (base, changes, error, _) in MISTAKES.items():
        arguments = merged({"backend": use_backend} | base, changes)
        if name in can:
            assert dk.policy_loss(**arguments).loss.isfinite()
        else:
            with pytest.raises(error):
                dk.policy_loss(**arguments)
    double = PACKED | {"logits": torch.randn(N, V).double(), "backend": use_backend}
    assert dk.policy_loss(**double).loss.dtype == torch.float64


@on_kernels(*KERNELS[:1])
def test_float64_is_for_the_reference(use_backend):
    double = PACKED | {"logits": torch.randn(N, V).double()}
    with pytest.raises(TypeError, match=r"logits must be bfloat16, float16, float32 .* float64"):
        dk.policy_loss(**double, backend=use_backend)


@on_kernels(*KERNELS[:1])
def test_mistakes_in_selected_logprobs(use_backend):
    logits, ids = PADDED["logits"], PADDED["target_ids"]
    for arguments, options, error, words in (
        ((logits.tolist(), ids), {}, TypeError, "logits must be a tensor, got list"),
        ((logits, ids[0]), {}, ValueError, r"target_ids .*\[2, 3\], got \[3\]"),
        ((logits, ids.float()), {}, TypeError, "target_ids must be int64, int32, got float32"),
        ((logits, ids), {"mask": torch.ones(2, 4)}, ValueError, r"mask .*\[2, 3\], got \[2, 4\]"),
        ((logits, ids), {"mask": [1, 1]}, TypeError, "mask must be a tensor"),
        ((logits, ids), {"temperature": 0}, ValueError, "temperature=0 must be"),
        ((logits.double(), ids), {}, TypeError, "logits must be bfloat16, .*, got float64"),
        ((logits[..., ::2], ids), {}, ValueError, "logits must be contiguous"),
        ((logits, ids + 9), {}, IndexError, r"target_ids\[2\] is 11, .*vocabulary of 11 \(row 2\)"),
    ):
        with pytest.raises(error, match=words):
            dk.selected_logprobs(*arguments, backend=use_backend, **options)


# ---- in place -----------------------------------------------------------------------------------


@on_kernels(*KERNELS[:1])
@pytest.mark.parametrize("call", ["policy_loss", "selected_logprobs"])
def test_logits_that_cannot_be_overwritten(call, use_backend):
    def run(logits):
        if call == "policy_loss":
            return dk.policy_loss(
                **PACKED | {"logits": logits}, inplace=True, backend=use_backend
            ).loss
        ids = PACKED["target_ids"]
        return dk.selected_logprobs(logits, ids, inplace=True, backend=use_backend)[0].sum()

    leaf = torch.randn(N, V, requires_grad=True)
    copy = leaf.detach().clone()
    with pytest.raises(ValueError, match="inplace=True would overwrite logits that are a leaf"):
        run(leaf)
    for view in (leaf.view_as(leaf), leaf[:, :], leaf.T.T):  # torch refuses to write to these too
        with pytest.raises(ValueError, match="a leaf of the graph, or a view of one"):
            run(view)
    one_row = torch.randn(1, V, requires_grad=True)
    with pytest.raises(ValueError, match=r"inplace=True needs .* strides \[0, 1\]"):
        run((one_row * 1).expand(N, V))
    memory = torch.randn(N + V, requires_grad=True) * 1
    with pytest.raises(ValueError, match=r"inplace=True needs .* strides \[1, 1\]"):
        run(memory.unfold(0, V, 1)[:N])
    assert torch.equal(leaf.detach(), copy)
    with torch.no_grad():
        run(leaf)  # nothing is overwritten where no gradient is recorded
    assert torch.equal(leaf.detach(), copy)


@on_kernels(*KERNELS[:1])
def test_compiled_code_looks_at_the_places_too(use_backend):
    def run(row):
        logits = (row * 1).expand(N, V)
        return dk.policy_loss(**PACKED | {"logits": logits}, inplace=True, backend=use_backend).loss

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    row = torch.randn(1, V, requires_grad=True)
    with pytest.raises(ValueError, match=r"inplace=True needs .* strides"):
        compiled(row)


# ---- totals -------------------------------------------------------------------------------------


@on_backends()
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize(
    "name, value, base",
    [
        ("num_responses", 1, PACKED), ("num_tokens", 5, PACKED), ("max_length", 3, PACKED),
        ("num_responses", 1, PADDED), ("num_tokens", 5.5, PADDED), ("max_length", 2, PADDED),
    ],
)  # fmt: skip
def test_a_total_smaller_than_what_is_there(name, value, base, as_tensor, use_backend):
    total = torch.tensor(value) if as_tensor else value
    with pytest.raises(ValueError, match=rf"{name}=.* must be > 0 and that of the whole batch"):
        dk.policy_loss(**base, **{name: total}, backend=use_backend)


@on_backends()
@pytest.mark.parametrize("value", [0.0, -4.0, float("nan")])
@pytest.mark.parametrize("name", ["num_responses", "num_tokens", "max_length"])
def test_a_total_that_is_none(name, value, use_backend):
    with pytest.raises(ValueError, match=rf"{name}=.* must be > 0"):
        dk.policy_loss(**PACKED, **{name: torch.tensor(value)}, backend=use_backend)


# ---- ids ----------------------------------------------------------------------------------------


@on_backends()
@pytest.mark.parametrize("bad", [V, V + 1, 2**31, 2**40, -1, -100, -(2**40)])
@pytest.mark.parametrize("name", ["target_ids", "topk_ids", "gspo"])
def test_an_id_outside_the_vocabulary(name, bad, use_backend):
    options = {"target_ids": {}, "topk_ids": TOPK, "gspo": {"objective": dk.gspo()}}[name]
    logits = torch.randn(N, V, requires_grad=True) * 1
    copy, version = logits.detach().clone(), logits._version
    arguments = PACKED | options | {"logits": logits, "inplace": True, "backend": use_backend}
    key = "topk_ids" if name == "topk_ids" else "target_ids"
    ids = arguments[key].clone()
    place = (4, 1) if name == "topk_ids" else (4,)
    ids[place] = bad
    arguments[key] = ids
    where = re.escape(f"{key}{list(place)} is {bad}, outside the vocabulary of {V} (row 4)")
    with pytest.raises(IndexError, match=where):
        dk.policy_loss(**arguments)
    assert torch.equal(logits, copy) and logits._version == version


@on_backends()
def test_an_id_twice_in_a_row_of_the_top_k(use_backend):
    """Its probability would count twice."""
    ids = torch.arange(3).repeat(N, 1)
    ids[4, 2] = 0
    arguments = PACKED | TOPK | {"topk_ids": ids, "topk_logprobs": -torch.ones(N, 3)}
    with pytest.raises(ValueError, match=r"topk_ids\[4\] has the id 0 more than once"):
        dk.policy_loss(**arguments, backend=use_backend)
    arguments |= {"mask": torch.arange(N).view(1, N) != 4, "lengths": None}
    for key in ("logits", "target_ids", "old_logprobs", "advantages", "topk_ids", "topk_logprobs"):
        arguments[key] = arguments[key][None]
    assert dk.policy_loss(**arguments, backend=use_backend).loss.isfinite()


@on_backends()
def test_any_id_where_no_token_counts(use_backend):
    ids = PADDED["target_ids"].clone()
    mask = torch.ones(B, T)
    ids[0, 1], ids[1, 2], mask[0, 1], mask[1, 2] = -100, 2**40, 0, 0
    arguments = PADDED | {"target_ids": ids, "mask": mask, "backend": use_backend}
    assert dk.policy_loss(**arguments).loss.isfinite()
    logprobs, _ = dk.selected_logprobs(PADDED["logits"], ids, mask=mask, backend=use_backend)
    assert (logprobs[mask == 0] == 0).all() and logprobs.isfinite().all()


# ---- tensors that are more than they seem -------------------------------------------------------


def test_a_dtensor_is_named(tmp_path):
    from torch import distributed
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    store = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        logits = distribute_tensor(PACKED["logits"], mesh, [Replicate()])
        with pytest.raises(TypeError, match=r"logits must be a plain tensor, got a DTensor with"):
            dk.policy_loss(**PACKED | {"logits": logits})
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int16])
def test_lengths_of_any_integer_type(dtype):
    lengths = torch.tensor([4, 2]).to(dtype)
    out = dk.policy_loss(**PACKED | {"lengths": lengths})
    assert torch.equal(out.loss, dk.policy_loss(**PACKED).loss)


# ---- the choice of a backend --------------------------------------------------------------------


@needs_kernels
def test_backend_from_the_environment(monkeypatch):
    monkeypatch.setenv("DCPO_KERNELS_BACKEND", "reference")
    assert backends.choose("auto", "cpu") == "reference"
    assert backends.choose("cpu", "cpu") == "cpu"
    monkeypatch.setenv("DCPO_KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="'nonsense' is not one of auto, reference, cpu"):
        dk.policy_loss(**PACKED)
    monkeypatch.setenv("DCPO_KERNELS_BACKEND", "")
    assert backends.choose("auto", "cpu") == "cpu"
    with pytest.raises(RuntimeError, match="backend='cpu' can't be used for cuda tensors"):
        backends.choose("cpu", "cuda")
