"""Fit the codebook of entropy-coded records: the steps, and tables counted on training latents."""
# B patches, C latent channels, h w latent cells, S symbols

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentds import entropy_records, rans
from latentds.entropy_codebook import MAX_STEPS, EntropyCodebook
from latentds.errors import ShapeError

MAX_FIT_PATCHES = 1024
# Octaves of the steps around the one that spends the bytes on average; 256 steps are 1.4 % apart,
# so that half a step, what a patch leaves unused on average, is 0.02 dB.
FINER, COARSER = 2.0, 3.0
GEOMETRIC_SHARE = 0.005  # of a table: integers that no training patch showed still have a code
ROUNDS = 3  # tables, steps by these tables, tables at these steps: the fourth changes < 0.1 %
DEFAULT_LANES = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyFitReport:
    """What a codebook does to the latents it was fitted on.

    patches        of the fit
    nominal_step   at which they take the record's bytes on average
    bits_a_value   by the tables, at every patch's own step
    zeros          share of integers that are zero
    mse            mean squared error of the latents, weighted with the squared gains
    underfull      share of patches at the finest step: more bytes than they can use
    dropped        share of patches that lose channels: fewer bytes than they need
    """

    patches: int
    nominal_step: float
    bits_a_value: float
    zeros: float
    mse: float
    underfull: float
    dropped: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, rounded to what a sample can tell."""
        return {
            name: value if isinstance(value, int) else float(f"{value:.4g}")
            for name, value in dataclasses.asdict(self).items()
        }


def fit_entropy_codebook(
    latents: Tensor | np.ndarray | Iterable[Tensor],
    record_bytes: int,
    *,
    gains: np.ndarray | None = None,
    lanes: int | None = None,
) -> tuple[EntropyCodebook, EntropyFitReport]:
    """A codebook for latents distributed like these, and what it does to them.

    latents       float (N, C, h, w), or an iterable of such batches, in random order: the first
                  1,024 patches are used
    record_bytes  R
    gains         float (C,): how many integers a unit of a channel is worth at step 1, the same for
                  a network trained with a rate term or for one whose error is told by mean
                  squared error; None for 1
    lanes         by default the largest divisor of w up to 32
    raises        ShapeError or ValueError for latents that cannot be used, and for bytes that they
                  cannot reach, with those that they can
    """
    sample = collect(latents)
    channels, height, width = sample.shape[1:]
    weights = np.ones(channels, np.float32) if gains is None else np.asarray(gains, np.float32)
    if weights.shape != (channels,):
        raise ShapeError(f"gains have shape {weights.shape} for {channels} channels")
    lanes = lanes or max(n for n in range(1, DEFAULT_LANES + 1) if width % n == 0)
    scaled = sample * torch.from_numpy(weights)[:, None, None]
    nominal = nominal_step(scaled, record_bytes - entropy_records.HEAD_BYTES - 3 * lanes)
    octaves = np.linspace(-FINER, COARSER, MAX_STEPS)
    codebook = EntropyCodebook(
        latents_shape=(channels, height, width),
        record_bytes=record_bytes,
        lanes=lanes,
        steps=(nominal * 2.0**octaves).astype(np.float32),
        gains=weights,
        tables=count_tables(rounded(scaled, torch.tensor(nominal))),
    )
    for _ in range(ROUNDS):
        levels = levels_of(sample, codebook)
        tables = count_tables(at_levels(sample, levels, codebook))
        codebook = dataclasses.replace(codebook, tables=tables)
    return codebook, report(sample, nominal, codebook)


def collect(latents: Tensor | np.ndarray | Iterable[Tensor]) -> Tensor:
    """float32 (N, C, h, w) on the CPU, N <= MAX_FIT_PATCHES."""
    batches = [latents] if isinstance(latents, (Tensor, np.ndarray)) else latents
    kept: list[Tensor] = []
    for batch in batches:
        kept.append(torch.as_tensor(batch)[:MAX_FIT_PATCHES].detach().to("cpu", torch.float32))
        if sum(map(len, kept)) >= MAX_FIT_PATCHES:
            break
    sample = torch.cat(kept)[:MAX_FIT_PATCHES] if kept else torch.empty(0)
    if sample.ndim != 4 or not sample.numel():
        raise ShapeError(f"latents have shape {tuple(sample.shape)}, not (N, C, h, w) with N > 0")
    if not bool(torch.isfinite(sample).all()):
        raise ValueError("latents contain NaN or infinity; encode in float32")
    return sample


def rounded(scaled: Tensor, step: Tensor) -> Tensor:
    """int32 (N, C, h*w) of latents times their gains."""
    limit = entropy_records.LARGEST
    return (scaled.flatten(2) / step).round_().clamp_(-limit, limit).int()


def nominal_step(scaled: Tensor, stream_bytes: int) -> float:
    """The step at which the integers' entropy, a table a channel, is `stream_bytes` a patch."""
    spread = float(scaled.std()) or 1.0
    low, high = spread / 1024, spread * 1024
    for _ in range(24):
        middle = (low * high) ** 0.5
        counts = count_integers(rounded(scaled, torch.tensor(middle))).astype(np.float64)
        shares = counts / counts.sum(1, keepdims=True)
        bits = -(counts * np.log2(np.maximum(shares, 1e-30))).sum() / len(scaled)
        low, high = (middle, high) if bits > 8 * stream_bytes else (low, middle)
    return high


def count_integers(integers: Tensor) -> np.ndarray:
    """int64 (C, 255): how often each of -127..127 occurs in (N, C, h*w)."""
    limit = entropy_records.LARGEST
    channels, values = integers.shape[1], 2 * limit + 1
    rows = torch.arange(channels)[None, :, None] * values
    places = (integers + limit + rows).flatten()
    return torch.bincount(places, minlength=channels * values).view(channels, values).numpy()


def count_tables(integers: Tensor) -> np.ndarray:
    """uint16 (1, C, S) frequencies of integers (N, C, h*w); S is as small as they allow."""
    counts = count_integers(integers)
    limit = entropy_records.LARGEST
    distance = np.abs(np.arange(-limit, limit + 1))
    mean = (counts * distance).sum(1, keepdims=True) / counts.sum(1, keepdims=True) + 0.1
    tails = (mean / (1 + mean)) ** distance
    shares = counts / counts.sum(1, keepdims=True)
    shares += GEOMETRIC_SHARE * (tails / tails.sum(1, keepdims=True) - shares)
    rows = np.stack([frequencies_of(row) for row in shares])
    used = int(distance[(rows[:, :-1] > 0).any(0)].max(initial=1))
    kept = rows[:, [*range(limit - used, limit + used + 1), 2 * limit + 1]]
    return kept.astype(np.uint16)[None]


def frequencies_of(shares: np.ndarray) -> np.ndarray:
    """int64 (S,), sum 4096: shares (S - 1,) rounded, what rounds to 0 left to the escape behind."""
    scaled = np.floor(shares / shares.sum() * rans.TOTAL + 0.5).astype(np.int64)
    scaled[len(scaled) // 2] = max(1, scaled[len(scaled) // 2])
    left = shares[scaled == 0].sum() / shares.sum() * rans.TOTAL
    frequencies = np.append(scaled, max(1, round(float(left))))
    frequencies[frequencies[:-1].argmax()] += rans.TOTAL - frequencies.sum()
    return frequencies


def levels_of(sample: Tensor, codebook: EntropyCodebook) -> Tensor:
    """int64 (N,): the level of every patch by the tables' costs."""
    parts = sample.split(entropy_records.CHUNK)
    return torch.cat([entropy_records.finest_levels(part, codebook) for part in parts])


def at_levels(sample: Tensor, levels: Tensor, codebook: EntropyCodebook) -> Tensor:
    """int32 (N, C, h*w): every patch at its level."""
    integers = entropy_records.integers_at(sample, levels, codebook)
    return integers.clamp_(-entropy_records.LARGEST, entropy_records.LARGEST)


def report(sample: Tensor, nominal: float, codebook: EntropyCodebook) -> EntropyFitReport:
    """What the codebook does to the sample."""
    levels = levels_of(sample, codebook)
    integers = at_levels(sample, levels, codebook)
    last = len(codebook.steps) - 1
    steps = torch.from_numpy(codebook.steps.copy())[levels.clamp(max=last)]
    gains = torch.from_numpy(codebook.gains.copy())[:, None]
    errors = sample.flatten(2) * gains - integers * steps[:, None, None]
    costs = entropy_records.costs_of(integers, codebook)
    return EntropyFitReport(
        patches=len(sample),
        nominal_step=nominal,
        bits_a_value=float(costs.double().mean()) / (1 << entropy_records.COST_BITS),
        zeros=float((integers == 0).double().mean()),
        mse=float(errors.double().square().mean()),
        underfull=float((levels == 0).double().mean()),
        dropped=float((levels > last).double().mean()),
    )
