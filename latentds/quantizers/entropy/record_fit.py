"""Fit the codebook of entropy-coded records: the steps, the model, tables counted on latents."""
# N patches, C latent channels, h w latent cells (in scan order where flat), K classes, S symbols

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentds.errors import ShapeError
from latentds.quantizers.entropy import record_encoding as encoding
from latentds.quantizers.entropy.contexts import scan_of
from latentds.quantizers.entropy.native_model import native_model
from latentds.quantizers.entropy.rans import COST_BITS, HEAD_BYTES, LARGEST
from latentds.quantizers.entropy.record_codebook import EntropyCodebook
from latentds.quantizers.entropy.record_model import MAX_STEPS, lanes_for
from latentds.quantizers.entropy.table_fit import count_integers, count_tables, fit_model

MAX_FIT_PATCHES = 512  # 1,024 change the bytes of other patches by less than 0.1 %
# Octaves of the steps around the one that spends the bytes on average; 256 steps are 1.4 % apart,
# so that half a step, what a patch leaves unused on average, is 0.02 dB.
FINER, COARSER = 2.0, 3.0
RANGE_PATCHES = 64  # that tell which sizes are possible: a tenth of a second each
ROUNDS = 3  # steps by the tables, then model and tables anew at these steps
CLASSES, PARENTS = 8, 4  # 16 classes save another 0.3 %, all earlier channels as parents 0.3 %


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyFitReport:
    """What a codebook does to the latents it was fitted on.

    patches        of the fit
    nominal_step   at which they take the record's bytes on average, a table a channel
    bits_a_value   by the tables, at every patch's own step
    zeros          share of integers that are zero
    mse            mean squared error of the latents times their gains
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
    classes: int = CLASSES,
) -> tuple[EntropyCodebook, EntropyFitReport]:
    """A codebook for latents distributed like these, and what it does to them.

    latents       float (N, C, h, w), or an iterable of such batches, in random order: the first
                  512 patches are used
    record_bytes  R
    gains         float (C,): how many integers a unit of a channel is worth at step 1, the same for
                  a network trained with a rate term or for one whose error is told by mean
                  squared error; None for 1
    lanes         by default 32, of small records one for 128 bytes or for four cells
    classes       K; 1 for one table a channel, without a model
    raises        ShapeError or ValueError for latents that cannot be used, and for bytes that they
                  cannot reach, with those that they can
    """
    sample = collect(latents)
    channels, height, width = (int(size) for size in sample.shape[1:])
    weights = np.ones(channels, np.float32) if gains is None else np.asarray(gains, np.float32)
    if weights.shape != (channels,):
        raise ShapeError(f"gains have shape {weights.shape} for {channels} channels")
    cells = torch.from_numpy(scan_of(height, width).cells)
    values = sample.flatten(2).index_select(2, cells) * torch.from_numpy(weights)[:, None]
    lanes = lanes or lanes_for(record_bytes, height * width)
    shape = (channels, height, width)
    try:
        if record_bytes > encoding.most_bytes(shape):
            raise ValueError("they would not be filled")
        codebook, nominal = plain_codebook(values, shape, record_bytes, lanes)
        codebook = dataclasses.replace(codebook, gains=weights)
        encoding.check_reach(codebook)
        for _ in range(ROUNDS):
            integers = at_own_steps(values, codebook)[0]
            codebook = refit(integers, codebook, classes)
        encoding.check_reach(codebook)
    except ValueError as error:
        raise ValueError(
            f"records of {record_bytes} bytes: no tables of these latents bring every patch "
            f"to that size; {possible_bytes(values, shape)}"
        ) from error
    return codebook, report(values, nominal, codebook)


def plain_codebook(
    values: Tensor, latents_shape: tuple[int, int, int], record_bytes: int, lanes: int
) -> tuple[EntropyCodebook, float]:
    """A codebook of a table a channel, and its nominal step, of values (N, C, h*w)."""
    nominal = nominal_step(values, record_bytes - HEAD_BYTES - int(1.4 * lanes))
    integers, channels = rounded(values, nominal), latents_shape[0]
    codebook = EntropyCodebook(
        latents_shape=latents_shape,
        record_bytes=record_bytes,
        lanes=lanes,
        steps=(nominal * 2.0 ** np.linspace(-FINER, COARSER, MAX_STEPS)).astype(np.float32),
        gains=np.ones(channels, np.float32),
        tables=count_tables(integers, None, 1),
        order=order_of(integers),
        parents=np.zeros((channels, 0), np.int16),
        weights=np.zeros((channels, 3, 2), np.int16),
        thresholds=np.zeros((channels, 0), np.int32),
    )
    return codebook, nominal


def possible_bytes(values: Tensor, latents_shape: tuple[int, int, int]) -> str:
    """What record sizes tables of such values can reach, in words: tried, a sixteenth apart."""
    most, found = encoding.most_bytes(latents_shape), []
    for sixteenths in range(1, 17):
        record_bytes = most * sixteenths // 16
        try:
            lanes = lanes_for(record_bytes, math.prod(latents_shape[1:]))
            tried = plain_codebook(values[:RANGE_PATCHES], latents_shape, record_bytes, lanes)[0]
            encoding.check_reach(tried)
        except ValueError:
            continue
        found.append(record_bytes)
    if not found:
        return "no number of bytes will do: use additive codes"
    return f"possible are about {found[0]:,} to {found[-1]:,}, or additive codes"


def refit(integers: Tensor, codebook: EntropyCodebook, classes: int) -> EntropyCodebook:
    """The codebook with model and tables of these integers (N, C, h*w)."""
    tables = count_tables(integers, None, 1)
    plain = dataclasses.replace(
        codebook,
        tables=tables,
        thresholds=np.zeros((len(codebook.gains), 0), np.int32),
    )
    if classes == 1:
        return plain
    model = fit_model(integers, plain, classes, PARENTS)
    shell = dataclasses.replace(
        plain,
        parents=model["parents"],
        weights=model["weights"],
        thresholds=model["thresholds"],
        tables=np.repeat(tables, classes, axis=0),
    )
    from latentds.quantizers.entropy.native_rounding import find_classes

    found, known = np.empty(integers.shape, np.int32), native_model(shell)
    for patch, into in zip(integers.numpy(), found, strict=True):
        find_classes(patch, known, into)
    return dataclasses.replace(
        shell, tables=count_tables(integers, torch.from_numpy(found), classes)
    )


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


def rounded(values: Tensor, step: float) -> Tensor:
    """int32 (N, C, h*w): the nearest integers at a step, within -127..127."""
    return (values / step).round_().clamp_(-LARGEST, LARGEST).int()


def nominal_step(values: Tensor, stream_bytes: int) -> float:
    """The step at which the integers' entropy, a table a channel, is `stream_bytes` a patch."""
    spread = float(values.std()) or 1.0
    low, high = spread / 256, spread * 256
    for _ in range(16):
        middle = (low * high) ** 0.5
        counts = count_integers(rounded(values, middle)).astype(np.float64)
        shares = counts / counts.sum(1, keepdims=True)
        bits = -(counts * np.log2(np.maximum(shares, 1e-30))).sum() / len(values)
        low, high = (middle, high) if bits > 8 * stream_bytes else (low, middle)
    return high


def order_of(integers: Tensor) -> np.ndarray:
    """int16 (C,): channels by mean magnitude, the largest first: those tell most of others."""
    means = integers.abs().double().mean((0, 2))
    return means.argsort(descending=True, stable=True).numpy().astype(np.int16)


def at_own_steps(
    values: Tensor, codebook: EntropyCodebook
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Integers int32 (N, C, h*w) of every patch at its level, their classes, the levels (N,)."""
    scaled = values.numpy()
    levels = encoding.finest_levels(scaled, codebook, codebook.rate_weight)
    integers, classes = encoding.integers_at(scaled, levels, codebook, codebook.rate_weight)
    return torch.from_numpy(integers.clip(-LARGEST, LARGEST)), classes, levels


def report(values: Tensor, nominal: float, codebook: EntropyCodebook) -> EntropyFitReport:
    """What the codebook does to the sample."""
    integers, classes, levels = at_own_steps(values, codebook)
    last = len(codebook.steps) - 1
    steps = torch.from_numpy(codebook.steps[levels.clip(max=last)])
    errors = values - integers * steps[:, None, None]
    bits, _ = encoding.bits_by_tables(integers.numpy(), classes, codebook)
    return EntropyFitReport(
        patches=len(values),
        nominal_step=nominal,
        bits_a_value=float(bits.sum()) / (1 << COST_BITS) / integers.numel(),
        zeros=float((integers == 0).double().mean()),
        mse=float(errors.double().square().mean()),
        underfull=float((levels == 0).mean()),
        dropped=float((levels > last).mean()),
    )
