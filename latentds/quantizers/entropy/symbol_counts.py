"""Frequency tables counted on integers."""
# N patches, C channels, n cells, K classes, S symbols

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from latentds.quantizers.entropy.rans import LARGEST, TOTAL

# A table's mixture with a geometric law: integers that no training patch showed still have a code.
GEOMETRIC_SHARE, GEOMETRIC_COUNT = 0.005, 8
# An extent ends where a value more would cost every other one more than its escapes do:
# 2 / 4096 of a table are 0.0007 bits a value, an escape's byte is 8 bits.
TAIL_SHARE = 1e-4
VALUES = 2 * LARGEST + 1


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
