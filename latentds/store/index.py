"""The tables beside the shards, derived from the shards alone: packs, patches, counts, names."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentds.core.storage import naming, rename_durably, sha256_file, write_atomically
from latentds.errors import FormatError
from latentds.store.format import (
    CHECKSUM_DTYPE,
    CHECKSUMS,
    DIGEST_DTYPE,
    DIGESTS,
    MAX_BLOCK_ROWS,
    NO_LABEL,
    PACK_DTYPE,
    PACKS_TABLE,
    PATCH_DTYPE,
    PATCHES,
    PATCHES_TABLE,
    ROWS_CRC32,
    TABLES,
    Contract,
    Spans,
    pack_key,
    sorted_names,
)
from latentds.store.manifest import Manifest, ShardRecord
from latentds.store.open_files import BLOCK_ROWS, KINDS, BlockSums, Table
from latentds.store.packs import SCHEMA, ScannedPack, decode_table, read_member, scan_shard

PART_ROWS = 1 << 16  # of a table that is read as a whole
AS_BLOCKS = range(64, 1025)  # patches of packs that do for blocks of the patch table
PACK_SUMS_FROM = 1 << 26  # patches from which a patch table's sums are in the pack table
WANTED_BLOCKS = 256  # of a table before a first shuffled batch: two windows of the order
PACK_BLOCK_ROWS = 64  # of the pack table 4 KiB, of its digests 6: a pack of a window needs one each
UNKNOWN_PX = -1  # x and y where a source has none
ARRAYS = ("packs", "digests", "patches", "checksums")
INDEXED = ("label", "slide", "x", "y", "mpp", "size_px")  # columns that the patch table holds


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """What one shard contributes to the tables.

    packs    PACK_DTYPE rows, first_patch counted from the shard's start
    digests  DIGEST_DTYPE rows
    patches  PATCH_DTYPE rows, label and slide indexing `classes` and `slides` of this shard
    checksums  CHECKSUM_DTYPE, one a patch
    """

    record: ShardRecord
    packs: np.ndarray
    digests: np.ndarray
    patches: np.ndarray
    checksums: np.ndarray
    classes: tuple[str, ...]
    slides: tuple[str, ...]


def index_shard(
    folder: Path,
    name: str,
    contract: Contract,
    packs: Sequence[ScannedPack] | None = None,
    sha256: str | None = None,
) -> ShardIndex:
    """Index a finished shard: every header, every column, every checksum.

    packs, sha256  what an earlier pass over the file found, to spare another
    """
    path = folder / name
    packs = list(scan_shard(path, contract)) if packs is None else packs
    check_keys(path, name, packs)
    table = pa.concat_tables(
        decode_table(
            read_member(path, pack, "patches"),
            f"{path}, {pack.key}.{PATCHES}",
            SCHEMA,
            pack.row["count"],
            INDEXED,
        )
        for pack in packs
    )
    classes, labels = number_names(table["label"])
    slides, slide_numbers = number_names(table["slide"])
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    record = ShardRecord(
        name=name,
        split=name.removeprefix("data/").rpartition("-")[0],
        bytes=path.stat().st_size,
        sha256=sha256 or sha256_file(path),
        codebook_id=contract.codebook.codebook_id,
        packs=len(packs),
        patches=len(table),
        labels={label: int(count) for label, count in zip(classes, counts, strict=True)},
    )
    patches = np.zeros(len(table), PATCH_DTYPE)
    patches["label"], patches["slide"] = labels, slide_numbers
    for field, unknown in (("x", UNKNOWN_PX), ("y", UNKNOWN_PX), ("mpp", np.nan), ("size_px", 0)):
        patches[field] = pc.fill_null(table[field], unknown).to_numpy()
    return ShardIndex(
        record=record,
        packs=pack_rows(packs),
        digests=digest_rows(packs),
        patches=patches,
        checksums=np.array([crc32 for pack in packs for crc32 in pack.checksums], CHECKSUM_DTYPE),
        classes=classes,
        slides=slides,
    )


def check_keys(path: Path, name: str, packs: Sequence[ScannedPack]) -> None:
    """Refuse a shard without packs, or whose keys are not SPLIT-SSSSSS-PPPPPP in sequence."""
    if not packs:
        raise FormatError(f"{path}: no packs in it; fetch it anew")
    split, _, number = name.removeprefix("data/").removesuffix(".tar").rpartition("-")
    for place, pack in enumerate(packs):
        if pack.key != pack_key(split, int(number), place):
            raise FormatError(f"{path}: pack {place} has key {pack.key!r}; renamed or reordered")


def number_names(column: pa.ChunkedArray) -> tuple[tuple[str, ...], np.ndarray]:
    """The distinct names, sorted, and every value's number among them (-1 for null)."""
    names = sorted(name for name in pc.unique(column).to_pylist() if name is not None)
    numbers = pc.index_in(column, value_set=pa.array(names, pa.string()))
    return tuple(names), pc.fill_null(numbers, NO_LABEL).to_numpy().astype(np.int32)


def pack_rows(packs: Sequence[ScannedPack]) -> np.ndarray:
    """PACK_DTYPE rows of a shard's packs, the shard numbered 0."""
    rows = np.zeros(len(packs), PACK_DTYPE)
    for field in PACK_DTYPE.names or ():
        rows[field] = [pack.row.get(field, 0) for pack in packs]
    rows["first_patch"] = np.cumsum(rows["count"]) - rows["count"]
    return rows


def digest_rows(packs: Sequence[ScannedPack]) -> np.ndarray:
    """DIGEST_DTYPE rows of a shard's packs."""
    fields = DIGEST_DTYPE.names or ()
    joined = b"".join(pack.digests[field] for pack in packs for field in fields)
    return np.frombuffer(joined, DIGEST_DTYPE)


def save_index(index: ShardIndex, path: Path) -> None:
    """Keep a shard's index until all shards are there."""
    names = {
        "record": index.record._asdict(),
        "classes": index.classes,
        "slides": index.slides,
    }
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(names).encode(), np.uint8)
    arrays = {name: getattr(index, name) for name in ARRAYS}
    np.savez(buffer, names=text, **arrays)
    write_atomically(path, buffer.getvalue())


def load_index(path: Path) -> ShardIndex:
    with np.load(path, allow_pickle=False) as arrays:
        names = json.loads(arrays["names"].tobytes())
        return ShardIndex(
            record=ShardRecord(**names["record"]),
            **{name: arrays[name] for name in ARRAYS},
            classes=tuple(names["classes"]),
            slides=tuple(names["slides"]),
        )


def write_tables(
    folder: Path, paths: Sequence[Path], order: Sequence[str] = ()
) -> tuple[tuple[ShardRecord, ...], tuple[str, ...], tuple[str, ...]]:
    """Join the shards' indexes (sorted by shard name) into the four tables.

    One shard in memory at a time.

    order    label names in the order that numbers them, with or without patches; others follow
    returns  shard records, classes, slides, as the manifest lists them
    """
    records, classes, slides = [], set[str](), set[str]()
    for path in paths:
        index = load_index(path)
        records.append(index.record)
        classes.update(index.classes)
        slides.update(index.slides)
    names = ((*order, *sorted_names(classes.difference(order))), tuple(sorted(slides)))
    totals = (sum(r.packs for r in records), sum(r.patches for r in records))
    with (
        TableWriter(folder / PACKS_TABLE, PACK_DTYPE, totals[0]) as packs,
        TableWriter(folder / DIGESTS, DIGEST_DTYPE, totals[0]) as digests,
        TableWriter(folder / PATCHES_TABLE, PATCH_DTYPE, totals[1]) as patches,
        TableWriter(folder / CHECKSUMS, CHECKSUM_DTYPE, totals[1]) as checksums,
    ):
        first_patch = 0
        for number, path in enumerate(paths):
            index = load_index(path)
            pack_part, patch_part = renumber(index, number, first_patch, *names)
            packs.write(pack_part)
            digests.write(index.digests)
            patches.write(patch_part)
            checksums.write(index.checksums)
            first_patch += len(patch_part)
    return tuple(records), *names


class TableWriter:
    """An npy table written by ordinary writes, which report a full disk; a map would die of it."""

    def __init__(self, path: Path, dtype: np.dtype[Any], rows: int) -> None:
        self.path, self.temporary = path, path.with_name(f"{path.name}.tmp")
        self.file = self.temporary.open("wb")
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (rows,),
        }
        np.lib.format.write_array_header_1_0(self.file, header)

    def write(self, part: np.ndarray) -> None:
        with naming(self.path):
            self.file.write(part.tobytes())

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with naming(self.path):
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
            self.file.close()
        if kind is None:
            rename_durably(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


def renumber(
    index: ShardIndex,
    shard: int,
    first_patch: int,
    classes: tuple[str, ...],
    slides: tuple[str, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """A shard's rows with numbers of the whole data set instead of its own."""
    packs, patches = index.packs.copy(), index.patches.copy()
    ends = np.cumsum(packs["count"], dtype=np.int64)
    packs["shard"] = shard
    packs["first_patch"] += np.uint64(first_patch)
    for field, own, all_names in (
        ("label", index.classes, classes),
        ("slide", index.slides, slides),
    ):
        position = {name: number for number, name in enumerate(all_names)}
        lookup = np.array([*(position[name] for name in own), NO_LABEL], np.int32)
        patches[field] = lookup[patches[field]]  # -1 picks the last entry, which is -1
    packs[ROWS_CRC32] = [zlib.crc32(part.data) for part in np.split(patches, ends[:-1])]
    return packs, patches


def summarize_blocks(
    path: Path, dtype: np.dtype[Any], rows: int, kind: str = "crc32"
) -> dict[str, Any]:
    """Fields of a table's entry in the manifest that let blocks of it be checked alone."""
    size = block_rows_of(dtype, rows, kind)
    sums = BlockSums(Spans.even(rows, size), kind, lambda _: [])
    table = Table(path, dtype, rows, sums)
    packed = b"".join(sums.of(table.read(number)) for number in range(len(sums.spans)))
    return {"block_rows": size, f"block_{kind}": base64.b64encode(packed).decode()}


def summarize_patches(out: Path, manifest: Manifest, size: int | None) -> dict[str, Any]:
    """The same of the patch table; of very large sets the pack table has the sums.

    size  patches of every pack, as `even_size` found it
    """
    if size is not None and manifest.patches > PACK_SUMS_FROM and size in AS_BLOCKS:
        return {"blocks": "packs"}
    return summarize_blocks(out / PATCHES_TABLE, TABLES[PATCHES_TABLE], manifest.patches)


def even_size(out: Path, manifest: Manifest) -> int | None:
    """Patches of every pack but the last of its shard; None where they are not alike."""
    table = Table(out / PACKS_TABLE, TABLES[PACKS_TABLE], manifest.packs)
    parts = range(0, manifest.packs, PART_ROWS)
    counts = np.concatenate([table[part : part + PART_ROWS]["count"] for part in parts])
    size, ends = int(counts.max()), np.cumsum([shard.packs for shard in manifest.shards])
    return size if (np.delete(counts, ends - 1) == size).all() else None


def block_rows_of(dtype: np.dtype[Any], rows: int, kind: str) -> int:
    """Rows of a block, a power of two: about as many as make a first batch cost least.

    That fetches the manifest, with 4/3 of a sum's bytes (base64) a block, and WANTED_BLOCKS.
    """
    size = BLOCK_ROWS if kind == "crc32" else PACK_BLOCK_ROWS
    best = math.sqrt(KINDS[kind][0] * 4 / 3 * rows / (WANTED_BLOCKS * dtype.itemsize))
    while size * math.sqrt(2) < best and size < MAX_BLOCK_ROWS:
        size *= 2
    return size
