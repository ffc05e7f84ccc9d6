"""Where patches come from: what an input holds, what a source must say, and the one reader."""

from __future__ import annotations

import abc
import functools
import io
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np

from latentds.core.display import number_of
from latentds.errors import InputError, UnusableError
from latentds.sources.cut_options import SourceOptions
from latentds.sources.image_folder import picture_suffixes, walk
from latentds.sources.kinds import MAYBE, NEVER, SUFFIXES, Kinds, choose, sort_files
from latentds.sources.parquet_files import has_pictures
from latentds.sources.picture import Header, Listing, Picture, Regions
from latentds.sources.slide_looks import SlideLook
from latentds.store.patch_record import Patch, Place

TILE_TAR = ".tiles.tar"  # hs2p's and slide2vec's
TILE_NAME = re.compile(r"(\d+)_(\d+)\.(?:jpe?g|png)")  # <column>_<row>
FOLDER_IMG, TILES = "img/", "tiles"  # marks: a folder of that name, files named as tiles are
ARCHIVES = (".tar", ".parquet")
Value = TypeVar("Value")
HEADERS_AT_ONCE = 4096  # a task is larger than a header
MAX_WORKERS = 16  # threads that read where --workers is not given
TASK_REGIONS = 4  # of a picture or slide that a thread reads at a time


class Inspection:
    """An input as a source's `detect` sees it; what costs a look at all files is looked at once."""

    def __init__(self, options: SourceOptions) -> None:
        self.options, self.root = options, options.source

    @functools.cached_property
    def is_folder(self) -> bool:
        return self.root.is_dir()

    @functools.cached_property
    def is_file(self) -> bool:
        return self.root.is_file()

    @property
    def is_open(self) -> bool:
        """Whether its files alone, or the one that it is, say what it is: no --kind."""
        return (self.is_folder or self.is_file) and self.options.kind is None

    @functools.cached_property
    def paths(self) -> list[str]:
        return list(walk(self.root))

    @functools.cached_property
    def suffixes(self) -> set[str]:
        """How the input, or the files of its folder, are named, in small letters."""
        paths = self.paths if self.is_folder else [self.root.name]
        return {os.path.splitext(path)[1].lower() for path in paths}  # noqa: PTH122  # of many

    @functools.cached_property
    def marks(self) -> set[str]:
        """What names alone tell of the kind: suffixes, and the marks above."""
        is_asked, img = self.options.kind == "tiles", self.root / "img"
        has_tiles = self.is_folder and any(TILE_NAME.search(path) for path in self.paths)
        found = {TILES: is_asked or has_tiles, FOLDER_IMG: img.is_dir()}
        return self.suffixes | {mark for mark, is_there in found.items() if is_there}

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether all files are pictures, or nothing, by their names: no look is needed."""
        return self.is_open and self.suffixes <= (picture_suffixes() | NEVER) - MAYBE - SUFFIXES

    @functools.cached_property
    def kinds(self) -> Kinds:
        return sort_files(self.options.folder, self.paths)

    @functools.cached_property
    def choice(self) -> tuple[bool, tuple[str, ...]]:
        """Whether it is one of slides, and notes; InputError for slides and pictures."""
        return (False, ()) if self.is_plain else choose(self.options.folder, self.kinds)

    def check_picture(self) -> None:
        """Refuse a file that no source reads; asked by the last one, that of pictures."""
        if not (self.kinds.pictures or self.kinds.unsure):
            raise InputError(
                f"{self.root}: no picture or slide, no table (.csv, .tsv, .parquet), no archive "
                "that is read (.tar, .parquet); unpack a zip or tar.gz, and name its folder"
            )

    @functools.cached_property
    def archives(self) -> tuple[str, ...]:
        """Archives of pictures: the input itself, or a folder's; InputError for pictures beside.

        What else lies in a folder of slides is left alone.
        """
        if self.is_file:
            return (self.root.name,) if is_archive(self.root.name) else ()
        if not self.is_open:
            return ()
        found = tuple(path for path in self.paths if is_archive(path))
        if any(path.endswith(TILE_TAR) for path in found):
            return found  # hs2p puts previews and masks beside its tars
        pictures = [*self.kinds.pictures, *self.kinds.unsure]
        if not found or self.kinds.slides or not pictures:
            return () if self.kinds.slides else found
        for path in found:
            if path.lower().endswith(".tar") or has_pictures(self.root / path):
                raise InputError(
                    f"{self.root}: holds pictures ({pictures[0]}) and an archive ({path}); name "
                    "the one that is meant, or pass --kind pictures"
                )
        return ()


def is_archive(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in ARCHIVES


class Source(abc.ABC):
    """Where patches come from.

    A source says five things: `listing`, `header` and `read`, and where they are not what stands
    here, `regions` and `facts`. The rest follows from these; a source that can tell it without
    reading a pixel, or has more to say, overrides it. `header`, `regions` and `read` are called
    from several threads. For Ray it must be picklable, and can then still `read`.

    kind   in words, for the user: what was found in the input
    notes  what is assumed of it
    marks  where it needs one: `detect` is asked only where the names of the input have one, as a
           rule a suffix of the input or of a file in its folder
    is_remote  whether its inputs lie on no disk; `detect` is asked only for those, or others'
    has_looks    whether its pictures are slides, which `look` shows
    keeps_looks  whether `look` will be asked for: what it needs is kept when headers are read
    labels_lie   in words, for a message: where a picture without a label could have one
    """

    kind: str = "a source of its own"
    notes: tuple[str, ...] = ()
    marks: frozenset[str] = frozenset()
    is_remote: bool = False
    has_looks: bool = False
    keeps_looks: bool = False
    labels_lie: str = "where the others have theirs"

    @abc.abstractmethod
    def listing(self) -> Listing:
        """All pictures; InputError where there are none or they contradict each other."""

    @abc.abstractmethod
    def header(self, picture: Picture) -> Header:
        """Size and coding; InputError (without the name) where it cannot be converted."""

    @abc.abstractmethod
    def read(
        self, picture: Picture, header: Header, patch_px: tuple[int, int], regions: Regions
    ) -> list[Patch]:
        """The patches at regions; InputError (without the name) where it cannot be decoded."""

    def regions(self, picture: Picture, header: Header, patch_px: tuple[int, int]) -> np.ndarray:
        """int32 (n, 2): x and y of the picture's patches, in its own pixels; one, the whole."""
        del picture, header, patch_px
        return np.zeros((1, 2), np.int32)

    def facts(self) -> dict[str, Any]:
        """What the manifest is to say about the input besides the options; no path, no name."""
        return {}

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        """This source of an input, None where that is not of its kind; for an entry of SOURCES."""
        del found
        return None

    def chunk(self, picture: Picture) -> str | None:
        """What must be read as a whole to reach a picture, None where each stands for itself.

        The order keeps pictures of MIXED_CHUNKS chunks together, so that each is read once.
        """
        del picture
        return None

    def patch_px(self, headers: dict[str, Header]) -> tuple[int, int]:
        """(H, W) of all patches, from the headers by source; InputError where none fits all."""
        return check_sizes(headers)

    def empty_reason(self, picture: Picture) -> str:
        """Why a picture has no regions."""
        del picture
        return "no patch in it"

    def label(self, picture: Picture, region: tuple[int, int]) -> str | None:
        """The label of the patch at a region, as `read` records it."""
        del region
        return picture.label

    def look(self, picture: Picture) -> SlideLook | None:
        """What a person is shown of a slide whose header was read; None where it is no slide."""
        del picture
        return None

    def file(self, picture: Picture) -> Path | BinaryIO:
        """What identifies a picture: its file, an open member of an archive, else its pixels.

        InputError (without the name) where there are none.
        """
        header = self.header(picture)
        patch_px = self.patch_px({picture.source: header})
        places = self.regions(picture, header, patch_px).tolist()
        patches = self.read(picture, header, patch_px, [(x, y) for x, y in places[:1]])
        return io.BytesIO(b"".join(patch.image.tobytes() for patch in patches))

    def mask_file(self, picture: Picture, size_px: tuple[int, int]) -> Path | None:
        """A picture's mask, None where there is none; InputError for one that is lost or bad."""
        del picture, size_px
        return None

    def whereabouts(
        self, picture: Picture, header: Header, patch_px: tuple[int, int], regions: Regions
    ) -> list[Place]:
        """Where the patches at regions lie, as `read` records it."""
        return [
            Place(patch.x_px_level0, patch.y_px_level0, patch.size_px_level0, patch.mpp)
            for patch in self.read(picture, header, patch_px, regions)
        ]

    def locate(
        self, picture: Picture, patch_px: tuple[int, int], place: tuple[int, int]
    ) -> tuple[Header, tuple[int, int]] | None:
        """Header and region of the patch that `read` records at x and y (-1 for unknown).

        None where the picture has none; InputError (without the name) as from `header`.
        """
        header = self.header(picture)
        regions = [(x, y) for x, y in self.regions(picture, header, patch_px).tolist()]
        places = self.whereabouts(picture, header, patch_px, regions)
        for region, (x, y, *_) in zip(regions, places, strict=True):
            if (-1 if x is None else x, -1 if y is None else y) == place:
                return header, region
        return None


class Kept(Generic[Value]):
    """At most `count` values by name; the least recently asked for goes first."""

    def __init__(self, count: int) -> None:
        self.count, self.lock = count, threading.Lock()
        self.futures: OrderedDict[str, Future[Value]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.count,)  # elsewhere they are made anew

    def get(self, name: str, make: Callable[[], Value]) -> Value:
        """The value of that name; made now, or waited for where another thread makes it.

        An error is kept like a value: what could not be read is not tried for every patch of it.
        """
        with self.lock:
            future = self.futures.pop(name, None)
            is_mine = future is None
            self.futures[name] = future = future or Future()
            while len(self.futures) > self.count:
                self.futures.popitem(last=False)
        if is_mine:
            try:
                future.set_result(make())
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def drop(self, name: str) -> None:
        with self.lock:
            self.futures.pop(name, None)


def count_workers(workers: int | None) -> int:
    """Threads that read: as many as asked for, else the number of cores, at most MAX_WORKERS."""
    return workers or min(MAX_WORKERS, os.cpu_count() or 1)


class PatchReader:
    """Reads for whoever wants pixels: conversions, patch sets, originals of a data set.

    What cannot be read is an InputError in its place, which does not name the picture: `of_file`
    does. The order is that asked for, whatever the number of threads.
    """

    def __init__(self, source: Source, workers: int | None) -> None:
        self.source = source
        self.pool = ThreadPoolExecutor(count_workers(workers), thread_name_prefix="originals")

    def headers(self, pictures: Sequence[Picture]) -> Iterator[Header | InputError]:
        """The header of every picture, or why it has none."""
        for start in range(0, len(pictures), HEADERS_AT_ONCE):
            yield from self.pool.map(self.header, pictures[start : start + HEADERS_AT_ONCE])

    def header(self, picture: Picture) -> Header | InputError:
        try:
            return self.source.header(picture)
        except (InputError, OSError) as error:
            return without_name(error)

    def submit(
        self, picture: Picture, header: Header, patch_px: tuple[int, int], regions: Regions
    ) -> Future[list[Patch | InputError]]:
        return self.pool.submit(self.read, picture, header, patch_px, regions)

    def read(
        self, picture: Picture, header: Header, patch_px: tuple[int, int], regions: Regions
    ) -> list[Patch | InputError]:
        """The patch at every region, or why there is none: what is sound is not lost to others."""
        try:
            found = self.source.read(picture, header, patch_px, regions)
            return [*checked(found, len(regions), patch_px)]
        except (InputError, OSError) as error:
            if len(regions) == 1:
                return [without_name(error)]
        return [one for at in regions for one in self.read(picture, header, patch_px, [at])]

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


def checked(patches: list[Patch], count: int, patch_px: tuple[int, int]) -> list[Patch]:
    """Patches as many and as large as were asked for; UnusableError where they are not."""
    if len(patches) != count:
        raise UnusableError(f"{len(patches)} patches where {count} were asked for", "other")
    for patch in patches:
        (height, width), wanted = patch.image.shape[:2], f"{patch_px[1]}x{patch_px[0]}"
        if (height, width) != patch_px:
            raise UnusableError(f"{width}x{height} px, no patch of {wanted} px", "changed")
    return patches


def without_name(error: InputError | OSError) -> InputError:
    """An error as one of a picture's, without the name that the file system's has."""
    if isinstance(error, OSError):
        return UnusableError(f"cannot be read ({error.strerror or error})")
    return error


def of_file(path: object, error: InputError) -> InputError:
    return InputError(f"{path}: {error}")


def tasks_of(numbers: np.ndarray) -> list[np.ndarray]:
    """Places of an array of picture numbers, a few of one picture at a time: a thread's tasks."""
    edges = np.flatnonzero(np.diff(numbers.astype(np.int64))) + 1
    runs = np.split(np.arange(len(numbers)), edges)
    return [run[i : i + TASK_REGIONS] for run in runs for i in range(0, len(run), TASK_REGIONS)]


def check_sizes(headers: dict[str, Header]) -> tuple[int, int]:
    """The one (H, W) of all pictures; InputError lists the sizes seen and the ways out."""
    sizes = Counter(header.size_px for header in headers.values())
    if len(sizes) == 1:
        return next(iter(sizes))
    examples = {header.size_px: source for source, header in reversed(headers.items())}
    seen = ", ".join(
        f"{w}x{h} ({number_of(count, 'file')}, e.g. {examples[h, w]})"
        for (h, w), count in sizes.most_common(4)
    )
    more = f" and {number_of(len(sizes) - 4, 'more size')}" if len(sizes) > 4 else ""
    raise InputError(
        f"pictures differ in size: {seen}{more}; choose --patch-size PX with --resize, --tile or "
        "--pad"
    )
