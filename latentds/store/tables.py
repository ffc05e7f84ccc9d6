"""The npy tables beside the shards: opened, checked against the manifest, read where wanted."""

from __future__ import annotations

import contextlib
import functools
import logging
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentds.core.storage import sha256_file
from latentds.errors import FormatError
from latentds.store.cache import KEPT_SHARE
from latentds.store.format import (
    CHECKSUMS,
    CODES,
    DIGESTS,
    MASKS,
    OF_PATCHES,
    PACKS_TABLE,
    PATCHES,
    PATCHES_TABLE,
    ROWS_CRC32,
    TABLES,
    Spans,
    pack_key,
)
from latentds.store.manifest import Manifest, ShardRecord
from latentds.store.open_files import (
    BlockSums,
    Extent,
    LocalFiles,
    Signature,
    Table,
    block_sums,
    signature_of,
    wait_for,
)
from latentds.store.remote_files import RUN_BYTES, RemoteFiles

if TYPE_CHECKING:
    from torch import Tensor

MANY_REQUESTS = 3000  # about what the Hub takes in five minutes
FEW_RUNS = 8  # a split of so many comes by them from the start: a look at it costs 256 MB
FIELDS = {CODES: "codes", PATCHES: "patches", MASKS: "masks"}
RECHECK_EPOCHS = 10  # a disk may lose what it was read from without telling
Files = LocalFiles | RemoteFiles
logger = logging.getLogger(__name__)

MAX_HASHED_BYTES = 1 << 25  # of a patch table without block checksums: hashed when it is opened


def rows_of(manifest: Manifest, name: str) -> int:
    return manifest.patches if name in OF_PATCHES else manifest.packs


def open_table(
    files: Files,
    manifest: Manifest,
    name: str,
    check: Callable[[np.ndarray, np.ndarray], None] = lambda *_: None,
    sums: BlockSums | None = None,
) -> Table:
    """A table whose rows are read when they are wanted, checked by their blocks' checksums.

    One that has none is hashed when it is opened, unless it is of patches, and large.

    sums  of its blocks, where they are not in the manifest
    """
    rows, entry = rows_of(manifest, name), manifest.tables.get(name, {})
    sums = sums or block_sums(entry, rows)
    is_small = name not in OF_PATCHES or rows * TABLES[name].itemsize <= MAX_HASHED_BYTES
    is_hashed = sums is None and is_small and name != CHECKSUMS
    parts = (functools.partial(files.fill_table, name), functools.partial(files.missing, name))
    renew = functools.partial(files.renew, name, manifest, sums)
    settings: tuple[Any, ...] = (TABLES[name], rows, sums, renew, check, *parts)

    def opened(path: Path) -> Table:
        table = Table(path, *settings)
        if is_hashed and entry.get("sha256") not in (None, sha256_file(path)):
            raise FormatError(
                f"{path}: not of the hash that the manifest records; damaged, fetch it anew"
            )
        return table

    try:
        return opened(files.table(name, manifest, sums))
    except FormatError:
        path = renew()
        if path is None:
            raise
    return opened(path)


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


def check_sizes(folder: Path, manifest: Manifest) -> list[Signature]:
    """Every shard's signature; refuses missing, truncated or grown ones before anything is read."""
    # To follow 8,000 whole paths takes longer. Linux asks for no right to list the folder.
    top = os.open(folder, getattr(os, "O_PATH", os.O_RDONLY))
    try:
        return [signature_in(folder, top, shard) for shard in manifest.shards]
    finally:
        os.close(top)


def signature_in(folder: Path, top: int, shard: ShardRecord) -> Signature:
    """The signature of a shard in an open folder."""
    try:
        status = os.stat(shard.name, dir_fd=top)
    except FileNotFoundError as error:
        path = folder / shard.name
        raise FormatError(f"{path}: missing; the manifest lists it, fetch it") from error
    if status.st_size != shard.bytes:
        raise FormatError(
            f"{folder / shard.name}: {status.st_size} bytes, the manifest says {shard.bytes}; "
            "truncated or replaced, fetch it anew"
        )
    return signature_of(status)


class PackTable:
    """Where packs begin in the patch table and where their members lie, checked where it is read.

    first_pack, first_patches  number of every shard's first, and one past the last, int64 (S + 1,)
    spans    rows of the patch table that packs have; by arithmetic where the manifest has their
             size, else held
    rows     PACK_DTYPE by pack
    """

    def __init__(self, files: Files, manifest: Manifest) -> None:
        self.files, self.manifest, self.is_local = files, manifest, files.revision is None
        shards = manifest.shards
        self.first_pack = np.cumsum([0, *(shard.packs for shard in shards)])
        firsts = self.first_patches = np.cumsum([0, *(shard.patches for shard in shards)])
        self.room = np.array([shard.bytes for shard in shards], np.uint64)
        with self.fetching_others():
            self.rows = open_table(files, manifest, PACKS_TABLE)
        if manifest.pack_patches is not None:
            self.spans = Spans(firsts, self.first_pack, manifest.pack_patches)
        else:
            edges = np.concatenate([[0], np.cumsum(self.rows["count"], dtype=np.int64)])
            if not np.array_equal(edges[self.first_pack], firsts):
                raise self.contradiction()
            self.spans = Spans.listed(edges)
        self.rows.check = self.check
        if self.rows.sums is None:
            self.rows[:]

    @contextlib.contextmanager
    def fetching_others(self) -> Iterator[None]:
        """Beside the block fetch the other tables, or their headers, unless the block fails.

        What fails of them is told when it is used.
        """
        files, tables = self.files, self.manifest.tables
        if not isinstance(files, RemoteFiles):
            yield
            return
        with ThreadPoolExecutor(2, "latentds-tables") as pool, files.transport.given_up_together():
            for name in tables.keys() & {PATCHES_TABLE, DIGESTS}:
                sums = block_sums(tables[name], rows_of(self.manifest, name))
                if "blocks" not in tables[name]:  # else its sums are in the pack table
                    # Not opened there: Python 3.11 fails where two threads parse (headers) at once.
                    pool.submit(files.table, name, self.manifest, sums)
            yield

    @functools.cached_property
    def digests(self) -> Table | None:
        """sha256 of every pack's members, DIGEST_DTYPE; None in sets without."""
        if DIGESTS not in self.manifest.tables:
            return None
        return open_table(self.files, self.manifest, DIGESTS)

    def open_patches(
        self, check: Callable[[np.ndarray, np.ndarray], None] = lambda *_: None
    ) -> Table:
        """The patch table; of very large sets its blocks are the packs, whose rows have sums."""
        sums = None
        if self.manifest.tables.get(PATCHES_TABLE, {}).get("blocks") == "packs":
            sums = BlockSums(self.spans, "crc32", self.sums_of_patches, are_here=False)
        return open_table(self.files, self.manifest, PATCHES_TABLE, check, sums)

    def sums_of_patches(self, packs: np.ndarray) -> list[bytes]:
        """CRC-32 of packs' rows of the patch table."""
        sums = self.rows[packs][ROWS_CRC32].astype("<u4").view("V4")
        return [each.tobytes() for each in sums]

    def shards_of(self, packs: Any) -> Any:
        """Index of the shard that packs lie in, int64."""
        return np.searchsorted(self.first_pack, packs, side="right") - 1

    def key(self, pack: int) -> str:
        """Key of a pack: split, shard number and place in the shard."""
        place = int(self.shards_of(pack))
        shard = self.manifest.shards[place]
        number = int(shard.name.removesuffix(".tar").rpartition("-")[2])
        return pack_key(shard.split, number, pack - int(self.first_pack[place]))

    def shard_path(self, pack: int) -> str:
        """A pack's shard, for messages."""
        return f"{self.files.where}/{self.manifest.shards[int(self.shards_of(pack))].name}"

    def where(self, pack: int) -> str:
        """A pack's shard and key, for messages."""
        return f"{self.shard_path(pack)}, key {self.key(pack)}"

    def extents(self, packs: Sequence[int] | np.ndarray, kind: str) -> list[Extent]:
        """Where packs' codes, columns or masks lie."""
        numbers, field = np.asarray(packs, np.int64), FIELDS[kind]
        rows, names = self.rows[numbers], self.manifest.shards
        sizes = rows["count"].astype(np.int64) * self.manifest.contract.bytes_per_patch
        columns = [rows["shard"], rows[f"{field}_offset"], rows[f"{field}_crc32"],
                   sizes if kind == CODES else rows[f"{field}_bytes"]]  # fmt: skip
        hashes: list[bytes | None] = [None] * len(rows)
        if not self.is_local and self.digests is not None:
            hashes = [each.tobytes() for each in self.digests[numbers][field]]
        return [
            Extent(names[shard].name, offset, size, crc32, sha256)
            for shard, offset, crc32, size, sha256 in zip(
                *(column.tolist() for column in columns), hashes, strict=True
            )
        ]

    def bring(self, packs: np.ndarray, ahead: bool = False) -> None:
        """Fetch what is not there of packs' rows and digests, side by side."""
        ones, tasks = np.ones(len(packs), np.int64), []
        for table in (self.rows, self.digests):
            tasks += table.bring(packs, ones, ahead) if table is not None else []
        wait_for([] if ahead else tasks)

    def want_all(self, split: str, sets: int, columns: bool, masks: bool) -> None:
        """Say that every pack of a split will be wanted: those of the Hub then come in runs.

        sets            that share the cache; where a split does not fit into its part, neighbours
                        would be evicted before their turn, so packs come one by one
        columns, masks  whether those will be wanted, too
        """
        files, shards = self.files, [s for s in self.manifest.shards if s.split == split]
        if not isinstance(files, RemoteFiles) or files.transport.hub is None or files.offline:
            return
        size, packs = sum(shard.bytes for shard in shards), sum(shard.packs for shard in shards)
        room = int(files.cache.limit * KEPT_SHARE / sets)
        if size <= room:
            files.run_packs = max(1, RUN_BYTES * packs // size)
            if size <= FEW_RUNS * RUN_BYTES:
                files.packs_alone = 0
            files.run_kinds = (CODES, *([PATCHES] if columns else ()), *([MASKS] if masks else ()))
        elif packs > MANY_REQUESTS:
            logger.warning(
                "%s: an epoch of %s is %s requests, as its %.1f GB are more than the cache keeps "
                "(%.1f GB), and the Hub may ask to wait; give a larger cache (CacheConfig(limit=), "
                "LATENTDS_CACHE_LIMIT), run 'latentds fetch', or have larger packs (repack "
                "--pack-size)", files.where, split, f"{packs:,}", size / 1e9, room / 1e9,
            )  # fmt: skip

    def fetch(self, packs: np.ndarray, ahead: bool = False) -> None:
        """Have packs' codes at hand; with `ahead` return at once."""
        extents, files = self.extents(packs, CODES), self.files
        if not isinstance(files, RemoteFiles) or files.run_packs == 1:
            return files.fetch(extents, ahead)
        if files.packs_alone > 0 and not ahead:
            files.packs_alone -= len(packs)
            return files.fetch(extents)
        absent = packs[[not files.holds(extent) for extent in extents]]
        starts = self.first_pack[self.shards_of(absent)]
        firsts = absent - (absent - starts) % files.run_packs
        runs: dict[str, list[Extent]] = {}
        alone: list[Extent] = []
        for first in np.unique(firsts).tolist():
            end = min(first + files.run_packs, int(self.first_pack[self.shards_of(first) + 1]))
            # Neighbours whose rows are not here are left out: no time to wait for them.
            near = np.flatnonzero(self.has(np.arange(first, end))) + first
            run = [e for kind in files.run_kinds for e in self.extents(near, kind) if e.size]
            # Packs may be of unlike sizes, and the table is another's.
            if max(e.offset + e.size for e in run) - min(e.offset for e in run) <= 2 * RUN_BYTES:
                runs[f"{run[0].shard} {first}"] = run
            else:
                alone += self.extents(absent[firsts == first], CODES)
        files.fetch_runs(runs, ahead)
        files.fetch(alone, ahead)

    def has(self, packs: np.ndarray) -> np.ndarray:
        """Of which packs rows and digests are there, bool (N,)."""
        parted = [table for table in (self.rows, self.digests) if table is not None]
        return np.asarray(np.all([packs >= 0, *(table.has(packs) for table in parted)], axis=0))

    def check(self, rows: np.ndarray, packs: np.ndarray) -> None:
        """Refuse rows that contradict counts and sizes of the manifest."""
        shards = self.shards_of(packs)
        if not (
            np.array_equal(rows["shard"], shards)
            and np.array_equal(rows["first_patch"].astype(np.int64), self.spans[packs])
            and np.array_equal(rows["count"], self.spans.counts(packs))
            and rows["count"].all()
        ):
            raise self.contradiction()
        room = self.room[shards]
        size = np.uint64(self.manifest.contract.bytes_per_patch)
        beyond = ends_past(rows["codes_offset"], rows["count"].astype(np.uint64) * size, room)
        for kind in ("patches", "masks"):
            beyond |= ends_past(rows[f"{kind}_offset"], rows[f"{kind}_bytes"], room)
        if beyond.any():
            place = int(np.argmax(beyond))
            raise FormatError(
                f"{self.files.where}/{PACKS_TABLE}: pack {packs[place]} lies behind the "
                f"{room[place]} bytes of its shard; fetch the table anew"
            )

    def contradiction(self) -> FormatError:
        """The error of a table that is not what the manifest counts."""
        return FormatError(
            f"{self.files.where}/{PACKS_TABLE}: shards do not start and end where the manifest "
            "says; fetch both anew"
        )


def ends_past(offsets: np.ndarray, sizes: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Whether stretches of a file end behind its `room`, bool (N,); uint64, without overflow."""
    return np.asarray((offsets > room) | (sizes > room - np.minimum(offsets, room)))


def check_rows(table: np.ndarray, rows: np.ndarray, manifest: Manifest, where: str) -> None:
    """Refuse labels and slides that the manifest does not list: a GPU would die of them."""
    del rows
    for field, names in (("label", manifest.classes), ("slide", manifest.slides)):
        least, most = table[field].min(), table[field].max()
        if least < -1 or most >= len(names):
            raise FormatError(
                f"{where}/{PATCHES_TABLE}: {field} {least if least < -1 else most}, but the "
                f"manifest lists {len(names)}; damaged, fetch it anew"
            )
