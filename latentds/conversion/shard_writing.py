"""Writing planned shards, the same way in one process and in every worker of many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from latentds.conversion.conversion_plan import check_budget
from latentds.conversion.left_out import by_region
from latentds.conversion.prepared import Conversion
from latentds.conversion.region_decoding import Chunk
from latentds.conversion.shardjob import Block, ShardJob, WriterThread
from latentds.core.progress import progress
from latentds.errors import ContractError


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
    """The progress bar of a conversion."""
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
