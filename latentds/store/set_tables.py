"""The tables of a data set: opened, and refused where they contradict the manifest."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from latentds.errors import FormatError
from latentds.store.files import OF_PATCHES, TABLES, Files
from latentds.store.format import CHECKSUMS, PACKS_TABLE, PATCHES_TABLE
from latentds.store.manifest import Manifest
from latentds.store.open_files import Signature, signature_of
from latentds.store.tables import Table, block_sums, read_whole

logger = logging.getLogger(__name__)

MAX_HASHED_BYTES = 1 << 25  # of a patch table without block checksums: hashed when it is opened


def rows_of(manifest: Manifest, name: str) -> int:
    """How many rows a table has."""
    return manifest.patches if name in OF_PATCHES else manifest.packs


def read_table(files: Files, manifest: Manifest, name: str) -> np.ndarray:
    """A table in memory, of the hash that the manifest records; from a location, once anew."""
    sha256 = manifest.tables.get(name, {}).get("sha256")
    dtype, rows = TABLES[name], rows_of(manifest, name)
    try:
        return read_whole(files.table(name, manifest), dtype, rows, sha256)
    except FormatError:
        path = files.renew(name, manifest)
        if path is None:
            raise
    return read_whole(path, dtype, rows, sha256)


def open_table(
    files: Files,
    manifest: Manifest,
    name: str,
    check: Callable[[np.ndarray], None] = lambda _: None,
) -> Table:
    """A table whose rows are read when they are wanted, checked by their blocks' checksums."""
    rows = rows_of(manifest, name)
    sums = block_sums(manifest.tables.get(name, {}), rows)
    renew = functools.partial(files.renew, name, manifest)
    fill = functools.partial(files.fill_table, name)
    return Table(files.table(name, manifest), TABLES[name], rows, sums, renew, check, fill)


def check_unsummed(files: Files, manifest: Manifest) -> None:
    """Hash a patch table that has no block checksums, if it is small; say what is not checked."""
    entry = manifest.tables[PATCHES_TABLE]
    has_sums = block_sums(entry, manifest.patches) is not None
    if has_sums and manifest.has_digest and CHECKSUMS in manifest.tables:
        return
    logger.warning(
        "%s: of a time before tables, patches and the manifest had checksums of their own: damage "
        "may go unnoticed, and checking reads whole packs; 'latentds verify' finds all damage, "
        "'latentds repack' writes a set that has them", files.where,
    )  # fmt: skip
    if not has_sums and manifest.patches * TABLES[PATCHES_TABLE].itemsize <= MAX_HASHED_BYTES:
        read_table(files, manifest, PATCHES_TABLE)


def check_packs(packs: np.ndarray, manifest: Manifest, where: str) -> None:
    """Refuse a pack table that contradicts itself, or the counts and sizes of the manifest."""
    shards = manifest.shards
    numbers = np.repeat(np.arange(len(shards)), [shard.packs for shard in shards])
    last_of_shards = np.cumsum([shard.packs for shard in shards]) - 1
    ends = np.cumsum(packs["count"].astype(np.int64))
    if not (
        np.array_equal(packs["shard"], numbers)
        and packs["count"].all()
        and np.array_equal(packs["first_patch"].astype(np.int64), ends - packs["count"])
        and np.array_equal(ends[last_of_shards], np.cumsum([shard.patches for shard in shards]))
    ):
        raise FormatError(
            f"{where}/{PACKS_TABLE}: shards do not start and end where the manifest says; fetch "
            "both anew"
        )
    room = np.array([shard.bytes for shard in shards], np.uint64)[numbers]
    size = np.uint64(manifest.contract.bytes_per_patch)
    beyond = ends_past(packs["codes_offset"], packs["count"].astype(np.uint64) * size, room)
    for kind in ("patches", "masks"):
        beyond |= ends_past(packs[f"{kind}_offset"], packs[f"{kind}_bytes"], room)
    if beyond.any():
        pack = int(np.argmax(beyond))
        raise FormatError(
            f"{where}/{PACKS_TABLE}: pack {pack} lies behind the {room[pack]} bytes of its shard; "
            "fetch the table anew"
        )


def ends_past(offsets: np.ndarray, sizes: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Whether stretches of a file end behind its `room`, bool (N,); uint64, without overflow."""
    found: np.ndarray = (offsets > room) | (sizes > room - np.minimum(offsets, room))
    return found


def check_rows(table: np.ndarray, manifest: Manifest, where: str) -> None:
    """Refuse labels and slides that the manifest does not list: a GPU would die of them."""
    for field, names in (("label", manifest.classes), ("slide", manifest.slides)):
        least, most = table[field].min(), table[field].max()
        if least < -1 or most >= len(names):
            raise FormatError(
                f"{where}/{PATCHES_TABLE}: {field} {least if least < -1 else most}, but the "
                f"manifest lists {len(names)}; damaged, fetch it anew"
            )


def check_sizes(folder: Path, manifest: Manifest) -> list[Signature]:
    """Every shard's signature; refuses missing, truncated or grown ones before anything is read."""
    found = []
    for shard in manifest.shards:
        try:
            status = (folder / shard.name).stat()
        except FileNotFoundError as error:
            raise FormatError(
                f"{folder / shard.name}: missing; the manifest lists it, fetch it"
            ) from error
        if status.st_size != shard.bytes:
            raise FormatError(
                f"{folder / shard.name}: {status.st_size} bytes, the manifest says {shard.bytes}; "
                "truncated or replaced, fetch it anew"
            )
        found.append(signature_of(status))
    return found
