"""What a set of patches is to an evaluation, be it of pictures, of a codec, or of latents."""
# N patches of the set, n of a request, H W pixels

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from latentds.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PatchTable:
    """What is known of every patch, in canonical order: sorted by (source, y, x).

    Originals and shards converted from them with the same options have the same rows.

    sources  file that a patch was cut from, relative to the input
    slides   names, None where unknown
    labels   int64 (N,), indices into the set's classes, -1 for none
    x, y     int64 (N,), left and top in pixels of level 0, -1 where unknown
    mpp      float32 (N,), micrometres a pixel of the patch, NaN where unknown
    size_px  int64 (N,), width of a patch in the pixels that x and y count, 0 where unknown
    splits   train, val, test, ...
    patients  names that a table, or another record beside the patches, tells, None where unknown;
              empty for data sets, which store none
    """

    sources: list[str]
    slides: list[str | None]
    labels: np.ndarray
    x: np.ndarray
    y: np.ndarray
    mpp: np.ndarray
    size_px: np.ndarray
    splits: list[str]
    patients: list[str | None] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sources)

    def class_names(self, classes: Sequence[str], where: str, remedy: str) -> list[str]:
        """The class's name of every patch; InputError, with the remedy, where any has none."""
        bare = np.flatnonzero(self.labels < 0)
        if len(bare):
            raise InputError(
                f"{where}: {len(bare):,} of {len(self):,} patches have no label, the first is "
                f"{self.sources[bare[0]]!r}; {remedy}"
            )
        return [classes[number] for number in self.labels.tolist()]

    @property
    def names(self) -> list[str]:
        """A patch's name, unique in the set: its source, and its place where that is known."""
        return [
            source if x < 0 and y < 0 else f"{source}@{x},{y}"
            for source, x, y in zip(self.sources, self.x.tolist(), self.y.tolist(), strict=True)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """Where the pixels of an evaluation come from: a row of its table.

    name             original, jpeg:10, tiny-v1+kmeans; a decoder that is not the recorded one
                     after a slash
    kind             original, codec (originals through one, on the fly) or latents (shards)
    codec            as it is written: original, jpeg:10, tiny-v1+kmeans
    autoencoder      name, None for originals and picture formats
    decoder          name of the decoder where it is another than the autoencoder's own
    fine_tuned       whether the decoder was trained anew for latents that were there before
    quantized        whether latents went through a codebook
    bytes_per_patch  mean of what a patch takes stored: by arithmetic for latents, measured for
                     picture formats; of originals, their files' bytes over their patches. None
                     where it cannot be told
    patch_px         (H, W)
    data             the input as it was given
    codebook         where the codebook is from, and its identity; empty for none
    """

    name: str
    kind: Literal["original", "codec", "latents"]
    codec: str
    autoencoder: str | None = None
    decoder: str | None = None
    fine_tuned: bool = False
    quantized: bool = False
    bytes_per_patch: float | None = None
    patch_px: tuple[int, int]
    data: str
    codebook: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"patch_px": list(self.patch_px)}


def canonical_order(sources: Sequence[str], y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """int64 (N,): places of patches sorted by source (by code points), y and x."""
    rank = {source: place for place, source in enumerate(sorted(set(sources)))}
    numbers = np.fromiter((rank[source] for source in sources), np.int64, len(sources))
    return np.lexsort((x, y, numbers)).astype(np.int64)
