"""Fetch a published data set into a folder: every file checked by its sha256, the manifest last."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from pathlib import Path

from latentds.core.storage import check_room, exclusive_lock, write_atomically
from latentds.errors import FormatError, InputError
from latentds.hub.card import PREVIEW, README
from latentds.hub.client import HubFile, Repository
from latentds.store.format import INPUT_STAMP, MANIFEST, SIDECARS, SLIDES_TABLE
from latentds.store.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from latentds.store.transport import Transport

LOCK = f"{SIDECARS}/fetch.lock"
HUB_NOTES = ".cache/huggingface"  # what the Hub's client keeps of files while it fetches them
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


def fetch(repository: str, out: str | os.PathLike[str] | None = None) -> FetchedSet:
    """Fetch ORG/NAME[@REVISION] from the Hub; the same call goes on where one was cut off.

    out       folder that is not there yet, or holds a part of the same set; NAME by default
    raises    FileNotFoundError where there is no such set, InputError where the folder holds
              something else, FormatError where the Hub sends other bytes than the manifest lists
    """
    name, _, revision = repository.removeprefix("hf://datasets/").partition("@")
    remote = Repository(name, revision or None)
    folder = Path(out or name.partition("/")[2])
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
    with exclusive_lock(folder / LOCK):
        missing = [path for path, file in wanted.items() if not is_here(folder / path, file)]
        fetch_files(remote, folder, {path: wanted[path] for path in missing}, set(listed))
        write_atomically(folder / MANIFEST, content)
        (folder / LOCK).unlink()
    return FetchedSet(
        folder=folder,
        commit=str(remote.head),
        manifest=manifest,
        files=len(wanted) + 1,
        new=len(missing),
        bytes=sum(wanted[path].size for path in missing),
    )


def wanted_files(manifest: Manifest, listed: dict[str, HubFile], name: str) -> dict[str, HubFile]:
    """Files of a set by path, with size and checksum: the manifest's, the Hub's for the rest."""
    wanted = {shard.name: HubFile(shard.bytes, shard.sha256, "") for shard in manifest.shards}
    for table, entry in manifest.tables.items():
        if not TABLE_PATTERN.fullmatch(table) or table == MANIFEST:
            raise FormatError(f"{name}/{MANIFEST}: names a table {table!r}; refused")
        wanted[table] = HubFile(entry.get("bytes") or 0, str(entry["sha256"]), "")
    beside = (README, PREVIEW, SLIDES_TABLE)  # no part of the set
    return wanted | {path: listed[path] for path in beside if path in listed}


def check_folder(folder: Path, wanted: set[str], manifest: bytes) -> None:
    """Refuse a folder that holds anything but a part of this set."""
    own = {MANIFEST, f"{MANIFEST}.tmp", LOCK, SLIDES_TABLE, INPUT_STAMP, *wanted}
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
    foreign = next((p for p in found if p not in own and not p.startswith(HUB_NOTES)), None)
    path = folder / MANIFEST
    if foreign is None and path.is_file() and path.read_bytes() != manifest:
        foreign = MANIFEST
    if foreign is not None:
        raise InputError(
            f"{folder}: holds something else ({foreign}); pass another folder with --out"
        )


def is_here(path: Path, file: HubFile) -> bool:
    return path.is_file() and file.holds(path)


def fetch_files(
    remote: Repository, folder: Path, missing: dict[str, HubFile], listed: set[str]
) -> None:
    """Have the Hub's client fetch files of the listed ones, and check each of them."""
    for path in missing:  # of other bytes, which the client may take for right
        (folder / path).unlink(missing_ok=True)
    begun = sum(path.stat().st_size for path in (folder / HUB_NOTES).rglob("*.incomplete"))
    check_room(folder, sum(file.size for file in missing.values()) - begun)
    if missing:
        remote.download(folder, missing, listed)
    for path, file in missing.items():
        if not (folder / path).is_file():
            raise InputError(f"{remote.name}/{path}: did not come; run the same command again")
        if not file.holds(folder / path):
            (folder / path).unlink()
            raise FormatError(
                f"{remote.name}/{path}: the Hub sends other bytes than the manifest lists "
                f"({(file.sha256 or file.blob)[:12]}...); fetch again, then tell the publisher"
            )
    shutil.rmtree(folder / HUB_NOTES, ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / HUB_NOTES).parent.rmdir()
