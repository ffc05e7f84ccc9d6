"""Planned regions to pixels, and those to codes, the same bytes every time.

Pixels are read in threads, ahead of the encoder and never far ahead. Batches are full,
in fp32, without TF32, by deterministic kernels.
"""
# B encode batch, N patches given, C latent channels, h w latent cells

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from latentds.autoencoders.autoencoder import Autoencoder, exact_arithmetic, latent_cells
from latentds.codecs.refining import error_gradient, refine
from latentds.conversion.conversion_plan import Plan
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.workdir import LeftOut, Region, by_region, record_of
from latentds.errors import ContractError, InputError
from latentds.quantizers.scalar import AnyCodebook
from latentds.sources.source import PatchReader, tasks_of
from latentds.store.patch_record import Patch

CHUNKS_AHEAD = 3  # decoded and waiting: memory is a few encode batches of pixels
NO_PIXELS = np.zeros((0, 0, 3), np.uint8)

# A source, some of its regions, and what became of each.
Task = tuple[str, list[tuple[int, int]], Future[list[Patch | InputError]]]
logger = logging.getLogger(__name__)

CPU_BATCH = 16
CUDA_BATCHES = (256, 128, 64, 32, 16, 8, 4, 2, 1)  # the largest that fits is chosen


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """What became of a stretch of regions.

    patches  the readable ones, their `image` emptied
    pixels   uint8 (N, H, W, 3), their images
    bad      the others
    """

    patches: list[Patch]
    pixels: np.ndarray
    bad: dict[Region, LeftOut]


class PlanReader:
    """Reads the regions of a plan.

    Chunks come in the order asked for, whatever the number of threads.
    """

    def __init__(
        self, plan: Plan, config: ConvertConfig, workers: int, ahead: int = CHUNKS_AHEAD
    ) -> None:
        self.plan, self.config, self.ahead = plan, config, ahead
        self.hide = config.hide if config.anonymize else None
        self.reader = PatchReader(plan.source, workers)
        self.collator = ThreadPoolExecutor(1, thread_name_prefix="collate")

    def chunks(self, groups: Iterable[np.ndarray]) -> Iterator[Chunk]:
        """What became of the plan's regions at every group of rows, reading ahead."""
        waiting: deque[Future[Chunk]] = deque()
        for rows in groups:
            waiting.append(self.collator.submit(self.collate, self.submit(rows)))
            if len(waiting) > self.ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def submit(self, rows: np.ndarray) -> list[Task]:
        regions, plan = self.plan.regions[rows], self.plan
        tasks = []
        for places in tasks_of(regions["picture"]):
            part = regions[places]
            number, at = int(part["picture"][0]), [(int(r["x"]), int(r["y"])) for r in part]
            picture, header = plan.pictures[number], plan.headers[number]
            future = self.reader.submit(picture, header, plan.patch_px, at)
            tasks.append((picture.source, at, future))
        return tasks

    def collate(self, tasks: list[Task]) -> Chunk:
        patches, bad = list[Patch](), list[LeftOut]()
        for source, places, future in tasks:
            for place, outcome in zip(places, future.result(), strict=True):
                if isinstance(outcome, Patch):
                    patches.append(outcome)
                else:
                    bad.append(record_of(source, place, outcome))
        pixels = np.zeros((len(patches), *self.plan.patch_px, 3), np.uint8)
        for row, patch in enumerate(patches):
            pixels[row] = patch.image
        return Chunk([self.stored(patch) for patch in patches], pixels, by_region(bad))

    def stored(self, patch: Patch) -> Patch:
        """A patch without its pixels, and without the names it came from where they are hidden."""
        hide = self.hide or str
        slide = None if patch.slide is None else hide(patch.slide)
        return dataclasses.replace(patch, image=NO_PIXELS, slide=slide, source=hide(patch.source))

    def close(self) -> None:
        self.reader.close()
        self.collator.shutdown(wait=True, cancel_futures=True)


def device_model(device: torch.device) -> str:
    """What decides about the last bits on a device: a GPU's name, a CPU's vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def to_images(pixels: np.ndarray, batch: int, device: torch.device) -> Tensor:
    """Images float (B, 3, H, W) in [0, 1] of uint8 (N, H, W, 3) pixels.

    N <= B, filled up with black.
    """
    filled = torch.zeros((batch, *pixels.shape[1:]), dtype=torch.uint8, device=device)
    filled[: len(pixels)] = torch.from_numpy(pixels).to(device)
    images: Tensor = filled.permute(0, 3, 1, 2).float().div_(255)
    return images


class Encoder:
    """An autoencoder's encoder on a device, at one batch size.

    Float convolutions differ in the last bits between batch sizes, and a bit can move a value over
    a threshold: so every batch is full, and its size is recorded.

    steps  of `refining.refine` before codes are made
    """

    def __init__(
        self, autoencoder: Autoencoder, device: torch.device, batch: int, steps: int = 0
    ) -> None:
        self.autoencoder: Autoencoder = autoencoder.to(device, torch.float32)
        self.device, self.batch, self.steps = device, batch, steps
        self.shapes: dict[tuple[int, int], tuple[int, int, int]] = {}

    def latents(self, pixels: np.ndarray) -> Tensor:
        """Latents float32 (N, C, h, w) on the device of uint8 (N, H, W, 3), N <= the batch size."""
        images = to_images(pixels, self.batch, self.device)
        with exact_arithmetic():
            return self.autoencoder.encode(images)[: len(pixels)]

    def codes(self, pixels: np.ndarray, codebook: AnyCodebook) -> np.ndarray:
        """Codes uint8 (N, *codes_shape) of uint8 (N, H, W, 3)."""
        if not self.steps:
            return codebook.quantize(self.latents(pixels)).cpu().numpy()
        images = to_images(pixels, self.batch, self.device)
        with exact_arithmetic():
            latents = self.autoencoder.encode(images)
            if self.device.type == "cpu":  # refined one by one: what fills the batch up is spared
                latents, images = latents[: len(pixels)], images[: len(pixels)]
            refined = refine(latents, images, self.autoencoder, codebook, self.steps)
        return codebook.quantize(refined)[: len(pixels)].cpu().numpy()

    def check_shape(self, patch_px: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of a patch's latents, found by encoding a black one; must be the card's.

        On a GPU a whole batch is encoded: that it fits the memory is found here.
        """
        if patch_px in self.shapes:
            return self.shapes[patch_px]
        card, is_cpu = self.autoencoder.card, self.device.type == "cpu"
        black = torch.zeros(1 if is_cpu else self.batch, 3, *patch_px, device=self.device)
        with exact_arithmetic():
            latents = self.autoencoder.encode(black)
            if self.steps and not is_cpu:
                error_gradient(latents, black, self.autoencoder)
        shape = tuple(latents.shape[1:])
        expected = (card.channels, *latent_cells(patch_px, card.factor))
        if shape != expected:
            raise ContractError(f"{card.name}: latents are {shape}, its card says {expected}")
        self.shapes[patch_px] = expected
        return expected


def choose_batch(
    autoencoder: Autoencoder, device: torch.device, patch_px: tuple[int, int], steps: int = 0
) -> int:
    """Encode batch for this machine: 16 on a CPU, else the largest of 256, 128, ... that fits."""
    if device.type != "cuda":
        return CPU_BATCH
    for batch in CUDA_BATCHES:
        try:
            Encoder(autoencoder, device, batch, steps).check_shape(patch_px)
            return batch
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            logger.info("an encode batch of %d does not fit; trying half", batch)
    raise ContractError(f"{device}: not even one patch of {patch_px} can be encoded in its memory")
