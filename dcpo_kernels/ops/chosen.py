"""The rows of a batch that go through matrix products, one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _capturing(marks: Tensor) -> bool:
    return marks.is_cuda and torch.cuda.is_current_stream_capturing()


def positions(marks: Tensor) -> Tensor | None:
    """[n] int64 on the CPU, the rows where `marks` is not 0; None: all of them.

    Their number has to be known here, so on a GPU this waits for it; but not while a CUDA graph is
    captured: then all rows go on, and those that don't count get a gradient of 0 all the same.
    """
    if _capturing(marks):
        return None
    rows = marks.flatten().cpu().nonzero().squeeze(1)
    return None if len(rows) == marks.numel() else rows


class Chosen:
    """Of `count` rows, those where `marks` is not 0; None: all. What is per row has any shape of
    `count` values, or of `count` times K; an output that was not asked for has none."""

    def __init__(self, count: int, marks: Tensor | None) -> None:
        self.all_rows = count
        rows = None if marks is None else positions(marks)
        self.count = count if rows is None else len(rows)
        self.rows = rows if rows is None or marks is None else rows.to(marks.device)
        self.marks = marks if marks is not None and _capturing(marks) else None

    def take(self, x: Tensor) -> Tensor:
        """[n] or [n, K]"""
        one = x.numel() == self.all_rows
        return self._at(x.reshape(-1) if one else x.reshape(self.all_rows, -1))

    def take_states(self, hidden: Tensor) -> Tensor:
        """[n, D]"""
        states = hidden.reshape(-1, hidden.shape[-1])
        if self.marks is not None:  # 0 * NaN would be in the weight's gradient
            return torch.where(self.marks.view(-1, 1) != 0, states, 0.0)
        return self._at(states)

    def _at(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x.index_select(0, self.rows)

    def take_part(self, x: Tensor, part: slice) -> Tensor:
        """Some of the chosen rows of [.., V], which may be strided."""
        rows = torch.arange(self.all_rows, device=x.device) if self.rows is None else self.rows
        if x.dim() == 2:
            return x[rows[part]]
        return x[rows[part] // x.shape[1], rows[part] % x.shape[1]]

    def take_each(self, record: Any) -> Any:
        return _each(self.take, record)

    def room_for(self, record: Any) -> Any:
        """For outputs: themselves where all rows are chosen."""
        return _each(
            lambda x: self.take(x) if self.rows is None else torch.empty_like(self.take(x)), record
        )

    def put(self, record: Any, values: Any, **fill: float) -> None:
        """Outputs from `room_for` to where they belong; the other rows hold 0, or `fill`."""
        if self.rows is None:
            return
        for name, x, chosen in zip(record._fields, record, values, strict=True):
            if x.numel():
                x.fill_(fill.get(name, 0))
                shape = (self.all_rows, *chosen.shape[1:])
                x.view(shape).index_copy_(0, self.rows, chosen)


def part_of(record: Any, part: slice) -> Any:
    return _each(lambda x: x[part], record)


def _each(change: Any, record: Any) -> Any:
    def changed(x: Any) -> Any:
        return change(x) if isinstance(x, Tensor) and x.numel() else x

    return type(record)(*(changed(x) for x in record))
