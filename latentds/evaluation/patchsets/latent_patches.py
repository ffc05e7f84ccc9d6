"""Shards: the patches of a latentds data set, in the order their originals have."""
# N patches of the set, n of a request, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import functools
import hashlib
import threading

import numpy as np

from latentds.core.randomness import digest_of
from latentds.errors import unknown_name
from latentds.evaluation.patchsets.developing import Codes
from latentds.evaluation.patchsets.patch_set import PatchTable, canonical_order
from latentds.store.reader import ShardSet

COLUMNS = ("source",)


class Shards:
    """The patches of a data set, of one of its splits, or of a slide.

    chosen  rows of the patch table, in any order

    Opening reads nothing; `table` reads the column of sources, from every pack that has a chosen
    patch. Codes are read patch by patch.
    """

    def __init__(self, shards: ShardSet, chosen: np.ndarray, lock: threading.Lock) -> None:
        self.shards, self.chosen, self.lock = shards, chosen, lock

    @property
    def where(self) -> str:
        return self.shards.folder

    @property
    def patch_px(self) -> tuple[int, int]:
        return self.shards.manifest.contract.patch_px

    @property
    def classes(self) -> list[str]:
        return list(self.shards.manifest.classes)

    @functools.cached_property
    def has_masks(self) -> bool:
        return self.shards.columns.has_masks

    @functools.cached_property
    def ordered(self) -> tuple[np.ndarray, list[str]]:
        """The chosen rows in canonical order, and their sources."""
        with self.lock:
            sources = self.shards.read_columns(self.chosen, COLUMNS)["source"]
        table = self.shards.patches[self.chosen]
        order = canonical_order(sources, table["y"], table["x"])
        return self.chosen[order], [sources[place] for place in order.tolist()]

    @functools.cached_property
    def table(self) -> PatchTable:
        rows, sources = self.ordered
        manifest, table = self.shards.manifest, self.shards.patches[rows]
        slides: list[str | None] = [*manifest.slides, None]  # the last for -1
        shard_of = self.shards.shards_of(self.shards.packs_of(rows))
        return PatchTable(
            sources=sources,
            slides=[slides[number] for number in table["slide"].tolist()],
            labels=table["label"].astype(np.int64),
            x=table["x"].astype(np.int64),
            y=table["y"].astype(np.int64),
            mpp=table["mpp"].copy(),
            size_px=table["size_px"].astype(np.int64),
            splits=[manifest.shards[number].split for number in shard_of.tolist()],
        )

    @functools.cached_property
    def by_slide(self) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
        """Place of every slide among those there are, their rows one slide after another, ends."""
        numbers = self.shards.patches[self.chosen]["slide"]
        rows = self.chosen[np.argsort(numbers, kind="stable")]
        present, counts = np.unique(numbers, return_counts=True)
        known = self.shards.manifest.slides
        names = [known[number] if 0 <= number < len(known) else None for number in present.tolist()]
        places = {name: place for place, name in enumerate(names) if name is not None}
        return places, rows, np.cumsum([0, *counts])

    def slides(self) -> list[str]:
        return sorted(self.by_slide[0])

    def nameless(self) -> int:
        return int((self.shards.patches[self.chosen]["slide"] < 0).sum())

    def of_slide(self, slide: str) -> Shards:
        places, rows, ends = self.by_slide
        if slide not in places:
            raise unknown_name("slide", slide, places)
        first, last = ends[places[slide]], ends[places[slide] + 1]
        return Shards(self.shards, rows[first:last], self.lock)

    def fingerprint(self) -> str:
        """Identity of the shards, by their hashes in the manifest, and of the chosen patches."""
        chosen = np.sort(self.chosen).astype(np.int64).tobytes()
        return digest_of([self.shards.manifest.dataset_id, hashlib.sha256(chosen).hexdigest()])

    def read(self, rows: np.ndarray) -> Codes:
        """Codes uint8 (n, C, h, w) of rows, and which codebook each has, int64 (n,)."""
        stored = self.ordered[0][rows]
        with self.lock:  # its caches are not made for several threads
            return self.shards.read_codes(stored), self.shards.codebook_numbers(stored)

    def read_masks(self, rows: np.ndarray) -> np.ndarray:
        """Masks uint8 (n, H, W) of rows; InputError for a patch without."""
        stored = self.ordered[0][rows]
        with self.lock:
            return self.shards.read_masks(stored, required=True)


def open_shards(location: str, split: str | None, check_codes: bool) -> Shards:
    """The patches of a data set; UnknownNameError for a split that is not there."""
    shards = ShardSet(location, check_codes, reads_parts=True)
    if split is None:
        chosen = np.arange(len(shards))
    else:
        if split not in shards.manifest.splits:
            raise unknown_name(f"split of {shards.folder}", split, shards.manifest.splits)
        chosen = np.arange(*shards.patch_range(split))
    return Shards(shards, chosen, threading.Lock())
