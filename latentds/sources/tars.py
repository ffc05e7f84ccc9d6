"""Tars that others made, trusting nothing in them: headers walked, members read by their offset."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

from latentds.core.storage import open_regular
from latentds.errors import InputError
from latentds.store.format import HEADER_PREFIX

MAX_HEADER_BYTES = 1 << 20  # a PAX or GNU header; a member's own takes 512
TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, EOFError)


class TarMember(NamedTuple):
    """A plain file in a tar: its name, and where its bytes lie."""

    name: str
    span: tuple[int, int]  # offset, size


class HeaderFile:
    """A tar as tarfile reads it: no single read is larger than a header can be."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; tarfile.ReadError where a header announces too many."""
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self.file.read(size)


class SeekableFile(io.RawIOBase):
    """What raw files of a known size have in common; a kind of them says `readinto`."""

    def __init__(self, size: int) -> None:
        self.size, self.place = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = max(0, (0, self.place, self.size)[whence] + offset)
        return self.place


class Window(SeekableFile):
    """(offset, size) of an open file as a file of their own; closes it at its end."""

    def __init__(self, file: BinaryIO, span: tuple[int, int]) -> None:
        super().__init__(span[1])
        self.file, self.offset = file, span[0]

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self.size - self.place)]
        self.file.seek(self.offset + self.place)
        count: int = cast(io.RawIOBase, self.file).readinto(view) or 0
        self.place += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def open_member(path: Path, span: tuple[int, int]) -> BinaryIO:
    """A member's bytes as a file; just what is asked for is read of them."""
    return io.BufferedReader(Window(open_regular(path, str(path), buffering=0), span))


def read_member(path: Path, member: TarMember, limit: int) -> bytes:
    """A small member's bytes; InputError (without the name) where it has more than `limit`."""
    size = member.span[1]
    if size > limit:
        raise InputError(f"its {PurePosixPath(member.name).suffix} has {size} bytes; refused")
    with open_member(path, member.span) as file:
        return file.read()


def tar_members(path: Path) -> Iterator[TarMember]:
    """The plain files of a tar in its order; links, devices and names that lead out are refused."""
    size = path.stat().st_size
    with open_regular(path, str(path)) as file:
        tar = open_tar(file, path)
        while (info := next_header(tar, path)) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all it has seen
            name = checked_name(info, path)
            if info.isdir():
                continue
            if info.offset_data + info.size > size:
                raise InputError(
                    f"{path}, {info.name}: {info.size} bytes from byte {info.offset_data}, but the "
                    f"file has {size}; truncated, fetch it anew"
                )
            yield TarMember(name, (info.offset_data, info.size))
        check_end(file, tar, path)


def open_tar(file: BinaryIO, path: Path) -> tarfile.TarFile:
    """tarfile's view of an open tar; InputError where it is none, or holds latents already."""
    try:
        tar = tarfile.TarFile(fileobj=cast(BinaryIO, HeaderFile(file)))
    except TAR_ERRORS as error:
        raise InputError(
            f"{path}: not an uncompressed tar ({error}); fetch it anew, or unpack it first"
        ) from error
    if any(name.startswith(HEADER_PREFIX) for name in tar.pax_headers):
        raise InputError(
            f"{path}: a latentds shard, which holds latents already; 'latentds info' describes its "
            "data set, LatentLoader reads it"
        )
    return tar


def next_header(tar: tarfile.TarFile, path: Path) -> tarfile.TarInfo | None:
    """The next member's header, None where tarfile sees no more."""
    try:
        return tar.next()
    except TAR_ERRORS as error:
        raise InputError(f"{path}: {error}; truncated or damaged, fetch it anew") from error


def checked_name(info: tarfile.TarInfo, path: Path) -> str:
    """A member's name without a leading `./`; InputError for what no collection needs."""
    name = PurePosixPath(info.name)
    if name.is_absolute() or ".." in name.parts:
        raise InputError(f"{path}, {info.name}: leads out of the archive; refused")
    if not (info.isdir() or info.isreg()) or info.issparse() or info.size < 0:
        raise InputError(f"{path}, {info.name}: a link or device, not a plain file; refused")
    return str(name)


def check_end(file: BinaryIO, tar: tarfile.TarFile, path: Path) -> None:
    """Refuse a tar that stops before its end mark: tarfile passes over damage without a word."""
    offset: int = tar.offset
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise InputError(
            f"{path}: no header and no end at byte {offset}; truncated or damaged, fetch it anew"
        )
