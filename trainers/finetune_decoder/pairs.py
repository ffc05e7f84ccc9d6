"""What decoders are fine-tuned on: latents, as a data set stores them, with their originals.

Crops of pictures are encoded on the fly; patches of a data set are read ahead of the training.
"""
# B patches of a forward pass of this rank, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import dataclasses
import re
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latentds_trainers.finetune_decoder.config import FinetuneConfig
from torch import Tensor

from latentds.autoencoders.autoencoder import NetworkAutoencoder
from latentds.codecs.formats import DECODE_ERRORS
from latentds.core.storage import open_picture
from latentds.errors import ContractError, InputError
from latentds.loading.batch import Batch
from latentds.loading.loader import LatentLoader
from latentds.loading.options import Order
from latentds.quantizers.scalar import AnyCodebook, dequantize, dequantize_each, quantize
from latentds.sources.image_folder import picture_suffixes, walk
from latentds.sources.originals import Originals, pixels_of
from latentds.sources.picture import first_line

DEFAULT_CROP_PX = 256  # of pictures
MAX_PX = 1 << 28
KEPT_BYTES = 4 << 30  # decoded pictures kept in memory, over all of them
SAMPLE_STEP = 1 << 40  # no run comes to such a step: crops of their own
SAMPLED_AT_ONCE = 8
AHEAD = 2  # steps whose originals are read while another is trained on


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """latents float32 (B, C, h, w), dequantized; images float32 (B, 3, H, W) in [0, 1]."""

    latents: Tensor
    images: Tensor


class PicturePairs:
    """Random crops of pictures, encoded on the fly and, with a codebook, quantized.

    config       folders, the share of each, crops, what is held out; none of the pictures of
                 `validate_on` is drawn
    autoencoder  encodes; crops are multiples of its factor
    codebook     set by who has one

    Crop `i` of the global batch of a step is a function of (seed, step, i) alone: any number of
    ranks sees the same ones.
    """

    codebook: AnyCodebook | None = None

    def __init__(self, config: FinetuneConfig, autoencoder: NetworkAutoencoder) -> None:
        self.crop_px = config.crop_px or DEFAULT_CROP_PX
        judged = [path for folder in config.validate_on for path in find_pictures(folder, bool)]
        self.pictures = [
            apart(folder, list_pictures(folder, self.crop_px, config.held_out), judged)
            for folder in config.pictures
        ]
        self.config, self.autoencoder = config, autoencoder
        shares = np.asarray(config.picture_weights or [1.0] * len(config.pictures), float)
        self.shares = shares / shares.sum()
        self.kept: dict[Path, np.ndarray] = {}
        self.kept_bytes, self.keeping = 0, threading.Lock()
        self.pool = ThreadPoolExecutor(config.workers, thread_name_prefix="crops")

    def batch(self, step: int, rows: range) -> Pair:
        """Pairs at places `rows` of a step's global batch; asked for in order."""
        crops = list(self.pool.map(lambda place: self.crop(step, place), rows))
        images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
        images = images.to(self.autoencoder.device).float().div(255)
        latents = self.autoencoder.encode(images)
        if self.codebook is not None:
            latents = dequantize(quantize(latents, self.codebook), self.codebook)
        return Pair(latents, images)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def sample(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents and images of about `count` others, a few at a time, the same on every rank."""
        for place in range(0, count, SAMPLED_AT_ONCE):
            pair = self.batch(SAMPLE_STEP, range(place, place + SAMPLED_AT_ONCE))
            yield pair.latents, pair.images

    def crop(self, step: int, place: int) -> np.ndarray:
        """Crop uint8 (H, W, 3) number `place` of a step's global batch: flipped, turned."""
        rng = np.random.default_rng([self.config.seed, step, place])
        paths = self.pictures[int(rng.choice(len(self.pictures), p=self.shares))]
        picture = self.picture(paths[int(rng.integers(len(paths)))])
        fits_half = min(picture.shape[:2]) >= 2 * self.crop_px
        is_half = rng.random() < self.config.half_scale and fits_half
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
            found = pixels_of(path, MAX_PX)
            with self.keeping:
                if path not in self.kept and self.kept_bytes + found.nbytes <= KEPT_BYTES:
                    self.kept[path] = found
                    self.kept_bytes += found.nbytes
        return found


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

    raises  ContractError where the set is not of the autoencoder, or not of the originals

    A thread reads two steps ahead. `state_dict` counts what was taken, not what was read. Windows
    are a function of seed, step and the patch's place in the global batch.
    """

    def __init__(
        self, config: FinetuneConfig, base: NetworkAutoencoder, device: torch.device, ranks: int
    ) -> None:
        assert config.data is not None and config.originals is not None
        self.config, self.device, self.factor = config, device, base.card.factor
        size = config.batch_size * config.accumulation * ranks  # the loader's batch is a step's
        self.loader = LatentLoader(
            config.data, config.split, shuffle=True, seed=config.seed, decode="latents",
            columns=("source",), order=Order(global_batch_size=size, last="repeat"),
        )  # fmt: skip
        contract, shards = self.loader.contract, self.loader.dataset.shards
        if contract.latent_id != base.card.latent_id:
            raise ContractError(
                f"{config.data}: stored latents have latent_id {contract.latent_id}, autoencoder "
                f"{base.card.name!r} makes {base.card.latent_id}; give the one they were made "
                "with, --autoencoder"
            )
        self.originals = Originals(
            shards, config.originals, slides=config.slides, root=config.root,
            anonymize=config.anonymize, workers=config.workers,
        )  # fmt: skip
        if config.crop_px is not None and config.crop_px > min(contract.patch_px):
            height, width = contract.patch_px
            raise InputError(
                f"--crop-px {config.crop_px}: patches of {shards.folder} are {width}x{height} px; "
                "choose a smaller one"
            )
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self.coming: deque[Future[ReadBatch]] = deque()
        self.batches = self.endless()
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
        return self.loader.gather_bad_packs()

    def batch(self, step: int, rows: range) -> Pair:
        if self.step is None or self.taken == len(self.step.images):
            self.step, self.taken = self.next_step(), 0
            self.state = self.step.state
        part = slice(self.taken, self.taken + len(rows))
        first = self.loader.dataset.rank * len(self.step.images) + self.taken
        self.taken += len(rows)
        latents, images = self.step.latents[part], self.step.images[part]
        if self.config.crop_px is not None:
            draws = [[self.config.seed, step, first + number] for number in range(len(images))]
            latents, images = self.windows(latents, images, draws, self.config.crop_px)
        return self.pair(latents, images)

    def next_step(self) -> ReadBatch:
        while len(self.coming) <= AHEAD:
            self.coming.append(self.thread.submit(next, self.batches))
        return self.coming.popleft().result()

    def endless(self) -> Iterator[ReadBatch]:
        """Batches of all epochs with their originals; the loader counts what it hands out."""
        while True:
            for batch in self.loader:
                state = self.loader.state_dict()
                assert batch.latents is not None  # the loader decodes to latents
                yield ReadBatch(batch.latents, self.read(batch), state)

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
        return self.originals.read(batch.columns["source"], batch.coords.cpu().numpy())

    def pair(self, latents: Tensor, images: np.ndarray) -> Pair:
        """Latents and pixels uint8 (B, H, W, 3) on the device."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(self.device)
        return Pair(latents.to(self.device), pixels.float().div(255))

    def windows(
        self, latents: Tensor, images: np.ndarray, draws: Sequence[list[int]], crop_px: int
    ) -> tuple[Tensor, np.ndarray]:
        """The same window of each patch's latents and pixels, one a draw."""
        cells, factor = crop_px // self.factor, self.factor
        kept: list[tuple[Tensor, np.ndarray]] = []
        for latent, image, draw in zip(latents, images, draws, strict=True):
            rng = np.random.default_rng(draw)
            y, x = (int(rng.integers(side // factor - cells + 1)) for side in image.shape[:2])
            window = image[y * factor :, x * factor :][:crop_px, :crop_px]
            kept.append((latent[:, y : y + cells, x : x + cells], window))
        return torch.stack([part for part, _ in kept]), np.stack([part for _, part in kept])


def mean_of_four(picture: np.ndarray) -> np.ndarray:
    """A picture uint8 (2H, 2W, 3) at half its size, by averaging."""
    quarters = picture.astype(np.uint16)
    total = quarters[::2, ::2] + quarters[1::2, ::2] + quarters[::2, 1::2] + quarters[1::2, 1::2]
    return ((total + 2) // 4).astype(np.uint8)


def list_pictures(folder: Path, crop_px: int, left_out: str | None = None) -> list[Path]:
    """Pictures below a folder that a crop fits in, sorted; InputError where there are none.

    left_out  regular expression searched in relative paths: such pictures are not listed
    """
    pattern = re.compile(left_out) if left_out is not None else None
    found = find_pictures(folder, lambda name: pattern is None or not pattern.search(name))
    fitting = [path for path in found if min(size_of(path)) >= crop_px]
    if not fitting:
        raise InputError(
            f"{folder}: {len(found)} pictures, none of {crop_px} px or larger; give another "
            "folder, or a smaller --crop-px"
        )
    return fitting


def apart(folder: Path, pictures: Sequence[Path], without: Collection[Path]) -> list[Path]:
    """The pictures that are not among those validated on; InputError where none is left."""
    resolved = {path.resolve() for path in without}
    kept = [path for path in pictures if path.resolve() not in resolved]
    if not kept:
        raise InputError(
            f"{folder}: all {len(pictures)} pictures are in --validate-on; none to train on"
        )
    return kept


def find_pictures(folder: Path, is_wanted: Callable[[str], bool]) -> list[Path]:
    """Pictures below a folder, sorted, by their relative paths."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of pictures")
    suffixes = picture_suffixes()
    names = [name for name in sorted(walk(folder)) if Path(name).suffix.lower() in suffixes]
    return [folder / name for name in names if is_wanted(name)]


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a picture; InputError that names one which cannot be read."""
    try:
        with open_picture(path) as picture:
            return picture.size
    except DECODE_ERRORS as error:
        reason = f"cannot be read ({first_line(error)}); repair it or take it out of the folder"
        raise InputError(f"{path}: {reason}") from error
