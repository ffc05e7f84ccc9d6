"""SlideBags: the patches of a slide as one item, for multiple-instance learning."""
# N patches of a bag, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentds.autoencoders.autoencoder import Autoencoder
from latentds.core.processes import choose_device, shared_zeros
from latentds.core.randomness import key_of, shuffled
from latentds.errors import InputError, unknown_name
from latentds.loading.batch import Vocabulary, check_codes, check_group
from latentds.loading.decoding import (
    DECODES,
    Decode,
    Decoder,
    Integers,
    check_decode,
    make_decoder,
    make_integers,
)
from latentds.loading.options import Select
from latentds.loading.selection import select_rows
from latentds.store.cache import CacheConfig
from latentds.store.reader import ShardSet

logger = logging.getLogger(__name__)
DECODE_CHUNK = 64


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Bag:
    """The patches of one slide, in raster order (by y, then x).

    slide    its name
    label    label that all its patches have, -1 where they differ or have none
    codes    uint8 (N, *codes_shape), as stored; `SlideBags.decode` makes images, latents or
             integers of them, a part at a time
    coords   int64 (N, 2), x and y in pixels of level 0, -1 where unknown
    mpp      float32 (N,), NaN where unknown
    labels   int64 (N,), of the patches
    rows     int64 (N,), rows of the data set's patch table
    columns  values of the columns asked for, lists of N
    codebooks  int64 (N,), which of the set's codebooks; None where there is one
    steps    float32 (N,), see Batch, of entropy-coded records; None for other encodings
    """

    slide: str
    label: int
    codes: Tensor
    coords: Tensor
    mpp: Tensor
    labels: Tensor
    rows: Tensor
    columns: dict[str, list[Any]]
    codebooks: Tensor | None = None
    steps: Tensor | None = None

    def __len__(self) -> int:
        return len(self.codes)


class SlideBags(Dataset[Bag]):
    """Slides of a split as bags of any length; a map-style data set of len() slides.

    In a DataLoader use `batch_size=None` (a bag an item) and, with workers, `decode` in the main
    process.

    folder, split, cache, select   see LatentDataset
    max_patches   at most so many patches a bag, another choice every epoch; None takes all
    seed          of the choice: a function of (seed, epoch, slide)
    columns       names among key, source, source_encoding to carry along
    decode        what `SlideBags.decode` gives: "pixels", "latents" or "codes"; see LatentLoader
    device, autoencoder, dtype   of it; see LatentLoader

    Local sets read the chosen patches' bytes and no others; remote ones read whole packs into the
    cache. Holds 8 bytes a patch of the split.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str = "train",
        *,
        max_patches: int | None = None,
        seed: int = 0,
        select: Select = Select(),
        columns: Sequence[str] = (),
        decode: str = "pixels",
        device: torch.device | str = "auto",
        autoencoder: Autoencoder | str | os.PathLike[str] | None = None,
        dtype: torch.dtype = torch.float32,
        cache: CacheConfig | None = None,
    ) -> None:
        if max_patches is not None and max_patches < 1:
            raise ValueError(f"max_patches={max_patches}; at least 1")
        check_decode(decode, DECODES[:3])
        check_group(select, Select, "select")
        self.shards = ShardSet(folder, cache=cache, reads_parts=True)
        self.vocabulary = Vocabulary([self.shards], select.class_to_idx)
        self.max_patches, self.seed, self.columns = max_patches, seed, tuple(columns)
        self.wanted, self.device = decode, choose_device(device)
        self.decoding = (autoencoder, dtype)
        self.decoder: Decoder | Integers | None = None
        rows = select_rows(self.shards, split, *select.unbalanced("SlideBags"))
        rows = np.arange(*self.shards.patch_range(split)) if rows is None else rows
        table = self.shards.patches[rows]
        named = table["slide"] >= 0
        rows, numbers, labels = rows[named], table["slide"][named], table["label"][named]
        if not len(rows):
            raise InputError(f"{folder}: no patch of split {split!r} has a slide; bags need them")
        if not named.all():
            logger.warning("%s: %d patches without a slide are in no bag", folder, (~named).sum())
        order = np.argsort(numbers, kind="stable")
        self.rows = rows[order]
        present, counts = np.unique(numbers, return_counts=True)
        self.slides = [self.shards.manifest.slides[number] for number in present]
        self.ends = np.cumsum(counts)
        self.note_differing(labels[order])
        self.position = shared_zeros(1, torch.int64)

    def note_differing(self, labels: np.ndarray) -> None:
        """Tell of slides whose patches, in the order of `rows`, have no one label."""
        starts = np.append(0, self.ends[:-1])
        least, most = (f.reduceat(labels, starts) for f in (np.minimum, np.maximum))
        differing = np.flatnonzero(least < most)
        if len(differing):
            logger.warning(
                "%s: patches of %d of %d slides differ in label, among them %r: the label of such "
                "a bag is -1, its `labels` are the patches' own", self.shards.folder,
                len(differing), len(self), self.slides[differing[0]],
            )  # fmt: skip

    @property
    def classes(self) -> list[str]:
        """Class names, sorted."""
        return list(self.vocabulary.classes)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that decides which `max_patches` a bag has."""
        self.position[0] = epoch
        self.shards.begin_epoch(epoch)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"decoder": None}  # a worker must not carry a network to decode with

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.position.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        """Slides."""
        return len(self.slides)

    def __getitem__(self, index: int) -> Bag:
        rows = self.choose(range(len(self))[index])  # range: negative indices, IndexError
        table = self.shards.patches[rows]
        order = np.lexsort((table["x"], table["y"]))
        rows, table = rows[order], table[order]
        labels = np.unique(numbered := self.vocabulary.labels[0][table["label"]])
        codes = torch.from_numpy(self.shards.read_codes(rows))
        books, numbers = self.shards.manifest.codebooks, self.shards.codebook_numbers(rows)
        check_codes(self.shards, codes, numbers, books)
        several = torch.from_numpy(numbers) if len(books) > 1 else None
        integers = make_integers(books)
        return Bag(
            slide=self.slides[index],
            label=int(labels[0]) if len(labels) == 1 else -1,
            codes=codes,
            coords=torch.from_numpy(np.stack([table["x"], table["y"]], 1).astype(np.int64)),
            mpp=torch.from_numpy(table["mpp"].copy()),
            labels=torch.from_numpy(numbered),
            rows=torch.from_numpy(rows),
            columns=self.shards.read_columns(rows, self.columns) if self.columns else {},
            codebooks=several,
            steps=None if integers is None else integers.steps(codes, several),
        )

    def choose(self, index: int) -> np.ndarray:
        """Rows of a bag's patches, ascending."""
        rows: np.ndarray = self.rows[self.ends[index - 1] if index else 0 : self.ends[index]]
        if self.max_patches is None or len(rows) <= self.max_patches:
            return rows
        key = key_of("bag", self.seed, int(self.position[0]), self.slides[index])
        return np.sort(rows[shuffled(len(rows), key)[: self.max_patches]])

    def index(self, slide: str) -> int:
        """Index of a slide; UnknownNameError for one that has no bag."""
        if slide not in self.slides:
            raise unknown_name("slide", slide, self.slides)
        return self.slides.index(slide)

    def decode(self, bag: Bag, chunk: int = DECODE_CHUNK) -> Iterator[Tensor]:
        """A bag's patches on the device, decoded `chunk` at a time.

        yields  images float (n, 3, H, W) in [0, 1]; or latents float32, or codes, as asked for
        """
        given, dtype = self.decoding
        decoder = self.decoder = self.decoder or make_decoder(
            self.shards, self.wanted, given, self.device, Decode(dtype=dtype)
        )
        for start in range(0, len(bag), chunk):
            part = slice(start, start + chunk)
            books = None if bag.codebooks is None else bag.codebooks[part].to(self.device)
            codes = bag.codes[part].to(self.device)
            yield codes if decoder is None else decoder(codes, books)
