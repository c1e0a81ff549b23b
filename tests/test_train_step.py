"""A step: the gradient, the updates, the metrics, and dynamic sampling."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from train_world import PROBLEMS, TOKENIZER, small_model, small_trainer, without_times

import dcpo_kernels as dk
from dcpo_kernels.train import TrainConfig, Trainer, experience, policy, recipes
from dcpo_kernels.train.batch import collate, response_logits
from dcpo_kernels.train.clock import PHASES, Clock
from dcpo_kernels.train.rewards import reward
from dcpo_kernels.train.rollout import decode, encode

CPU = torch.device("cpu")
METHODS = list(recipes())


def collected(trainer):
    """An experience some updates old, so that ratios differ from 1 and some are clipped."""
    past = trainer.sampler.collect(Clock(CPU))
    rows = range(len(past.rollout))
    for _ in range(3):
        trainer.accumulate(past, rows, Clock(CPU))
        trainer.update(len(rows), Clock(CPU))
    return past


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_do_not_change_the_gradient(method):
    trainer = small_trainer(method, learning_rate=0.02)
    past = collected(trainer)
    rows = [i for i in range(len(past.rollout)) if i != 3]
    gradients, losses = [], []
    for size in (len(rows), 4, 1):
        trainer.config = dataclasses.replace(trainer.config, micro_batch_size=size)
        summaries = trainer.accumulate(past, rows, Clock(CPU))
        assert len(summaries) == -(-len(rows) // size)
        losses.append(sum(s["loss"] for s in summaries))
        gradients.append(gradient(trainer.model))
        trainer.optimizer.zero_grad()
    scale = float(gradients[0].abs().max())
    assert scale > 0
    for other, loss in zip(gradients[1:], losses[1:], strict=True):
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-5 * scale)
        assert loss == pytest.approx(losses[0], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("method", ["dcpo", "gspo"])
def test_from_hidden_states_or_logits_the_gradient_is_the_same(method):
    trainers = [small_trainer(method, loss_from=way) for way in ("hidden", "logits")]
    gradients = []
    for trainer in trainers:
        past = collected(trainer)
        trainer.accumulate(past, range(8), Clock(CPU))
        gradients.append(gradient(trainer.model))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5 * float(gradients[0].abs().max()))


def test_otm_is_clipped_like_the_mean_over_responses(monkeypatch):
    """OTM adds up the 8 responses of a minibatch, which seq-mean-token-mean averages."""
    clipped = []
    for aggregation in ("only-token-mean", "seq-mean-token-mean"):
        trainer = small_trainer("dcpo", max_grad_norm=0.01)
        objective = dk.dcpo(aggregation=aggregation)
        trainer.config = dataclasses.replace(trainer.config, objective=objective)
        past = trainer.sampler.collect(Clock(CPU))
        trainer.accumulate(past, range(8), Clock(CPU))
        seen = []
        monkeypatch.setattr(
            trainer.optimizer, "step", lambda t=trainer, s=seen: s.append(gradient(t.model))
        )
        assert trainer.update(8, Clock(CPU)) > 0.01
        clipped += seen
    assert float(clipped[1].norm()) == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(clipped[0], 8 * clipped[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_what_a_hand_gets(method, monkeypatch):
    model = small_model()
    trainer = small_trainer(method, model, learning_rate=0.02, minibatches=4)
    start = small_model()
    outs = []

    def spy(*args, **kwargs):
        outs.append(dk.linear_policy_loss(*args, **kwargs))
        return outs[-1]

    monkeypatch.setattr(policy, "linear_policy_loss", spy)
    got = trainer.step()
    past = trainer.last

    truth = {
        tuple(p): q.ground_truth for p, q in zip(encode(TOKENIZER, PROBLEMS), PROBLEMS, strict=True)
    }
    scores = [
        reward(text, truth[tuple(prompt)])
        for text, prompt in zip(
            decode(TOKENIZER, past.rollout.responses), past.rollout.prompts, strict=True
        )
    ]
    if method != "dapo":  # which also counts what it dropped
        assert got["reward"] == pytest.approx(sum(scores) / 16)
        assert got["accuracy"] == scores.count(1) / 16
        assert got["unformatted"] == scores.count(-1) / 16
        assert got["responses"] == 16
    lengths = [len(r) for r in past.rollout.responses]
    assert got["tokens"] == sum(lengths)
    assert got["response_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert got["rur"] == pytest.approx(int((past.advantages != 0).sum()) / got["responses"])

    with torch.no_grad():
        logits = response_logits(start, collate(past.rollout.prompts, past.rollout.responses))
    logp = torch.log_softmax(logits.double(), -1)
    entropy = -(logp.exp() * logp).sum(-1).mean()
    assert got["entropy"] == pytest.approx(float(entropy), rel=1e-5)

    clipped = [out.clipped[out.mask] for out in outs]
    assert got["tcr"] == pytest.approx(
        sum(float((c != 0).float().mean()) for c in clipped) / len(outs)
    )
    for code, side in enumerate(("clip_high", "clip_low", "clip_cap", "clip_region"), 1):
        share = sum(float((c == code).float().mean()) for c in clipped) / len(outs)
        assert got[side] == pytest.approx(share)
    # 16 responses, 4 minibatches of 4, micro-batches of 3 and 1: two to a minibatch.
    assert len(outs) == 2 * min(4, len(lengths) // 4)
    assert got["loss"] == pytest.approx(
        sum(float(out.loss.detach()) for out in outs) / (len(outs) / 2), rel=1e-5
    )
    read = torch.cat([out.ratio[out.logprobs != 0] for out in outs])
    assert got["approx_kl"] == pytest.approx(
        float((read - 1 - read.log()).mean()), rel=1e-4, abs=1e-7
    )
    assert got["ratio_max"] == pytest.approx(float(read.max()))
    assert got["ratio_max"] > 1.05 or got["ratio_min"] < 0.95
    assert got["rollout_gap"] < 1e-4
    assert got["tokens_per_second"] == pytest.approx(got["tokens"] / got["seconds_step"])
    assert all(got[f"seconds_{phase}"] > 0 for phase in PHASES)
    assert sum(got[f"seconds_{phase}"] for phase in PHASES) <= got["seconds_step"]


def test_smooth_advantages_remember_a_problem_by_its_index():
    trainer = small_trainer("dcpo", prompts_per_step=16, minibatches=4)
    first = trainer.sampler.collect(Clock(CPU))
    torch.testing.assert_close(
        first.advantages, dk.group_advantage(first.rewards, torch.arange(64) // 4)
    )
    second = trainer.sampler.collect(Clock(CPU))
    assert not torch.equal(
        second.advantages, dk.group_advantage(second.rewards, torch.arange(64) // 4)
    )
    for problem in PROBLEMS:
        assert trainer.sampler.smooth.statistics(problem.index)[:2] == (2, 8)


def sampled_with(trainer, monkeypatch, scores):
    """What `collect` gives where the rewards are these, in order."""
    queue = iter(scores)
    monkeypatch.setattr(experience, "score", lambda texts, truths: [next(queue) for _ in texts])
    return trainer.sampler.collect(Clock(CPU))


EQUAL, MIXED = [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, -1.0, 1.0]


def test_dynamic_sampling_goes_on_until_there_are_enough(monkeypatch):
    trainer = small_trainer("dapo", sampling_rounds=5)
    rounds = [EQUAL, MIXED, EQUAL, EQUAL], [MIXED, EQUAL, MIXED, MIXED], [MIXED] * 4
    past = sampled_with(trainer, monkeypatch, [s for r in rounds for group in r for s in group])
    assert len(past.rollout) == 16 and len(past.rewards) == 32  # two rounds were enough
    assert (past.advantages.view(4, 4).abs().sum(1) > 0).all()
    for group in range(4):
        assert len({tuple(p) for p in past.rollout.prompts[4 * group : 4 * group + 4]}) == 1


def test_dynamic_sampling_is_bounded(monkeypatch):
    trainer = small_trainer("dapo", sampling_rounds=2)
    past = sampled_with(trainer, monkeypatch, EQUAL * 2 + MIXED + EQUAL * 5)
    assert len(past.rollout) == 4 and len(past.rewards) == 32  # one group is what there is
    past = sampled_with(trainer, monkeypatch, EQUAL * 8)
    assert len(past.rollout) == 16 and not past.advantages.any()  # nothing to learn, no crash


def test_a_step_without_anything_to_learn(monkeypatch):
    trainer = small_trainer("grpo")
    monkeypatch.setattr(experience, "score", lambda texts, truths: [0.0] * len(texts))
    got = trainer.step()
    assert got["loss"] == got["rur"] == got["tcr"] == got["approx_kl"] == got["grad_norm"] == 0


def test_a_seed_gives_the_same_steps():
    runs = [[without_times(t.step()) for _ in range(2)] for t in (small_trainer(), small_trainer())]
    assert runs[0] == runs[1]


BAD_CONFIGS = {
    "group_size=1 must be an integer >= 2": {"group_size": 1},
    "minibatches=0 must be an integer >= 1": {"minibatches": 0},
    "micro_batch_size=2.0 must be an integer >= 1": {"micro_batch_size": 2.0},
    "prompts_per_step=30 is not a multiple of minibatches=4": {"prompts_per_step": 30},
    "temperature=0 must be finite and > 0": {"temperature": 0},
    "learning_rate=nan must be finite and > 0": {"learning_rate": float("nan")},
    "weight_decay=-1 must be finite and >= 0": {"weight_decay": -1},
    "advantage='gae' is not one of smooth, group": {"advantage": "gae"},
    "kl_coef=0.1 needs a reference model": {"objective": dk.grpo(kl_coef=0.1)},
    "divergence='topk_tv' needs more of the old policy": {"objective": dk.dppo("topk_tv")},
    "divergence='kl' needs more of the old policy": {"objective": dk.dppo("kl")},
    "score_centering=True needs more of the old": {"objective": dk.cispo(score_centering=True)},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_bad_configs_say_what_is_wrong(message):
    with pytest.raises(ValueError) as caught:
        TrainConfig(**{"objective": dk.grpo(), **BAD_CONFIGS[message]})
    assert message in str(caught.value)
    with pytest.raises(TypeError, match="objective must be an Objective"):
        TrainConfig(objective="grpo")
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig(objective=dk.grpo()).seed = 1


def test_too_few_problems():
    config = recipes(prompts_per_step=32)["grpo"]
    with pytest.raises(ValueError, match="a batch of 32 problems was asked for, there are 16"):
        Trainer(small_model(), TOKENIZER, PROBLEMS, config)
