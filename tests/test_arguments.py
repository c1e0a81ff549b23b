"""Every mistake gives its error from Python, before a kernel runs and with nothing written; the
message names the argument, what came and what is needed."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from backends import CPU, needs_kernels, on_backends

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
TOPK = PACKED | {
    "objective": dk.dppo("topk_tv"),
    "topk_ids": torch.arange(2).repeat(N, 1),
    "topk_logprobs": -torch.ones(N, 2),
}
FULL = PACKED | {"objective": dk.dppo("tv"), "old_logits": torch.randn(N, V)}
CENTERED = dk.cispo(score_centering=True)
KL = dk.grpo(kl_coef=0.1)
GONE = object()  # leave the argument out


def mistake(words, error, base=PACKED, **changes):
    """What is changed in a call, its error, and the words that are in the message."""
    return pytest.param(words, error, base, changes, id=words)


zeros, ones, arange = torch.zeros, torch.ones, torch.arange
MISTAKES = [
    # logits
    mistake("logits must be a tensor, got list", TypeError, logits=[[0.0]]),
    mistake("logits [N, V] [B, T, V] [11]", ValueError, logits=zeros(V)),
    mistake("logits [1, 1, 1, 11]", ValueError, logits=zeros(1, 1, 1, V)),
    mistake("logits vocabulary [6, 0]", ValueError, logits=zeros(N, 0)),
    mistake("logits bfloat16 float16 float32 int64", TypeError, logits=zeros(N, V).long()),
    mistake("logits contiguous vocabulary strides [1, 6]", ValueError, logits=zeros(V, N).T),
    # scalars
    mistake("temperature 0.0 > 0", ValueError, temperature=0.0),
    mistake("temperature -1 > 0", ValueError, temperature=-1),
    mistake("temperature nan > 0", ValueError, temperature=float("nan")),
    mistake("temperature inf", ValueError, temperature=float("inf")),
    mistake("temperature 1e-50", ValueError, temperature=1e-50),
    mistake("temperature '1'", TypeError, temperature="1"),
    mistake("temperature None", TypeError, temperature=None),
    mistake("temperature [6] [2] [5]", ValueError, temperature=ones(5)),
    mistake("logit_softcap=0", ValueError, logit_softcap=0),
    mistake("logit_softcap=-30.0 > 0", ValueError, logit_softcap=-30.0),
    mistake("logit_softcap=nan", ValueError, logit_softcap=float("nan")),
    mistake("logit_softcap=inf finite", ValueError, logit_softcap=float("inf")),
    mistake("logit_softcap '30'", TypeError, logit_softcap="30"),
    mistake("logit_softcap True", TypeError, logit_softcap=True),
    mistake("temperature float32 int64", TypeError, temperature=ones(N).long()),
    mistake(
        "temperature[1, 1] 0.0 > 0",
        ValueError,
        PADDED,
        temperature=torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]]),
    ),
    mistake("backend 'gpu' auto reference cpu", ValueError, backend="gpu"),
    mistake("objective dcpo() function", TypeError, objective=dk.dcpo),
    mistake("objective dcpo() 'dcpo'", TypeError, objective="dcpo"),
    # which tokens belong together
    mistake("mask lengths neither", ValueError, lengths=GONE),
    mistake("lengths packed padded", ValueError, PADDED, lengths=[6]),
    mistake("mask [6, 11]", ValueError, lengths=GONE, mask=ones(N)),
    mistake("lengths [2, 3, 11]", ValueError, PADDED, mask=GONE, lengths=[3, 3]),
    mistake("mask [2, 3] [2, 4]", ValueError, PADDED, mask=ones(B, T + 1)),
    mistake("mask bool complex64", TypeError, PADDED, mask=ones(B, T).cfloat()),
    mistake("mask [2, 3] list", TypeError, PADDED, mask=[[1, 1, 1]] * 2),
    mistake("mask meta cpu", ValueError, PADDED, mask=ones(B, T, device="meta")),
    mistake("lengths 5 6", ValueError, lengths=[4, 1]),
    mistake("lengths 7 6", ValueError, lengths=torch.tensor([4, 3])),
    mistake("lengths[1] -2 0", ValueError, lengths=[6, -2, 2]),
    mistake("lengths[1] 7 6", ValueError, lengths=[1, 7, -2]),
    mistake(
        "lengths[0] 4611686018427387904 6", ValueError, lengths=torch.tensor([2**62] * 4 + [6])
    ),
    mistake("lengths integers", TypeError, lengths=[2**70]),
    mistake("lengths integers [R] float32 [2]", ValueError, lengths=[4.0, 2.0]),
    mistake("lengths integers bool", ValueError, lengths=ones(N) > 0),
    mistake("lengths integers [R] [1, 2]", ValueError, lengths=[[4, 2]]),
    mistake("lengths", (TypeError, ValueError), lengths="42"),
    mistake("lengths 9 6 gspo whole", ValueError, lengths=[4, 5], objective=dk.gspo()),
    # one value per token
    mistake("target_ids [6] [5]", ValueError, target_ids=arange(5)),
    mistake("target_ids [2, 3] [6]", ValueError, PADDED, target_ids=arange(N)),
    mistake("target_ids int64 int32 float32", TypeError, target_ids=zeros(N)),
    mistake("target_ids int64 int16", TypeError, target_ids=arange(N).short()),
    mistake("target_ids tensor [6] list", TypeError, target_ids=list(range(N))),
    mistake("target_ids meta cpu", ValueError, target_ids=arange(N, device="meta")),
    mistake("old_logprobs [6] [6, 1]", ValueError, old_logprobs=zeros(N, 1)),
    mistake("old_logprobs float32 int64", TypeError, old_logprobs=arange(N)),
    mistake("old_logprobs tensor list", TypeError, old_logprobs=[0.0] * N),
    mistake("advantages [6] [2] [5]", ValueError, advantages=zeros(5)),
    mistake("advantages [6] [2] []", ValueError, advantages=torch.tensor(1.0)),
    mistake("advantages float32 int64", TypeError, advantages=torch.tensor([1, -1])),
    mistake("advantages tensor float", TypeError, advantages=1.0),
    mistake("advantages meta cpu", ValueError, PADDED, advantages=ones(B, device="meta")),
    mistake("importance_weights [6] [2] [6, 11]", ValueError, importance_weights=ones(N, V)),
    mistake("importance_weights tensor list", TypeError, importance_weights=[1.0, 1.0]),
    # what an objective needs
    mistake("ref_logprobs grpo 0.1", ValueError, objective=KL),
    mistake("ref_logprobs [6] [11]", ValueError, objective=KL, ref_logprobs=zeros(V)),
    mistake("max_length", ValueError, objective=dk.dr_grpo()),
    mistake("topk_tv topk_ids [6, 'K']", ValueError, TOPK, topk_ids=GONE),
    mistake("topk_tv topk_logprobs", ValueError, TOPK, topk_logprobs=GONE),
    mistake("topk_ids [6, 'K'] [5, 2]", ValueError, TOPK, topk_ids=zeros(5, 2).long()),
    mistake("topk_ids [6, 'K'] [6]", ValueError, TOPK, topk_ids=arange(N)),
    mistake(
        f"topk_logprobs 1..{MAX_K} [6, {MAX_K + 1}]",
        ValueError,
        TOPK,
        topk_logprobs=zeros(N, MAX_K + 1),
    ),
    mistake(f"topk_ids 1..{MAX_K} [6, 0]", ValueError, TOPK, topk_ids=zeros(N, 0).long()),
    mistake("topk_ids [6, 2] topk_logprobs [6, 3]", ValueError, TOPK, topk_logprobs=zeros(N, 3)),
    mistake("topk_ids int64 float32", TypeError, TOPK, topk_ids=zeros(N, 2)),
    mistake("topk_ids [6, 'K'] list", TypeError, TOPK, topk_ids=[[0, 1]] * N),
    mistake("topk_logprobs meta cpu", ValueError, TOPK, topk_logprobs=zeros(N, 2, device="meta")),
    mistake("score_centering=True topk_ids [6, 'K']", ValueError, objective=CENTERED),
    mistake("topk_ids topk_logprobs 'none'", ValueError, topk_ids=zeros(N, 2).long()),
    mistake("'tv' old_logits [6, 11]", ValueError, FULL, old_logits=GONE),
    mistake("old_logits [6, 11] [6, 12]", ValueError, FULL, old_logits=zeros(N, V + 1)),
    mistake(
        "old_logits bfloat16 float16 float32 int64", TypeError, FULL, old_logits=zeros(N, V).long()
    ),
    mistake("meta", (ValueError, RuntimeError), FULL, old_logits=zeros(N, V, device="meta")),
    # totals of the whole batch
    mistake("num_responses 0 > 0", ValueError, num_responses=0),
    mistake("num_tokens -3 > 0", ValueError, num_tokens=-3),
    mistake("num_tokens nan > 0", ValueError, num_tokens=float("nan")),
    mistake("num_tokens number '6'", TypeError, num_tokens="6"),
    mistake("num_tokens one [2]", ValueError, num_tokens=ones(2)),
    # the scale of the loss
    mistake("loss_scale 0.0 > 0", ValueError, loss_scale=0.0),
    mistake("loss_scale inf finite", ValueError, loss_scale=float("inf")),
    mistake("loss_scale number '1'", TypeError, loss_scale="1"),
    mistake("loss_scale one [2]", ValueError, loss_scale=ones(2)),
    mistake("old_logits contiguous strides [1, 6]", ValueError, FULL, old_logits=zeros(V, N).T),
    mistake("old_logits tensor ndarray", TypeError, FULL, old_logits=np.zeros((N, V), np.float32)),
    mistake("old_logits tv kl 'none'", ValueError, old_logits=zeros(N, V)),
]


def merged(base, changes, backend):
    merged = base | changes | {"backend": changes.get("backend", backend)}
    return {key: value for key, value in merged.items() if value is not GONE}


@on_backends(*CPU[:1])
@pytest.mark.parametrize("words, error, base, changes", MISTAKES)
def test_mistake(words, error, base, changes, use_backend, monkeypatch):
    def no_kernel(*_):
        raise AssertionError("a kernel was about to run")

    monkeypatch.setattr(backends, "kernels", no_kernel)
    arguments = merged(base, changes, use_backend)
    kept = {key: x.clone() for key, x in arguments.items() if torch.is_tensor(x) and not x.is_meta}
    with pytest.raises(error) as caught:
        dk.policy_loss(**arguments)
    for word in re.findall(r"\[[^\]]*\]|[^\s\[\]]+(?:\[[^\]]*\])?", words):
        assert word in str(caught.value), f"{word!r} is missing from: {caught.value}"
    for key, copy in kept.items():
        assert torch.equal(arguments[key], copy)


@pytest.mark.parametrize("base", [PACKED, PADDED, TOPK, FULL])
def test_without_the_mistake(base):
    assert dk.policy_loss(**base).loss.isfinite()


@pytest.mark.parametrize("words, error, base, changes", MISTAKES)
def test_the_reference_checks_too(words, error, base, changes):
    """Except for what it can do: float64, and any stride."""
    arguments = merged(base, changes, "reference")
    if "contiguous" in words:
        assert dk.policy_loss(**arguments).loss.isfinite()
    else:
        with pytest.raises(error):
            dk.policy_loss(**arguments)


def test_float64_is_for_the_reference_to_take():
    double = PACKED | {"logits": torch.randn(N, V).double(), "backend": "reference"}
    assert dk.policy_loss(**double).loss.dtype == torch.float64


@on_backends(*CPU[:1])
def test_float64_is_for_the_reference(use_backend):
    double = PACKED | {"logits": torch.randn(N, V).double()}
    with pytest.raises(TypeError, match=r"logits must be bfloat16, float16, float32 .* float64"):
        dk.policy_loss(**double, backend=use_backend)


@on_backends(*CPU[:1])
def test_mistakes_in_selected_logprobs(use_backend):
    logits, ids = PADDED["logits"], PADDED["target_ids"]
    for arguments, options, error, words in (
        ((logits.tolist(), ids), {}, TypeError, "logits must be a tensor, got list"),
        ((logits, ids[0]), {}, ValueError, r"target_ids .*\[2, 3\], got \[3\]"),
        ((logits, ids.float()), {}, TypeError, "target_ids must be int64, int32, got float32"),
        ((logits, ids), {"mask": torch.ones(2, 4)}, ValueError, r"mask .*\[2, 3\], got \[2, 4\]"),
        ((logits, ids), {"mask": [1, 1]}, TypeError, "mask must be a tensor"),
        ((logits, ids), {"temperature": 0}, ValueError, "temperature=0 must be"),
        ((logits, ids), {"logit_softcap": 0}, ValueError, "logit_softcap=0 must be"),
        ((logits.double(), ids), {}, TypeError, "logits must be bfloat16, .*, got float64"),
        ((logits[..., ::2], ids), {}, ValueError, "logits must be contiguous"),
        ((logits, ids + 9), {}, IndexError, r"target_ids\[2\] is 11, .*vocabulary of 11 \(row 2\)"),
    ):
        with pytest.raises(error, match=words):
            dk.selected_logprobs(*arguments, backend=use_backend, **options)


# ---- in place -----------------------------------------------------------------------------------


@on_backends(*CPU[:1])
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


@on_backends(*CPU[:1])
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
    options = {"target_ids": PACKED, "topk_ids": TOPK, "gspo": {"objective": dk.gspo()}}[name]
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
    arguments = TOPK | {"topk_ids": ids, "topk_logprobs": -torch.ones(N, 3)}
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
