"""A small honest set of patches: pixels follow from slide and row, and a slide can be broken."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from latentds.core.randomness import digest_of
from latentds.embedders.embedder import EmbedderCard
from latentds.errors import FormatError, UnknownNameError
from latentds.evaluation.patchsets.patch_set import PatchTable, SourceFacts


@dataclasses.dataclass
class SmallPatches:
    """Slides of so many 8 px patches on a grid.

    sizes    patches of every slide
    broken   row of a slide from which on reading fails
    size_px  width of a patch at level 0
    read     rows that were asked for, by slide
    """

    sizes: Mapping[str, int]
    broken: Mapping[str, int] = dataclasses.field(default_factory=dict)
    size_px: int = 16
    codec: str = "original"
    own: str | None = None
    read: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    patch_px: tuple[int, int] = (8, 8)
    classes = ()

    @property
    def table(self) -> PatchTable:
        assert self.own is not None
        rows = np.arange(self.sizes[self.own])
        count = len(rows)
        return PatchTable(
            sources=[self.own] * count,
            slides=[self.own] * count,
            labels=np.full(count, -1),
            x=rows % 10 * self.size_px,
            y=rows // 10 * self.size_px,
            mpp=np.full(count, 0.5, np.float32),
            size_px=np.full(count, self.size_px),
            splits=["train"] * count,
        )

    def images(self, rows: np.ndarray) -> Tensor:
        assert self.own is not None
        if len(rows) and rows.max() >= self.broken.get(self.own, np.inf):
            raise FormatError(f"{self.own}.tar: damaged")
        self.read.setdefault(self.own, []).extend(rows.tolist())
        seed = sum(map(ord, self.own))
        pixels = [np.random.default_rng([seed, row]).integers(0, 256, (3, 8, 8)) for row in rows]
        return torch.from_numpy(np.stack(pixels).astype(np.uint8))

    def stream(self, requests: Iterable[np.ndarray]) -> Iterator[Tensor]:
        return map(self.images, requests)

    def slides(self) -> list[str]:
        return sorted(self.sizes)

    def nameless(self) -> int:
        return 0

    def of_slide(self, slide: str) -> SmallPatches:
        if slide not in self.sizes:
            raise UnknownNameError(slide)
        return dataclasses.replace(self, own=slide)

    def fingerprint(self) -> str:
        return digest_of(sorted(self.sizes.items()))

    def facts(self) -> SourceFacts:
        return SourceFacts(
            name=self.codec,
            kind="original",
            codec=self.codec,
            autoencoder=None,
            decoder=None,
            fine_tuned=False,
            quantized=False,
            bytes_per_patch=None,
            patch_px=self.patch_px,
            data="somewhere/slides",
        )


class ProjectionEmbedder:
    """A fixed random projection of the pixels.

    calls  batches embedded so far
    die    call at which it ends the run as a kill would, None for never
    """

    def __init__(self, dim: int = 6, name: str = "projection", die: int | None = None) -> None:
        self.card = EmbedderCard(name=name, class_name="Projection", dim=dim, weights_id="sha256:0")
        weights = torch.randn(3 * 64, dim, generator=torch.Generator().manual_seed(dim))
        self.weights, self.calls, self.die = weights, 0, die

    def embed(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.die is not None and self.calls > self.die:
            raise KeyboardInterrupt
        return images.flatten(1) @ self.weights

    def to(self, device: object = None, dtype: object = None) -> ProjectionEmbedder:
        return self


class BlankPatches(SmallPatches):
    """The same without pixels to draw: for many patches."""

    def images(self, rows: np.ndarray) -> Tensor:
        return torch.zeros((len(rows), 3, 8, 8), dtype=torch.uint8)
