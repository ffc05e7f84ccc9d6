"""The files of a data set: what a reader asks of them, and a folder's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from latentds.store.format import (
    CHECKSUM_DTYPE,
    CHECKSUMS,
    DIGEST_DTYPE,
    DIGESTS,
    PACK_DTYPE,
    PACKS_TABLE,
    PATCH_DTYPE,
    PATCHES_TABLE,
)
from latentds.store.manifest import Manifest, read_manifest
from latentds.store.open_files import BlockSums, OpenFile

MAX_OPEN_SHARDS = 256
TABLES = {
    PACKS_TABLE: PACK_DTYPE,
    PATCHES_TABLE: PATCH_DTYPE,
    DIGESTS: DIGEST_DTYPE,
    CHECKSUMS: CHECKSUM_DTYPE,
}
Tasks = list[Future[None]]
OF_PATCHES = (PATCHES_TABLE, CHECKSUMS)  # tables of a row a patch


class Extent(NamedTuple):
    """Bytes of a shard: what a pack's codes, columns or masks are.

    sha256  of them, None where the set does not record it
    """

    shard: str
    offset: int
    size: int
    crc32: int
    sha256: bytes | None


class Files(Protocol):
    """Where a set's bytes come from.

    where     for messages
    revision  commit or manifest a location resolved to, None for a folder
    """

    @property
    def where(self) -> str: ...

    @property
    def revision(self) -> str | None: ...

    def manifest(self) -> Manifest: ...

    def table(self, name: str, manifest: Manifest, sums: BlockSums | None = None) -> Path:
        """A table as a local file, with or without the blocks that `sums` are of."""
        ...

    def renew(
        self, name: str, manifest: Manifest, sums: BlockSums | None = None, block: int | None = None
    ) -> Path | None:
        """A table found damaged, fetched anew; None where there is nowhere to fetch it from.

        block  that alone is damaged: where the table comes by parts, it is `fill_table`'s to fetch
        """
        ...

    def fill_table(self, name: str, blocks: np.ndarray, ahead: bool = False) -> Tasks:
        """Begin to put blocks of a table into its file; with `ahead` behind what is wanted now."""
        ...

    def missing(self, name: str, blocks: np.ndarray) -> np.ndarray:
        """Which of some blocks of a table are not in its file."""
        ...

    def open(self, extent: Extent) -> tuple[OpenFile, int]:
        """The file with an extent's bytes, and where in it they begin."""
        ...

    def fetch(self, extents: Sequence[Extent], ahead: bool = False) -> None:
        """Have them at hand for `open`; with `ahead` return at once."""
        ...

    def drop(self, extent: Extent) -> bool:
        """Forget bytes that were found damaged; whether reading again may help."""
        ...


class LocalFiles:
    """A folder.

    reads_parts  whether single patches are read rather than many of a pack
    """

    revision: str | None = None

    def __init__(self, folder: Path) -> None:
        self.folder, self.where = folder, str(folder)
        self.reads_parts = False
        self.opened: OrderedDict[str, OpenFile] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": OrderedDict()}

    def manifest(self) -> Manifest:
        return read_manifest(self.folder)

    def table(self, name: str, manifest: Manifest, sums: BlockSums | None = None) -> Path:
        del manifest, sums
        return self.folder / name

    def renew(self, *_: Any, **__: Any) -> None:
        """There is nowhere to fetch it from."""

    def fill_table(self, name: str, blocks: np.ndarray, ahead: bool = False) -> Tasks:
        del name, blocks, ahead
        return []

    def missing(self, name: str, blocks: np.ndarray) -> np.ndarray:
        del name
        return blocks[:0]

    def open(self, extent: Extent) -> tuple[OpenFile, int]:
        file = self.opened.pop(extent.shard, None)
        if file is None:
            file = OpenFile(self.folder / extent.shard)
            if self.reads_parts:
                file.single_reads()
        keep(self.opened, extent.shard, file)
        return file, extent.offset

    def fetch(self, extents: Sequence[Extent], ahead: bool = False) -> None:
        """Let the system read them from disk side by side."""
        del ahead
        for extent in extents:
            self.open(extent)[0].will_need(extent.offset, extent.size)

    def drop(self, extent: Extent) -> bool:
        del extent
        return False


def keep(opened: OrderedDict[str, OpenFile], name: str, file: OpenFile) -> None:
    """Put an open file last; the least recently used of many goes, closed with its last user."""
    if len(opened) >= MAX_OPEN_SHARDS:
        opened.popitem(last=False)
    opened[name] = file
