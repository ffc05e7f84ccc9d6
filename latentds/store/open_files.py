"""Files of a folder, and tables in them, read by calls that report what goes wrong.

A map dies of what goes wrong, and names no file. Opening a table costs nothing whatever its size.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latentds.core.storage import check_kind, open_regular
from latentds.errors import FormatError, first_words, unopened
from latentds.store.format import MAX_BLOCK_ROWS, NPY_ERRORS, SHA256_BYTES, TABLE_HEAD_BYTES, Spans

Tasks = list[Future[None]]
Signature = tuple[int, int, int]  # size, time of the last change in ns, inode
BLOCK_ROWS = 512  # of the patch table 12 KiB, read and checked as one
MAX_HELD_BYTES = 1 << 24  # of a table in memory: two windows of the order touch some 3 MB
MAX_OPEN_SHARDS = 256


class OpenFile:
    """A file to read parts of, closed with its last user; FormatError where it is not there.

    is_sound  for its user to note that the content was checked since it was opened
    """

    def __init__(self, path: Path) -> None:
        self.path, self.fd, self.is_sound = path, -1, False
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            check_kind(os.fstat(self.fd).st_mode, str(path))
        except OSError as error:
            raise unopened(path, error) from error

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.fd >= 0:
            close(self.fd)  # as a default: at the interpreter's end `os` is gone

    def signature(self) -> Signature:
        """What changes when somebody writes to the file."""
        return signature_of(os.fstat(self.fd))

    def read(self, offset: int, size: int) -> memoryview:
        """Bytes of the file; FormatError where it ends before, or the disk does not give them."""
        content = memoryview(bytearray(size))
        self.read_into(content, offset)
        return content

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` from `offset`; FormatError as above."""
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self.fd, (target[done:],), offset + done)
            except OSError as error:
                raise FormatError(
                    f"{self.path}: cannot be read at byte {offset + done} ({error.strerror}); the "
                    "disk or its network fails, fetch the file anew"
                ) from error
            if not count:
                raise FormatError(
                    f"{self.path}: has {self.signature()[0]} bytes, those up to "
                    f"{offset + len(target)} are wanted; truncated, fetch it anew"
                )
            done += count

    def will_need(self, offset: int, size: int) -> None:
        """Let the system read a part beside others.

        Asking for them makes it read one after another: a first batch of 128 packs took 5 times as
        long.
        """
        if hasattr(os, "posix_fadvise"):  # not on a Mac
            os.posix_fadvise(self.fd, offset, size, os.POSIX_FADV_WILLNEED)

    def single_reads(self) -> None:
        """Have the system read nothing but what is asked for: no 128 KiB of neighbours."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)


def signature_of(status: os.stat_result) -> Signature:
    """The signature in a file's status."""
    return status.st_size, status.st_mtime_ns, status.st_ino


class Extent(NamedTuple):
    """Bytes of a shard: what a pack's codes, columns or masks are.

    sha256  of them, None where the set does not record it
    """

    shard: str
    offset: int
    size: int
    crc32: int
    sha256: bytes | None


class LocalFiles:
    """A folder.

    where        as it was given, for messages
    revision     commit or manifest that a location is resolved to, none of a folder
    reads_parts  whether single patches are read rather than many of a pack
    """

    revision: str | None = None

    def __init__(self, folder: Path) -> None:
        # Files are opened later, when the working directory may be another.
        self.folder, self.where = folder.absolute(), str(folder)
        self.reads_parts = False
        self.opened: OrderedDict[str, OpenFile] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": OrderedDict()}

    def table(self, name: str, *_: Any) -> Path:
        return self.folder / name

    def renew(self, *_: Any) -> Path | None:
        """A table found damaged, fetched anew: of a folder, from nowhere."""
        return None

    def fill_table(self, *_: Any, **__: Any) -> Tasks:
        """Begin to put blocks of a table into its file: of a folder, all are there."""
        return []

    def missing(self, _: str, blocks: np.ndarray) -> np.ndarray:
        """Which of some blocks of a table are not in its file."""
        return blocks[:0]

    def open(self, extent: Extent) -> tuple[OpenFile, int]:
        """The file with an extent's bytes, and where in it they begin."""
        file = self.opened.pop(extent.shard, None)
        if file is None:
            file = OpenFile(self.folder / extent.shard)
            if self.reads_parts:
                file.single_reads()
        keep(self.opened, extent.shard, file)
        return file, extent.offset

    def fetch(self, extents: Sequence[Extent], ahead: bool = False) -> None:
        """Let the system read them from disk side by side."""
        del ahead
        for extent in extents:
            self.open(extent)[0].will_need(extent.offset, extent.size)

    def drop(self, _: Extent) -> bool:
        """Forget bytes that were found damaged; whether reading again may help."""
        return False


def keep(opened: OrderedDict[str, OpenFile], name: str, file: OpenFile) -> None:
    """Put an open file last; the least recently used of many goes, closed with its last user."""
    if len(opened) >= MAX_OPEN_SHARDS:
        opened.popitem(last=False)
    opened[name] = file


class BlockSums(NamedTuple):
    """Checksums of the blocks of a table.

    spans     the blocks' rows
    kind      crc32, or sha256: its first SHA256_BYTES
    recorded  sums of blocks by number int64 (N,)
    are_here  whether none has to be fetched
    """

    spans: Spans
    kind: str
    recorded: Callable[[np.ndarray], list[bytes]]
    are_here: bool = True

    def of(self, content: Any) -> bytes:
        return KINDS[self.kind][1](content)


KINDS: dict[str, tuple[int, Callable[[Any], bytes]]] = {  # bytes of a sum, and how it is taken
    "crc32": (4, lambda content: zlib.crc32(content).to_bytes(4, "little")),
    "sha256": (SHA256_BYTES, lambda content: hashlib.sha256(content).digest()[:SHA256_BYTES]),
}


def block_sums(entry: dict[str, Any], rows: int) -> BlockSums | None:
    """The checksums in a table's entry, None where it has none; ValueError for damaged ones."""
    kind = next((kind for kind in KINDS if f"block_{kind}" in entry), None)
    if kind is None:
        return None
    field, (width, _) = f"block_{kind}", KINDS[kind]
    size = entry.get("block_rows")
    if type(size) is not int or not 0 < size <= MAX_BLOCK_ROWS:
        raise ValueError(f"block_rows is {size!r}")
    try:
        sums = np.frombuffer(base64.b64decode(entry[field], validate=True), f"V{width}")
    except (binascii.Error, TypeError, ValueError) as error:
        raise ValueError(f"{field} is no base64 of numbers ({error})") from error
    spans = Spans.even(rows, size)
    if len(sums) != len(spans):
        raise ValueError(f"{len(sums)} block checksums for {rows} rows")
    return BlockSums(spans, kind, lambda numbers: [each.tobytes() for each in sums[numbers]])


class Table:
    """A table of just the expected columns, rows and bytes, indexed as an array is.

    sums     of its blocks; None trusts the file
    renew    fetches the file anew, or just the block it is given, and says where the file is; None
             where that cannot be done
    check    raises for rows whose values cannot be; called with all that are handed out, and with
             their numbers
    fill     begins to put blocks into the file that are not there yet
    missing  which of some blocks are not there

    `table[rows]` and `table[first:end]` give rows, `table[name]` reads a field of all of them.
    raises  FormatError where the file is not what was expected or a block is damaged
    """

    def __init__(
        self,
        path: Path,
        dtype: np.dtype[Any],
        rows: int,
        sums: BlockSums | None = None,
        renew: Callable[..., Path | None] = lambda _=None: None,
        check: Callable[[np.ndarray, np.ndarray], None] = lambda *_: None,
        fill: Callable[..., Tasks] = lambda *_, **__: [],
        missing: Callable[[np.ndarray], np.ndarray] = lambda blocks: blocks[:0],
    ) -> None:
        self.dtype, self.count, self.sums = dtype, rows, sums
        self.renew, self.check, self.fill, self.missing = renew, check, fill, missing
        self.spans = sums.spans if sums else Spans.even(rows, BLOCK_ROWS)
        blocks, size = len(self.spans), min(self.spans.size, rows)
        most = max(2, MAX_HELD_BYTES // (size * dtype.itemsize))
        # Memory that is not touched costs nothing: it is taken as blocks come.
        self.held = np.empty((min(blocks, most), size), dtype)
        self.slots = np.zeros(blocks, np.int32)  # of every block, from 1; 0 where it is not held
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

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Rows, in the order asked for."""
        if not len(rows):
            return np.empty(0, self.dtype)
        if rows.min() < 0 or rows.max() >= self.count:
            raise IndexError(f"rows {rows.min()}..{rows.max()} of a table of {self.count}")
        numbers = self.spans.find(rows)
        wanted = np.unique(numbers)
        if len(self.held) // 2 < len(wanted) and len(self.held) < len(self.slots):  # a scan
            middle = len(rows) // 2
            return np.concatenate([self.gather(rows[:middle]), self.gather(rows[middle:])])
        new = wanted[self.slots[wanted] == 0]
        if len(new):
            wait_for(self.fill(new))
        recorded = self.sums.recorded(new) if self.sums and len(new) else [b""] * len(new)
        for number, expected in zip(new.tolist(), recorded, strict=True):
            self.hold(number, expected)
        slots = self.slots[numbers] - 1
        if (slots < 0).any():  # this one's making room took another's
            return self.gather(rows)
        found: np.ndarray = self.held[slots, rows - self.spans[numbers]]
        self.check(found, rows)
        return found

    def hold(self, number: int, expected: bytes) -> None:
        """Put a block among those in memory, in place of the one that came first."""
        block, slot = self.load(number, expected), self.next_slot
        if self.holds[slot] >= 0:
            self.slots[self.holds[slot]] = 0
        self.held[slot, : len(block)] = block
        self.slots[number], self.holds[slot] = slot + 1, number
        self.next_slot = (slot + 1) % len(self.held)

    def load(self, number: int, expected: bytes = b"") -> np.ndarray:
        """A block from the file, or from one fetched anew, of the recorded checksum."""
        try:
            return self.sound(number, expected)
        except FormatError:
            path = self.renew(number)
            if path is None:
                raise
        self.open(path)
        wait_for(self.fill(np.array([number])))
        return self.sound(number, expected)

    def sound(self, number: int, expected: bytes) -> np.ndarray:
        """A block from the file; FormatError where it does not have its checksum."""
        content = self.read(number)
        if self.sums is not None and self.sums.of(content) != expected:
            first, end = self.spans[[number, number + 1]].tolist()
            raise FormatError(
                f"{self.file.path}: rows {first} to {end - 1} do not have the recorded "
                "checksum; damaged, fetch the table anew ('latentds verify' lists all damage)"
            )
        return np.frombuffer(content, self.dtype)

    def read(self, number: int) -> memoryview:
        """Bytes of a block, as they are in the file."""
        first, end = self.spans[[number, number + 1]].tolist()
        size = self.dtype.itemsize
        return self.file.read(self.head + first * size, (end - first) * size)

    def bring(self, firsts: np.ndarray, counts: np.ndarray, ahead: bool = False) -> Tasks:
        """Begin to fetch stretches of rows that are not there."""
        begins, ends = self.spans.find(firsts), self.spans.find(firsts + counts - 1)
        longest = int((ends - begins).max(initial=0))
        blocks = np.minimum(begins[:, None] + np.arange(longest + 1), ends[:, None])
        new = np.unique(blocks)
        new = new[self.slots[new] == 0]
        return self.fill(new, ahead=ahead) if len(new) else []

    def has(self, rows: np.ndarray) -> np.ndarray:
        """Which rows need not be fetched, bool (N,)."""
        numbers = self.spans.find(rows)
        return ~np.isin(numbers, self.missing(np.unique(numbers)))

    def will_need(self, first: int, count: int) -> None:
        """Rows that will be read soon."""
        size = self.dtype.itemsize
        if self.slots[self.spans.find(first)] == 0:
            self.file.will_need(self.head + first * size, count * size)


def wait_for(tasks: Tasks) -> None:
    """Wait for what was begun, and raise what it raised."""
    for task in tasks:
        task.result()


def check_head(path: Path, dtype: np.dtype[Any], rows: int) -> int:
    """Length of a table's header; FormatError where the file is not what was expected."""
    try:
        with open_regular(path, str(path)) as file:
            head = io.BytesIO(file.read(TABLE_HEAD_BYTES))
            size = os.fstat(file.fileno()).st_size
        if np.lib.format.read_magic(head) != (1, 0):
            raise ValueError("npy version is not 1.0")
        shape, fortran, found = np.lib.format.read_array_header_1_0(head)
    except OSError as error:
        raise unopened(path, error) from error
    except NPY_ERRORS as error:
        raise FormatError(f"{path}: not a table ({first_words(error)}); fetch it anew") from error
    if found != dtype or fortran or shape != (rows,):
        unlike = set(dtype.names or [str(dtype)]) - set(found.names or [str(found)])
        what = f"shape {shape}, {rows} rows are wanted"
        if found != dtype:
            what = f"other columns than wanted ({', '.join(sorted(unlike)) or 'types or order'})"
        raise FormatError(f"{path}: {what}; damaged or another set's, fetch it anew")
    if size != head.tell() + rows * dtype.itemsize:
        raise FormatError(f"{path}: {size} bytes are not {rows} rows; truncated, fetch it anew")
    return head.tell()
