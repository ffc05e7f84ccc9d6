"""What is known of a patch, as a row for people's tables: names instead of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from latentds.store.format import NO_LABEL
from latentds.store.index import UNKNOWN_PX
from latentds.store.reader import ShardSet


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
    """What is known of patches of a split."""
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
