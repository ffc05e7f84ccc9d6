"""The npy tables beside the shards: read where they are wanted, blocks checked before first use.

Opening costs nothing whatever the size. What contradicts the manifest is refused.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import logging
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from latentds.core.untrusted_files import open_regular
from latentds.errors import FormatError, first_words
from latentds.store.files import OF_PATCHES, TABLES, Files
from latentds.store.format import (
    CHECKSUMS,
    NPY_ERRORS,
    PACKS_TABLE,
    PATCHES_TABLE,
    TABLE_HEAD_BYTES,
    BlockSums,
    block_sums,
)
from latentds.store.manifest import Manifest
from latentds.store.open_files import OpenFile, Signature, signature_of

BLOCK_ROWS = 512  # of the patch table 12 KiB, read and checked as one
MAX_BLOCKS = 4096  # of a table in memory: two windows of the order touch some 500
logger = logging.getLogger(__name__)

MAX_HASHED_BYTES = 1 << 25  # of a patch table without block checksums: hashed when it is opened


def summarize_blocks(path: Path, dtype: np.dtype[Any], rows: int) -> dict[str, Any]:
    """Fields of a table's entry in the manifest that let blocks of it be checked alone."""
    table = Table(path, dtype, rows)
    sums = [zlib.crc32(table.load(number).data) for number in range(-(-rows // BLOCK_ROWS))]
    packed = np.array(sums, "<u4").tobytes()
    return {"block_rows": BLOCK_ROWS, "block_crc32": base64.b64encode(packed).decode()}


def nothing(blocks: np.ndarray, ahead: bool = False) -> None:
    """Of a folder, all blocks are there."""
    del blocks, ahead


class Table:
    """A table of just the expected columns, rows and bytes, indexed as an array is.

    sums   of its blocks; None trusts the file
    renew  fetches the file anew and says where it is; None where that cannot be done
    check  raises for rows whose values cannot be; called with all that are handed out
    fill   puts blocks into the file that are not there yet; `ahead` returns at once

    `table[rows]` and `table[first:end]` give rows, `table[name]` reads a field of all of them.
    raises  FormatError where the file is not what was expected or a block is damaged
    """

    def __init__(
        self,
        path: Path,
        dtype: np.dtype[Any],
        rows: int,
        sums: BlockSums | None = None,
        renew: Callable[[], Path | None] = lambda: None,
        check: Callable[[np.ndarray], None] = lambda _: None,
        fill: Callable[..., None] = nothing,
    ) -> None:
        self.dtype, self.count, self.sums = dtype, rows, sums
        self.renew, self.check, self.fill = renew, check, fill
        self.block_rows = sums.rows if sums else BLOCK_ROWS
        blocks = -(-rows // self.block_rows)
        # Memory that is not touched costs nothing: it is taken as blocks come.
        self.held = np.empty((min(blocks, MAX_BLOCKS), self.block_rows), dtype)
        self.slots = np.full(blocks, -1, np.int32)  # of every block, -1 where it is not held
        self.holds = np.full(len(self.held), -1, np.int64)  # which block a slot has
        self.next_slot = 0
        self.lock = threading.RLock()  # blocks come and go while rows are gathered
        self.open(path)

    def open(self, path: Path) -> None:
        """Take the file at `path`."""
        self.head = check_head(path, self.dtype, self.count)
        self.file = OpenFile(path)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, wanted: Any) -> Any:
        if isinstance(wanted, str):
            return self[:][wanted]
        if isinstance(wanted, slice):
            wanted = np.arange(*wanted.indices(self.count))
        rows = np.asarray(wanted)
        with self.lock:
            found = self.gather(np.flatnonzero(rows) if rows.dtype == bool else rows.reshape(-1))
        return found if rows.ndim else found[0]

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        del copy  # it always is one
        return np.asarray(self[:], dtype)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Rows, in the order asked for."""
        if not len(rows):
            return np.empty(0, self.dtype)
        if rows.min() < 0 or rows.max() >= self.count:
            raise IndexError(f"rows {rows.min()}..{rows.max()} of a table of {self.count}")
        numbers, within = np.divmod(rows.astype(np.int64), self.block_rows)
        wanted = np.unique(numbers)
        if len(self.held) // 2 < len(wanted) and len(self.held) < len(self.slots):  # a scan
            middle = len(rows) // 2
            return np.concatenate([self.gather(rows[:middle]), self.gather(rows[middle:])])
        new = wanted[self.slots[wanted] < 0]
        if len(new):
            self.fill(new)
        for number in new.tolist():
            self.hold(number)
        if (self.slots[numbers] < 0).any():  # this one's making room took another's
            return self.gather(rows)
        found: np.ndarray = self.held[self.slots[numbers], within]
        self.check(found)
        return found

    def hold(self, number: int) -> None:
        """Put a block among those in memory, in place of the one that came first."""
        block, slot = self.load(number), self.next_slot
        if self.holds[slot] >= 0:
            self.slots[self.holds[slot]] = -1
        self.held[slot, : len(block)] = block
        self.slots[number], self.holds[slot] = slot, number
        self.next_slot = (slot + 1) % len(self.held)

    def load(self, number: int) -> np.ndarray:
        """A block from the file, or from one fetched anew."""
        try:
            return self.sound(number)
        except FormatError:
            path = self.renew()
            if path is None:
                raise
        self.open(path)
        self.fill(np.array([number]))
        return self.sound(number)

    def sound(self, number: int) -> np.ndarray:
        """A block from the file; FormatError where it does not have its checksum."""
        first = number * self.block_rows
        rows = min(self.block_rows, self.count - first)
        size = self.dtype.itemsize
        content = self.file.read(self.head + first * size, rows * size)
        if self.sums is not None and zlib.crc32(content) != self.sums.crc32[number]:
            raise FormatError(
                f"{self.file.path}: rows {first} to {first + rows - 1} do not have the recorded "
                "checksum; damaged, fetch the table anew ('latentds verify' lists all damage)"
            )
        return np.frombuffer(content, self.dtype)

    def bring(self, firsts: np.ndarray, counts: np.ndarray, ahead: bool = False) -> None:
        """Have stretches of rows fetched that are not there; `ahead` returns at once."""
        begins = firsts.astype(np.int64) // self.block_rows
        ends = (firsts.astype(np.int64) + counts.astype(np.int64) - 1) // self.block_rows
        longest = int((ends - begins).max(initial=0))
        blocks = np.minimum(begins[:, None] + np.arange(longest + 1), ends[:, None])
        new = np.unique(blocks)
        new = new[self.slots[new] < 0]
        if len(new):
            self.fill(new, ahead=ahead)

    def will_need(self, first: int, count: int) -> None:
        """Rows that will be read soon."""
        size = self.dtype.itemsize
        if self.slots[first // self.block_rows] < 0:
            self.file.will_need(self.head + first * size, count * size)


def read_whole(path: Path, dtype: np.dtype[Any], rows: int, sha256: str | None) -> np.ndarray:
    """A table in memory; FormatError where it is not what was expected, or not of its hash."""
    head = check_head(path, dtype, rows)
    content = OpenFile(path).read(0, head + rows * dtype.itemsize)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise FormatError(
            f"{path}: not of the hash that the manifest records; damaged, fetch it anew"
        )
    return np.frombuffer(content, dtype, rows, head)


def check_head(path: Path, dtype: np.dtype[Any], rows: int) -> int:
    """Length of a table's header; FormatError where the file is not what was expected."""
    try:
        with open_regular(path, str(path)) as file:
            head = io.BytesIO(file.read(TABLE_HEAD_BYTES))
        if np.lib.format.read_magic(head) != (1, 0):
            raise ValueError("npy version is not 1.0")
        shape, fortran, found = np.lib.format.read_array_header_1_0(head)
    except (*NPY_ERRORS, OSError) as error:
        raise FormatError(f"{path}: not a table ({first_words(error)}); fetch it anew") from error
    size = path.stat().st_size
    if found != dtype or fortran or shape != (rows,):
        raise FormatError(f"{path}: {found} {shape}, expected {rows} rows of {dtype}")
    if size != head.tell() + rows * dtype.itemsize:
        raise FormatError(f"{path}: {size} bytes are not {rows} rows; truncated, fetch it anew")
    return head.tell()


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
