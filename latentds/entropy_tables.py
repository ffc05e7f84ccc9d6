"""A codebook's numbers as tensors on one device, made once, and the classes of known integers."""
# B patches, C channels, P parents of a channel, K classes, S symbols, n cells of a phase

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from latentds import rans
from latentds.entropy_contexts import (
    CAP,
    PHASES,
    Scan,
    activity,
    around_of,
    blur,
    classes_of,
    scan_of,
)

if TYPE_CHECKING:
    from latentds.entropy_codebook import EntropyCodebook

COST_BITS = 8  # costs are integers of 1/256 bit: their sums do not depend on the order
ESCAPE_BITS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class ModelTables:
    """What says which table codes a value.

    weights     int32 (3, P + 2, C, 1), a phase first
    thresholds  int32 (K - 1, C, 1)
    parents     int64 (P, C), 0 where there is none: its weight is 0
    caps        int32 (C, 1): largest magnitude of a channel that neighbours see
    """

    scan: Scan
    size: tuple[int, int]
    weights: Tensor
    thresholds: Tensor
    parents: Tensor
    caps: Tensor

    def magnitudes(self, integers: Tensor, channels: slice = slice(None)) -> Tensor:
        """int32, integers' absolute values as far as neighbours see them: escapes are all alike."""
        return integers.abs().minimum(self.caps[channels])

    def classes(self, phase: int, around: Tensor | None, parents: list[Tensor],
                channels: slice = slice(None)) -> Tensor:  # fmt: skip
        """int32 classes of a phase's cells in some channels; see `activity`."""
        total = activity(self.weights[phase][:, channels], around, parents)
        return classes_of(torch.as_tensor(total), self.thresholds[:, channels])


@functools.lru_cache(maxsize=16)
def model_tables(codebook: EntropyCodebook, device: torch.device) -> ModelTables:
    """The model's tensors on a device."""
    _, height, width = codebook.latents_shape
    move = functools.partial(torch.as_tensor, dtype=torch.int32, device=device)
    return ModelTables(
        scan=scan_of(height, width, device),
        size=(height, width),
        weights=move(codebook.weights.transpose(1, 2, 0)[..., None].astype(np.int32)),
        thresholds=move(codebook.thresholds.T[..., None].astype(np.int32)),
        parents=move(codebook.parents.T.astype(np.int32).clip(0)).long(),
        caps=move(np.minimum(codebook.extents + 1, CAP)[:, None].astype(np.int32)),
    )


@functools.lru_cache(maxsize=16)
def decoding_table(codebook: EntropyCodebook, device: torch.device) -> Tensor:
    """int32 ((K * C + 1) * 4096); the last row is of one symbol, which takes no bits."""
    rows = codebook.tables.reshape(-1, codebook.tables.shape[2])
    idle = np.zeros((1, rows.shape[1]), rows.dtype)
    idle[0, 0] = rans.TOTAL
    return rans.decoding_table(np.concatenate([rows, idle])).to(device)


@dataclasses.dataclass(frozen=True, eq=False)
class EncodingTables:
    """Intervals and costs of every row's symbols, flat ((K * C + 1) * S), the idle row last.

    frequencies, starts  int32
    costs                int32, 1/256 bit, an escape's byte included
    savings              int32, 1/256 bit that the next integer towards zero takes less; 0 for
                         zero and for escapes
    """

    frequencies: Tensor
    starts: Tensor
    costs: Tensor
    savings: Tensor


@functools.lru_cache(maxsize=16)
def encoding_tables(
    codebook: EntropyCodebook, device: torch.device | None = None
) -> EncodingTables:
    """The encoder's tensors, on the CPU or a device."""
    symbols = codebook.tables.shape[2]
    rows = codebook.tables.reshape(-1, symbols).astype(np.int32)
    idle = np.zeros((1, symbols), np.int32)
    idle[0, 0] = rans.TOTAL
    rows = np.concatenate([rows, idle])
    bits = rans.PRECISION_BITS - np.log2(np.maximum(rows, 1))
    bits[:, -1] += ESCAPE_BITS
    costs = np.rint(bits * (1 << COST_BITS)).astype(np.int32)
    values = np.arange(symbols - 1) - codebook.magnitude
    savings = np.zeros_like(costs)
    savings[:, :-1] = costs[:, :-1] - costs[:, np.arange(symbols - 1) - np.sign(values)]
    return EncodingTables(
        frequencies=torch.from_numpy(rows.reshape(-1)).to(device),
        starts=torch.from_numpy((rows.cumsum(1, dtype=np.int32) - rows).reshape(-1)).to(device),
        costs=torch.from_numpy(costs.reshape(-1)).to(device),
        savings=torch.from_numpy(savings.reshape(-1)).to(device),
    )


def classes_at(integers: Tensor, codebook: EntropyCodebook) -> Tensor | None:
    """int32 (h*w, C, B) classes of integers int32 (h*w, C, B), cells in scan order.

    None where there is but one class. The patches come last, so that what is gathered by cell or
    channel lies side by side.
    """
    if len(codebook.tables) == 1:
        return None
    model = model_tables(codebook, integers.device)
    magnitudes = model.magnitudes(integers)
    blurred = blur(magnitudes, model.scan, *model.size, dim=0)
    parents = [blurred.index_select(1, index) for index in model.parents]
    classes = torch.empty_like(integers)
    for phase in range(PHASES):
        part = model.scan.phase(phase)
        around = around_of(magnitudes, model.scan, phase, dim=0)
        classes[part] = model.classes(phase, around, [p[part] for p in parents])
    return classes


def places_at(integers: Tensor, classes: Tensor | None, codebook: EntropyCodebook) -> Tensor:
    """int32 (h*w, C, B): place of every value in the encoder's flat tables."""
    _, channels, symbols = codebook.tables.shape
    extents = torch.from_numpy(codebook.extents).to(integers.device)[:, None]
    escaped = integers.abs() > extents
    places = (integers + codebook.magnitude).masked_fill_(escaped, symbols - 1)
    rows = torch.arange(channels, dtype=torch.int32, device=integers.device)
    places += symbols * rows[:, None]
    return places if classes is None else places.add_(classes, alpha=symbols * channels)


def costs_at(integers: Tensor, codebook: EntropyCodebook) -> Tensor:
    """int32 (h*w, C, B): cost of every value in 1/256 bit."""
    places = places_at(integers, classes_at(integers, codebook), codebook)
    return encoding_tables(codebook, integers.device).costs[places]


def decoded_values(codebook: EntropyCodebook) -> np.ndarray:
    """float32 (steps, C): what an integer's unit is worth."""
    scales: np.ndarray = codebook.steps[:, None] / codebook.gains[None, :]
    return scales
