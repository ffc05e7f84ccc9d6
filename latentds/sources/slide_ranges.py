"""Slides of a location read in place: OpenSlide on a local file with holes, filled before it looks.

A tiled pyramid's directory is fetched when the input is, its tiles when a region of them is read.
OpenSlide does the rest, as it would of a whole copy: patches are the same, bit for bit, which they
would not be by another reader (tiffslide), and one library decides what a slide is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from latentds.core.storage import check_whole, tiles_file
from latentds.errors import InputError, LocationError, UnusableError
from latentds.sources.picture import Regions
from latentds.sources.slide_reading import LEVEL_SLACK, open_whole
from latentds.sources.tars import SeekableFile
from latentds.store.transport import Transport

SUFFIXES = {None: (".svs",), "slides": (".svs", ".tif", ".tiff")}  # by --kind
LEAST_BYTES = 1 << 24  # of a slide: a smaller one is sooner there as a whole
BLOCK_BYTES = 1 << 16  # of a directory, at a time
MAX_DIRECTORY_BYTES, MAX_PAGES = 1 << 26, 64
GAP_BYTES = 1 << 15  # between tiles, cheaper to fetch than another request
RANGE_BYTES = 1 << 23  # of a request
REQUESTS = 8  # at a time
EDGE = 1  # pixels around a region that OpenSlide may look at


class Directory(SeekableFile):
    """A remote file for whoever reads its directory; keeps the blocks that were read."""

    def __init__(self, transport: Transport, name: str, size: int) -> None:
        super().__init__(size)
        self.transport, self.name = transport, name
        self.blocks: dict[int, bytes] = {}

    def block(self, number: int) -> bytes:
        if number not in self.blocks:
            start = number * BLOCK_BYTES
            if (len(self.blocks) + 1) * BLOCK_BYTES > MAX_DIRECTORY_BYTES:
                raise ValueError(f"a directory of more than {MAX_DIRECTORY_BYTES:,} bytes")
            length = min(BLOCK_BYTES, self.size - start)
            self.blocks[number] = self.transport.read(self.name, start, length, length)
        return self.blocks[number]

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.size - self.place))
        done = 0
        while done < count:
            number, offset = divmod(self.place + done, BLOCK_BYTES)
            part = self.block(number)[offset : offset + count - done]
            view[done : done + len(part)] = part
            done += len(part)
        self.place += count
        return count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level:
    """Where the tiles of a slide's level lie.

    tile     width, height
    across   tiles of a row
    first    number of its first tile among those of all levels
    offsets  int64, in the file, row by row; counts likewise
    """

    tile: tuple[int, int]
    across: int
    first: int
    offsets: np.ndarray
    counts: np.ndarray

    def tiles(self, left: float, top: float, size: tuple[int, int]) -> np.ndarray:
        """Numbers among its own of the tiles that a region touches, in the level's pixels."""
        rows = len(self.offsets) // self.across
        spans = []
        places = zip((left, top), size, self.tile, (self.across, rows), strict=True)
        for start, length, edge, most in places:
            low = max(0, math.floor((start - EDGE) / edge))
            spans.append(np.arange(low, min(most, math.floor((start + length + EDGE) / edge) + 1)))
        numbers: np.ndarray = (spans[1][:, None] * self.across + spans[0]).ravel()
        return numbers


def make_hollow(transport: Transport, kind: str | None, name: str, path: Path, size: int) -> bool:
    """Whether a location's slide can be read by range; then `path` is its file, with holes.

    kind  --kind: only where it is slides, a .tif is surely no picture
    """
    if path.suffix.lower() not in SUFFIXES.get(kind, ()) or size < LEAST_BYTES:
        return False
    if path.is_file() and path.stat().st_size == size:
        return tiles_file(path).is_file()
    directory = Directory(transport, name, size)
    try:
        read_directory(directory)
    except (ValueError, IndexError, KeyError, TypeError, ImportError):  # tifffile's are ValueErrors
        return False  # fetched as a whole; what is wrong with it is told where it is opened
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    with partial.open("wb") as file:
        for number, content in directory.blocks.items():
            file.seek(number * BLOCK_BYTES)
            file.write(content)
        file.truncate(size)
    levels = levels_of(partial)
    if levels is None:
        partial.unlink()
        return False
    tiles_file(path).write_bytes(bytes(sum(len(level.offsets) for level in levels)))
    partial.replace(path)
    return True


def read_directory(file: io.RawIOBase) -> None:
    """Read every value of a TIFF file's directories."""
    import tifffile

    with tifffile.TiffFile(io.BufferedReader(file, BLOCK_BYTES)) as tiff:
        for number, page in enumerate(tiff.pages):
            if number == MAX_PAGES:
                raise ValueError(f"more than {MAX_PAGES} pages")
            for tag in page.aspage().tags:
                _ = tag.value


def levels_of(path: Path) -> list[Level] | None:
    """Of a TIFF file the tiles of every level that OpenSlide sees; None where they do not tell.

    A level that is put together from several pages, or of strips, does not.
    """
    import tifffile

    with contextlib.suppress(ValueError, InputError), tifffile.TiffFile(path) as tiff:
        tiled = [page.aspage() for page in tiff.pages if page.aspage().is_tiled]
        pages = {(page.imagewidth, page.imagelength): page for page in tiled}
        slide = open_whole(path)
        chosen = [pages.get(size) for size in slide.level_dimensions]
        slide.close()
        if len(pages) < len(tiled) or any(p is None or p.planarconfig != 1 for p in chosen):
            return None
        return list(described(page for page in chosen if page is not None))
    return None


def described(pages: Iterable[Any]) -> Iterator[Level]:
    first = 0
    for page in pages:
        across, down = (
            math.ceil(length / tile)
            for length, tile in (
                (page.imagewidth, page.tilewidth), (page.imagelength, page.tilelength),
            )
        )  # fmt: skip
        if len(page.dataoffsets) != across * down or len(page.databytecounts) != across * down:
            raise ValueError(f"{len(page.dataoffsets)} tiles of {across} x {down}")
        yield Level(
            tile=(page.tilewidth, page.tilelength),
            across=across,
            first=first,
            offsets=np.array(page.dataoffsets, np.int64),
            counts=np.array(page.databytecounts, np.int64),
        )
        first += across * down


def open_slide(path: Path, transport: Transport | None = None, name: str = "") -> Any:
    """An open slide; InputError (without the name) where OpenSlide cannot.

    transport  of the location that a file with holes is filled from
    name       of the slide there
    """
    if transport is None or not tiles_file(path).is_file():
        check_whole(path)
        return open_whole(path)
    return RangedSlide(open_whole(path), path, transport, name)


def bring_regions(slide: Any, regions: Regions, scale: float, edge: int) -> None:
    """Fetch what `cut_region` will read of a location's slide, all of it side by side."""
    if isinstance(slide, RangedSlide):
        level = slide.get_best_level_for_downsample(scale * LEVEL_SLACK)
        length = math.ceil(edge * scale / slide.level_downsamples[level])
        slide.bring(level, regions, (length, length))


class RangedSlide:
    """An open slide whose tiles are fetched before they are looked at; else as OpenSlide's.

    slide      OpenSlide's, of the file with holes
    path       of the file
    transport  of the location
    name       of the slide there
    """

    def __init__(self, slide: Any, path: Path, transport: Transport, name: str) -> None:
        levels = levels_of(path)
        if levels is None:
            raise UnusableError("its directory cannot be read any more; remove it, to be fetched")
        self.slide, self.levels, self.path = slide, levels, path
        self.transport, self.name = transport, name
        self.known = np.fromfile(tiles_file(path), np.uint8) == 1
        self.size, self.mtime_ns = path.stat().st_size, path.stat().st_mtime_ns
        self.lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.slide, name)

    def __enter__(self) -> RangedSlide:
        return self

    def __exit__(self, *_: object) -> None:
        self.slide.close()

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Any:
        self.bring(level, [location], size)
        return self.slide.read_region(location, level, size)

    def bring(
        self, level: int, locations: Sequence[tuple[float, float]], size: tuple[int, int]
    ) -> None:
        """Have regions' tiles in the file. Locations are of level 0, the size is the level's."""
        where, factor = self.levels[level], self.slide.level_downsamples[level]
        numbers = [where.tiles(x / factor, y / factor, size) for x, y in locations]
        wanted = np.unique(np.concatenate(numbers))
        if self.known[where.first + wanted].all():
            return
        with self.lock:  # one thread asks for a tile, the others wait for it
            wanted = wanted[~self.known[where.first + wanted]]
            ranges = list(joined(where.offsets[wanted], where.counts[wanted]))
            with ThreadPoolExecutor(REQUESTS) as pool:
                list(pool.map(self.fill, ranges))
            with tiles_file(self.path).open("r+b") as file:
                for number in (where.first + wanted).tolist():
                    file.seek(number)
                    file.write(b"\1")
            self.known[where.first + wanted] = True

    def fill(self, span: tuple[int, int]) -> None:
        """Fetch bytes of the file; its time of change stays, for its content does."""
        start, end = span[0], min(span[1], self.size)
        if start >= end:
            return  # beyond the file's end; OpenSlide says so
        try:
            content = self.transport.read(self.name, start, end - start, end - start)
            with self.path.open("r+b") as file:
                file.seek(start)
                file.write(content)
            os.utime(self.path, ns=(self.mtime_ns, self.mtime_ns))
        except (InputError, OSError) as error:  # of the place or the disk, not of one picture
            raise LocationError(
                f"{self.path}, filled from {self.transport.shown}: {error}"
            ) from error


def joined(offsets: np.ndarray, counts: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and end of ranges that hold all of these, near ones together."""
    span: tuple[int, int] | None = None
    for place in np.argsort(offsets, kind="stable").tolist():
        start, end = int(offsets[place]), int(offsets[place] + counts[place])
        if span and start <= span[1] + GAP_BYTES and end - span[0] <= RANGE_BYTES:
            span = (span[0], max(span[1], end))
            continue
        if span:
            yield span
        span = (start, end)
    if span:
        yield span
