"""Fit what names a value's table: weights of the magnitudes around it, and where classes end."""
# N patches, C channels, P parents, K classes, M values of a phase, F features

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from latentds.quantizers.entropy.coder_tables import model_tables
from latentds.quantizers.entropy.contexts import CAP, PHASES, activity, around_of, blur
from latentds.quantizers.entropy.record_model import RecordModel

UNIT = 1024  # of an activity: a magnitude of 1
FEATURE_UNIT = 16  # of blurred magnitudes and of cells around
MAX_VALUES = 1 << 16  # of a phase: weights are known to a per cent from far fewer
RIDGE = 1e-4
# Where classes end, in shares of a channel's values: finer towards the top, where magnitudes vary.
SHARES = (0.0, 0.25, 0.5, 0.7, 0.82, 0.9, 0.95, 0.985, 1.0)


def fit_model(
    integers: Tensor, codebook: RecordModel, classes: int, parents: int
) -> dict[str, np.ndarray]:
    """`parents`, `weights` and `thresholds` of a codebook for integers int32 (N, C, h*w).

    codebook  whose size, order and extents are used
    """
    model = model_tables(codebook, integers.device)
    magnitudes = model.magnitudes(integers)
    blurred = blur(magnitudes, model.scan, *model.size)
    channels = integers.shape[1]
    found: dict[str, np.ndarray] = {
        "parents": np.full((channels, parents), -1, np.int16),
        "weights": np.zeros((channels, PHASES, parents + 2), np.int16),
        "thresholds": np.zeros((channels, classes - 1), np.int32),
    }
    order = codebook.order.tolist()
    stride = max(1, integers.numel() // channels // MAX_VALUES)
    for place, channel in enumerate(order):
        earlier = order[:place]
        target = magnitudes[:, channel : channel + 1]
        activities = []
        chosen = choose_parents(target, blurred[:, earlier], parents, stride)
        names = [earlier[i] for i in chosen]
        found["parents"][channel, : len(names)] = names
        for phase in range(PHASES):
            part = model.scan.phase(phase)
            around = around_of(target, model.scan, phase)
            above = [blurred[:, name : name + 1, part] for name in names]
            weights = fit_weights(target[:, :, part], around, above, stride)
            found["weights"][channel, phase, : len(weights)] = weights
            shaped = torch.from_numpy(weights.astype(np.int32))[:, None, None]
            total = activity(shaped, around, above)
            activities.append(torch.as_tensor(total).expand(target[:, :, part].shape).flatten())
        found["thresholds"][channel] = ends_of(torch.cat(activities), classes)
    return found


def choose_parents(target: Tensor, blurred: Tensor, parents: int, stride: int) -> list[int]:
    """Which of the channels (N, F, h*w) tell most of the target's magnitudes (N, 1, h*w)."""
    count = blurred.shape[1]
    if count <= parents:
        return list(range(count))
    features = blurred.transpose(0, 1).flatten(1)[:, ::stride].T.double() / FEATURE_UNIT
    solution = solve(features, target.flatten()[::stride].double())
    told = solution[1:].clamp(min=0) * features.std(0)
    return sorted(told.topk(parents).indices.tolist())


def fit_weights(
    target: Tensor, around: Tensor | None, above: list[Tensor], stride: int
) -> np.ndarray:
    """int16 (2 + parents,) weights of one phase: a constant, the cells around, the parents."""
    features = [
        values.flatten()[::stride] for values in ([] if around is None else [around]) + above
    ]
    stacked = torch.stack(features, 1).double() / FEATURE_UNIT if features else torch.zeros(
        (len(target.flatten()[::stride]), 0), dtype=torch.float64)  # fmt: skip
    solution = solve(stacked, target.flatten()[::stride].double())
    constant, rest = solution[:1] * UNIT, solution[1:] * UNIT / FEATURE_UNIT
    if around is None:
        rest = torch.cat([torch.zeros(1, dtype=torch.float64), rest])
    limit = np.iinfo(np.int16).max
    return torch.cat([constant, rest]).round().clamp(-limit, limit).numpy().astype(np.int16)


def solve(features: Tensor, target: Tensor) -> Tensor:
    """float64 (1 + F,): least squares of a constant and features (M, F), with a small ridge."""
    matrix = torch.cat([torch.ones_like(target)[:, None], features], 1)
    gram = matrix.T @ matrix / len(matrix)
    gram += RIDGE * torch.eye(len(gram), dtype=torch.float64)
    solution: Tensor = torch.linalg.solve(gram, matrix.T @ target / len(matrix))
    return solution


def ends_of(activities: Tensor, classes: int) -> np.ndarray:
    """int32 (K - 1,) ascending thresholds that part activities into classes."""
    places = np.linspace(0, 1, classes + 1)[1:-1]
    shares = np.interp(places, np.linspace(0, 1, len(SHARES)), SHARES)
    ascending = activities.sort().values.numpy()
    ends: np.ndarray = ascending[(shares * (len(ascending) - 1)).astype(int)]
    return ends.astype(np.int32)


assert CAP * FEATURE_UNIT < 256
