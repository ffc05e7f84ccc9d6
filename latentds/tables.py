"""Files in memory, and npy tables as arrays over them: opening costs nothing whatever the size."""

from __future__ import annotations

import io
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from latentds.errors import FormatError
from latentds.format import NPY_ERRORS
from latentds.opening import open_regular

TABLE_HEAD_BYTES = 4096


def map_file(path: Path) -> mmap.mmap:
    """A file in memory."""
    with open_regular(path, str(path)) as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def will_need(mapped: mmap.mmap, offset: int, size: int) -> None:
    """Let the system read a part of a file side by side with others.

    Touching them makes it read one after another: a first batch of 128 packs took 5 times as long.
    """
    start = offset - offset % mmap.PAGESIZE
    if offset + size <= len(mapped):  # whoever reads it says what is wrong
        mapped.madvise(mmap.MADV_WILLNEED, start, offset + size - start)


class MappedTable:
    """A table of just the expected columns, rows and bytes.

    rows  structured array over the file
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], rows: int) -> None:
        self.head = check_head(path, dtype, rows)
        self.mapped = map_file(path)
        self.rows = np.frombuffer(self.mapped, dtype, rows, self.head)

    def will_need(self, first: int, count: int) -> None:
        """Rows that will be read soon."""
        size = self.rows.dtype.itemsize
        will_need(self.mapped, self.head + first * size, count * size)


def check_head(path: Path, dtype: np.dtype[Any], rows: int) -> int:
    """Length of a table's header; FormatError where the file is not what was expected."""
    try:
        with open_regular(path, str(path)) as file:
            head = io.BytesIO(file.read(TABLE_HEAD_BYTES))
        if np.lib.format.read_magic(head) != (1, 0):
            raise ValueError("npy version is not 1.0")
        shape, fortran, found = np.lib.format.read_array_header_1_0(head)
    except (*NPY_ERRORS, OSError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise FormatError(f"{path}: not a table ({reason}); fetch it anew") from error
    size = path.stat().st_size
    if found != dtype or fortran or shape != (rows,):
        raise FormatError(f"{path}: {found} {shape}, expected {rows} rows of {dtype}")
    if size != head.tell() + rows * dtype.itemsize:
        raise FormatError(f"{path}: {size} bytes are not {rows} rows; truncated, fetch it anew")
    return head.tell()
