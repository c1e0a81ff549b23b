"""The door: what `losses` accepts, checked once and brought to the records that the operators
take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcpo_kernels import checks, presets
from dcpo_kernels.objective import AGGREGATIONS, WHOLE_RESPONSE, Objective
from dcpo_kernels.ops.records import Grouping, Options, Rows, Targets, Tokens, replaced
from dcpo_kernels.vocab_parallel import Shard


class Batch(NamedTuple):
    """Everything that a loss was told, but for its logits or log-probabilities."""

    backend: str
    objective: Objective
    grouping: Grouping
    tokens: Tokens  # its weights are to come, from `grouping`
    by_response: dict[str, Tensor]  # fields of tokens and rows that came as [R] float32
    entropy_weights: Tensor | None  # as they came: not yet multiples of the weights
    dropped: Tensor | None  # scalar: tokens that don't count because they are not finite
    ratio_by_response: bool  # each response has one ratio, and all of its tokens are in the call
    rows: Rows
    options: Options
    loss_scale: float | Tensor | None
    inplace: bool
    shard: Shard | None = None  # of the vocabulary; its logits are this rank's


_DEFAULT = presets.dcpo()


def objective_of(objective: object) -> Objective:
    """A preset, or a function that is one."""
    if objective is None:
        return _DEFAULT
    if isinstance(objective, Objective):
        return objective
    name = getattr(objective, "__name__", "function")
    if not callable(objective) or getattr(presets, name, None) is objective:
        raise TypeError(
            f"objective must be an Objective such as dcpo(), or a function from TokenValues to a "
            f"loss per token, got {objective!r}"
        )
    return Objective(name, function=objective)


_NO_ROWS: Any = Rows(*[None] * len(Rows._fields))  # pyright: ignore[reportArgumentType]


def token_batch(
    logits: Tensor,  # or whatever else has the tokens' shape and one axis more
    objective: Objective,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None,
    lengths: Tensor | Sequence[int] | None,
    weights: Tensor | None,
    response_lengths: Tensor | Sequence[int] | None,
    response_log_ratio: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    rollout_logprobs: Tensor | None,
    entropy_weights: Tensor | None,
    num_responses: int | Tensor | None,
    num_tokens: int | Tensor | None,
    max_length: int | Tensor | None,
    skip_zero_advantage: bool,
    drop_nonfinite: bool,
    found: Tensor | None = None,  # per token, whether there is a log-probability at all
    backend: str,
) -> Batch:
    """What is said of tokens and responses."""
    token_mask, row_lengths, all_ones = checks.grouping(logits, mask, lengths, objective)
    responses = logits.shape[0] if row_lengths is None else row_lengths.shape[0]
    by_response: dict[str, Tensor] = {}

    def value(name: str, x: Tensor | None) -> Tensor | None:
        """[N] float32, or None where it is [R]: then it waits in by_response."""
        if x is None:
            return None
        x, per_response = checks.per_token_or_response(name, x, logits, responses, all_ones)
        if per_response:
            by_response[name] = x
            return None
        return x

    def per_token(name: str, x: Tensor | None) -> Tensor | None:
        return None if x is None else checks.floats(name, x, logits)

    if ref_logprobs is None and objective.kl_coef != 0:
        raise ValueError(
            f"objective {objective.name} has kl_coef={objective.kl_coef} and needs ref_logprobs"
        )
    if entropy_weights is not None and objective.entropy_coef == 0:
        raise ValueError(
            f"entropy_weights are for the entropy term, and objective {objective.name} has none "
            "(entropy_coef=0)"
        )
    corrects = objective.rollout_mode != "none"
    if corrects != (rollout_logprobs is not None) and objective.function is None:
        raise ValueError(
            f"objective {objective.name} has rollout_mode={objective.rollout_mode!r} and "
            + ("needs rollout_logprobs" if corrects else "no use for rollout_logprobs")
        )
    has_reference = objective.kl_coef != 0 or objective.function is not None
    tokens = Tokens(
        old_logprobs=per_token("old_logprobs", old_logprobs),
        advantages=value("advantages", advantages),  # pyright: ignore[reportArgumentType]
        weights=None,  # pyright: ignore[reportArgumentType]
        ref_logprobs=per_token("ref_logprobs", ref_logprobs) if has_reference else None,
        importance_weights=value("importance_weights", importance_weights),
        log_ratio=None,
        rollout_logprobs=per_token("rollout_logprobs", rollout_logprobs),
        entropy_weights=None,
    )
    one_ratio = objective.by_response
    if response_log_ratio is not None:
        if not one_ratio:
            raise ValueError(
                f"response_log_ratio is for objectives with one ratio per response, and "
                f"{objective.name} has one per token"
            )
        if objective.surrogate in WHOLE_RESPONSE:
            raise ValueError(
                f"response_log_ratio is not all that objective {objective.name} wants of a "
                "response: each must be whole in a call"
            )
        by_response["log_ratio"] = checks.per_response(
            "response_log_ratio",
            response_log_ratio,
            logits,
            responses,
            checks.FLOATS,
            torch.float32,
        )
    if response_lengths is not None:
        if one_ratio and response_log_ratio is None:
            raise ValueError(
                f"response_lengths means that responses are not whole in this call, and objective "
                f"{objective.name} takes one ratio of a whole response: pass response_log_ratio "
                f"[{responses}] too, its log-ratio"
            )
        response_lengths = checks.integers("response_lengths", response_lengths)
        response_lengths = checks.per_response(
            "response_lengths", response_lengths, logits, responses, checks.INTEGERS, torch.int64
        )
    dropped = None
    if drop_nonfinite:
        known = (tokens.old_logprobs, tokens.rollout_logprobs)
        finite = [x.isfinite() for x in known if x is not None]
        finite += [] if found is None else [found]
        token_mask, dropped = checks.without(finite, token_mask)
    skip_zero = None
    if skip_zero_advantage and not objective.pulls_without_advantage:
        skip_zero = by_response.get("advantages", tokens.advantages)
    responses_total = checks.total("num_responses", num_responses, logits)
    tokens_total = checks.total("num_tokens", num_tokens, logits)
    length_total = checks.total("max_length", max_length, logits)
    aggregation = "token-sum" if weights is not None else objective.aggregation
    if max_length is None and aggregation == "seq-mean-token-sum-norm":
        raise ValueError(
            f"aggregation={aggregation!r} needs max_length, the same in every micro-batch"
        )
    ratio_by_response = one_ratio and response_log_ratio is None
    grouping = Grouping(
        mask=token_mask,
        lengths=row_lengths,
        response_lengths=response_lengths,
        weights=per_token("weights", weights),
        aggregation=AGGREGATIONS.index(aggregation),
        num_responses=responses_total[0],
        num_tokens=tokens_total[0],
        max_length=length_total[0],
        num_responses_on_device=responses_total[1],
        num_tokens_on_device=tokens_total[1],
        max_length_on_device=length_total[1],
        skip_zero=skip_zero,
        skip_by_response="advantages" in by_response,
        skip_whole_responses=ratio_by_response,
    )
    return Batch(
        backend=backend,
        objective=objective,
        grouping=grouping,
        tokens=tokens,
        by_response=by_response,
        entropy_weights=per_token("entropy_weights", entropy_weights),
        dropped=dropped,
        ratio_by_response=ratio_by_response,
        rows=_NO_ROWS,
        options=Options(1.0, objective.entropy_coef != 0),
        loss_scale=None,
        inplace=False,
    )


def with_rows(
    batch: Batch,
    logits: Tensor,
    target_ids: Tensor,
    *,
    temperature: float | Tensor,
    logit_softcap: float | None,
    topk_ids: Tensor | None,
    topk_logprobs: Tensor | None,
    old_logits: Tensor | None,
    loss_scale: float | Tensor | None,
    with_entropy: bool,
    inplace: bool,
    shard: Shard | None = None,
) -> Batch:
    """And what is said of the logits."""
    objective, by_response = batch.objective, dict(batch.by_response)
    number, temperatures = 1.0, None
    if isinstance(temperature, Tensor):
        lengths = batch.grouping.lengths
        responses = logits.shape[0] if lengths is None else lengths.shape[0]
        temperatures, per_response = checks.per_token_or_response(
            "temperature",
            checks.temperatures(temperature, logits, batch.grouping.mask),
            logits,
            responses,
            False,
        )
        if per_response:
            by_response["temperatures"], temperatures = temperatures, None
    else:
        number = checks.temperature_number(temperature)
    topk_ids, topk_logprobs = checks.topk(objective, topk_ids, topk_logprobs, logits)
    rows = Rows(
        target_ids=checks.rows_of("target_ids", target_ids, logits, checks.IDS, torch.int64),
        temperatures=temperatures,
        topk_ids=topk_ids,
        topk_logprobs=topk_logprobs,
        old_logits=checks.old_logits(objective, old_logits, logits, batch.backend),
    )
    return replaced(
        batch,
        by_response=by_response,
        rows=rows,
        options=Options(
            number,
            with_entropy or objective.entropy_coef != 0,
            checks.softcap_number(logit_softcap),
        ),
        loss_scale=checks.loss_scale(loss_scale, logits),
        inplace=inplace,
        shard=shard,
    )


def targets_of(
    logits: Tensor,
    target_ids: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    logit_softcap: float | None,
    with_entropy: bool,
    backend: str,
) -> tuple[Targets, Options]:
    """The same for `selected_logprobs`."""
    token_mask = None if mask is None else checks.mask_of(mask, logits)
    number, temperatures = 1.0, None
    if isinstance(temperature, Tensor):
        temperatures = checks.temperatures(temperature, logits, token_mask)
        temperatures = checks.floats("temperature", temperatures, logits)
    else:
        number = checks.temperature_number(temperature)
    ids = checks.targets(target_ids, logits)
    softcap = checks.softcap_number(logit_softcap)
    return Targets(ids, token_mask, temperatures), Options(number, with_entropy, softcap)
