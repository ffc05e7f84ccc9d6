"""Planned shards made: regions to pixels, those to codes, codes written, the same bytes every time.

Pixels are read in threads, ahead of the encoder and never far ahead. Batches are full, without
TF32, by deterministic kernels. Blocks are written in a thread of their own.
"""
# B encode batch, N patches given, C latent channels, h w latent cells

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

from latentds.autoencoders.autoencoder import Autoencoder, exact_arithmetic, latent_cells
from latentds.codecs.refining import error_gradient, refine
from latentds.conversion.conversion_plan import Plan, PlannedShard, check_budget
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.workdir import LeftOut, Region, WorkFolder, by_region, record_of
from latentds.core.display import progress
from latentds.core.processes import choose_device
from latentds.errors import ContractError, InputError
from latentds.quantizers.scalar import AnyCodebook
from latentds.sources.source import PatchReader, tasks_of
from latentds.store.format import Contract, pack_key
from latentds.store.index import index_shard, save_index
from latentds.store.packs import Pack, ShardWriter, encode_masks, encode_table, patches_table
from latentds.store.patch_record import Patch

CHUNKS_AHEAD = 3  # decoded and waiting: memory is a few encode batches of pixels
BACKLOG = 4  # blocks encoded and not yet written
NO_PIXELS = np.zeros((0, 0, 3), np.uint8)
# A source, some of its regions, and what became of each.
Task = tuple[str, list[tuple[int, int]], Future[list[Patch | InputError]]]


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
    """Reads the regions of a plan: chunks in the order asked for, whatever the number of threads.

    On a CPU without reading ahead, which would hold the encoder up. Two cores, PNG patches:
    pictures decoded between two batches cost 9 % of the encoder's rate, pictures decoded during
    them 10 to 19 %, because every layer ends at a barrier of all threads.
    """

    def __init__(self, plan: Plan, config: ConvertConfig) -> None:
        self.plan, self.config = plan, config
        self.ahead = 0 if choose_device(config.device).type == "cpu" else CHUNKS_AHEAD
        self.hide = config.hide if config.anonymize else None
        self.reader = PatchReader(plan.source, config.workers)
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
    dtype  that the encoder computes in; decodings, as of golden patches, are in float32
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        device: torch.device,
        batch: int,
        steps: int = 0,
        dtype: str = "float32",
    ) -> None:
        self.autoencoder: Autoencoder = autoencoder.to(device, torch.float32)
        self.encoding = self.autoencoder
        if dtype != "float32":  # the decoder's weights keep all their digits
            self.encoding = copy.deepcopy(self.autoencoder).to(dtype=getattr(torch, dtype))
        self.device, self.batch, self.steps = device, batch, steps
        self.shapes: dict[tuple[int, int], tuple[int, int, int]] = {}

    def latents(self, pixels: np.ndarray) -> Tensor:
        """Latents float32 (N, C, h, w) on the device of uint8 (N, H, W, 3), N <= the batch size."""
        return self.encode(to_images(pixels, self.batch, self.device))[: len(pixels)]

    def encode(self, images: Tensor) -> Tensor:
        """Latents float32 (B, C, h, w) of images (B, 3, H, W) in [0, 1]."""
        with exact_arithmetic():
            latents: Tensor = self.encoding.encode(images).float()
        return latents

    def codes(self, pixels: np.ndarray, codebook: AnyCodebook) -> np.ndarray:
        """Codes uint8 (N, *codes_shape) of uint8 (N, H, W, 3)."""
        if not self.steps:
            return codebook.quantize(self.latents(pixels)).cpu().numpy()
        images = to_images(pixels, self.batch, self.device)
        latents = self.encode(images)
        if self.device.type == "cpu":  # refined one by one: what fills the batch up is spared
            latents, images = latents[: len(pixels)], images[: len(pixels)]
        with exact_arithmetic():
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
        latents = self.encode(black)
        if self.steps and not is_cpu:
            with exact_arithmetic():
                error_gradient(latents, black, self.autoencoder)
        shape = tuple(latents.shape[1:])
        expected = (card.channels, *latent_cells(patch_px, card.factor))
        if shape != expected:
            raise ContractError(f"{card.name}: latents are {shape}, its card says {expected}")
        self.shapes[patch_px] = expected
        return expected


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Conversion:
    config: ConvertConfig
    plan: Plan
    encoder: Encoder
    reader: PlanReader
    work: WorkFolder
    contract: Contract
    shards: list[PlannedShard]
    made: dict[str, Any]

    def bad(self) -> dict[Region, LeftOut]:
        journals = self.work.journals.values()
        return by_region([*self.plan.bad, *(bad for journal in journals for bad in journal.bad)])


WriteShards = Callable[[Conversion], None]  # an engine


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Encoded candidates of a stretch of the plan.

    patches  the readable ones; codes  their codes in parts, uint8 (n, C, h, w)
    bad      what is left out
    """

    patches: list[Patch]
    codes: list[np.ndarray]
    bad: dict[Region, LeftOut]


class WriterThread:
    """Runs tasks in order in one thread; at most BACKLOG wait, and the first error is raised."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self.waiting: deque[Future[None]] = deque()

    def submit(self, task: Callable[..., None], *arguments: object) -> None:
        self.waiting.append(self.pool.submit(task, *arguments))
        while len(self.waiting) > BACKLOG:
            self.waiting.popleft().result()

    def __enter__(self) -> WriterThread:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            while self.waiting and kind is None:
                self.waiting.popleft().result()
        finally:
            self.pool.shutdown(wait=True, cancel_futures=True)


class ShardJob:
    """A planned shard, from the block after the last that an earlier run made durable.

    blocks_left  (start, stop) rows of the plan's regions that this run has to write
    """

    def __init__(
        self, config: ConvertConfig, contract: Contract, shard: PlannedShard, work: WorkFolder
    ) -> None:
        self.config, self.contract, self.shard = config, contract, shard
        self.journal, self.index = work.journal(shard.name), work.index(shard.name)
        self.path = config.out / shard.name
        self.writer: ShardWriter | None = None
        is_done = self.index.is_file() or self.is_written()
        if not is_done:
            partial = self.path.with_name(f"{self.path.name}.partial")
            if not partial.is_file() or partial.stat().st_size < self.journal.end:
                self.journal.reset()
        self.blocks_left = () if is_done else shard.blocks[self.journal.blocks :]

    def is_written(self) -> bool:
        """Whether the shard has its name: a run was killed between its rename and its index."""
        return self.path.is_file() and self.journal.blocks == len(self.shard.blocks)

    def write(self, block: Block) -> None:
        """Pack a block and append it; sync when it is time to."""
        if self.writer is None:
            self.writer = ShardWriter(self.path, self.contract, self.journal.end)
        packs = self.make_packs(block)
        for pack in packs:
            self.writer.add(pack)
        if self.journal.add(len(packs), block.bad.values()):
            self.journal.append(self.writer.sync())

    def finish(self) -> None:
        """Give the shard its name and keep its index; one of bad pictures only leaves nothing."""
        if self.index.is_file():
            return
        if not self.is_written():
            self.close()
        if self.journal.packs:
            save_index(index_shard(self.config.out, self.shard.name, self.contract), self.index)

    def close(self) -> None:
        writer = self.writer or ShardWriter(self.path, self.contract, self.journal.end)
        with writer:
            self.journal.append(writer.sync())
            if self.journal.packs:
                writer.finish()
            else:
                writer.temporary.unlink()

    def make_packs(self, block: Block) -> list[Pack]:
        """A block's packs: runs of `pack_size` patches, or all of its slide."""
        if not block.patches:
            return []
        patches, codes = block.patches, np.concatenate(block.codes)
        size = len(patches) if self.config.pack_by_slide else self.config.pack_size
        number = int(Path(self.shard.name).stem.rpartition("-")[2])
        first = self.journal.packs + self.journal.written["packs"]
        packs = []
        for place, start in enumerate(range(0, len(patches), size)):
            part = patches[start : start + size]
            packs.append(
                Pack(
                    key=pack_key(self.shard.split, number, first + place),
                    codes=codes[start : start + size],
                    patches=encode_table(patches_table(part)),
                    masks=encode_masks(pa.array([p.mask_png for p in part], pa.binary())),
                )
            )
        return packs


def write_shards(
    conversion: Conversion,
    is_quiet: bool = False,
    on_bad: Callable[[], object] = lambda: None,
) -> None:
    """Write every shard that is not there yet; packing and writing overlap with encoding.

    on_bad  called before a block with bad pictures is written; may raise
    """
    work, total = conversion.work, len(conversion.plan.regions)
    jobs = [ShardJob(conversion.config, conversion.contract, s, work) for s in conversion.shards]
    bad = conversion.bad()
    with (
        patches_bar(total, is_quiet) as bar,
        WriterThread() as writer,
    ):
        left = [block for job in jobs for block in job.blocks_left]
        bar.initial = bar.n = total - sum(stop - start for start, stop in left)
        blocks = encoded_blocks(conversion, left, bar)
        for job in jobs:
            for _ in job.blocks_left:
                block = next(blocks)
                if block.bad:
                    on_bad()
                bad |= block.bad
                check_budget(conversion.config, bad.values())
                writer.submit(job.write, block)
            writer.submit(job.finish)


def patches_bar(total: int, is_quiet: bool = False) -> tqdm[Any]:
    return progress(total=total, desc="patches", unit="patch", smoothing=0.05, disable=is_quiet)


def encoded_blocks(
    conversion: Conversion, blocks: Sequence[tuple[int, int]], bar: tqdm[Any]
) -> Iterator[Block]:
    """Patches, codes and bad pictures of every block; the pictures of the next decode meanwhile."""
    batch = conversion.encoder.batch
    groups = (
        np.arange(first, min(first + batch, stop))
        for start, stop in blocks
        for first in range(start, stop, batch)
    )
    chunks = conversion.reader.chunks(groups)
    for start, stop in blocks:
        block = Block([], [], {})
        for _ in range(start, stop, batch):
            chunk = next(chunks)
            block.patches.extend(chunk.patches)
            block.codes.extend([encode_chunk(conversion, chunk)] if chunk.patches else [])
            block.bad.update(chunk.bad)
            bar.update(min(batch, len(chunk.patches) + len(chunk.bad)))
        yield block


def encode_chunk(conversion: Conversion, chunk: Chunk) -> np.ndarray:
    """Codes of a chunk's pixels; ContractError where the autoencoder gives no numbers."""
    try:
        return conversion.encoder.codes(chunk.pixels, conversion.contract.codebook)
    except ValueError as error:
        name = conversion.encoder.autoencoder.card.name
        raise ContractError(
            f"{name}: {error} (batch that starts with {chunk.patches[0].source})"
        ) from error
