"""Sampling, and the promise that what is sampled and what is trained are one distribution."""

from __future__ import annotations

import math

import pytest
import torch
from train_world import PROBLEMS, SUMS, TOKENIZER, VOCAB, small_model, small_trainer
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import dcpo_kernels as dk
from dcpo_kernels.demo.arithmetic import as_problems, make_sums
from dcpo_kernels.train.batch import collate, response_logits, response_states
from dcpo_kernels.train.clock import Clock
from dcpo_kernels.train.head import head_of
from dcpo_kernels.train.policy import Policy
from dcpo_kernels.train.rollout import Rollout, decode, encode, end_ids, generate, sample

# Prompts of different lengths, so that some are padded.
MIXED = encode(TOKENIZER, as_problems(make_sums(3, 2, 0) + make_sums(3, 4, 0) + SUMS[:2], 0))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocabulary", [1, 5, 256, 300])  # one block, whole blocks, a tail
def test_sample_follows_softmax(vocabulary, temperature):
    draws = 100_000
    logits = 2 * torch.randn(1, vocabulary)
    logits[0, ::3] = -math.inf
    logits[0, vocabulary // 2] = 1.0
    p = torch.softmax(logits[0].double() / temperature, -1)
    generator = torch.Generator().manual_seed(0)
    ids, logprobs = sample(logits.expand(draws, -1).clone(), temperature, generator)
    torch.testing.assert_close(logprobs, p.log().float()[ids], rtol=0, atol=1e-5)
    counts = torch.bincount(ids, minlength=vocabulary)
    assert not counts[p == 0].any()
    # Each count is within 5 standard deviations of what it should be.
    spread = (draws * p * (1 - p)).sqrt()
    assert ((counts - draws * p).abs() <= 5 * spread + 1).all()


def test_sample_takes_large_logits():
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4]]).expand(100, -1).clone()
    ids, logprobs = sample(logits, 1.0, torch.Generator().manual_seed(0))
    assert set(ids.tolist()) == {0, 1}
    assert logprobs.isfinite().all()


def generated(model, prompts, seed=0, **parts) -> Rollout:
    how = {"group_size": 3, "max_new_tokens": 8, "end": end_ids(model, TOKENIZER), **parts}
    return generate(model, prompts, generator=torch.Generator().manual_seed(seed), **how)


def test_responses_end_where_they_should():
    rollout = generated(small_model(), MIXED)
    end = TOKENIZER.eos_token_id
    assert len(rollout) == 3 * len(MIXED)
    assert rollout.prompts == [prompt for prompt in MIXED for _ in range(3)]
    assert len({len(response) for response in rollout.responses}) > 1
    for response, logprobs in zip(rollout.responses, rollout.logprobs, strict=True):
        assert 1 <= len(response) <= 8 and len(logprobs) == len(response)
        assert end not in response[:-1]
        assert response[-1] == end or len(response) == 8
    assert any(r"\boxed{" in text for text in decode(TOKENIZER, rollout.responses))


def test_a_seed_gives_the_same_responses():
    model = small_model()
    assert generated(model, MIXED).responses == generated(model, MIXED).responses
    assert generated(model, MIXED).responses != generated(model, MIXED, seed=1).responses


def test_padding_and_neighbours_do_not_matter():
    model = small_model()
    greedy = {"temperature": 0.0, "group_size": 1}
    together = generated(model, MIXED, **greedy).responses
    assert together == [generated(model, [p], **greedy).responses[0] for p in MIXED]


def test_every_end_id_ends():
    model = small_model()
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, 9]
    assert end_ids(model, TOKENIZER) == sorted([TOKENIZER.eos_token_id, 9])
    everything = generated(model, MIXED, end=range(VOCAB))
    assert all(len(response) == 1 for response in everything.responses)
    assert all(len(response) == 8 for response in generated(model, MIXED, end=[]).responses)


def test_prompts_without_a_chat_template_are_plain_text():
    plain = TOKENIZER.__class__(tokenizer_object=TOKENIZER.backend_tokenizer)
    assert TOKENIZER.decode(encode(plain, PROBLEMS[:1])[0]) == SUMS[0].text


SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


def rope_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()


def soft_capped_model():
    """What it does to its logits after the projection must not be lost. Sliding window as well."""
    torch.manual_seed(0)
    own = {"head_dim": 16, "final_logit_softcapping": 2.0, "initializer_range": 0.5}
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, **own, sliding_window=8)).eval()


MODELS = {"gpt2": small_model, "llama": rope_model, "gemma2": soft_capped_model}


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_response_logits_are_those_of_the_whole_sequence(make):
    model = make()
    rollout = generated(model, MIXED)
    batch = collate(rollout.prompts, rollout.responses)
    logits = response_logits(model, batch)
    assert list(logits.shape) == [int(batch.lengths.sum()), VOCAB]
    at = 0
    for prompt, response in zip(rollout.prompts, rollout.responses, strict=True):
        alone = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        part = slice(at, at + len(response))
        torch.testing.assert_close(logits[part], alone, rtol=1e-4, atol=1e-5)
        assert batch.target_ids[part].tolist() == response
        at += len(response)
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_the_head_makes_these_logits_of_hidden_states(make):
    model = make()
    rollout = generated(model, MIXED)
    batch = collate(rollout.prompts, rollout.responses)
    head = head_of(model)
    states, logits = response_states(model, batch), response_logits(model, batch)
    torch.testing.assert_close(head.logits(states), logits, rtol=1e-4, atol=1e-5)
    assert (head.logit_softcap is not None) == (make is soft_capped_model)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_head_that_does_more_is_not_taken_for_a_projection():
    model = small_model()
    model.get_output_embeddings().register_forward_hook(lambda module, _, out: out.clamp(max=0.5))
    assert head_of(model) is None
    assert Policy.of(model, "auto").head is None
    with pytest.raises(ValueError, match="loss_from='hidden': the logits of GPT2"):
        Policy.of(model, "hidden")


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_and_recomputed_logprobs_agree(make, temperature):
    model = make()
    rollout = generated(model, MIXED, temperature=temperature)
    batch = collate(rollout.prompts, rollout.responses)
    logprobs, _ = dk.selected_logprobs(
        response_logits(model, batch), batch.target_ids, temperature=temperature
    )
    torch.testing.assert_close(logprobs, torch.cat(rollout.logprobs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["dcpo", "gspo"])
def test_the_first_minibatch_has_ratio_one(method):
    trainer = small_trainer(method, temperature=0.8)
    clock = Clock(trainer.model.device)
    experience = trainer.sampler.collect(clock)
    assert (experience.advantages != 0).any()
    for summary in trainer.accumulate(experience, range(8), clock):
        assert summary["ratio_min"] == pytest.approx(1, abs=1e-4)
        assert summary["ratio_max"] == pytest.approx(1, abs=1e-4)
