"""Patches of a data set with their originals, read ahead of the training."""
# B patches of a forward pass, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from latentds_trainers.finetune_decoder.pairs import SAMPLED_AT_ONCE, Pair
from torch import Tensor

from latentds.errors import InputError
from latentds.loading.batch import Batch
from latentds.loading.loader import LatentLoader
from latentds.quantizers.scalar import dequantize_each
from latentds.sources.originals import Originals

AHEAD = 2  # steps whose originals are read while another is trained on


@dataclasses.dataclass(frozen=True, eq=False)
class ReadBatch:
    """What one step of this rank takes, and where the loader stood behind it.

    latents  float32 (N, C, h, w), dequantized
    images   uint8 (N, H, W, 3)
    """

    latents: Tensor
    images: np.ndarray
    state: dict[str, Any]


class ShardPairs:
    """Patches of a data set with the pictures they were cut from, epoch after epoch.

    loader   its batches are an optimizer step's: of all forward passes of this rank
    crop_px  edge of the windows trained on, a multiple of the factor; None for whole patches

    A thread reads two steps ahead. `state_dict` counts what was taken, not what was read. Windows
    are a function of seed, step and the patch's place in the global batch.
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
        contract = loader.contract
        self.factor = int(contract.autoencoder["factor"])
        if crop_px is not None and crop_px > min(contract.patch_px):
            height, width = contract.patch_px
            raise InputError(
                f"--crop-px {crop_px}: patches of {loader.dataset.shards.folder} are "
                f"{width}x{height} px; choose a smaller one"
            )
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self.coming: deque[Future[ReadBatch]] = deque()
        self.batches: Iterator[Batch] | None = None
        self.step: ReadBatch | None = None
        self.taken = 0  # patches of it
        self.state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The loader's state behind the last step taken."""
        return self.loader.state_dict() if self.state is None else self.state

    def load_state_dict(self, state: dict[str, Any], bad_packs: Sequence[str] = ()) -> None:
        """Go on after the steps `state` counts; before the first batch is asked for."""
        self.loader.load_state_dict(state, bad_packs)
        self.state = state

    def gather_bad_packs(self) -> list[str]:
        """The loader's. Collective."""
        return self.loader.gather_bad_packs()

    def batch(self, step: int, rows: range) -> Pair:
        if self.step is None or self.taken == len(self.step.images):
            self.step, self.taken = self.next_step(), 0
            self.state = self.step.state
        part = slice(self.taken, self.taken + len(rows))
        first = self.loader.dataset.rank * len(self.step.images) + self.taken
        self.taken += len(rows)
        latents, images = self.step.latents[part], self.step.images[part]
        if self.crop_px is not None:
            draws = [[self.seed, step, first + number] for number in range(len(images))]
            latents, images = self.windows(latents, images, draws)
        return self.pair(latents, images)

    def next_step(self) -> ReadBatch:
        """The batch that was read first; has another one read."""
        while len(self.coming) <= AHEAD:
            self.coming.append(self.thread.submit(self.read_next))
        return self.coming.popleft().result()

    def read_next(self) -> ReadBatch:
        """The loader's next batch with its originals, in the thread."""
        if self.batches is None:
            self.batches = self.endless()
        batch = next(self.batches)
        state = self.loader.state_dict()
        assert batch.latents is not None  # the loader decodes to latents
        return ReadBatch(batch.latents, self.read(batch), state)

    def endless(self) -> Iterator[Batch]:
        """Batches of all epochs; the loader counts what it hands out."""
        while True:
            yield from self.loader

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)

    def sample(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        for pair in self.spread(self.loader.dataset.split, count):
            yield pair.latents, pair.images

    def spread(self, split: str, count: int) -> Iterator[Pair]:
        """Whole patches spread over a split, a few at a time, the same on every rank."""
        dataset = self.loader.dataset
        first, end = dataset.shards.patch_range(split)
        rows = np.unique(np.linspace(first, end - 1, count).astype(np.int64))
        for start in range(0, len(rows), SAMPLED_AT_ONCE):
            part = rows[start : start + SAMPLED_AT_ONCE]
            batch = dataset.read(part)
            books = dataset.shards.codebook_numbers(part)
            latents = dequantize_each(batch.codes, books, dataset.shards.manifest.codebooks)
            yield self.pair(latents, self.read(batch))

    def read(self, batch: Batch) -> np.ndarray:
        """A batch's originals, uint8 (B, H, W, 3)."""
        return self.originals.read(batch.columns["source"], batch.coords.cpu().numpy())

    def pair(self, latents: Tensor, images: np.ndarray) -> Pair:
        """Latents and pixels uint8 (B, H, W, 3) on the device."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(self.device)
        return Pair(latents.to(self.device), pixels.float().div(255))

    def windows(
        self, latents: Tensor, images: np.ndarray, draws: Sequence[list[int]]
    ) -> tuple[Tensor, np.ndarray]:
        """The same window of each patch's latents and pixels, one a draw."""
        assert self.crop_px is not None
        cells, factor = self.crop_px // self.factor, self.factor
        kept: list[tuple[Tensor, np.ndarray]] = []
        for latent, image, draw in zip(latents, images, draws, strict=True):
            rng = np.random.default_rng(draw)
            y, x = (int(rng.integers(side // factor - cells + 1)) for side in image.shape[:2])
            window = image[y * factor :, x * factor :][: self.crop_px, : self.crop_px]
            kept.append((latent[:, y : y + cells, x : x + cells], window))
        return torch.stack([part for part, _ in kept]), np.stack([part for _, part in kept])
