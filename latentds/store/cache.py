"""A folder of fetched bytes: filled once a node, bounded in size, least recently used first out."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from latentds.core.storage import naming
from latentds.errors import InputError

DEFAULT_LIMIT = "50GB"
LOCKS = 1024  # members that may be filled at once without waiting for each other
KEPT_SHARE = 0.9  # of the limit, after an eviction
# What writing to a cache that can only be read ends with; EBADF once a file of it is open.
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EBADF)
STALE_S = 600  # after which an unfinished file is a killed process's
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where what remote sets give is kept, and how much of it.

    dir      LATENTDS_CACHE by default, else ~/.cache/latentds; on a disk of the node: all processes
             there share it
    limit    bytes, or a text such as "200GB"; LATENTDS_CACHE_LIMIT by default, else 50 GB
    offline  connect to nothing, use what is there; by default what HF_HUB_OFFLINE or
             LATENTDS_OFFLINE say
    """

    dir: Path | None = None
    limit: int | str | None = None
    offline: bool | None = None

    def resolve(self) -> tuple[Path, int, bool]:
        """Folder, bytes and offline, defaults filled in."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentds"
        folder = Path(self.dir or os.environ.get("LATENTDS_CACHE") or home).absolute()
        limit = self.limit or os.environ.get("LATENTDS_CACHE_LIMIT") or DEFAULT_LIMIT
        words = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "LATENTDS_OFFLINE"))
        offline = any(word.upper() in ("1", "ON", "YES", "TRUE") for word in words)
        return folder, parse_bytes(limit), offline if self.offline is None else self.offline


def parse_bytes(text: int | str) -> int:
    """Bytes of a number or a text such as "200GB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", str(text).strip().upper())
    unit = match[2] if match else "?"
    unit = unit if unit in UNITS else f"{unit}B"
    if not match or unit not in UNITS or float(match[1]) <= 0:
        raise ValueError(f"cache limit {text!r}; a number of bytes, or one with KB, MB, GB or TB")
    return int(float(match[1]) * UNITS[unit])


class Cache:
    """Files under a folder.

    folder  shared by the processes of a node
    limit   bytes of members; tables and manifests do not count
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def fill(self, name: str, fetch: Callable[[], bytes]) -> Path:
        """The file `name`, fetched by whichever process is first; others wait for it."""
        path = self.folder / name
        if path.is_file():
            with contextlib.suppress(OSError):  # evicted since, or another's
                os.utime(path)  # used now: among the last to go
            return path
        with self.lock_of(name):
            if not path.is_file():
                content = fetch()
                self.write(path, content)
                self.account(len(content))
        return path

    def fill_file(self, name: str, download: Callable[[Path], None]) -> Path:
        """The file `name`, kept for good, written by `download` to the path it is given."""
        path = self.folder / name
        with self.lock_of(name):
            if not path.is_file():
                self.write_by(path, download)
        return path

    def write(self, path: Path, content: bytes | memoryview) -> None:
        """Write `content`; see `write_by`."""

        def write(temporary: Path) -> None:
            with naming(path):
                temporary.write_bytes(content)

        self.write_by(path, write)

    def write_by(self, path: Path, write: Callable[[Path], None]) -> None:
        """Write under a temporary name and rename; no sync: what a power failure loses is fetched.

        A half-written file is never seen: its pack's checksum is checked when it is read.
        """
        own = f"{os.getpid()}-{threading.get_ident()}"  # several ranks may note the same thing
        temporary = path.with_name(f"{path.name}.{own}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            temporary.replace(path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise self.judged(error) from error

    def judged(self, error: BaseException) -> BaseException:
        """An error of writing, with the remedy where the disk is full or not ours."""
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return InputError(
                f"{self.folder}: disk full; set a lower cache limit (now {self.limit:,} bytes) "
                "or another cache folder (CacheConfig, LATENTDS_CACHE, LATENTDS_CACHE_LIMIT)"
            )
        if isinstance(error, OSError) and error.errno in READ_ONLY:
            return InputError(
                f"{self.folder}: this cache can only be read here; give a folder that can be "
                "written (CacheConfig, LATENTDS_CACHE)"
            )
        return error

    def drop(self, name: str) -> None:
        """Forget a file that was found damaged."""
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise self.judged(error) from error

    def account(self, size: int) -> None:
        """Count a new member; over the limit, evict."""
        with self.lock("lock"):
            counter = self.folder / "bytes"
            try:
                total = int(counter.read_text()) + size
            except (FileNotFoundError, ValueError):
                total = sum(size for _, size, _ in self.members())
            counter.write_text(str(self.evict() if total > self.limit else total))

    def evict(self) -> int:
        """Delete the least recently used members; the bytes that are left."""
        members = sorted(self.members())
        total = sum(size for _, size, _ in members)
        for _, size, path in members[:-1]:  # the newest is about to be read
            if total <= self.limit * KEPT_SHARE:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def members(self) -> Iterator[tuple[float, int, Path]]:
        """Time of last use, size and path of every member; stale unfinished files are removed."""
        for path in self.folder.glob("sets/*/data/*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if path.suffix != ".tmp":
                yield status.st_mtime, status.st_size, path
            elif time.time() - status.st_mtime > STALE_S:
                path.unlink(missing_ok=True)

    def lock_of(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Hold the lock of what has a name: one of LOCKS, so few names share one."""
        return self.lock(f"locks/{int(hashlib.sha256(name.encode()).hexdigest(), 16) % LOCKS}")

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold a lock of the node; a killed process gives it back.

        None where nothing can be written: what is there is read, and what is not is told.
        """
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            opened = path.open("a")
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            opened = None
        if opened is None:
            yield
            return
        with opened as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                # Closing is not enough: a process forked meanwhile has the file open too.
                fcntl.flock(file, fcntl.LOCK_UN)
