"""The files of a data set, whether they lie in a folder or at a remote location."""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from latentds.cache import Cache, CacheConfig
from latentds.errors import FormatError, InputError
from latentds.foreign_json import parse_json
from latentds.format import (
    DIGEST_DTYPE,
    DIGESTS,
    MANIFEST,
    PACK_DTYPE,
    PACKS_TABLE,
    PATCH_DTYPE,
    PATCHES_TABLE,
)
from latentds.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest, read_manifest
from latentds.tables import TABLE_HEAD_BYTES, map_file, will_need
from latentds.transport import ATTEMPTS, Transport

logger = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 256
THREADS = 16  # ranges fetched at once by a process
MAX_PENDING = 256  # of them asked for ahead
TABLES = {PACKS_TABLE: PACK_DTYPE, PATCHES_TABLE: PATCH_DTYPE, DIGESTS: DIGEST_DTYPE}


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

    def table(self, name: str, manifest: Manifest) -> Path:
        """A table as a local file."""
        ...

    def read(self, extent: Extent) -> memoryview:
        """Bytes, mapped."""
        ...

    def fetch(self, extents: Sequence[Extent], ahead: bool = False) -> None:
        """Have them at hand for `read`; with `ahead` return at once."""
        ...

    def drop(self, extent: Extent) -> bool:
        """Forget bytes that were found damaged; whether reading again may help."""
        ...


def open_files(folder: str | os.PathLike[str], cache: CacheConfig | None = None) -> Files:
    """A folder's files, or a location's (anything with ://)."""
    if "://" in str(folder):
        return RemoteFiles(str(folder), cache or CacheConfig())
    return LocalFiles(Path(folder))


class LocalFiles:
    """A folder; shards are memory-mapped."""

    revision: str | None = None

    def __init__(self, folder: Path) -> None:
        self.folder, self.where = folder, str(folder)
        self.reads_parts = False  # single patches rather than whole packs
        self.maps: OrderedDict[str, mmap.mmap] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"maps": OrderedDict()}

    def manifest(self) -> Manifest:
        return read_manifest(self.folder)

    def table(self, name: str, manifest: Manifest) -> Path:
        del manifest
        return self.folder / name

    def read(self, extent: Extent) -> memoryview:
        mapped = self.map_shard(extent.shard)
        if extent.offset + extent.size > len(mapped):
            raise FormatError(
                f"{self.folder / PACKS_TABLE}: a pack lies at {extent.offset}.."
                f"{extent.offset + extent.size} of {extent.shard}, which has {len(mapped)} bytes; "
                "fetch the table anew"
            )
        return memoryview(mapped)[extent.offset : extent.offset + extent.size]

    def map_shard(self, shard: str) -> mmap.mmap:
        """The memory map of a shard; the least recently used of many is closed."""
        mapped = self.maps.pop(shard, None)
        if mapped is None:
            mapped = map_file(self.folder / shard)
            if self.reads_parts:  # else every patch brings 128 KiB of its neighbours along
                mapped.madvise(mmap.MADV_RANDOM)
            if len(self.maps) >= MAX_OPEN_SHARDS:
                self.maps.popitem(last=False)  # unmapped when its last view is gone
        self.maps[shard] = mapped
        return mapped

    def fetch(self, extents: Sequence[Extent], ahead: bool = False) -> None:
        """Let the system read them from disk side by side; one after another is what faults do."""
        del ahead
        for extent in extents:
            will_need(self.map_shard(extent.shard), extent.offset, extent.size)

    def drop(self, extent: Extent) -> bool:
        del extent
        return False


class RemoteFiles:
    """A location, through the cache: tables whole, members of packs by range, each once a node."""

    def __init__(self, location: str, config: CacheConfig) -> None:
        folder, limit, self.offline = config.resolve()
        self.cache, self.transport = Cache(folder, limit), Transport(location)
        self.where = self.transport.shown.rstrip("/")
        reference = hashlib.sha256(location.encode()).hexdigest()[:32]
        self.reference = f"refs/{reference}.json"
        self.name, self.revision = self.resolve()
        self.pools: dict[str, Any] = {}
        self.waiting = 0  # extents asked for ahead that no thread has begun with

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"pools": {}, "waiting": 0}

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
            found = (self.cache.folder / last["set"] / MANIFEST).is_file()
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # torn by a power failure
            return None
        return last if found else None

    def resolve_online(self) -> tuple[str, str]:
        """Ask what the location is now, and remember it."""
        self.transport.resolve()
        content = self.transport.read(MANIFEST, 0, None, MAX_MANIFEST_BYTES)
        parse_manifest(parse_json(content, f"{self.where}/{MANIFEST}"), self.where)
        digest = hashlib.sha256(content).hexdigest()
        name, revision = f"sets/{digest[:32]}", self.transport.revision or digest
        self.cache.fill(f"{name}/{MANIFEST}", lambda: content, keep=True)
        record = {"set": name, "revision": revision, "commit": self.transport.revision}
        self.cache.write(self.cache.folder / self.reference, json.dumps(record).encode())
        return name, revision

    def manifest(self) -> Manifest:
        path = self.cache.folder / self.name / MANIFEST
        return parse_manifest(parse_json(path.read_bytes(), str(path)), self.where)

    def table(self, name: str, manifest: Manifest) -> Path:
        """A whole table in the cache; fetched anew where its hash is not the manifest's."""
        entry, rows = manifest.tables[name], manifest.patches
        rows = rows if name == PATCHES_TABLE else manifest.packs
        size, digest = entry.get("bytes"), entry.get("sha256")
        most = TABLE_HEAD_BYTES + rows * TABLES[name].itemsize
        if type(size) is not int or not 0 < size <= most:
            raise FormatError(f"{self.where}/{name}: {size} bytes, {rows} rows have fewer; refused")

        def download(path: Path) -> None:
            self.refuse_offline(name)
            self.transport.download(name, path, size, str(digest))

        # Hashed when it is filled; after that its size tells a torn write from a whole one.
        path = self.cache.fill_file(f"{self.name}/{name}", download)
        if path.stat().st_size != size:
            self.cache.drop(f"{self.name}/{name}")
            path = self.cache.fill_file(f"{self.name}/{name}", download)
        return path

    def refuse_offline(self, name: str) -> None:
        """Say what is missing where nothing may be fetched."""
        if self.offline:
            raise InputError(f"{self.where}/{name}: not in the cache, and offline; connect once")

    def member(self, extent: Extent) -> str:
        """Name in the cache."""
        shard = extent.shard.removeprefix("data/")
        return f"{self.name}/data/{shard}/{extent.offset}-{extent.size}"

    def fill(self, extent: Extent, attempts: int = ATTEMPTS) -> Path:
        """The extent as a file of the cache."""

        def fetch() -> bytes:
            self.refuse_offline(extent.shard)
            content = self.transport.read(
                extent.shard,
                extent.offset,
                extent.size,
                extent.size,
                lambda content: is_sound(content, extent),
                attempts,
            )
            return content

        return self.cache.fill(self.member(extent), fetch)

    def read(self, extent: Extent) -> memoryview:
        while True:
            path = self.fill(extent)
            try:
                if path.stat().st_size == extent.size:
                    return memoryview(map_file(path))
            except FileNotFoundError:  # evicted since
                continue
            self.drop(extent)  # not what was written: the disk's fault

    def fetch(self, extents: Sequence[Extent], ahead: bool = False) -> None:
        if ahead:
            self.fetch_ahead(extents)
        elif len(extents) > 1:  # one alone `read` fetches
            tasks = [self.threads("now").submit(self.fill, extent) for extent in extents]
            done, rest = wait(tasks, return_when=FIRST_EXCEPTION)
            for (
                task
            ) in rest:  # the first failure is enough; `read` will meet it, and knows the pack
                task.cancel()
            wait(rest)
            del done

    def fetch_ahead(self, extents: Sequence[Extent]) -> None:
        """Fill the cache beside the work, unless much is asked for already."""

        def fill(extent: Extent) -> None:
            self.waiting -= 1
            if threading.main_thread().is_alive():  # a process that ends waits for its threads
                self.fill(extent, attempts=1)  # should it fail, the read will meet it and say so

        for extent in extents:
            if not self.offline and self.waiting < MAX_PENDING:
                self.waiting += 1
                self.threads("ahead").submit(fill, extent)

    def threads(self, name: str) -> ThreadPoolExecutor:
        """A pool of this process; what is needed now does not queue behind what is for later."""
        if self.pools.get("pid") != os.getpid():  # threads do not survive a fork
            self.pools, self.waiting = {"pid": os.getpid()}, 0
        if name not in self.pools:
            self.pools[name] = ThreadPoolExecutor(THREADS, f"latentds-{name}")
        pool: ThreadPoolExecutor = self.pools[name]
        return pool

    def drop(self, extent: Extent) -> bool:
        self.cache.drop(self.member(extent))
        return not self.offline


def is_sound(content: bytes, extent: Extent) -> bool:
    """Whether fetched bytes are those recorded: by sha256, or by CRC-32 in sets without."""
    if extent.sha256 is not None:
        return hashlib.sha256(content).digest() == extent.sha256
    return zlib.crc32(content) == extent.crc32
