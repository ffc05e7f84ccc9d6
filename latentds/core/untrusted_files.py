"""Opens files that others made: regular ones only, and as pictures only formats that are read here.

A named pipe or a device would be waited for for ever, and Pillow left to choose starts Ghostscript.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from latentds.errors import InputError

# What patches are kept in. Each is decoded inside this process by a library made for that alone.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
FREE_BYTES, TIMES = 1 << 24, 64  # of an h5 dataset: so much in any case, and times what is stored
MAX_CHUNK_BYTES = 1 << 28  # is decompressed at once, whatever is asked for
KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def other_kind(mode: int) -> str | None:
    """What a file of that st_mode is where it is no regular one."""
    if stat.S_ISREG(mode):
        return None
    return next((name for is_kind, name in KINDS if is_kind(mode)), "no file")


def check_regular(path: Path, where: str = "") -> None:
    """Refuse all but a regular file (links are followed); for libraries that open it themselves.

    where   what the message starts with; nothing where the caller adds the name
    raises  InputError; FileNotFoundError and the like where there is nothing to look at
    """
    check_kind(path.stat().st_mode, where)


def check_kind(mode: int, where: str) -> None:
    """Refuse the st_mode of all but a regular file."""
    kind = other_kind(mode)
    if kind:
        raise InputError(f"{where}{': ' * bool(where)}{kind}, not a regular file; take it out")


def open_regular(path: Path, where: str = "", buffering: int = -1) -> BinaryIO:
    """A regular file, open for reading; InputError for another kind, which is not waited for.

    where  what the message starts with; nothing where the caller adds the name
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_kind(os.fstat(file).st_mode, where)
        os.set_blocking(file, True)
        return open(file, "rb", buffering)  # noqa: PTH123
    except BaseException:
        os.close(file)
        raise


def tiles_file(path: Path) -> Path:
    """Beside a slide that is read in place: a byte for every tile, 1 once it is no hole."""
    return path.with_name(f".{path.name}.tiles")


def check_whole(path: Path) -> None:
    """Refuse a file with holes, which only `sources.slide_ranges` fills before it is read."""
    if tiles_file(path).is_file():
        raise InputError("has holes that only its location can fill; convert that")


def expands_to(dataset: Any, path: Path) -> str | None:
    """What is wrong with how an h5 dataset is stored, None where nothing is.

    Rows that compress to nothing, or were never written, take memory that the file does not have.
    """
    held, stored = dataset.nbytes, min(dataset.id.get_storage_size(), path.stat().st_size)
    if held > FREE_BYTES + TIMES * stored:
        return f"announces {held:,} bytes, of which {stored:,} are stored; refused"
    chunk = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize
    if chunk > MAX_CHUNK_BYTES:
        return f"is stored in chunks of {chunk:,} bytes; refused"
    return None


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def pixels_of(path: Path) -> np.ndarray:
    """Pixels uint8 (H, W, 3) of a picture of our own choice; what Pillow raises where it is none.

    Other people's are read by `sources.pictures`, which bounds their size and judges their mode.
    """
    with open_picture(path) as image:
        return np.asarray(image.convert("RGB"))


@contextlib.contextmanager
def open_picture(
    file: Path | BinaryIO, formats: list[str] | tuple[str, ...] | None = None
) -> Iterator[Image.Image]:
    """A picture of a path or an open file, of FORMATS or just the formats named.

    raises  InputError (without the name) for what is no regular file; for what is no such picture
            one of codecs.formats.DECODE_ERRORS
    """
    with contextlib.ExitStack() as opened:
        if isinstance(file, Path):
            check_whole(file)
        content = opened.enter_context(open_regular(file)) if isinstance(file, Path) else file
        yield opened.enter_context(Image.open(content, formats=formats or known_formats()))
