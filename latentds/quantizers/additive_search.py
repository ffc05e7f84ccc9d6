"""The search for the rows of additive tables whose sum is nearest to a vector."""
# N vectors, S stages, K rows of a stage's table, D channels, W sums kept a vector

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

OVERLAP = 1e-9  # squared cosine between two stages' tables; float32 rounding leaves about 1e-14
GROUP = 32  # topk of 2,048 costs takes 5 times as long as the minima of 64 groups, then topk of 256


def is_separable(tables: np.ndarray) -> bool:
    """Whether every two stages' tables (S, K, D) vary in orthogonal directions.

    Then each stage can be searched by itself, and the greedy search is exact.
    """
    centred = tables.astype(np.float64)
    centred -= centred.mean(axis=1, keepdims=True)
    moments = np.einsum("skd,ske->sde", centred, centred).reshape(len(tables), -1)
    norms = np.linalg.norm(moments, axis=1)
    # trace(M_s M_t) is the squared norm of all inner products between two stages' rows
    overlap = moments @ moments.T
    limit = OVERLAP * np.outer(norms, norms)
    np.fill_diagonal(limit, np.inf)
    return bool((overlap <= limit).all())


def search(vectors: Tensor, table: Tensor, beam: int) -> Tensor:
    """Codes uint8 (N, S) of vectors (N, D), by the `beam` best sums after each stage.

    table  float32 (S, K, D) on the vectors' device
    """
    stages = len(table)
    # What all sums share is taken off both sides: |r|^2 - 2 r.t + |t|^2 cancels badly far from 0.
    shift = table[0].mean(0)
    residuals = (vectors - shift)[:, None]
    paths = torch.empty(len(vectors), 1, 0, dtype=torch.uint8, device=vectors.device)
    for stage in range(stages):
        rows = table[stage] - shift if stage == 0 else table[stage]
        keep = 1 if stage == stages - 1 else beam
        parents, codes = best_children(residuals, rows, keep)
        # Greedy and first stages have one parent: nothing to gather.
        if residuals.shape[1] > 1:
            residuals = residuals.gather(1, parents[..., None].expand(-1, -1, rows.shape[1]))
            paths = paths.gather(1, parents[..., None].expand(-1, -1, stage))
        residuals = residuals - rows[codes]
        paths = torch.cat([paths.expand(-1, codes.shape[1], -1), codes.byte()[..., None]], dim=2)
    return paths[:, 0]


def best_children(residuals: Tensor, rows: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Which sums (N, keep) go on with which rows: those that leave the least.

    residuals  (N, W, D)
    rows       (K, D)
    """
    count, width, channels = residuals.shape
    costs = torch.addmm(rows.square().sum(1), residuals.view(-1, channels), rows.T, alpha=-2)
    costs = costs.view(count, width, -1)
    if width > 1:
        costs = costs + residuals.square().sum(2, keepdim=True)
    flat = costs.flatten(1)
    keep = min(keep, flat.shape[1])
    best = flat.argmin(1, keepdim=True) if keep == 1 else smallest(flat, keep)
    return best // len(rows), best % len(rows)


def smallest(costs: Tensor, keep: int) -> Tensor:
    """Indices (N, keep) of the smallest costs (N, M), ascending by cost.

    Where M is large, only within the GROUP-sized groups whose own smallest are among the smallest:
    the same result, since any other group has `keep` better ones before it.
    """
    groups = costs.shape[1] // GROUP
    if costs.shape[1] % GROUP or groups <= keep:
        return costs.topk(keep, largest=False).indices
    grouped = costs.view(len(costs), groups, GROUP)
    chosen = grouped.amin(2).topk(keep, largest=False).indices
    candidates = grouped.gather(1, chosen[..., None].expand(-1, -1, GROUP)).flatten(1)
    best = candidates.topk(keep, largest=False).indices
    return chosen.gather(1, best // GROUP) * GROUP + best % GROUP
