"""Put a finished data set on an object store: shards first, the manifest last."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from latentds.core.storage import parse_json, write_atomically
from latentds.errors import InputError, first_words
from latentds.store.client_errors import client_errors, is_network
from latentds.store.format import MANIFEST, SLIDES_TABLE
from latentds.store.manifest import Manifest, read_manifest
from latentds.store.transport import Transport, open_location, shown

UPLOADED = ".latentds/uploaded.json"  # beside the local set; never uploaded itself
BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}


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
    here = {name: (folder / name).stat().st_size for name in names}
    with judging(location):
        check_free(filesystem, root, location, manifest, overwrite)
        done, there = read_done(folder, location, manifest), sizes(filesystem, root)
        for name, size in here.items():
            if name not in done or there.get(name) != size:
                put(filesystem, folder / name, f"{root}/{name}")
                done.append(name)
                record = {"to": shown(location), "dataset_id": manifest.dataset_id, "files": done}
                write_atomically(folder / UPLOADED, json.dumps(record).encode())
            progress(name, size)
        there = sizes(filesystem, root)
        for name, size in here.items():
            if there.get(name) != size:
                raise InputError(
                    f"{shown(location)}/{name}: {there.get(name)} bytes there, {size} here; run "
                    "the same command again"
                )
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

    if location.startswith(("http://", "https://")):
        raise InputError(
            f"{shown(location)}: a web server, which does not list files as an object store does; "
            "download them (wget --recursive) and give the folder"
        )
    transport, (filesystem, root) = Transport(location), open_location(location)

    def listed() -> dict[str, int]:
        with client_errors(shown(location)):
            return sizes(filesystem, root)

    found: dict[str, int] = transport.retry(listed, shown(location))
    if not found:
        raise InputError(f"{shown(location)}: no files there")
    if "" in found:
        raise InputError(f"{shown(location)}: one file; name its folder, and the file in --only")
    with progress(total=sum(found.values()), unit="B", unit_scale=True, desc="fetching") as bar:
        for name, size in sorted(found.items()):
            path = folder / inside(name, location)
            if not in_place(name, path, size):
                fetch(transport, name, path, size)
            bar.update(size)
    return folder


def sizes(filesystem: Any, root: str) -> dict[str, int]:
    """Bytes of every file below a path, by relative name; empty where there is nothing."""
    filesystem.invalidate_cache()
    try:
        found = filesystem.find(root, detail=True)
    except FileNotFoundError:
        return {}
    return {path.removeprefix(root).lstrip("/"): int(at["size"]) for path, at in found.items()}


def inside(name: str, location: str) -> str:
    """A relative name; InputError where it leads out of its folder."""
    if not name or ".." in name.split("/") or "\\" in name or "\0" in name:
        raise InputError(
            f"{shown(location)}: object name {name!r} leads out of the folder; refused"
        )
    return name


def fetch(transport: Transport, name: str, target: Path, size: int) -> None:
    """One file, whole under its name or not at all."""
    if target.is_file() and target.stat().st_size == size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    transport.download(name, partial, size)
    partial.replace(target)


@contextlib.contextmanager
def judging(location: str) -> Iterator[None]:
    """Say what an error of a store's client means for us."""
    try:
        yield
    except PermissionError as error:
        raise InputError(
            f"{shown(location)}: writing is denied ({first_words(error)}); check credentials and "
            "the bucket's policy, then run the same command again"
        ) from None
    except Exception as error:
        kind = type(error)
        is_clients = is_network(error) and not isinstance(error, OSError)  # no fault of a disk
        if not (is_clients or kind.__module__.startswith("botocore")):
            raise
        raise InputError(
            f"{shown(location)}: {kind.__name__}; check credentials (AWS_ACCESS_KEY_ID, a profile) "
            "and the network, then run the same command again"
        ) from None


def refuse_taken(location: str) -> None:
    """InputError where a finished data set lies at a location."""
    filesystem, root = open_location(location)
    with judging(location):
        is_taken = filesystem.exists(f"{root}/{MANIFEST}")
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
    """One file; object stores show it when it is complete, and their clients try again."""
    names = filesystem.protocol
    try:
        if BUCKETS.isdisjoint((names,) if isinstance(names, str) else names):
            # Not in a store of buckets: it would make a bucket that is misspelt.
            filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
        filesystem.put_file(str(source), target)
    except PermissionError:
        raise
    except OSError as error:
        raise InputError(
            f"{target}: {first_words(error)}; run the same command again, what is there is kept"
        ) from error


def read_done(folder: Path, location: str, manifest: Manifest) -> list[str]:
    """Files that an earlier run has put there."""
    path = folder / UPLOADED
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return []
    same = record["to"] == shown(location) and record["dataset_id"] == manifest.dataset_id
    return list(record["files"]) if same else []
