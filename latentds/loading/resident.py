"""Resident: the stored bytes of all that a loader may draw, on its device, gathered by place."""
# N patches held, B patches of a batch

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentds.errors import DamagedPackError
from latentds.loading.array import check_fits, fill
from latentds.loading.dataset import LatentDataset


@dataclasses.dataclass(frozen=True, eq=False)
class HeldPlaces:
    """Where patches lie among the resident ones.

    rows   of every set, those held: ascending
    first  place of every set's first
    """

    rows: Sequence[np.ndarray | range]
    first: Sequence[int]

    def __call__(self, which: int, rows: np.ndarray) -> np.ndarray:
        """Places int64 of rows of one set's patch table."""
        held = self.rows[which]
        found = rows - held.start if isinstance(held, range) else np.searchsorted(held, rows)
        return np.asarray(found + self.first[which], np.int64)


class Resident:
    """Stored bytes of every patch that a data set's order may draw.

    dataset  whose batches have places for codes from now on; damaged packs that it may replace
             (`max_bad`) are found here and left out
    device   where the bytes lie, and where batches' places are

    codes    uint8 (N, *codes_shape)
    gathered patches so far
    raises   InputError where they do not fit
    """

    def __init__(self, dataset: LatentDataset, device: torch.device) -> None:
        rows = [sampler.chosen for sampler in dataset.samplers]
        counts = [len(part) for part in rows]
        shape = dataset.shards.manifest.contract.codes_shape
        each = dataset.shards.manifest.contract.bytes_per_patch
        check_fits(dataset.shards, sum(counts), device, each)
        self.codes = torch.empty((sum(counts), *shape), dtype=torch.uint8, device=device)
        first = np.cumsum([0, *counts]).tolist()
        for which, shards in enumerate(dataset.sets):
            read = functools.partial(read_sound, dataset, which)
            fill(self.codes[first[which] : first[which + 1]], shards, rows[which], read)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # other streams will read what this one has copied
        dataset.collator.places = HeldPlaces(rows, first[:-1])
        self.gathered = 0

    def __call__(self, places: Tensor) -> Tensor:
        """Stored bytes uint8 (B, *codes_shape) at places int64 (B,) on the device."""
        self.gathered += len(places)
        return self.codes.index_select(0, places)

    def before(self, decode: Callable[..., Any]) -> Callable[[Tensor, Tensor | None], Any]:
        """What takes places where `decode` takes stored bytes."""
        return lambda places, books: decode(self(places), books)


def read_sound(dataset: LatentDataset, which: int, rows: np.ndarray) -> np.ndarray:
    """Stored bytes of rows of one set, zeros for packs that are damaged and noted as such."""
    shards = dataset.sets[which]
    packs = shards.packs_of(rows)
    while True:
        bad = [pack for other, pack in dataset.bad if other == which]
        sound = ~np.isin(packs, bad)
        try:
            found = shards.read_codes(rows[sound])
        except DamagedPackError as error:
            dataset.note_bad(error)
            continue
        if sound.all():
            return found
        whole = np.zeros((len(rows), *found.shape[1:]), np.uint8)
        whole[sound] = found
        return whole
