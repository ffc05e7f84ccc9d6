"""What is known of a patch, for people: a row of a table, names for numbers; a file name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from latentds.store.format import NO_LABEL
from latentds.store.index import UNKNOWN_PX
from latentds.store.reader import ShardSet

MAX_NAME = 120  # characters a folder or file may have here; most file systems end at 255 bytes
AMBIGUOUS = re.compile(r"__|_/|/_|^/|/$")  # where `/` as `__` could be read in two ways


class Row(NamedTuple):
    """What is known of a patch, None where it is not."""

    key: str
    label: str | None
    slide: str | None
    x: int | None
    y: int | None
    mpp: float | None
    size_px: int | None
    split: str
    source: str
    source_encoding: str
    codebook_id: str


def read_rows(shards: ShardSet, split: str, rows: np.ndarray) -> list[Row]:
    manifest, table = shards.manifest, shards.patches[rows]
    columns = shards.read_columns(rows, ("key", "source", "source_encoding"))
    books = [book.codebook_id for book in manifest.codebooks]
    return [
        Row(
            key=columns["key"][place],
            label=manifest.classes[row["label"]] if row["label"] != NO_LABEL else None,
            slide=manifest.slides[row["slide"]] if row["slide"] >= 0 else None,
            x=int(row["x"]) if row["x"] != UNKNOWN_PX else None,
            y=int(row["y"]) if row["y"] != UNKNOWN_PX else None,
            mpp=None if np.isnan(row["mpp"]) else float(row["mpp"]),
            size_px=int(row["size_px"]) or None,
            split=split,
            source=columns["source"][place],
            source_encoding=columns["source_encoding"][place],
            codebook_id=books[book],
        )
        for place, (row, book) in enumerate(
            zip(table, shards.codebook_numbers(rows).tolist(), strict=True)
        )
    ]


def table_line(path: str, row: Row, fields: Sequence[str]) -> list[Any]:
    """A patch's line in table.csv, empty where something is unknown."""
    known = row._asdict() | {"path": path}
    return ["" if known[name] is None else known[name] for name in fields]


def patch_path(label: str | None, slide: str | None, key: str, suffix: str) -> str:
    """`LABEL/SLIDE/KEY.SUFFIX`, levels that are None left out: distinct for distinct keys.

    Every part is ASCII letters, digits, `_`, `-` and inner dots: none leads out of its folder.
    """
    folders = [folder_name(name) for name in (label, slide) if name is not None]
    return "/".join([*folders, f"{file_stem(key)}{suffix}"])


def folder_name(name: str) -> str:
    """A name as one plain folder's; a hash tells apart what had to be changed."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:MAX_NAME].strip(".")
    return plain if plain == name and plain else f"{plain or '_'}-{short_hash(name)}"


def file_stem(key: str) -> str:
    """A patch's key as one file name without a suffix: folders of its source become `__`."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", key.replace("/", "__"))
    if plain and not AMBIGUOUS.search(key) and len(plain) <= MAX_NAME:
        return plain
    return f"{plain[-MAX_NAME:] or '_'}-{short_hash(key)}"


def short_hash(text: str) -> str:
    """12 hex digits of the sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
