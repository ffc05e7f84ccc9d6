"""Planned shards, written block by block in a thread of their own, alike in every process."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from latentds.conversion.conversion_plan import PlannedShard, check_budget
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.patch_encoding import Chunk
from latentds.conversion.prepared import Conversion
from latentds.conversion.workdir import LeftOut, Region, WorkFolder, by_region
from latentds.core.display import progress
from latentds.errors import ContractError
from latentds.store.format import Contract, pack_key
from latentds.store.index import index_shard, save_index
from latentds.store.packs import Pack, ShardWriter, encode_masks, encode_table, patches_table
from latentds.store.patch_record import Patch

BACKLOG = 4  # blocks encoded and not yet written


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
        """Queue a task; waits while too many are queued."""
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
    bad = by_region([*conversion.plan.bad, *work.all_bad()])
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
