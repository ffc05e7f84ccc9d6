"""Files read by calls that report what goes wrong, and which patches in them were found sound.

A map dies of what goes wrong, and names no file.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentds.core.untrusted_files import check_kind
from latentds.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

Signature = tuple[int, int, int]  # size, time of the last change in ns, inode
RECHECK_EPOCHS = 10  # a disk may lose what it was read from without telling


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
            raise FormatError(f"{path}: {error.strerror}; fetch it anew") from error

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


class CodeChecks:
    """Marks of patches that had their checksum.

    A patch is checked when it is first read, by whichever process does, again when its shard's
    size, time or inode is another, and every RECHECK_EPOCHS epochs.

    first_patches  row of every shard's first patch, and one past the last
    signatures     of the shards as they were when the set was opened; none for a location, whose
                   packs lie in a cache that others clear: they are checked when they are opened
    """

    def __init__(self, first_patches: np.ndarray, signatures: list[Signature]) -> None:
        self.first_patches, self.signatures = first_patches, signatures
        self.round = 0
        self.shared: Tensor | None = None
        size = -(-int(first_patches[-1]) // 8) if signatures else 0
        # A bit a patch. Forked workers see such memory change, without torch; see `__getstate__`.
        self.marks = np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which shares memory by torch's handles: the marks move there."""
        import torch

        from latentds.core.processes import shared_zeros

        if self.shared is None:
            self.shared = shared_zeros(len(self.marks), torch.uint8)
            moved = self.shared.numpy()
            moved[:] = self.marks
            self.marks = moved
        return self.__dict__ | {"marks": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        assert self.shared is not None
        self.marks = self.shared.numpy()

    def look_at(self, shard: int, signature: Signature) -> None:
        """Forget a shard's marks where it has changed."""
        if signature != self.signatures[shard]:
            self.signatures[shard] = signature
            first, end = self.first_patches[shard : shard + 2].tolist()
            self.marks[first // 8 : -(-end // 8)] = 0

    def begin_epoch(self, epoch: int) -> None:
        """Forget all marks every few epochs."""
        if epoch // RECHECK_EPOCHS != self.round:
            self.round = epoch // RECHECK_EPOCHS
            self.marks[:] = 0

    def doubtful(self, rows: np.ndarray) -> np.ndarray:
        """Places of rows that are not marked, int64."""
        return np.flatnonzero(~(self.marks[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1)

    def found_sound(self, rows: np.ndarray) -> None:
        """Mark rows. Two processes may lose each other's marks: those are checked once more."""
        np.bitwise_or.at(self.marks, rows >> 3, np.left_shift(1, rows & 7).astype(np.uint8))
