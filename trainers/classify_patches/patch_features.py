"""Features of all patches, made once and kept in the run's folder, block by block.

    OUT/features/<embedder>-<identity>/block-000012.safetensors    of 1024 patches

Ranks share the blocks; those that are there already are not made again, so a killed run goes on. A
block holds the patches' colour histograms and, where there is an embedder, its features.
"""
# N patches, D features

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors
from torch import Tensor

from latentds.core.display import progress
from latentds.core.randomness import digest_of
from latentds.core.storage import write_atomically
from latentds.embedders.latent_backbone import LatentBackbone
from latentds.errors import InputError
from latentds.evaluation.probes import COLOUR_BINS, colour_histograms

if TYPE_CHECKING:
    from latentds_trainers.classify_patches.patch_inputs import LabelledPatches

    from latentds.embedders import EmbedderCard, NetworkEmbedder

BLOCK = 1024
COLOURS, FEATURES = "colours", "features"


class FeatureStore:
    """The blocks of a source's features by an embedder.

    out        the run's folder
    patches    what they are of
    source     facts of the source of pixels, with what identifies the stored ones; a store is of
               one source, embedder and precision
    embedder   card of the embedder, None for colour histograms alone
    """

    def __init__(
        self,
        out: Path,
        patches: LabelledPatches,
        source: dict[str, Any],
        embedder: EmbedderCard | None,
        precision: str,
    ) -> None:
        self.widths = {COLOURS: 3 * COLOUR_BINS}
        if embedder is not None:
            self.widths[FEATURES] = embedder.dim
        self.blocks = blocks_of(patches.starts)
        names = hashlib.sha256("\n".join(patches.items).encode()).hexdigest()
        card = None if embedder is None else embedder.to_json()
        self.identity = digest_of([source, card, precision, names])
        name = "colours" if embedder is None else re.sub(r"[^\w.-]+", "-", embedder.name)
        self.folder = out / "features" / f"{name}-{self.identity}"

    def path(self, number: int) -> Path:
        return self.folder / f"block-{number:06d}.safetensors"

    def missing(self, rank: int, ranks: int) -> list[int]:
        return [n for n in range(rank, len(self.blocks), ranks) if not self.path(n).exists()]

    def write(self, number: int, tensors: dict[str, np.ndarray]) -> None:
        content = to_safetensors(tensors, {"identity": self.identity})
        write_atomically(self.path(number), content)

    def read(self) -> dict[str, np.ndarray]:
        """Of all patches, float32: `colours` (N, 96) and, where there is an embedder, `features`
        (N, D). InputError that names a block that is damaged.
        """
        parts = [self.read_block(number) for number in range(len(self.blocks))]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.widths}

    def read_block(self, number: int) -> dict[str, np.ndarray]:
        path, rows = self.path(number), len(self.blocks[number])
        try:
            with safe_open(path, "numpy") as file:
                identity = (file.metadata() or {}).get("identity")
                arrays = {name: file.get_tensor(name) for name in self.widths}
            is_whole = identity == self.identity and all(
                arrays[name].shape == (rows, width) and np.isfinite(arrays[name]).all()
                for name, width in self.widths.items()
            )
            if not is_whole:
                raise ValueError(f"made for {identity}, or no finite {rows} rows {self.widths}")
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(
                f"{path}: {error}; delete the file, and the same command makes it again"
            ) from error
        return arrays


def blocks_of(starts: np.ndarray) -> list[np.ndarray]:
    """Rows of every block, none of which spans two sets."""
    return [
        np.arange(first, min(first + BLOCK, end))
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
        for first in range(start, end, BLOCK)
    ]


def make_features(
    store: FeatureStore,
    patches: LabelledPatches,
    embed: Callable[[Tensor], Tensor] | None,
    *,
    batch_size: int,
    rank: int,
    ranks: int,
    inputs: LabelledPatches | None = None,
) -> None:
    """Make this rank's missing blocks.

    embed   features (B, D) of images uint8 (B, 3, H, W), None for colour histograms alone
    inputs  what features are made of instead of the images: the same patches' latents
    raises  InputError for features that are not finite
    """
    numbers = store.missing(rank, ranks)
    parts = {number: split_rows(store.blocks[number], batch_size) for number in numbers}
    images = patches.stream(rows for number in numbers for rows in parts[number])
    seen = images
    if embed is not None and inputs is not None:
        seen = inputs.stream(rows for number in numbers for rows in parts[number])
    total = sum(len(store.blocks[number]) for number in numbers)
    desc = f"features, rank 0 of {ranks}" if ranks > 1 else "features"
    with progress(total=total, desc=desc, unit="patch", disable=rank > 0) as bar:
        for number in numbers:
            found = []
            for rows in parts[number]:
                pixels = next(images)
                found.append(describe(pixels, pixels if seen is images else next(seen), embed))
                bar.update(len(rows))
            arrays = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
            check_finite(arrays, [patches.items[row] for row in store.blocks[number].tolist()])
            store.write(number, arrays)


def check_finite(arrays: dict[str, np.ndarray], items: list[str]) -> None:
    """InputError that names the first patch with values that are not finite."""
    for name, values in arrays.items():
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            raise InputError(
                f"{items[bad[0]]}: its {name} are not finite; try --precision fp32, or another "
                "embedder"
            )


def split_rows(rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


@torch.no_grad()
def describe(
    images: Tensor, inputs: Tensor, embed: Callable[[Tensor], Tensor] | None
) -> dict[str, np.ndarray]:
    """What a block keeps of images uint8 (B, 3, H, W), features being of `inputs`."""
    found = {COLOURS: colour_histograms(images)}
    if embed is not None:
        found[FEATURES] = embed(inputs).float().cpu().numpy()
    return found


def embedding(embedder: NetworkEmbedder, precision: str) -> Callable[[Tensor], Tensor]:
    """Features of images uint8 (B, 3, H, W) or of latents, where the embedder is."""

    def embed(inputs: Tensor) -> Tensor:
        values = as_input(inputs.to(embedder.device))
        made: Callable[[Tensor], Tensor] = embedder.embed
        if isinstance(embedder, LatentBackbone) and inputs.dtype != torch.uint8:
            made = embedder.embed_latents
        if precision == "fp32":
            return made(values)
        with torch.autocast(embedder.device.type, dtype=torch.bfloat16):
            return made(values)

    return embed


def as_input(values: Tensor) -> Tensor:
    """What a network reads: images in [0, 1] of uint8, or latents as they are."""
    return values.float() / 255 if values.dtype == torch.uint8 else values
