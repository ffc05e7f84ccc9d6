"""The files of a data set at a remote location, through the cache of a node."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from latentds.errors import DamagedPackError, FormatError, InputError
from latentds.store.cache import Cache, CacheConfig
from latentds.store.format import MANIFEST, OF_PATCHES, TABLE_HEAD_BYTES, TABLES
from latentds.store.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from latentds.store.open_files import BlockSums, Extent, OpenFile, Tasks, keep
from latentds.store.table_parts import (
    LARGE_PART_BYTES,
    PART_BYTES,
    PRESENT,
    START_BYTES,
    WHOLE_BYTES,
    TableParts,
)
from latentds.store.transport import ATTEMPTS, Transport

logger = logging.getLogger(__name__)

THREADS = 16  # ranges fetched at once by a process
RUN_BYTES = 32_000_000  # of neighbouring packs that come by one request: the Hub counts requests
RUNS_AHEAD = 2  # such requests that wait or are on their way; one at a time is held in memory
ALONE = 128  # packs, a window of the order, that a process asks for by themselves first
MAX_PENDING = 256  # of them asked for ahead


class RemoteFiles:
    """A location, through the cache: small tables whole, the rest by range, each once a node."""

    def __init__(self, location: str, config: CacheConfig) -> None:
        folder, limit, self.offline = config.resolve()
        self.cache, self.transport = Cache(folder, limit), Transport(location)
        self.where = self.transport.shown.rstrip("/")
        reference = hashlib.sha256(location.encode()).hexdigest()[:32]
        self.reference = f"refs/{reference}.json"
        self.name, self.revision = self.resolve()
        self.opened: OrderedDict[str, OpenFile] = OrderedDict()
        self.parted: dict[str, TableParts] = {}  # large tables, by name
        self.pools: dict[str, Any] = {}
        self.waiting = 0  # extents asked for ahead that no thread has begun with
        self.asked: set[str] = set()  # runs that wait or are on their way
        self.fetched: set[str] = set()  # runs that this process has fetched
        self.run_packs = 1  # packs of a run; see PackTable.want_all
        self.run_kinds: tuple[str, ...] = ()  # which of their members come along
        self.packs_alone = ALONE  # that are still fetched by themselves when they are asked for
        self.spare_bytes = START_BYTES  # of tables; see TableParts.wanted

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {
            "opened": OrderedDict(), "parted": {}, "pools": {}, "waiting": 0, "asked": set()
        }  # fmt: skip

    def resolve(self) -> tuple[str, str]:
        """Cache folder of the manifest the location stands for, and the revision."""
        if not self.offline and not (self.transport.revision and self.last_resolved()):
            try:
                return self.resolve_online()
            except InputError as error:
                if not self.last_resolved():
                    raise
                # As text: a record that is kept would keep the error's frames, and our threads.
                logger.warning("%s; using what it was when last seen", str(error))
        last = self.last_resolved()
        if last is None:
            raise InputError(
                f"{self.where}: offline, and nothing of it is in the cache {self.cache.folder}; "
                "open it once with a connection"
            )
        self.transport.revision = self.transport.revision or last.get("commit")
        return last["set"], last["revision"]

    def last_resolved(self) -> dict[str, Any] | None:
        """What the location was when it was last seen."""
        try:
            last: dict[str, Any] = json.loads((self.cache.folder / self.reference).read_text())
            whole = self.kept_manifest(last["set"]) is not None and bool(last["revision"])
        except (FileNotFoundError, ValueError, TypeError, KeyError):  # torn, or never written
            return None
        return last if whole else None

    def kept_manifest(self, name: str) -> bytes | None:
        """The manifest in a folder of the cache, whose name is its hash; None where it is torn."""
        try:
            content = (self.cache.folder / name / MANIFEST).read_bytes()
        except FileNotFoundError:
            return None
        return content if name == folder_of(content) else None

    def resolve_online(self) -> tuple[str, str]:
        """Ask what the location is now, and remember it."""
        self.transport.resolve()
        content = self.transport.read(MANIFEST, 0, None, MAX_MANIFEST_BYTES)
        parse_manifest(content, f"{self.where}/{MANIFEST}")
        digest = hashlib.sha256(content).hexdigest()
        name, revision = folder_of(content), self.transport.revision or digest
        if self.kept_manifest(name) is None:
            self.cache.write(self.cache.folder / name / MANIFEST, content)
        record = {"set": name, "revision": revision, "commit": self.transport.revision}
        self.cache.write(self.cache.folder / self.reference, json.dumps(record).encode())
        return name, revision

    def manifest(self) -> Manifest:
        content = self.kept_manifest(self.name)
        if content is None:  # torn since it was looked at, a moment ago
            raise FormatError(f"{self.cache.folder / self.name / MANIFEST}: torn; open it again")
        self.spare_bytes -= len(content)
        return parse_manifest(content, f"{self.where}/{MANIFEST}")

    def table(self, name: str, manifest: Manifest, sums: BlockSums | None = None) -> Path:
        """A table in the cache: a large one that has sums with holes, for `fill_table` to fill."""
        rows = manifest.patches if name in OF_PATCHES else manifest.packs
        size, digest = (manifest.tables[name].get(field) for field in ("bytes", "sha256"))
        most = TABLE_HEAD_BYTES + rows * TABLES[name].itemsize
        if type(size) is not int or not 0 < size <= most:
            raise FormatError(f"{self.where}/{name}: {size} bytes, {rows} rows have fewer; refused")
        if sums is not None and size > WHOLE_BYTES:
            if size <= rows * TABLES[name].itemsize:
                raise FormatError(f"{self.where}/{name}: {size} bytes, not {rows} rows; refused")
            with self.table_lock(name):
                return self.parts_of(name, size, rows, sums).path

        def download(path: Path) -> None:
            self.refuse_offline(name)
            self.transport.download(name, path, size, str(digest))

        # Hashed when it is filled; its size tells most torn writes, its checksums the others.
        with self.table_lock(name):
            path = self.cache.fill_file(f"{self.name}/{name}", download)
            if path.stat().st_size != size:
                self.cache.drop(f"{self.name}/{name}")
                path = self.cache.fill_file(f"{self.name}/{name}", download)
        self.spare_bytes -= size
        return path

    def table_lock(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Held while a table's files are made and opened, or dropped: never the one amid the other.

        A table that is open stays what it was, whoever renews it.
        """
        return self.cache.lock(f"{self.name}/{name}.lock")

    def renew(
        self, name: str, manifest: Manifest, sums: BlockSums | None = None, block: int | None = None
    ) -> Path | None:
        if self.offline:
            return None
        parts = self.parted.get(name)
        if parts is not None and block is not None and parts.forget(block):
            logger.warning("%s: block %s torn in the cache, fetched anew", parts.path, block)
            return parts.path
        logger.warning("%s: torn in the cache, fetched anew", self.cache.folder / self.name / name)
        self.parted.pop(name, None)
        with self.table_lock(name):
            for file in (f"{name}{PRESENT}", name):
                self.cache.drop(f"{self.name}/{file}")
        return self.table(name, manifest, sums)

    def parts_of(self, name: str, size: int, rows: int, sums: BlockSums) -> TableParts:
        """A large table whose parts are fetched where they are wanted."""

        def fetch(start: int, length: int, check: Callable[[bytes], bool]) -> bytes:
            self.refuse_offline(name)
            try:
                return self.transport.read(name, start, length, length, check)
            except DamagedPackError as error:  # of a table, which `max_bad` cannot replace
                raise FormatError(str(error)) from error

        shape, key = (rows, TABLES[name].itemsize), f"{self.name}/{name}"
        self.parted[name] = TableParts(self.cache, key, size, shape, sums, fetch)
        return self.parted[name]

    def fill_table(self, name: str, blocks: np.ndarray, ahead: bool = False) -> Tasks:
        parts = self.parted.get(name)
        if parts is None or (ahead and self.offline):
            return []
        part_bytes = LARGE_PART_BYTES if self.run_packs > 1 else PART_BYTES
        ranges = parts.wanted(blocks, part_bytes, self.spare_bytes, ahead)
        self.spare_bytes -= sum(end - first for first, end in ranges) * parts.block_bytes
        return parts.bring(ranges, self.threads("ahead" if ahead else "now"))

    def missing(self, name: str, blocks: np.ndarray) -> np.ndarray:
        parts = self.parted.get(name)
        return blocks[:0] if parts is None else parts.missing(blocks)

    def refuse_offline(self, name: str) -> None:
        """Say what is missing where nothing may be fetched."""
        if self.offline:
            raise InputError(
                f"{self.where}/{name}: offline, and not in the cache {self.cache.folder}; read it "
                "once with a connection"
            )

    def member(self, extent: Extent) -> str:
        """Name in the cache."""
        shard = extent.shard.removeprefix("data/")
        return f"{self.name}/data/{shard}/{extent.offset}-{extent.size}"

    def fill(self, extent: Extent, attempts: int = ATTEMPTS) -> Path:
        """The extent as a file of the cache."""

        def fetch() -> bytes:
            self.refuse_offline(extent.shard)
            shard, offset, size, _, _ = extent
            check = functools.partial(is_sound, extent=extent)
            return self.transport.read(shard, offset, size, size, check, attempts)

        return self.cache.fill(self.member(extent), fetch)

    def open(self, extent: Extent) -> tuple[OpenFile, int]:
        name = self.member(extent)
        file = self.opened.pop(name, None)
        for _ in range(ATTEMPTS):
            if file is not None and file.signature()[0] == extent.size:
                keep(self.opened, name, file)
                return file, 0
            if file is not None:  # not what was written: the disk's fault
                self.cache.drop(name)
            path = self.fill(extent)
            with contextlib.suppress(FormatError):  # evicted since
                file = OpenFile(path)
        raise FormatError(
            f"{self.cache.folder / name}: does not stay there; use a larger cache limit, or a "
            "cache folder on a sound disk (CacheConfig, LATENTDS_CACHE)"
        )

    def fetch(self, extents: Sequence[Extent], ahead: bool = False) -> None:
        if ahead:
            self.fetch_ahead(extents)
        elif len(extents) > 1:  # one alone `read` fetches
            tasks = [self.threads("now").submit(self.fill, extent) for extent in extents]
            rest = wait(tasks, return_when=FIRST_EXCEPTION).not_done
            for task in rest:  # one failure is enough; `read` will meet it, and knows the pack
                task.cancel()
            wait(rest)

    def fetch_ahead(self, extents: Sequence[Extent]) -> None:
        """Fill the cache beside the work, unless much is asked for already."""

        def fill(extent: Extent) -> None:
            self.waiting -= 1
            self.fill(extent, attempts=1)  # should it fail, the read will meet it and say so

        for extent in extents:
            if not self.offline and self.waiting < MAX_PENDING:
                self.waiting += 1
                self.threads("ahead").submit(fill, extent)

    def holds(self, extent: Extent) -> bool:
        """Whether an extent is in the cache."""
        return (self.cache.folder / self.member(extent)).is_file()

    def fetch_runs(self, runs: Mapping[str, Sequence[Extent]], ahead: bool = False) -> None:
        """As `fetch`, of neighbours in a shard, by a name of their own: a run is one request."""
        pool, tasks = self.threads("runs-ahead" if ahead else "runs", 1), []
        for name, run in runs.items():
            # A process that ends waits for those that it asked for ahead.
            if ahead and (self.offline or name in self.asked or len(self.asked) >= RUNS_AHEAD):
                continue
            self.asked.add(name)
            tasks.append(pool.submit(self.fill_run, name, run))
        if not ahead:
            rest = wait(tasks, return_when=FIRST_EXCEPTION).not_done
            self.asked -= {name for name, task in zip(runs, tasks, strict=True) if task.cancel()}
            wait(rest)

    def fill_run(self, name: str, run: Sequence[Extent]) -> None:
        """Put what the cache lacks of a run there, in one try.

        What does not come, or comes damaged, is left to `open`, which has more tries and knows the
        pack.
        """
        try:
            with self.cache.lock_of(name):
                missing = [extent for extent in run if not self.holds(extent)]
                if not missing:
                    return
                if name in self.fetched and len(missing) > len(run) // 2 and self.run_packs > 1:
                    self.run_packs = 1
                    logger.warning(
                        "%s: neighbours of packs are evicted before their turn, so packs come one "
                        "by one from now on; the cache has %s bytes, and all that is read through "
                        "it needs room (CacheConfig(limit=), LATENTDS_CACHE_LIMIT)",
                        self.where, f"{self.cache.limit:,}",
                    )  # fmt: skip
                    return
                self.keep_run(missing)
                self.fetched.add(name)
        finally:
            self.asked.discard(name)

    def keep_run(self, missing: Sequence[Extent]) -> None:
        """Fetch extents of a shard that lie close together by one request, and keep the sound."""
        start = min(extent.offset for extent in missing)
        length = max(extent.offset + extent.size for extent in missing) - start
        content = memoryview(self.transport.read(missing[0].shard, start, length, length, bool, 1))
        kept = 0
        try:
            for extent in missing:
                part = content[extent.offset - start :][: extent.size]
                if is_sound(part, extent):
                    self.cache.write(self.cache.folder / self.member(extent), part)
                    kept += extent.size
        finally:
            self.cache.account(kept)

    def threads(self, name: str, number: int = THREADS) -> ThreadPoolExecutor:
        """A pool of this process; what is needed now does not queue behind what is for later."""
        if self.pools.get("pid") != os.getpid():  # threads do not survive a fork
            self.pools, self.waiting, self.asked = {"pid": os.getpid()}, 0, set()
        if name not in self.pools:
            self.pools[name] = ThreadPoolExecutor(number, f"latentds-{name}")
        pool: ThreadPoolExecutor = self.pools[name]
        return pool

    def drop(self, extent: Extent) -> bool:
        name = self.member(extent)
        self.opened.pop(name, None)
        if self.offline:  # what is there is all there is
            return False
        self.cache.drop(name)
        return True


def folder_of(content: bytes) -> str:
    """The cache's folder of a set, by its manifest."""
    return f"sets/{hashlib.sha256(content).hexdigest()[:32]}"


def is_sound(content: bytes | memoryview, extent: Extent) -> bool:
    """Whether fetched bytes are those recorded: by sha256, or by CRC-32 in sets without."""
    if extent.sha256 is not None:
        return hashlib.sha256(content).digest() == extent.sha256
    return zlib.crc32(content) == extent.crc32
