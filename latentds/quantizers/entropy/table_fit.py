"""Fit the tables of records: weights and classes that name a value's table, and its frequencies."""
# N patches, C channels, n cells, P parents, K classes, S symbols, M values of a phase, F features

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from latentds.quantizers.entropy.contexts import CAP, PHASES, Scan, scan_of
from latentds.quantizers.entropy.rans import LARGEST, TOTAL
from latentds.quantizers.entropy.record_model import RecordModel

UNIT = 1024  # of an activity: a magnitude of 1
FEATURE_UNIT = 16  # of blurred magnitudes and of cells around
MAX_VALUES = 1 << 16  # of a phase: weights are known to a per cent from far fewer
RIDGE = 1e-4
# Where classes end, in shares of a channel's values: finer towards the top, where magnitudes vary.
SHARES = (0.0, 0.25, 0.5, 0.7, 0.82, 0.9, 0.95, 0.985, 1.0)
# A table's mixture with a geometric law: integers that no training patch showed still have a code.
GEOMETRIC_SHARE, GEOMETRIC_COUNT = 0.005, 8
# An extent ends where a value more would cost every other one more than its escapes do:
# 2 / 4096 of a table are 0.0007 bits a value, an escape's byte is 8 bits.
TAIL_SHARE = 1e-4
VALUES = 2 * LARGEST + 1


def fit_model(
    integers: Tensor, codebook: RecordModel, classes: int, parents: int
) -> dict[str, np.ndarray]:
    """`parents`, `weights` and `thresholds` of a codebook for integers int32 (N, C, h*w).

    codebook  whose size, order and extents are used
    """
    scan = scan_of(*codebook.latents_shape[1:])
    caps = torch.from_numpy(np.minimum(codebook.extents + 1, CAP)).to(integers)
    magnitudes = integers.abs().minimum(caps[:, None])
    blurred = torch.from_numpy(blur(magnitudes.numpy(), scan, *codebook.latents_shape[1:]))
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
            part = slice(scan.ends[phase - 1] if phase else 0, scan.ends[phase])
            around = None
            if phase:  # four times: on the scale of a blurred channel, 16 times a magnitude
                around = 4 * target[:, :, scan.neighbours[phase - 1]].sum(2, dtype=torch.int32)
            above = [blurred[:, name : name + 1, part] for name in names]
            weights = fit_weights(target[:, :, part], around, above, stride)
            found["weights"][channel, phase, : len(weights)] = weights
            expected = torch.full_like(target[:, :, part], int(weights[0]))
            for weight, seen in zip(weights[1:].tolist(), [around, *above], strict=True):
                expected += 0 if seen is None else weight * seen
            activities.append(expected.flatten())
        found["thresholds"][channel] = ends_of(torch.cat(activities), classes)
    return found


def blur(magnitudes: np.ndarray, scan: Scan, height: int, width: int) -> np.ndarray:
    """int32 (N, C, h*w) of magnitudes so: 3x3 sums weighted 1 2 1, edge cells repeated outside."""
    lines = magnitudes[:, :, scan.inverse].reshape(*magnitudes.shape[:2], height, width)
    padded = np.pad(lines, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    down = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    sums = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    smoothed: np.ndarray = sums.reshape(magnitudes.shape)[:, :, scan.cells]
    return smoothed


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


def count_integers(integers: Tensor, classes: Tensor | None = None, count: int = 1) -> np.ndarray:
    """int64 (K * C, 255): how often each of -127..127 occurs in (N, C, n), a class and channel."""
    channels = integers.shape[1]
    rows = torch.arange(channels)[None, :, None]
    if classes is not None:
        rows = rows + channels * classes
    places = (rows * VALUES + (integers + LARGEST)).flatten()
    counts = torch.bincount(places, minlength=count * channels * VALUES)
    return counts.view(-1, VALUES).numpy()


def count_tables(integers: Tensor, classes: Tensor | None, count: int) -> np.ndarray:
    """uint16 (K, C, S) frequencies of integers int32 (N, C, n) of -127..127.

    classes  int32 (N, C, n) in 0..K-1, None for one
    count    K
    """
    channels = integers.shape[1]
    counts = count_integers(integers, classes, count).reshape(count, channels, VALUES)
    distance = np.abs(np.arange(VALUES) - LARGEST)
    extents = extents_of(counts.sum(0), distance)
    tables = np.zeros((count, channels, VALUES + 1), np.int64)
    for channel in range(channels):
        prior = counts[:, channel].sum(0)
        for number in range(count):
            shares = smoothed(counts[number, channel], prior, distance)
            coded = distance <= extents[channel]
            tables[number, channel] = frequencies_of(shares, coded)
    widest = int(extents.max())
    kept = [*range(LARGEST - widest, LARGEST + widest + 1), VALUES]
    return tables[:, :, kept].astype(np.uint16)


def extents_of(counts: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """int64 (C,): the largest magnitude of each channel that has a code of its own, at least 1."""
    extents = np.ones(len(counts), np.int64)
    for channel, row in enumerate(counts):
        by_magnitude = np.bincount(distance, weights=row)
        beyond = by_magnitude[::-1].cumsum()[::-1] / max(1, row.sum())
        extents[channel] = max(1, int((beyond >= TAIL_SHARE).sum()) - 1)
    return extents


def smoothed(counts: np.ndarray, prior: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """float64 (255,) shares: counts and a few of a geometric law with the counts' mean."""
    source = counts if counts.sum() >= GEOMETRIC_COUNT else counts + prior
    mean = ((source * distance).sum() + 0.05) / (source.sum() + 1)
    law = (mean / (1 + mean)) ** distance
    weight = max(GEOMETRIC_COUNT, GEOMETRIC_SHARE * counts.sum())
    shares: np.ndarray = counts + weight * law / law.sum()
    total: float = shares.sum()
    return shares / total


def frequencies_of(shares: np.ndarray, coded: np.ndarray) -> np.ndarray:
    """int64 (256,) of sum 4096: at least 1 where coded, the rest of the shares to the escape."""
    escape = max(1, round(float(shares[~coded].sum()) * TOTAL))
    left = TOTAL - escape - int(coded.sum())
    exact = np.where(coded, shares, 0)
    exact = exact / exact.sum() * left
    frequencies = np.where(coded, 1 + np.floor(exact).astype(np.int64), 0)
    frequencies[frequencies.argmax()] += TOTAL - escape - frequencies.sum()
    return np.append(frequencies, escape)
