"""A codebook's numbers as tensors on one device, made once."""
# B patches, C channels, P parents of a channel, K classes, n cells of a phase

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
from torch import Tensor

from latentds.quantizers.entropy.contexts import (
    CAP,
    Scan,
    activity,
    classes_of,
    scan_of,
)
from latentds.quantizers.entropy.native_model import decoding_rows
from latentds.quantizers.entropy.record_model import RecordModel


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
def model_tables(codebook: RecordModel, device: torch.device) -> ModelTables:
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
def decoding_table(codebook: RecordModel, device: torch.device) -> Tensor:
    """`native_model.decoding_rows` on a device."""
    return torch.from_numpy(decoding_rows(codebook)).to(device)
