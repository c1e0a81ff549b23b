"""Value and gradient against the losses of verl and TRL, run from their installed packages.

They take log-probabilities; ours takes logits. So theirs is differentiated through log_softmax in
float64, on the same logits.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from backends import CPU, on_backends

import dcpo_kernels as dk

BATCH, TIME, VOCAB = 6, 9, 61


@pytest.fixture
def batch():
    """A padded batch whose policy has drifted far enough to be clipped on each side."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = 2 * normal(BATCH, TIME, VOCAB)
    old_logits = logits + 0.6 * normal(BATCH, TIME, VOCAB)
    ids = torch.distributions.Categorical(logits=old_logits).sample()

    def logprobs(x):
        return x.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)

    mask = torch.arange(TIME) < torch.tensor([TIME, 3, 1, 7, 5, TIME])[:, None]
    return SimpleNamespace(
        logits=logits,
        ids=ids,
        logprobs=logprobs,
        old=logprobs(old_logits),
        ref=logprobs(logits + 0.3 * normal(BATCH, TIME, VOCAB)),
        advantages=normal(BATCH),
        importance=normal(BATCH, TIME).abs(),
        mask=mask,
    )


def theirs(batch, loss_of):
    logits = batch.logits.clone().requires_grad_()
    loss = loss_of(batch.logprobs(logits))
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def ours(batch, backend, **options):
    logits = batch.logits.float().requires_grad_()
    out = dk.policy_loss(
        logits, batch.ids, batch.old.float(), batch.advantages.float(), mask=batch.mask,
        backend=backend, **options,
    )  # fmt: skip
    return out, torch.autograd.grad(out.loss, logits)[0]


def assert_equal(batch, loss_of, backend, **options):
    loss, gradient = theirs(batch, loss_of)
    out, our_gradient = ours(batch, backend, **options)
    torch.testing.assert_close(out.loss.detach().double(), loss, rtol=2e-5, atol=2e-6)
    scale = float(gradient.abs().max())
    torch.testing.assert_close(our_gradient.double(), gradient, rtol=2e-5, atol=5e-6 * scale)
    assert scale > 1e-3
    return out


on_ours = on_backends("reference", *CPU[:1])
SHAPES = {
    "token-mean": {},
    "seq-mean-token-mean": {},
    "seq-mean-token-sum-norm": {"max_length": TIME},
}


@pytest.fixture(scope="module")
def verl():
    config = pytest.importorskip("verl.workers.config", reason="verl is not installed")
    algos = pytest.importorskip("verl.trainer.ppo.core_algos")

    def loss(name, batch, aggregation, importance=None, dro_beta=None, **numbers):
        actor = config.ActorConfig(
            strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **numbers,
            policy_loss=config.PolicyLossConfig(dro_beta=dro_beta),
        )  # fmt: skip
        function = algos.get_policy_loss_fn(name)
        advantages = batch.advantages[:, None].expand(BATCH, TIME)
        mask = batch.mask.double()
        return lambda logp: function(
            batch.old, logp, advantages, mask, aggregation, actor, importance
        )[0]

    return loss


def clip(low, high, cap=3.0):
    """verl's numbers; clip_ratio alone would be overruled by the defaults of the other two."""
    return {"clip_ratio_low": low, "clip_ratio_high": high, "clip_ratio_c": cap}


VERL = {
    "vanilla": (dk.ppo(0.2, 1.3), clip(0.2, 0.2, 1.3)),
    "vanilla clip-higher": (
        dk.dapo(0.2, 0.28, ratio_cap=3.0),
        clip(0.2, 0.28, 3.0),
    ),
    "gspo": (dk.gspo(0.02, 0.03, ratio_level="sequence-token"), clip(0.02, 0.03)),
    "dppo_tv": (dk.dppo(ratio_cap=1.5), clip(0.15, 0.15, 1.5)),
    "dppo_kl": (dk.dppo("binary_kl"), clip(0.05, 0.05, 20.0)),
    "sapo": (dk.sapo(), {"tau_pos": 1.0, "tau_neg": 1.05}),
    "cispo": (dk.cispo(1.3), clip(1.0, 0.3)),
    "cispo with a floor": (dk.cispo(1.3, 0.8), clip(0.2, 0.3)),
    "geo_mean": (dk.gmpo(0.1, 0.15), clip(0.1, 0.15)),
    "gpg": (dk.reinforce(), {}),
    "dro": (dk.reinforce(old_kl_coef=0.3, old_kl_estimator="k2"), {"dro_beta": 0.3}),
}
UNCLIPPED = ("sapo", "gpg", "dro")


@pytest.mark.parametrize("weighted", [False, True], ids=["", "importance-weights"])
@pytest.mark.parametrize("aggregation", SHAPES)
@pytest.mark.parametrize("name", VERL)
@on_ours
def test_verl(verl, batch, name, aggregation, weighted, use_backend):
    objective, numbers = VERL[name]
    if name == "sapo" and aggregation != "seq-mean-token-mean":
        aggregation = "seq-mean-token-mean"  # verl's takes no other
    if name == "dro" and weighted:
        pytest.skip("verl's weights multiply the KL term too")
    if name == "geo_mean" and (weighted or aggregation != "seq-mean-token-mean"):
        pytest.skip("verl averages over responses alone, and takes the weights' geometric mean")
    importance = batch.importance if weighted else None
    out = assert_equal(
        batch,
        verl(name.split()[0], batch, aggregation, importance, **numbers),
        use_backend,
        objective=replace(objective, aggregation=aggregation),
        importance_weights=None if importance is None else importance.float(),
        **SHAPES[aggregation],
    )
    assert out.clipped.any() == (name not in UNCLIPPED)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs", "k3+"])
@on_ours
def test_verl_kl(verl, batch, estimator, use_backend):
    """Its KL loss beside its policy loss, as verl/workers/utils/losses.py adds them."""
    algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    policy, mask = verl("vanilla", batch, "token-mean", **clip(0.2, 0.2)), batch.mask.double()

    def with_kl(logp):
        kl = algos.kl_penalty(logp, batch.ref, estimator)
        return policy(logp) + 0.3 * algos.agg_loss(kl, mask, "token-mean")

    objective = dk.ppo(kl_coef=0.3, kl_estimator=estimator)
    assert_equal(batch, with_kl, use_backend, objective=objective, ref_logprobs=batch.ref.float())


@pytest.fixture(scope="module")
def trl():
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="trl is not installed")

    gmpo = pytest.importorskip("trl.experimental.gmpo.gmpo_trainer")

    def loss(
        batch, loss_type, beta, level="token", unbiased=False, delta=None, cap=1.28, weights=None
    ):
        of = gmpo.GMPOTrainer if loss_type == "gmpo" else trainer.GRPOTrainer

        def loss_of(logp):
            # The method alone, on a trainer of which nothing else is real: its metrics go nowhere.
            self = MagicMock()
            for name, value in {
                "_get_per_token_logps_and_entropies": lambda *a, **k: (logp, logp * 0, None),
                "aux_loss_enabled": False,
                "top_entropy_quantile": 1.0,
                "off_policy_mask_threshold": None,
                "importance_sampling_level": level,
                "beta": beta,
                "loss_type": loss_type,
                "epsilon_low": 0.2,
                "epsilon_high": cap if loss_type == "cispo" else 0.28,  # there it is the cap
                "use_vllm": weights is not None,
                "vllm_importance_sampling_correction": True,
                "get_gamma_weights": trainer.GRPOTrainer.get_gamma_weights,
                "max_completion_length": TIME,
                "current_gradient_accumulation_steps": 1,
                "_entropy_bonus_enabled": False,
            }.items():
                setattr(self, name, value)
            self.accelerator.num_processes = 1
            self.accelerator.gather = lambda x: x
            self.args = SimpleNamespace(
                use_bias_correction_kl=unbiased,
                delta=delta,
                sapo_temperature_pos=1.0,
                sapo_temperature_neg=1.05,
                vespo_k_pos=2.0,
                vespo_lambda_pos=3.0,
                vespo_k_neg=3.0,
                vespo_lambda_neg=2.0,
                steps_per_generation=1,
            )
            nobody = torch.zeros(BATCH, 0, dtype=torch.int64)
            inputs = {
                "prompt_ids": nobody,
                "prompt_mask": nobody,
                "completion_ids": batch.ids,
                "completion_mask": batch.mask.double(),
                "advantages": batch.advantages,
                "old_per_token_logps": batch.old,
                "ref_per_token_logps": batch.ref,
                "num_items_in_batch": batch.mask.sum(),
            }
            if weights is not None:
                inputs["importance_sampling_ratio"] = weights
            return of._compute_loss(self, None, inputs)

        return loss_of

    return loss


TRL = {
    "grpo": dk.dapo(aggregation="seq-mean-token-mean"),
    "bnpo": dk.bnpo(eps_high=0.28),
    "dapo": dk.dapo(),
    "dr_grpo": dk.dr_grpo(eps_high=0.28),
    "sapo": dk.sapo(),
    "cispo": dk.cispo(1.28),
    "luspo": dk.luspo(0.2, 0.28, ratio_level="token"),
}


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", TRL)
@on_ours
def test_trl(trl, batch, loss_type, level, beta, use_backend):
    objective = replace(TRL[loss_type], ratio_level=level, kl_coef=beta)
    assert_equal(
        batch,
        trl(batch, loss_type, beta, level),
        use_backend,
        objective=objective,
        ref_logprobs=batch.ref.float(),
        max_length=TIME,
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", TRL)
@on_ours
def test_trl_unbiased_kl(trl, batch, loss_type, level, use_backend):
    """use_bias_correction_kl, its default; and weights per token, which with one ratio per response
    pull at all of its tokens."""
    objective = replace(TRL[loss_type], ratio_level=level, kl_coef=0.3, kl_estimator="k3_unbiased")
    assert_equal(
        batch,
        trl(batch, loss_type, 0.3, level, unbiased=True, weights=batch.importance),
        use_backend,
        importance_weights=batch.importance.float(),
        objective=objective,
        ref_logprobs=batch.ref.float(),
        max_length=TIME,
    )


@pytest.mark.parametrize("weighted", [False, True], ids=["", "importance-weights"])
@pytest.mark.parametrize("level", ["token", "sequence"])  # of no matter to it
@on_ours
def test_trl_vespo(trl, batch, level, weighted, use_backend):
    weights = batch.mask * batch.importance + ~batch.mask * 1.0  # it sums those of padding too
    options = {"importance_weights": weights.float()} if weighted else {}
    loss = trl(batch, "vespo", 0.04, level, weights=weights if weighted else None)
    objective, ref = dk.vespo(kl_coef=0.04), batch.ref.float()
    assert_equal(batch, loss, use_backend, objective=objective, ref_logprobs=ref, **options)


@on_ours
def test_trl_gmpo(trl, batch, use_backend):
    loss, ref = trl(batch, "gmpo", 0.04), batch.ref.float()
    objective = dk.gmpo(0.2, 0.28, kl_coef=0.04)
    out = assert_equal(batch, loss, use_backend, objective=objective, ref_logprobs=ref)
    assert out.clipped.any()


@on_ours
def test_trl_delta_is_ratio_cap(trl, batch, use_backend):
    objective = dk.dapo(ratio_cap=1.5)
    out = assert_equal(batch, trl(batch, "dapo", 0, delta=1.5), use_backend, objective=objective)
    assert (out.clipped == 3).any()


@on_ours
def test_trl_cispo_has_a_cap_below_one(trl, batch, use_backend):
    """Its epsilon_high is the cap, and 0.2 unless it is set."""
    assert_equal(batch, trl(batch, "cispo", 0, cap=0.2), use_backend, objective=dk.cispo(0.2))


def test_verl_critic(batch):
    algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed")
    mask = batch.mask.double()
    mask[0, 3:5] = 0  # a tool's output
    rewards, values = batch.importance.float() * mask, batch.ref.float()
    _, returns = algos.compute_gae_advantage_return(rewards, values, mask, 0.98, 0.9)
    ours = dk.gae(rewards, values, mask, 0.98, 0.9)
    torch.testing.assert_close(ours.returns[mask != 0], returns[mask != 0].float())

    predicted = (values + 0.3 * torch.randn(BATCH, TIME)).requires_grad_()
    loss, clipped = algos.compute_value_loss(predicted, ours.returns, values, mask, 0.2)
    out = dk.value_loss(predicted, values, ours.returns, mask, 0.2)
    torch.testing.assert_close(out.loss, loss.float())
    torch.testing.assert_close(out.clipped, clipped.float())
    theirs, ours = (torch.autograd.grad(x, predicted)[0] for x in (loss, out.loss))
    torch.testing.assert_close(ours, theirs)
