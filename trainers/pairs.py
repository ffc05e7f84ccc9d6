"""What decoders are fine-tuned on: latents, as a data set stores them, with their originals."""
# B patches of this rank, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from latentds.autoencoders.base import NetworkAutoencoder
from latentds.batch import Batch
from latentds.errors import InputError
from latentds.loader import LatentLoader
from latentds.originals import Originals
from latentds.quantizer import Codebook, dequantize, dequantize_each, quantize
from latentds.sources.image_folder import walk
from latentds.sources.pictures import picture_suffixes, read_picture

MAX_PX = 1 << 28
KEPT_BYTES = 4 << 30  # decoded pictures kept in memory, over all of them
SAMPLE_STEP = 1 << 40  # no run comes to such a step: crops of their own
SAMPLED_AT_ONCE = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """latents float32 (B, C, h, w), dequantized; images float32 (B, 3, H, W) in [0, 1]."""

    latents: Tensor
    images: Tensor


class Pairs(Protocol):
    """Where pairs come from."""

    def batch(self, step: int, rows: range) -> Pair:
        """Pairs at places `rows` of a step's global batch; asked for in order."""
        ...

    def sample(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents and images of about `count` others, a few at a time, the same on every rank."""
        ...


class PicturePairs:
    """Random crops of pictures, encoded on the fly and, with a codebook, quantized.

    folders   pictures of several folders; every folder is drawn from equally often unless `weights`
              says otherwise
    crop_px   edge of a crop, a multiple of the autoencoder's factor
    half_scale  share of the crops taken at half resolution
    held_out  regular expression: pictures whose relative path matches are not used

    Crop `i` of the global batch of a step is a function of (seed, step, i) alone: any number of
    ranks sees the same ones.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        autoencoder: NetworkAutoencoder,
        codebook: Codebook | None,
        *,
        crop_px: int,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        half_scale: float = 0.0,
        held_out: str | None = None,
    ) -> None:
        self.pictures = [list_pictures(folder, crop_px, held_out) for folder in folders]
        self.autoencoder, self.codebook = autoencoder, codebook
        self.crop_px, self.seed = crop_px, seed
        shares = np.asarray(weights or [1.0] * len(folders), float)
        self.shares, self.half_scale = shares / shares.sum(), half_scale
        self.kept: dict[Path, np.ndarray] = {}
        self.kept_bytes = 0

    def batch(self, step: int, rows: range) -> Pair:
        crops = [self.crop(step, place) for place in rows]
        images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
        images = images.to(self.autoencoder.device).float().div(255)
        latents = self.autoencoder.encode(images)
        if self.codebook is not None:
            latents = dequantize(quantize(latents, self.codebook), self.codebook)
        return Pair(latents, images)

    def sample(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        for place in range(0, count, SAMPLED_AT_ONCE):
            pair = self.batch(SAMPLE_STEP, range(place, place + SAMPLED_AT_ONCE))
            yield pair.latents, pair.images

    def crop(self, step: int, place: int) -> np.ndarray:
        """Crop uint8 (H, W, 3) number `place` of a step's global batch: flipped, turned."""
        rng = np.random.default_rng([self.seed, step, place])
        paths = self.pictures[int(rng.choice(len(self.pictures), p=self.shares))]
        picture = self.picture(paths[int(rng.integers(len(paths)))])
        is_half = rng.random() < self.half_scale and min(picture.shape[:2]) >= 2 * self.crop_px
        side = self.crop_px * (2 if is_half else 1)
        y, x = (int(rng.integers(length - side + 1)) for length in picture.shape[:2])
        crop = picture[y : y + side, x : x + side]
        if is_half:
            crop = mean_of_four(crop)
        crop = np.rot90(crop, int(rng.integers(4)))
        return crop[:, ::-1] if rng.random() < 0.5 else crop

    def picture(self, path: Path) -> np.ndarray:
        """A decoded picture; kept while all that is kept fits in memory."""
        found = self.kept.get(path)
        if found is None:
            found, _ = read_picture(path, MAX_PX)
            if self.kept_bytes + found.nbytes <= KEPT_BYTES:
                self.kept[path] = found
                self.kept_bytes += found.nbytes
        return found


class ShardPairs:
    """Patches of a data set with the pictures they were cut from, epoch after epoch.

    crop_px  edge of the windows trained on, a multiple of the factor; None for whole patches
    """

    def __init__(
        self,
        loader: LatentLoader,
        originals: Originals,
        device: torch.device,
        *,
        crop_px: int | None = None,
        seed: int = 0,
    ) -> None:
        self.loader, self.originals, self.device = loader, originals, device
        self.crop_px, self.seed = crop_px, seed
        self.factor = int(loader.contract.autoencoder["factor"])
        self.batches = self.endless()

    def endless(self) -> Iterator[Batch]:
        """Batches of all epochs; the loader counts what it hands out."""
        while True:
            yield from self.loader

    def batch(self, step: int, rows: range) -> Pair:
        batch = next(self.batches)
        pair = Pair(batch.latents.to(self.device), self.pixels(batch))
        return pair if self.crop_px is None else self.window(pair, [self.seed, step, rows[0]])

    def sample(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        dataset = self.loader.dataset
        first, end = dataset.shards.patch_range(dataset.split)
        rows = np.unique(np.linspace(first, end - 1, count).astype(np.int64))
        for start in range(0, len(rows), SAMPLED_AT_ONCE):
            part = rows[start : start + SAMPLED_AT_ONCE]
            batch = dataset.read(part)
            books = dataset.shards.codebook_numbers(part)
            latents = dequantize_each(batch.codes, books, dataset.shards.manifest.codebooks)
            yield latents.to(self.device), self.pixels(batch)

    def pixels(self, batch: Batch) -> Tensor:
        """A batch's originals, float (B, 3, H, W) in [0, 1]."""
        found = self.originals.read(batch.columns["source"], batch.coords.cpu().numpy())
        images = torch.from_numpy(found).permute(0, 3, 1, 2).to(self.device)
        return images.float().div(255)

    def window(self, pair: Pair, draw: list[int]) -> Pair:
        """The same window of latents and pixels, one of the draw's."""
        assert self.crop_px is not None
        cells = self.crop_px // self.factor
        rng = np.random.default_rng(draw)
        rows, columns = (int(size) for size in pair.images.shape[-2:])
        y, x = (int(rng.integers(side // self.factor - cells + 1)) for side in (rows, columns))
        top, left = y * self.factor, x * self.factor
        return Pair(
            pair.latents[:, :, y : y + cells, x : x + cells].contiguous(),
            pair.images[:, :, top : top + self.crop_px, left : left + self.crop_px].contiguous(),
        )


def mean_of_four(picture: np.ndarray) -> np.ndarray:
    """A picture uint8 (2H, 2W, 3) at half its size, by averaging."""
    quarters = picture.astype(np.uint16)
    total = quarters[::2, ::2] + quarters[1::2, ::2] + quarters[::2, 1::2] + quarters[1::2, 1::2]
    return ((total + 2) // 4).astype(np.uint8)


def list_pictures(
    folder: Path, crop_px: int, pattern: str | None = None, matching: bool = False
) -> list[Path]:
    """Pictures below a folder that a crop fits in, sorted; InputError where there are none.

    pattern   regular expression searched in relative paths: such pictures are left out
    matching  or are the only ones
    """
    from PIL import Image

    suffixes = picture_suffixes()
    names = [name for name in sorted(walk(folder)) if Path(name).suffix.lower() in suffixes]
    if pattern is not None:
        names = [name for name in names if bool(re.search(pattern, name)) == matching]
    found = [folder / name for name in names]
    fitting = []
    for path in found:
        with Image.open(path) as picture:
            if min(picture.size) >= crop_px:
                fitting.append(path)
    if not fitting:
        raise InputError(
            f"{folder}: {len(found)} pictures, none of {crop_px} px or larger; give another "
            "folder, or a smaller --crop-px"
        )
    return fitting
