"""Collator: draws of one or several sets to a Batch of codes."""
# B batch, S sets

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentds.core.randomness import patch_seeds
from latentds.errors import FormatError
from latentds.loading.batch import Batch
from latentds.loading.mixture import Vocabulary
from latentds.loading.sampling import Drawn
from latentds.quantizers.lookup import make_integers
from latentds.quantizers.scalar import AnyCodebook, dequantize_each
from latentds.store.reader import ShardSet


class Collator:
    """Reads what was drawn.

    sets     (S,)
    seed     of the run
    decode   stored, codes or latents
    columns, masks   what to carry besides
    class_to_idx     numbers of classes, where they are not the sets' own
    """

    def __init__(
        self,
        sets: Sequence[ShardSet],
        seed: int,
        decode: str,
        columns: tuple[str, ...],
        masks: bool,
        class_to_idx: Mapping[str, int] | None = None,
    ) -> None:
        self.sets, self.seed, self.decode = sets, seed, decode
        self.columns, self.masks = columns, masks
        self.vocabulary = Vocabulary(sets, class_to_idx)
        self.decoders = self.vocabulary.codebooks  # what codes become latents by
        self.integers = make_integers(self.decoders) if decode == "codes" else None
        # Of resident codes: where they lie, which batches then carry instead (`Resident`).
        self.places: Callable[[int, np.ndarray], np.ndarray] | None = None

    def collate(self, drawn: Drawn, valid: np.ndarray, bad: tuple[str, ...] = ()) -> Batch:
        """The batch of D draws; DamagedPackError where a pack cannot be read."""
        if len(self.sets) == 1:
            parts = [(np.arange(len(drawn)), self.read(0, drawn.rows))]
        else:
            parts = [
                (
                    places := np.flatnonzero(drawn.sets == which),
                    self.read(which, drawn.rows[places]),
                )
                for which in np.unique(drawn.sets).tolist()
            ]
        fields = scatter(parts, len(drawn))
        mixed = len(self.sets) > 1
        return Batch(
            **fields,
            rows=torch.from_numpy(drawn.rows),
            seeds=torch.from_numpy(patch_seeds(self.seed, drawn.passes, drawn.sets, drawn.rows)),
            valid=torch.from_numpy(valid),
            sets=torch.from_numpy(drawn.sets) if mixed else None,
            bad=bad,
        )

    def read(self, which: int, rows: np.ndarray) -> dict[str, Any]:
        """Fields of a Batch for patches of one set."""
        shards = self.sets[which]
        read = shards.read_codes if self.places is None else functools.partial(self.places, which)
        codes = torch.from_numpy(read(rows))
        manifest, table = shards.manifest, shards.patches[rows]  # by now on their way from disk
        books = self.vocabulary.books[which][shards.codebook_numbers(rows)]
        codebooks = self.vocabulary.codebooks
        if self.places is None:
            check_codes(shards, codes, books, codebooks)
        return {
            **self.shown(codes, torch.from_numpy(books)),
            "labels": torch.from_numpy(self.vocabulary.labels[which][table["label"]]),
            "slides": [manifest.slides[s] if s >= 0 else None for s in table["slide"].tolist()],
            "coords": torch.from_numpy(np.stack([table["x"], table["y"]], 1).astype(np.int64)),
            "mpp": torch.from_numpy(table["mpp"].copy()),
            "codebooks": torch.from_numpy(books) if len(codebooks) > 1 else None,
            "latents": dequantize_each(codes, books, self.decoders)
            if self.decode == "latents"
            else None,
            "masks": torch.from_numpy(shards.read_masks(rows)) if self.masks else None,
            "columns": shards.read_columns(rows, self.columns) if self.columns else {},
        }

    def shown(self, codes: Tensor, books: Tensor) -> dict[str, Tensor | None]:
        """The codes as they are stored, or the integers of records with their steps."""
        if self.integers is None:
            return {"codes": codes, "steps": None}
        return {"codes": self.integers(codes, books), "steps": self.integers.steps(codes, books)}


def scatter(parts: list[tuple[np.ndarray, dict[str, Any]]], count: int) -> dict[str, Any]:
    """Fields of several sets' patches, each part put to its places among `count`."""
    if len(parts) == 1:
        return parts[0][1]
    back = torch.from_numpy(np.argsort(np.concatenate([places for places, _ in parts])))
    joined: dict[str, Any] = {}
    for name, sample in parts[0][1].items():
        values = [fields[name] for _, fields in parts]
        if isinstance(sample, Tensor):
            joined[name] = torch.cat(values)[back]
        elif isinstance(sample, list):
            flat = [value for part in values for value in part]
            joined[name] = [flat[place] for place in back.tolist()]
        elif isinstance(sample, dict):
            parts_of = [(places, fields[name]) for places, fields in parts]
            joined[name] = scatter(parts_of, count) if sample else {}
        else:
            joined[name] = None
    return joined


def check_codes(
    shards: ShardSet, codes: Tensor, books: np.ndarray, codebooks: Sequence[AnyCodebook]
) -> None:
    """Refuse codes that a codebook has no entry for, which a decoder would not notice."""
    for number in np.unique(books).tolist():
        own = codes.numpy() if len(codebooks) == 1 else codes.numpy()[books == number]
        fault = codebooks[number].find_fault(own)
        if fault is not None:
            raise FormatError(f"{shards.folder}: {fault}; damaged, fetch it anew")
