"""Convert: plan, codebook, shards, tables, manifest.

Resumes after the last block that reached the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.base import Autoencoder
from latentds.codebooks import StoredCodebook
from latentds.columns import encode_masks, encode_table, patches_table
from latentds.conversion.codebook import find_codebook
from latentds.conversion.config import ConvertConfig
from latentds.conversion.decode import PatchReader
from latentds.conversion.encode import Encoder, choose_batch, choose_device
from latentds.conversion.finish import finish
from latentds.conversion.plan import Plan, PlannedShard, check_budget, make_plan, plan_shards
from latentds.conversion.workdir import Journal, Pending, WorkFolder, prepare_output
from latentds.format import Contract, pack_key
from latentds.index import index_shard, save_index
from latentds.manifest import Manifest
from latentds.sources.patch import Patch
from latentds.writer import Pack, ShardWriter

logger = logging.getLogger(__name__)
MAX_WORKERS = 16  # decode threads where --workers is not given


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Conversion:
    """A conversion ready to run."""

    config: ConvertConfig
    plan: Plan
    encoder: Encoder
    reader: PatchReader
    work: WorkFolder
    contract: Contract
    shards: list[PlannedShard]
    made: dict[str, Any]


def convert(config: ConvertConfig, autoencoder: Autoencoder | None = None) -> Manifest:
    """Convert a folder of pictures; returns the manifest of the finished data set.

    autoencoder  an object to use instead of `config.autoencoder`'s name or path
    raises       InputError, TooManyBadSamplesError, WeightsError, ContractError; OSError on a full
                 disk. After any of them the same call goes on where it stopped.
    """
    plan = make_plan(config)
    autoencoder = autoencoder or load_autoencoder(config.autoencoder)
    workers = config.workers or min(MAX_WORKERS, os.cpu_count() or 1)
    with (
        prepare_output(config) as work,
        contextlib.closing(PatchReader(plan, config, workers)) as reader,
    ):
        conversion = prepare(config, reader, autoencoder, work)
        write_shards(conversion)
        manifest = finish(conversion)
        shutil.rmtree(work.folder)
    return manifest


def prepare(
    config: ConvertConfig, reader: PatchReader, autoencoder: Autoencoder, work: WorkFolder
) -> Conversion:
    """Batch, codebook, contract and shards; from the work folder where an earlier run left them."""
    plan, device, earlier = reader.plan, choose_device(config.device), work.read_plan()
    if earlier:
        # Sums of another number of threads differ in their last bits, and so would the bytes.
        torch.set_num_threads(earlier["made"]["threads"])
    batch = config.encode_batch or earlier.get("encode_batch")
    encoder = Encoder(
        autoencoder, device, batch or choose_batch(autoencoder, device, plan.patch_px)
    )
    stored = find_codebook(config, plan, encoder, reader, work)
    card = autoencoder.card
    contract = Contract(
        latent_id=card.latent_id,
        decoder_id=card.decoder_id,
        codebook=stored.codebook,
        autoencoder=card.to_json(),
        patch_px=plan.patch_px,
        codes_shape=encoder.check_shape(plan.patch_px),
    )
    made = describe(config, plan, encoder, stored)
    work.write_plan(
        {
            "encode_batch": encoder.batch,
            "input": plan.digest(),
            "contract": contract.to_json(),
            "made": made,
        }
    )
    return Conversion(
        config=config,
        plan=plan,
        encoder=encoder,
        reader=reader,
        work=work,
        contract=contract,
        shards=plan_shards(plan, config, contract.bytes_per_patch),
        made=made,
    )


def describe(
    config: ConvertConfig, plan: Plan, encoder: Encoder, stored: StoredCodebook
) -> dict[str, Any]:
    """How the run is made, for the manifest: nothing that names a place, a host or a person."""
    from latentds.version import __version__

    device = encoder.device
    return {
        "options": config.recorded(),
        "encode_batch": encoder.batch,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {"latentds": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "codebook": stored.made,
        "masks": config.masks is not None,
        "converted_to_rgb": plan.modes(),
        "source_encodings": plan.encodings(),
        "ignored_files": plan.ignored,
    }


def write_shards(conversion: Conversion) -> None:
    """Write every shard that is not there yet."""
    work, total = conversion.work, len(conversion.plan.regions)
    with tqdm(total=total, desc="patches", unit="patch", smoothing=0.05, delay=1) as bar:
        for shard in conversion.shards:
            journal = work.journal(shard.name)
            if not work.index(shard.name).is_file():
                write_shard(conversion, shard, journal, bar)
                finish_shard(conversion, shard, journal)
            else:
                skip(bar, shard.blocks)


def skip(bar: tqdm[Any], blocks: Sequence[tuple[int, int]]) -> None:
    """Count blocks of an earlier run as done without counting them into the rate."""
    bar.initial = bar.n = bar.n + sum(stop - start for start, stop in blocks)


def write_shard(
    conversion: Conversion, shard: PlannedShard, journal: Journal, bar: tqdm[Any]
) -> None:
    """Write one shard from its first block, or from the one after the last in its journal."""
    path = conversion.config.out / shard.name
    if path.is_file():
        return  # a run was killed between the shard's rename and its index
    if not is_resumable(path, journal):
        journal.reset()
    with ShardWriter(path, conversion.contract, journal.end) as writer:
        skip(bar, shard.blocks[: journal.blocks])
        pending = Pending()
        for patches, codes, bad in encoded_blocks(conversion, shard.blocks[journal.blocks :], bar):
            packs = make_packs(conversion, shard, journal.packs + pending.packs, patches, codes)
            for pack in packs:
                writer.add(pack)
            pending.add(len(packs), bad)
            left_out = [*conversion.plan.bad, *conversion.work.all_bad(), *pending.bad]
            check_budget(conversion.config, list(dict(left_out).items()))
            if pending.is_due():
                journal.append(writer.sync(), *pending.take())
        journal.append(writer.sync(), *pending.take())
        if journal.packs:
            writer.finish()


def is_resumable(path: Path, journal: Journal) -> bool:
    """Whether the bytes the journal promises are there."""
    partial = path.with_name(f"{path.name}.partial")
    return journal.end == 0 or (partial.is_file() and partial.stat().st_size >= journal.end)


def finish_shard(conversion: Conversion, shard: PlannedShard, journal: Journal) -> None:
    """Index a finished shard; one whose pictures were all bad leaves nothing."""
    out = conversion.config.out
    if journal.packs:
        index = index_shard(out, shard.name, conversion.contract)
        save_index(index, conversion.work.index(shard.name))
    else:
        (out / f"{shard.name}.partial").unlink(missing_ok=True)


def encoded_blocks(
    conversion: Conversion, blocks: Sequence[tuple[int, int]], bar: tqdm[Any]
) -> Iterator[tuple[list[Patch], np.ndarray, list[tuple[str, str]]]]:
    """Patches, their codes and the bad pictures of every block.

    The next blocks' pictures decode meanwhile.
    """
    batch = conversion.encoder.batch
    ranges = [
        (a, min(a + batch, stop)) for start, stop in blocks for a in range(start, stop, batch)
    ]
    chunks = conversion.reader.chunks(ranges)
    for start, stop in blocks:
        patches: list[Patch] = []
        codes = [np.zeros((0, *conversion.contract.codes_shape), np.uint8)]
        bad: dict[str, str] = {}
        for _ in range(start, stop, batch):
            chunk = next(chunks)
            if chunk.patches:
                codes.append(conversion.encoder.codes(chunk.pixels, conversion.contract.codebook))
            patches += chunk.patches
            bad.update(chunk.bad)
            bar.update(len(chunk.patches) + len(chunk.bad))
        yield patches, np.concatenate(codes), list(bad.items())


def make_packs(
    conversion: Conversion,
    shard: PlannedShard,
    first: int,
    patches: list[Patch],
    codes: np.ndarray,
) -> list[Pack]:
    """A block's packs: runs of `pack_size` patches, or all of its slide."""
    size = len(patches) if conversion.config.pack_by_slide else conversion.config.pack_size
    number = int(Path(shard.name).stem.rpartition("-")[2])
    packs = []
    for place, start in enumerate(range(0, len(patches), size or 1)):
        part = patches[start : start + size]
        packs.append(
            Pack(
                key=pack_key(shard.split, number, first + place),
                codes=codes[start : start + size],
                patches=encode_table(patches_table(part)),
                masks=encode_masks(part),
            )
        )
    return packs
