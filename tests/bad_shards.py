"""Build damaged, foreign and hostile data sets out of a good one."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from latentds.store.composing import describe_file
from latentds.store.format import CHECKSUMS, MANIFEST, PATCH_DTYPE, PATCHES_TABLE, npy_header
from latentds.store.index import summarize_blocks
from latentds.store.packs import BLOCK


def edit_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    """Apply `change` to the manifest's JSON, as somebody who writes such sets would: no damage."""
    path = folder / MANIFEST
    record = json.loads(path.read_text())
    change(record)
    record.pop("digest", None)
    path.write_text(json.dumps(record))


def edit_table(folder: Path, name: str, change: Callable[[np.ndarray], None]) -> None:
    """Apply `change` to a table, as somebody who writes such sets would: its hashes are right."""
    table = np.load(folder / name)
    change(table)
    np.save(folder / name, table)
    entry = describe_file(folder / name)
    if name == PATCHES_TABLE:
        entry |= summarize_blocks(folder / name, PATCH_DTYPE, len(table))
    edit_manifest(folder, lambda record: record["tables"].update({name: entry}))


def make_old(folder: Path) -> None:
    """Make it a set of before tables, patches and the manifest had checksums."""

    def change(record: dict) -> None:
        record["tables"].pop(CHECKSUMS)
        for field in ("block_rows", "block_crc32"):
            record["tables"][PATCHES_TABLE].pop(field)

    edit_manifest(folder, change)
    (folder / CHECKSUMS).unlink()


def flip_bit(path: Path, offset: int) -> None:
    """Flip the lowest bit of one byte."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def first_shard(folder: Path) -> Path:
    """The first shard of a data set."""
    return sorted((folder / "data").glob("*.tar"))[0]


def rename_member(path: Path, old: str, new: str) -> None:
    """Give a tar member another name, checksum put right."""
    content = bytearray(path.read_bytes())
    start = content.index(old.encode() + b"\0")
    info = tarfile.TarInfo.frombuf(bytes(content[start : start + BLOCK]), "utf-8", "strict")
    info.name = new
    content[start : start + BLOCK] = info.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(content)


def replace_npy_header(path: Path, shape: tuple[int, ...]) -> None:
    """Make the first codes member announce another shape."""
    content = bytearray(path.read_bytes())
    start = content.index(b"\x93NUMPY")
    content[start : start + 128] = npy_header(shape).ljust(128)[:128]
    path.write_bytes(content)


def insert_pickle(path: Path) -> None:
    """Put a pickled object array where the first codes were."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": pickle.dumps(1)}], dtype=object), allow_pickle=True)
    content = bytearray(path.read_bytes())
    start = content.index(b"\x93NUMPY")
    content[start : start + len(buffer.getvalue())] = buffer.getvalue()
    path.write_bytes(content)


def foreign_tar(path: Path) -> None:
    """A tar of a text file, made by tarfile."""
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("readme.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"hello"))
