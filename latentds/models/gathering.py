"""Figures of the global batch: features and means gathered over the ranks.

Without `torch.distributed`, or with one rank, everything is this process's own.
"""
# B batch of a rank, R ranks, D features

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Gather(torch.autograd.Function):
    """Rows of all ranks in rank order; their gradient, times R, goes back to the own rows.

    For a loss that every rank computes alike, of all rows. Gradients of weights are *averaged* over
    ranks (DDP, DeepSpeed), while each rank's graph reaches the weights through its own rows alone:
    the sum over ranks would be the gradient, so the average needs the factor R. The own rows'
    gradient is whole without asking the others: nothing is sent in the backward pass.
    """

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        """Rows (R * B, D) of this rank's (B, D); B is the same on every rank."""
        context.rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(ranks())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        """The own rows' part of the gradient, times R."""
        start = dist.get_rank() * context.rows
        return gradients[0][start : start + context.rows] * ranks()


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks, float (R * B, D), differentiable in the own ones. Collective."""
    gathered: Tensor = Gather.apply(rows) if ranks() > 1 else rows
    return gathered


class GatheredCenter(nn.Module):
    """Moving average of the rows of all ranks, however many each of them has.

    momentum  share of the old centre that stays

    Rows are added pass by pass, and the centre moves once, by the mean of all of them: how many
    passes or ranks they came in makes no difference. lightly's `Center` moves with every pass, and
    averages the ranks' means: another number where ranks mask different counts of tokens, and NaN
    where one masks none.
    """

    value: Tensor

    def __init__(self, size: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(1, size))
        self.sums: Tensor | None = None  # float32 (D + 1,): of rows since the last move, and count

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take rows (n, D), n of 0 too, into the next move."""
        sums = torch.cat([rows.sum(0), rows.new_full((1,), len(rows))]).float()
        self.sums = sums if self.sums is None else self.sums + sums

    @torch.no_grad()
    def move(self) -> None:
        """Move towards the mean of all ranks' rows; stay where there are none. Collective."""
        if self.sums is None:
            return
        sums, self.sums = self.sums, None
        if ranks() > 1:
            dist.all_reduce(sums)
        count = sums[-1]
        mean = torch.where(count > 0, sums[:-1] / count.clamp(min=1), self.value)
        self.value.lerp_(mean, 1 - self.momentum)
