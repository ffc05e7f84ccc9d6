"""Fetch a published data set into a folder: every file checked by its sha256, the manifest last."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from latentds.core.storage import (
    exclusive_lock,
    naming,
    rename_durably,
    sha256_file,
    write_atomically,
)
from latentds.errors import FormatError, InputError
from latentds.hub.card import PREVIEW
from latentds.hub.client import NAME, HubFile, Repository
from latentds.hub.publish_plan import README
from latentds.store.format import MANIFEST, SIDECARS, SLIDES_TABLE
from latentds.store.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from latentds.store.transport import Transport

PART_BYTES = 16 * 1_000_000  # asked for at once: what a broken connection costs
THREADS = 8
PARTIAL = ".partial"
LOCK = f"{SIDECARS}/fetch.lock"
TABLE_PATTERN = re.compile(rf"{re.escape(SIDECARS)}/[a-z0-9_]+\.[a-z0-9]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FetchedSet:
    """What was fetched.

    commit   the revision was when it was asked for
    files    of the set, manifest included
    new      of them, not in the folder before
    """

    folder: Path
    commit: str
    manifest: Manifest
    files: int
    new: int
    bytes: int


def fetch(
    repository: str,
    out: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> FetchedSet:
    """Fetch ORG/NAME[@REVISION] from the Hub; the same call goes on where one was cut off.

    out       folder that is not there yet, or holds a part of the same set; NAME by default
    progress  called with bytes that are there and bytes of all
    raises    FileNotFoundError where there is no such set, InputError where the folder holds
              something else or the disk is too small, FormatError where the Hub sends other bytes
              than the manifest lists
    """
    name, _, revision = repository.removeprefix("hf://datasets/").partition("@")
    if not NAME.fullmatch(name):
        raise InputError(f"{repository!r} is not ORG/NAME[@REVISION] on the Hub")
    folder = Path(out or name.partition("/")[2])
    remote = Repository(name, revision or None)
    listed = remote.files()
    if listed is None:
        raise FileNotFoundError(
            f"{name}@{remote.revision}: no such data set on the Hub, or not for you; check the "
            "name, log in with 'hf auth login'"
        )
    if MANIFEST not in listed:
        raise FormatError(
            f"{name}@{remote.revision}: no {MANIFEST}; no latentds set, or one whose upload has "
            "not ended: ask its publisher"
        )
    transport = Transport(f"hf://datasets/{name}@{remote.head}")
    content = transport.read(MANIFEST, 0, None, MAX_MANIFEST_BYTES)
    manifest = parse_manifest(content, f"{name}/{MANIFEST}")
    wanted = wanted_files(manifest, listed, name)
    check_folder(folder, set(wanted), content)
    (folder / SIDECARS).mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder / LOCK):
        new, size = fetch_files(transport, folder, wanted, progress)
        write_atomically(folder / MANIFEST, content)
        (folder / LOCK).unlink()
    return FetchedSet(
        folder=folder,
        commit=str(remote.head),
        manifest=manifest,
        files=len(wanted) + 1,
        new=new,
        bytes=size,
    )


def wanted_files(manifest: Manifest, listed: dict[str, HubFile], name: str) -> dict[str, HubFile]:
    """Files of a set by path, with size and checksum: the manifest's, the Hub's for the rest."""
    wanted = {shard.name: HubFile(shard.bytes, shard.sha256, "") for shard in manifest.shards}
    for table, entry in manifest.tables.items():
        if not TABLE_PATTERN.fullmatch(table) or table == MANIFEST:
            raise FormatError(f"{name}/{MANIFEST}: names a table {table!r}; refused")
        wanted[table] = HubFile(table_bytes(entry, f"{name}/{table}"), str(entry["sha256"]), "")
    beside = (README, PREVIEW, SLIDES_TABLE)  # no part of the set
    return wanted | {path: listed[path] for path in beside if path in listed}


def table_bytes(entry: dict[str, Any], where: str) -> int:
    size = entry.get("bytes")
    if type(size) is not int or size < 1:
        raise FormatError(f"{where}: the manifest gives {size!r} bytes; tell the publisher")
    return size


def check_folder(folder: Path, wanted: set[str], manifest: bytes) -> None:
    """Refuse a folder that holds anything but a part of this set."""
    own = {
        MANIFEST,
        f"{MANIFEST}.tmp",
        LOCK,
        SLIDES_TABLE,
        *wanted,
        *(f"{path}{PARTIAL}" for path in wanted),
    }
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    foreign = next((path for path in found if path not in own), None)
    path = folder / MANIFEST
    if foreign is None and path.is_file() and path.read_bytes() != manifest:
        foreign = MANIFEST
    if foreign is not None:
        raise InputError(
            f"{folder}: holds something else ({foreign}); pass another folder with --out"
        )


def fetch_files(
    transport: Transport,
    folder: Path,
    wanted: dict[str, HubFile],
    progress: Callable[[int, int], None],
) -> tuple[int, int]:
    """Have every file in the folder; how many were not there, and their bytes."""
    missing = [path for path, file in wanted.items() if not is_here(folder / path, file)]
    total = sum(file.size for file in wanted.values())
    needed = sum(wanted[path].size - kept_bytes(folder / path) for path in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{folder}: {needed:,} bytes are to come, the disk has {free:,} free")
    done, lock = total - needed, threading.Lock()

    def count(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            progress(done, total)

    count(0)
    with ThreadPoolExecutor(THREADS, "latentds-fetch") as pool:
        tasks = [pool.submit(fetch_file, transport, folder, p, wanted[p], count) for p in missing]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return len(missing), sum(wanted[path].size for path in missing)


def is_here(path: Path, file: HubFile) -> bool:
    return path.is_file() and file.holds(path)


def kept_bytes(path: Path) -> int:
    """Bytes of a file that a run which was cut off has left."""
    partial = path.with_name(path.name + PARTIAL)
    return partial.stat().st_size if partial.is_file() else 0


def fetch_file(
    transport: Transport, folder: Path, name: str, file: HubFile, count: Callable[[int], None]
) -> None:
    """One file, appended to what is there of it, renamed when its checksum is right."""
    path = folder / name
    partial = path.with_name(path.name + PARTIAL)
    path.parent.mkdir(parents=True, exist_ok=True)
    if (kept := kept_bytes(path)) > file.size:
        count(-kept)
        partial.unlink()
    for last in (False, True):  # a part that was kept may be of another commit: once more from 0
        append_rest(transport, name, partial, file.size, count)
        if file.holds(partial):
            rename_durably(partial, path)
            return
        found = sha256_file(partial)
        partial.unlink()
        count(-file.size)
        if last:
            raise FormatError(
                f"{transport.shown}/{name}: sha256 {found[:12]}..., expected "
                f"{(file.sha256 or file.blob)[:12]}..., twice; tell the publisher"
            )


def append_rest(
    transport: Transport, name: str, partial: Path, size: int, count: Callable[[int], None]
) -> None:
    with naming(partial), partial.open("ab") as target:
        while (start := target.tell()) < size:
            wanted = min(PART_BYTES, size - start)
            target.write(transport.read(name, start, wanted, wanted))
            count(wanted)
        target.flush()
        os.fsync(target.fileno())
