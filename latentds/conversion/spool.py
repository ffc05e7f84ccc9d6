"""Patches that another program gives, checked, and kept on disk until encoded: a source."""
# H W pixels of a patch

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np

from latentds.conversion import workdir
from latentds.core.storage import exclusive_lock, naming, write_atomically
from latentds.errors import InputError
from latentds.sources.picture import Header, Listing, Picture, Regions
from latentds.sources.source import Source
from latentds.store.format import SPLIT_PATTERN, patch_key
from latentds.store.patch_record import Patch

MAX_PLACE = 2**31 - 1  # x, y and size_px are int32 columns
PIXELS, RECORDS, SHAPE = "pixels.u8", "patches.jsonl", "shape.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """What a program says of a patch; `Patch` has the same words, crc32 is its pixels'."""

    source: str
    split: str
    label: str | None
    slide: str | None
    x: int | None
    y: int | None
    size_px: int | None
    mpp: float | None
    encoding: str
    crc32: int

    @property
    def key(self) -> str:
        return patch_key(self.source, self.x, self.y)


def spread(name: str, value: Any, count: int) -> Sequence[Any]:
    """A word for each of `count` images: one for all, or a sequence of as many."""
    if value is None or isinstance(value, str | bytes | PurePath) or np.ndim(value) == 0:
        return [value] * count
    if len(value) != count:
        raise InputError(f"{name}: {len(value)} values for {count} images")
    return list(value)


def checked(
    crc32: int, *, slide: Any, x: Any, y: Any, mpp: Any, label: Any, split: Any, size_px: Any,
    source: Any, encoding: Any,
) -> Given:  # fmt: skip
    """What is said of a patch, in its own types; InputError names the word and its value."""
    named = {"slide": slide, "label": label, "source": source, "encoding": encoding}
    names = {word: text_of(word, value) for word, value in named.items()}
    source = names["source"] or names["slide"]
    if source is None:
        raise InputError("a patch has neither slide nor source; one of them names it")
    for word in ("slide", "source"):
        given = names[word] or ""
        if given.startswith(("/", "\\", "~")) or ".." in PurePath(given).parts or given[1:2] == ":":
            raise InputError(f"{word} {given!r}: a name, or a path relative to your input")
    if (x is None) != (y is None):
        raise InputError(f"x is {x}, y is {y}; give both or neither ({source})")
    if not isinstance(split, str) or not SPLIT_PATTERN.fullmatch(split):
        raise InputError(f"split {split!r}: a split's name is a-z, 0-9 and _, up to 32")
    place = {word: whole(word, value) for word, value in (("x", x), ("y", y), ("size_px", size_px))}
    if mpp is not None and not (math.isfinite(float(mpp)) and 0.01 <= float(mpp) <= 100):
        raise InputError(f"mpp is {mpp}; 0.01 to 100 micrometres a pixel ({source})")
    return Given(
        source=source,
        split=str(split),
        label=names["label"],
        slide=names["slide"],
        **place,
        mpp=None if mpp is None else float(mpp),
        encoding=names["encoding"] or "pixels",
        crc32=crc32,
    )


def text_of(word: str, value: Any) -> str | None:
    """A name, None for none; InputError for what is no text, or none that a table can hold."""
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise InputError(f"{word} is {value!r}; a name as text, or None")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # of os.fsdecode, for a file's name in another encoding
        raise InputError(f"{word} {value!r} is not UTF-8; decode it as what it is") from error
    return str(value)


def whole(word: str, value: Any) -> int | None:
    """A whole number of pixels, also as a float; InputError for others."""
    if value is None:
        return None
    if not float(value).is_integer() or not 0 <= value <= MAX_PLACE:
        raise InputError(f"{word} is {value}; a whole number of pixels of level 0, 0 or more")
    return int(value)


class Spool:
    """Patches in the order given; what was synced survives a kill, and only that.

    is_anew   forget what is there
    given     what is said of each, by key, in their order
    patch_px  (H, W) of all, None before the first
    """

    def __init__(self, folder: Path, is_anew: bool = False) -> None:
        self.folder, self.waiting = folder, list[str]()
        self.locked = contextlib.ExitStack()
        self.locked.enter_context(exclusive_lock(folder / "lock"))
        if is_anew:
            (folder / RECORDS).unlink(missing_ok=True)
        self.patch_px: tuple[int, int] | None = None
        _, whole = workdir.read_lines(folder / RECORDS)
        found = [given_of(line) for line in whole.splitlines()]
        if found:
            height, width = json.loads((folder / SHAPE).read_text())
            self.patch_px = height, width
        self.given = {one.key: one for one in found}
        self.pixels, self.records = (
            reopened(folder / name, size)
            for name, size in ((PIXELS, len(found) * self.patch_bytes), (RECORDS, len(whole)))
        )
        self.synced_at = time.monotonic()

    @property
    def patch_bytes(self) -> int:
        return 0 if self.patch_px is None else self.patch_px[0] * self.patch_px[1] * 3

    def append(self, one: Given, pixels: np.ndarray) -> None:
        """Keep a patch, uint8 (H, W, 3); made durable within seconds."""
        if self.patch_px is None:
            self.patch_px = pixels.shape[0], pixels.shape[1]
            write_atomically(self.folder / SHAPE, json.dumps(self.patch_px).encode())
        with naming(self.folder / PIXELS):
            self.pixels.write(np.ascontiguousarray(pixels).data)
        self.given[one.key] = one
        self.waiting.append(json.dumps(dataclasses.astuple(one)) + "\n")
        if time.monotonic() - self.synced_at >= workdir.SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Make what was added durable: the pixels before what names them."""
        lines, self.waiting = "".join(self.waiting).encode(), []
        for file, content in ((self.pixels, b""), (self.records, lines)):
            with naming(Path(file.name)):
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        self.synced_at = time.monotonic()

    def close(self) -> None:
        with self.locked, self.pixels, self.records:
            self.sync()


def given_of(line: str) -> Given:
    """A line of the records; names that many patches share are kept once."""
    source, split, label, slide, *rest = json.loads(line)
    names: list[Any] = [sys.intern(n) if n else n for n in (source, split, label, slide)]
    return Given(*names, *rest)


def reopened(path: Path, size: int) -> BinaryIO:
    """A file open to append after `size` bytes; what a killed process wrote behind them goes."""
    found = path.stat().st_size if path.is_file() else 0
    if found < size:
        raise InputError(f"{path}: has {found} bytes of {size}; damaged, remove {path.parent}")
    file = path.open("ab")
    if found > size:
        file.truncate(size)
    return file


class SpooledPatches(Source):
    """The patches of a spool, a picture each, in the order given."""

    kind = "patches of another program"
    labels_lie = "when they are added"

    def __init__(self, spool: Spool, has_labels: bool = True) -> None:
        assert spool.patch_px is not None
        self.has_labels = has_labels
        self.path, self.size_px = spool.folder / PIXELS, spool.patch_px
        self.given = list(spool.given.values())
        self.rows = {key: row for row, key in enumerate(spool.given)}

    def listing(self) -> Listing:
        return Listing(
            tuple(
                Picture(
                    key, one.split, one.label if self.has_labels else None, one.slide, mpp=one.mpp
                )
                for key, one in zip(self.rows, self.given, strict=True)
            )
        )

    def header(self, picture: Picture) -> Header:
        size = self.size_px[0] * self.size_px[1] * 3
        return Header(self.size_px, "RGB", self.given[self.rows[picture.source]].encoding, size)

    def read(
        self, picture: Picture, header: Header, patch_px: tuple[int, int], regions: Regions
    ) -> list[Patch]:
        del patch_px, regions
        row = self.rows[picture.source]
        one = self.given[row]
        pixels = np.fromfile(self.path, np.uint8, header.bytes, offset=row * header.bytes)
        return [
            Patch(
                image=pixels.reshape(*header.size_px, 3),
                source=one.source,
                source_encoding=one.encoding,
                label=picture.label,
                slide=one.slide,
                x_px_level0=one.x,
                y_px_level0=one.y,
                size_px_level0=one.size_px,
                mpp=one.mpp,
            )
        ]
