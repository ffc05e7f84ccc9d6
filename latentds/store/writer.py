"""Write shards: plain tar, deterministic to the byte, resumable after every block of packs."""
# N patches of a pack, C latent channels, h w latent cells

from __future__ import annotations

import dataclasses
import os
import tarfile
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from latentds.core.storage import naming, rename_durably
from latentds.errors import FormatError
from latentds.store.format import CODES, MASKS, PATCHES, Contract, npy_header, shard_headers

BLOCK = 512
RECORD = 10_240  # POSIX: a tar ends on a multiple of 20 blocks


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pack:
    """N patches as they are stored.

    key      dot-free ASCII
    codes    uint8 (N, C, h, w)
    patches  Parquet bytes of the columns
    masks    Parquet bytes of the masks, None for none
    """

    key: str
    codes: np.ndarray
    patches: bytes
    masks: bytes | None = None


def global_header(contract: Contract) -> bytes:
    """The PAX global header that opens a shard: other tar readers skip it."""
    return tarfile.TarInfo.create_pax_global_header(shard_headers(contract))


def member_bytes(name: str, content: bytes) -> bytes:
    """A tar member: header, content, padding."""
    return member_header(name, len(content)) + content + bytes(-len(content) % BLOCK)


def member_header(name: str, size: int) -> bytes:
    """A tar member's header, without times or owners."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def pack_bytes(pack: Pack) -> bytes:
    """The members of a pack, in the format's order."""
    codes = np.ascontiguousarray(pack.codes)
    if codes.dtype != np.uint8 or codes.ndim < 2 or not len(codes):
        raise FormatError(
            f"pack {pack.key}: codes are {codes.dtype} {codes.shape}, not uint8 (N, *codes_shape)"
        )
    members = [member_bytes(f"{pack.key}.{CODES}", npy_header(codes.shape) + codes.tobytes())]
    if pack.masks is not None:
        members.append(member_bytes(f"{pack.key}.{MASKS}", pack.masks))
    members.append(member_bytes(f"{pack.key}.{PATCHES}", pack.patches))
    return b"".join(members)


class ShardWriter:
    """A shard being written under a temporary name; `finish` gives it its own.

    path         final path
    contract     goes into the global header
    resume_at    length of what an earlier process is known to have written and synced; 0 starts
                 anew
    """

    def __init__(self, path: Path, contract: Contract, resume_at: int = 0) -> None:
        self.path, self.temporary = path, path.with_name(f"{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file: BinaryIO = self.temporary.open("r+b" if resume_at else "wb")
        if resume_at:
            self.file.truncate(resume_at)  # whatever came after the last synced block is dropped
            self.file.seek(resume_at)
        else:
            with naming(self.path):
                self.file.write(global_header(contract))

    def add(self, pack: Pack) -> None:
        """Append a pack."""
        with naming(self.path):
            self.file.write(pack_bytes(pack))

    def sync(self) -> int:
        """Make what was added durable; returns the length that `resume_at` may name."""
        with naming(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
        return self.file.tell()

    def finish(self) -> None:
        """Close the tar, sync it, give it its name."""
        end = self.file.tell() + 2 * BLOCK
        with naming(self.path):
            self.file.write(bytes(2 * BLOCK + -end % RECORD))
            self.sync()
            self.file.close()
        rename_durably(self.temporary, self.path)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with naming(self.path):
            self.file.close()  # flushes what a full disk did not take
