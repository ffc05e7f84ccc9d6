"""Patches that another program gives, kept on the disk until they are encoded: a source."""
# H W pixels of a patch

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from latentds.conversion import workdir
from latentds.conversion.given import Given
from latentds.core.storage import exclusive_lock, naming, write_atomically
from latentds.errors import InputError
from latentds.sources.picture import Header, Listing, Picture
from latentds.sources.source import Source
from latentds.store.patch_record import Patch

PIXELS, RECORDS, SHAPE = "pixels.u8", "patches.jsonl", "shape.json"


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
        """Bytes of a patch's pixels."""
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
        """Sync, and let others in."""
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

    def __init__(self, spool: Spool) -> None:
        assert spool.patch_px is not None
        self.path, self.size_px = spool.folder / PIXELS, spool.patch_px
        self.given = list(spool.given.values())
        self.rows = {key: row for row, key in enumerate(spool.given)}

    def listing(self) -> Listing:
        return Listing(
            tuple(
                Picture(key, one.split, one.label, one.slide, mpp=one.mpp)
                for key, one in zip(self.rows, self.given, strict=True)
            )
        )

    def header(self, picture: Picture) -> Header:
        size = self.size_px[0] * self.size_px[1] * 3
        return Header(self.size_px, "RGB", self.given[self.rows[picture.source]].encoding, size)

    def read(
        self,
        picture: Picture,
        header: Header,
        patch_px: tuple[int, int],
        regions: Sequence[tuple[int, int]],
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
