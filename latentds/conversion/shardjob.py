"""One shard of a conversion: what is left of it, written block by block in a thread of its own."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from latentds.conversion.conversion_plan import PlannedShard
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.left_out import LeftOut, Region
from latentds.conversion.workdir import Pending, WorkFolder
from latentds.store.columns import encode_masks, encode_table, patches_table
from latentds.store.format import Contract, pack_key
from latentds.store.index import index_shard, save_index
from latentds.store.patch_record import Patch
from latentds.store.writer import Pack, ShardWriter

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
        self.pending = Pending()
        if not (self.index.is_file() or self.is_written()):
            partial = self.path.with_name(f"{self.path.name}.partial")
            if not partial.is_file() or partial.stat().st_size < self.journal.end:
                self.journal.reset()
        is_done = self.index.is_file() or self.is_written()
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
        self.pending.add(len(packs), list(block.bad.values()))
        if self.pending.is_due():
            self.journal.append(self.writer.sync(), *self.pending.take())

    def finish(self) -> None:
        """Give the shard its name and keep its index; one of bad pictures only leaves nothing."""
        if self.index.is_file():
            return
        if not self.is_written():
            self.close()
        if self.journal.packs:
            save_index(index_shard(self.config.out, self.shard.name, self.contract), self.index)

    def close(self) -> None:
        """Sync what is pending and end the tar."""
        writer = self.writer or ShardWriter(self.path, self.contract, self.journal.end)
        with writer:
            self.journal.append(writer.sync(), *self.pending.take())
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
        first = self.journal.packs + self.pending.packs
        packs = []
        for place, start in enumerate(range(0, len(patches), size)):
            part = patches[start : start + size]
            packs.append(
                Pack(
                    key=pack_key(self.shard.split, number, first + place),
                    codes=codes[start : start + size],
                    patches=encode_table(patches_table(part)),
                    masks=encode_masks(part),
                )
            )
        return packs
