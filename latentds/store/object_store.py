"""Put a finished data set on an object store: shards first, the manifest last."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentds.core.storage import parse_json, write_atomically
from latentds.errors import InputError, first_words
from latentds.store.format import MANIFEST, SLIDES_TABLE
from latentds.store.manifest import Manifest, read_manifest
from latentds.store.transport import shown, unopenable

UPLOADED = ".latentds/uploaded.json"  # beside the local set; never uploaded itself
LOCATION = re.compile(r"([a-z][a-z0-9+]+):/+(.+)")
ATTEMPTS = 3
BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}


def location_of(path: str | os.PathLike[str]) -> str | None:
    """The location a path was typed as (pathlib makes s3:/bucket of s3://bucket), or None."""
    found = LOCATION.fullmatch(str(path))
    return f"{found[1]}://{found[2]}" if found else None


def upload(
    folder: Path,
    location: str,
    overwrite: bool = False,
    progress: Callable[[str, int], None] = lambda *_: None,
) -> Manifest:
    """Copy a data set to a location that fsspec writes; a run that was cut off goes on.

    overwrite  replace another data set that lies there
    progress   told every file and its size when it is there
    raises     InputError where something else lies there, or writing is denied
    """
    manifest = read_manifest(folder)
    filesystem, root = open_location(location)
    beside = [name for name in (SLIDES_TABLE, "README.md") if (folder / name).is_file()]
    names = [*(shard.name for shard in manifest.shards), *manifest.tables, *beside, MANIFEST]
    try:
        check_free(filesystem, root, location, manifest, overwrite)
        done = read_done(folder, location, manifest)
        for name in names:
            size = (folder / name).stat().st_size
            if name not in done or size_of(filesystem, f"{root}/{name}") != size:
                put(filesystem, folder / name, f"{root}/{name}")
                done.append(name)
                keep_done(folder, location, manifest, done)
            progress(name, size)
        check_arrived(filesystem, root, location, folder, names)
    except Exception as error:
        raise judged(error, location) from None
    (folder / UPLOADED).unlink(missing_ok=True)
    return manifest


def download(
    location: str, folder: Path, in_place: Callable[[str, Path, int], bool] = lambda *_: False
) -> Path:
    """A location's files in a local folder; what is there with its size is not fetched again.

    in_place  told a file's name there, its path here and its size: whether it need not be fetched
    raises  InputError where nothing lies there, or a name leads out of the folder
    """
    from latentds.core.display import progress

    filesystem, root = open_location(location)
    try:
        found = filesystem.find(root, detail=True)
        names = {path.removeprefix(root).lstrip("/"): info for path, info in found.items()}
        if not names:
            raise InputError(f"{shown(location)}: no files there")
        total = sum(int(info["size"]) for info in names.values())
        with progress(total=total, unit="B", unit_scale=True, desc="fetching") as bar:
            for name, info in sorted(names.items()):
                path, size = folder / inside(name, location), int(info["size"])
                if not in_place(name, path, size):
                    fetch(filesystem, f"{root}/{name}", path, size)
                bar.update(size)
    except Exception as error:
        raise judged(error, location) from None
    return folder


def inside(name: str, location: str) -> str:
    """A relative name; InputError where it leads out of its folder."""
    if not name or ".." in name.split("/") or "\\" in name or "\0" in name:
        raise InputError(
            f"{shown(location)}: object name {name!r} leads out of the folder; refused"
        )
    return name


def fetch(filesystem: Any, source: str, target: Path, size: int) -> None:
    """One file, whole under its name or not at all."""
    if target.is_file() and target.stat().st_size == size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    filesystem.get_file(source, str(partial))
    partial.replace(target)


def open_location(location: str) -> tuple[Any, str]:
    """The file system of a location, and the path there."""
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise unopenable(location, error) from error
    return filesystem, str(root).rstrip("/")


def judged(error: Exception, location: str) -> Exception:
    """What an error of a store's client means for us; itself where it means nothing more."""
    kind = type(error)
    if isinstance(error, PermissionError):
        return InputError(
            f"{shown(location)}: writing is denied ({first_words(error)}); check credentials and "
            "the bucket's policy, then run the same command again"
        )
    if kind.__module__.startswith("botocore"):
        return InputError(
            f"{shown(location)}: {kind.__name__}; check credentials (AWS_ACCESS_KEY_ID, a profile) "
            "and the network, then run the same command again"
        )
    return error


def refuse_taken(location: str) -> None:
    """InputError where a finished data set lies at a location."""
    filesystem, root = open_location(location)
    try:
        is_taken = filesystem.exists(f"{root}/{MANIFEST}")
    except Exception as error:
        raise judged(error, location) from None
    if is_taken:
        raise InputError(
            f"{shown(location)}: holds a finished data set; choose another --out, or --overwrite"
        )


def check_free(
    filesystem: Any, root: str, location: str, manifest: Manifest, overwrite: bool
) -> None:
    """Refuse a place that holds another data set; its manifest goes first where it may go."""
    path = f"{root}/{MANIFEST}"
    if not filesystem.exists(path):
        return
    found = parse_json(filesystem.cat_file(path), f"{shown(location)}/{MANIFEST}")
    shards = [[s.name, s.sha256] for s in manifest.shards]
    theirs = [[s.get("name"), s.get("sha256")] for s in found.get("shards", [])]
    if shards == theirs:
        return
    if not overwrite:
        raise InputError(
            f"{shown(location)}: holds another data set; choose another place, or --overwrite"
        )
    filesystem.rm_file(path)  # what is half replaced must not look whole


def put(filesystem: Any, source: Path, target: str) -> None:
    """One file; object stores show it when it is complete. Tried again where a connection fails."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if not BUCKETS & set(protocols(filesystem)):  # there it would make a misspelt bucket
                filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            filesystem.put_file(str(source), target)
            return
        except PermissionError:
            raise
        except OSError as error:
            if attempt == ATTEMPTS:
                raise InputError(
                    f"{target}: {first_words(error)}, after {ATTEMPTS} tries; run the same command "
                    "again, what is there is kept"
                ) from error


def protocols(filesystem: Any) -> tuple[str, ...]:
    """Names of a file system's protocol."""
    names = filesystem.protocol
    return (names,) if isinstance(names, str) else tuple(names)


def size_of(filesystem: Any, path: str) -> int | None:
    """Bytes of an object, None where there is none."""
    try:
        return int(filesystem.info(path)["size"])
    except FileNotFoundError:
        return None


def check_arrived(
    filesystem: Any, root: str, location: str, folder: Path, names: list[str]
) -> None:
    """Refuse to call a set uploaded of which something is not there as it should be."""
    filesystem.invalidate_cache()
    for name in names:
        found, size = size_of(filesystem, f"{root}/{name}"), (folder / name).stat().st_size
        if found != size:
            raise InputError(
                f"{shown(location)}/{name}: {found} bytes there, {size} here; run the same command "
                "again"
            )


def read_done(folder: Path, location: str, manifest: Manifest) -> list[str]:
    """Files that an earlier run has put there."""
    path = folder / UPLOADED
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return []
    same = record["to"] == shown(location) and record["dataset_id"] == manifest.dataset_id
    return list(record["files"]) if same else []


def keep_done(folder: Path, location: str, manifest: Manifest, done: list[str]) -> None:
    """Note what is there."""
    record = {"to": shown(location), "dataset_id": manifest.dataset_id, "files": done}
    write_atomically(folder / UPLOADED, json.dumps(record).encode())
