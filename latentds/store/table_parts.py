"""A large table of a location, in the cache by parts: what is wanted is fetched, once a node."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np

from latentds.store.cache import READ_ONLY, Cache
from latentds.store.open_files import BlockSums

WHOLE_BYTES = 1 << 22  # up to so many, one request for all is quicker than many for parts
START_BYTES = 7_000_000  # of manifest and tables, up to which gaps are fetched to spare requests
GROWTH = 128  # blocks, a window of the order, that come without their parts: a look costs little
PART_BYTES = 1 << 18  # of a part: 32 MB a window; of what is fetched to spare a request, at most
LARGE_PART_BYTES = 1 << 22  # of a part, where all of the table will be wanted
RANGE_BYTES = 1 << 23  # of a request, where parts that are wanted lie side by side
LOCKED_BYTES = 1 << 18  # processes that begin to fetch so close to each other take turns
PRESENT = ".parts"  # suffix of the file that has a byte for every block: 1 once it is there

Fetch = Callable[[int, int, Callable[[bytes], bool]], bytes]  # start, size, is it sound


class TableParts:
    """A table of a location: a file of the cache with holes, filled where it is wanted.

    path   of the file
    size   bytes of the whole table
    shape  rows of it, and bytes of a row
    sums   of its blocks
    fetch  bytes of the location's file: from where, how many, and a function that checks them

    Processes of a node share the file. A part is sound when it is fetched; what the disk loses
    afterwards has another checksum when it is read.
    """

    def __init__(
        self,
        cache: Cache,
        name: str,
        size: int,
        shape: tuple[int, int],
        sums: BlockSums,
        fetch: Fetch,
    ) -> None:
        self.cache, self.name, self.size, self.sums, self.fetch = cache, name, size, sums, fetch
        rows, self.row_bytes = shape
        self.head, self.count = size - rows * self.row_bytes, len(sums.spans)
        self.block_bytes = min(sums.spans.size, rows) * self.row_bytes  # of all but the last
        self.asked, self.lock = 0, threading.Lock()
        cache.fill_file(f"{name}{PRESENT}", self.mark)
        self.path = cache.fill_file(name, self.make)
        self.files = [self.path, self.path.with_name(f"{self.path.name}{PRESENT}")]
        self.descriptors = [open_to_write(path) for path in self.files]
        self.known = np.zeros(self.count, bool)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        for descriptor in self.__dict__.get("descriptors", ()):
            close(descriptor)

    def mark(self, path: Path) -> None:
        """Note no block as there; all, where a table lies there whole, fetched so before.

        A file of holes takes less room than it is long. What is noted wrongly has another checksum.
        """
        set_size(path, self.count)
        try:
            status = (self.cache.folder / self.name).stat()
        except FileNotFoundError:
            return
        if status.st_size == self.size and status.st_blocks * 512 >= self.size:
            path.write_bytes(b"\1" * self.count)

    def make(self, path: Path) -> None:
        """A file of nothing but holes behind its header."""
        head = self.fetch(0, self.head, bool)
        set_size(path, self.size)
        with path.open("r+b") as file:
            file.write(head)

    def missing(self, blocks: np.ndarray) -> np.ndarray:
        """Which of some blocks are not there."""
        for block in blocks[~self.known[blocks]].tolist():
            self.known[block] = os.pread(self.descriptors[1], 1, block) == b"\1"
        return np.asarray(blocks[~self.known[blocks]])

    def forget(self, block: int) -> bool:
        """Note that a block is not there; False where the file is gone, cut, or another's now."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return False
        if status.st_size != self.size or status.st_ino != os.fstat(self.descriptors[0]).st_ino:
            return False
        self.write(1, b"\0", block)
        self.known[block] = False
        return True

    def wanted(
        self, blocks: np.ndarray, part_bytes: int, spare_bytes: int, ahead: bool
    ) -> list[tuple[int, int]]:
        """First block and end of every range to fetch, so that `blocks` are there.

        part_bytes   of a part, all of which is fetched with any of its blocks
        spare_bytes  of what lies between the first blocks, to have fewer ranges
        ahead        whether they are wanted later: then parts come at once
        """
        with self.lock:
            missing, is_first = self.missing(blocks), self.asked < GROWTH and not ahead
            self.asked += len(blocks)
        if not len(missing):
            return []
        width = 1 if is_first else 1 << max(1, part_bytes // self.block_bytes).bit_length() - 1
        parts = np.unique(missing // width)
        is_spared = is_first and self.sums.are_here
        spare = max(0, spare_bytes // self.block_bytes) if is_spared else 0
        most = max(1, RANGE_BYTES // self.block_bytes // width)
        return [
            (first * width, min((last + 1) * width, self.count))
            for first, last in neighbours(parts, spare, PART_BYTES // self.block_bytes, most)
        ]

    def bring(self, ranges: list[tuple[int, int]], pool: Executor) -> list[Future[None]]:
        """Begin to fetch ranges of blocks, side by side.

        Their checksums are looked up here: in the pool a table that fetches them would wait for
        room in it.
        """
        return [
            pool.submit(self.fill, first, end, self.sums.recorded(np.arange(first, end)))
            for first, end in ranges
        ]

    def fill(self, first: int, end: int, recorded: list[bytes]) -> None:
        """Fetch blocks `first` to `end`, unless another process has meanwhile."""
        place = first * self.block_bytes // LOCKED_BYTES
        with self.cache.lock(f"locks/{zlib.crc32(f'{self.name} {place}'.encode()) % 1024}"):
            if not len(self.missing(np.arange(first, end))):
                return
            edges = self.sums.spans[np.arange(first, end + 1)] * self.row_bytes
            start, places = self.head + int(edges[0]), (edges - edges[0]).tolist()

            def is_sound(content: bytes) -> bool:
                view = memoryview(content)
                ranges = zip(places[:-1], places[1:], recorded, strict=True)
                return all(self.sums.of(view[begin:stop]) == each for begin, stop, each in ranges)

            content = self.fetch(start, places[-1], is_sound)
            self.write(0, content, start)
            self.write(1, b"\1" * (end - first), first)

    def write(self, which: int, content: bytes, offset: int) -> None:
        """Write to one of the files at an offset."""
        view = memoryview(content)
        try:
            while view:
                count = os.pwrite(self.descriptors[which], view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:
            raise self.cache.judged(error) from error


def neighbours(parts: np.ndarray, spare: int, widest: int, most: int) -> list[tuple[int, int]]:
    """First and last of every run of ascending numbers, of at most so many.

    spare   numbers between them that runs may hold, all together: the narrowest gaps are closed
    widest  of these gaps
    """
    found: list[tuple[int, int]] = []
    gaps = np.diff(parts) - 1
    order = np.argsort(gaps, kind="stable")
    closed = np.zeros(len(parts), bool)
    closed[order[(np.cumsum(gaps[order]) <= spare) & (gaps[order] <= widest)] + 1] = True
    for part, follows in zip(parts.tolist(), closed.tolist(), strict=True):
        if follows and part - found[-1][0] < most:
            found[-1] = (found[-1][0], part)
        else:
            found.append((part, part))
    return found


def set_size(path: Path, size: int) -> None:
    """Make a file of zeros that takes no room."""
    with path.open("wb") as file:
        file.truncate(size)


def open_to_write(path: Path) -> int:
    """A descriptor; one to read where the cache can only be read."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
