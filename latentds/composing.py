"""Compose a data set from codes that are there already: packs, shards, tables, card, manifest."""
# n patches of a part, C latent channels, h w latent cells

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from latentds.columns import encode_table
from latentds.errors import InputError
from latentds.format import (
    DIGESTS,
    GOLDEN,
    MANIFEST,
    PACKS_TABLE,
    PATCHES_TABLE,
    Contract,
    pack_key,
)
from latentds.index import index_shard, save_index, write_tables
from latentds.manifest import Manifest
from latentds.publishing import dataset_card
from latentds.storage import sha256_file, write_atomically
from latentds.writer import Pack, ShardWriter

Part = tuple[np.ndarray, pa.Table]
SHARD_BYTES = 256 * 1_000_000  # of codes, as `convert --shard-mb` has it


def compose(
    out: Path,
    contract: Contract,
    splits: dict[str, Iterable[Part]],
    made: dict[str, Any],
    golden: bytes,
    pack_size: int = 256,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Write a whole data set.

    out      a folder that is not there yet, or empty
    splits   split to its patches, in any parts: codes uint8 (n, C, h, w) and their columns
    made     how they came about, for the manifest
    golden   bytes of the golden patches' file
    """
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: not empty; choose another folder")
    shard_patches = max(pack_size, shard_bytes // contract.bytes_per_patch // pack_size * pack_size)
    write_atomically(out / GOLDEN, golden)
    with tempfile.TemporaryDirectory() as work:
        indexes = []
        for split, parts in sorted(splits.items()):
            packs = cut(parts, pack_size)
            for number, shard in enumerate(grouped(packs, shard_patches // pack_size)):
                name = f"data/{split}-{number:06d}.tar"
                write_shard(out / name, contract, split, number, shard)
                path = Path(work) / f"{split}-{number:06d}.npz"
                save_index(index_shard(out, name, contract), path)
                indexes.append(path)
        if not indexes:
            raise InputError(f"{out}: no patches to write")
        records, classes, slides = write_tables(out, indexes)
    manifest = Manifest(
        contract=contract, shards=records, classes=classes, slides=slides, tables={}, made=made
    )
    return complete(out, manifest)


def complete(out: Path, manifest: Manifest) -> Manifest:
    """Write the card and, last of all, the manifest, with the tables that lie there described."""
    names = (PACKS_TABLE, DIGESTS, PATCHES_TABLE, GOLDEN)
    tables = {name: describe_file(out / name) for name in names}
    manifest = dataclasses.replace(manifest, tables=tables)
    write_atomically(out / "README.md", dataset_card(manifest).encode())
    write_atomically(out / MANIFEST, manifest.to_json().encode())
    return manifest


def describe_file(path: Path) -> dict[str, Any]:
    """Bytes and sha256 of a file, as the manifest lists them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def write_shard(
    path: Path, contract: Contract, split: str, number: int, parts: Iterable[Part]
) -> None:
    """One shard of ready packs."""
    with ShardWriter(path, contract) as writer:
        for place, (codes, columns) in enumerate(parts):
            key = pack_key(split, number, place)
            writer.add(Pack(key=key, codes=codes, patches=encode_table(columns)))
        writer.finish()


def cut(parts: Iterable[Part], size: int) -> Iterator[Part]:
    """The same patches in parts of `size`; the last may be smaller."""
    codes: list[np.ndarray] = []
    columns: list[pa.Table] = []
    count = 0
    for part_codes, part_columns in parts:
        codes.append(part_codes)
        columns.append(part_columns)
        count += len(part_codes)
        if count >= size:
            joined, table = np.concatenate(codes), pa.concat_tables(columns)
            whole = count - count % size
            for start in range(0, whole, size):
                yield joined[start : start + size], table.slice(start, size)
            codes, columns, count = [joined[whole:]], [table.slice(whole)], count - whole
    if count:
        yield np.concatenate(codes), pa.concat_tables(columns)


def grouped(parts: Iterator[Part], count: int) -> Iterator[Iterator[Part]]:
    """Runs of at most `count` parts; each must be consumed before the next is asked for."""
    for first in parts:

        def run(first: Part = first) -> Iterator[Part]:
            yield first
            for _ in range(count - 1):
                try:
                    yield next(parts)
                except StopIteration:
                    return

        yield run()
