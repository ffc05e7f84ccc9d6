"""What a set of patches is to an evaluation, be it of pictures, of a codec, or of latents."""
# N patches of the set, n of a request, H W pixels

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from latentds.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


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
    autoencoder: str | None
    decoder: str | None
    fine_tuned: bool
    quantized: bool
    bytes_per_patch: float | None
    patch_px: tuple[int, int]
    data: str
    codebook: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"patch_px": list(self.patch_px)}


class PatchSet(Protocol):
    """Patches of one size. Rows count from 0 in canonical order."""

    @property
    def name(self) -> str:
        """What a table calls this source of pixels, for example tiny-v1+kmeans."""
        ...

    @property
    def patch_px(self) -> tuple[int, int]:
        """(H, W)."""
        ...

    @property
    def classes(self) -> list[str]:
        """Sorted names of the whole input's classes; those of a single split are among them."""
        ...

    @property
    def has_masks(self) -> bool:
        """Whether `masks` tells something."""
        ...

    @property
    def table(self) -> PatchTable:
        """All patches. Of slides as originals it finds the tissue of every one when first used."""
        ...

    def __len__(self) -> int:
        """N, for which the table is made."""
        ...

    def images(self, rows: np.ndarray) -> Tensor:
        """uint8 (n, 3, H, W) on the device: pixels as decoded, rounded to 8 bits.

        A patch's pixels do not depend on which others are asked for with it.
        raises  InputError, FormatError with the file's name where one cannot be read
        """
        ...

    def stream(self, requests: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """`images` of one request after the other, the next ones read in threads meanwhile."""
        ...

    def masks(self, rows: np.ndarray) -> np.ndarray:
        """uint8 (n, H, W), lossless, never through a codec; InputError where there are none."""
        ...

    def slides(self) -> list[str]:
        """Sorted names of the slides; empty where patches name none."""
        ...

    def rows_of(self, slide: str) -> np.ndarray:
        """Rows of a slide's patches, ascending; UnknownNameError for one that is not there."""
        ...

    def of_slide(self, slide: str) -> PatchSet:
        """The patches of one slide as a set of their own, rows from 0.

        Of slides as originals only this one's tissue is found: take it to go slide by slide.
        """
        ...

    def fingerprint(self) -> str:
        """Identity of what is stored behind the table, 16 hex digits; the same once moved.

        Of originals: the sizes of all files, and the first bytes of some, with their masks. Of
        latents: the hashes of the shards, and which patches of them are meant. What is done to
        what is stored (a codec, a decoder) `facts` tells.
        raises  InputError with the name of a file that cannot be read
        """
        ...

    def facts(self) -> SourceFacts:
        """Where the pixels come from and what they cost; may encode a sample to measure that."""
        ...


def canonical_order(sources: Sequence[str], y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """int64 (N,): places of patches sorted by source (by code points), y and x."""
    rank = {source: place for place, source in enumerate(sorted(set(sources)))}
    numbers = np.fromiter((rank[source] for source in sources), np.int64, len(sources))
    return np.lexsort((x, y, numbers)).astype(np.int64)
