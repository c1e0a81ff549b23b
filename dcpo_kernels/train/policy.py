"""A model as its losses see it: from hidden states, or from logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dcpo_kernels.linear import linear_policy_loss, linear_selected_logprobs
from dcpo_kernels.losses import PolicyLoss, policy_loss, selected_logprobs
from dcpo_kernels.train.batch import Batch, response_logits, response_states
from dcpo_kernels.train.head import Head, head_of


class Policy:
    """head: None where its losses start from logits."""

    def __init__(self, model: Any, head: Head | None) -> None:
        self.model, self.head = model, head

    @classmethod
    def of(cls, model: Any, loss_from: str) -> Policy:
        """loss_from: as in `TrainConfig`."""
        head = None if loss_from == "logits" else head_of(model)
        if head is None and loss_from == "hidden":
            raise ValueError(
                f"loss_from='hidden': the logits of {type(model).__name__} are more than a linear "
                "projection of its hidden states, a scale and a soft cap; use 'logits'"
            )
        return cls(model, head)

    def run(self, batch: Batch) -> Tensor:
        """[N, D] hidden states or [N, V] logits of the response tokens."""
        of = response_logits if self.head is None else response_states
        return of(self.model, batch)

    def loss(self, made: Tensor, batch: Batch, *data: Any, **options: Any) -> PolicyLoss:
        """made: by `run`; may be overwritten."""
        if self.head is None:
            return policy_loss(made, batch.target_ids, *data, **options, inplace=True)
        head = self.head._asdict()
        return linear_policy_loss(
            made, head.pop("weight"), batch.target_ids, *data, **head, **options
        )

    def logprobs(self, made: Tensor, batch: Batch, **options: Any) -> tuple[Tensor, Tensor | None]:
        if self.head is None:
            return selected_logprobs(made, batch.target_ids, **options)
        head = self.head._asdict()
        weight = head.pop("weight")
        return linear_selected_logprobs(made, weight, batch.target_ids, **head, **options)
