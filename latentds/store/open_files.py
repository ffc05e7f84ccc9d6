"""Files read by calls that report what goes wrong; a map dies of it, and names no file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from latentds.core.untrusted_files import check_kind
from latentds.errors import FormatError

Signature = tuple[int, int, int]  # size, time of the last change in ns, inode


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
