"""Parquet files of encoded pictures as a source: OpenMidnight's columns, Hugging Face's images."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from latentds.conversion.config import ConvertConfig
from latentds.errors import InputError
from latentds.sources.kept import Kept
from latentds.sources.parquet_files import BATCH_ROWS, PictureTable, open_table
from latentds.sources.picture_files import PictureFiles
from latentds.sources.records import fields_of, splits_of
from latentds.sources.source import MIXED_CHUNKS, Header, Listing, Picture

# Row groups in memory: those that the plan mixes, and as many read ahead.
GROUPS_KEPT = 2 * MIXED_CHUNKS


class PictureParquet(PictureFiles):
    """Every *.parquet of a folder, or one. A picture's source is `file.parquet/row`.

    A row group is decompressed as a whole, so its pictures stay near each other in the order.
    """

    kind = "Parquet of encoded pictures"

    def __init__(self, config: ConvertConfig, files: Sequence[str]) -> None:
        super().__init__(config)
        if self.root.is_file():
            self.root = self.root.parent
        self.files = files
        self.tables: dict[str, PictureTable] = {}
        self.raw: dict[str, int] = {}  # edge of the pictures that are bare pixels
        self.broken: dict[str, str] = {}
        self.groups: Kept[list[Any]] = Kept(GROUPS_KEPT)

    def listing(self) -> Listing:
        splits = splits_of(self.root, self.files, self.config.splits)
        for file in self.files:
            table = open_table(self.root / file)
            if table is None:
                raise InputError(
                    f"{self.root / file}: no column of pictures (image_bytes, or a struct with "
                    "bytes); remove it, or add one"
                )
            self.tables[file] = table
        pictures = [p for file in self.files for p in self.rows_of(file, splits[file])]
        if not pictures:
            raise InputError(f"{self.root}: {len(self.files)} Parquet files, no row in them")
        return self.named(Listing(tuple(pictures)))

    def rows_of(self, file: str, split: str) -> Iterator[Picture]:
        """The pictures of a file, a row each."""
        for number, row in enumerate(self.tables[file].rows()):
            source, fields = f"{file}/{number}", {}
            try:
                fields = fields_of(row, self.config.labels)
                if row.get("image_dtype") == "raw":
                    self.raw[source] = edge_of(row)
            except InputError as error:
                self.broken[source] = str(error)
            yield Picture(source, split, **fields)

    def chunk(self, picture: Picture) -> str | None:
        file, row = place_of(picture)
        return f"{file}/{self.tables[file].group_of(row)}"

    def header(self, picture: Picture) -> Header:
        if picture.source in self.broken:
            raise InputError(self.broken[picture.source])
        header = super().header(picture)
        return dataclasses.replace(header, encoding="raw") if self.is_raw(picture) else header

    def is_raw(self, picture: Picture) -> bool:
        """Whether a picture is bare pixels."""
        return picture.source in self.raw

    def file(self, picture: Picture) -> BinaryIO:
        file, row = place_of(picture)
        table = self.tables[file]
        group = table.group_of(row)
        parts = self.groups.get(f"{file}/{group}", lambda: table.pictures(group))
        part, place = divmod(row - table.starts[group], BATCH_ROWS)
        found = parts[part][place].as_py()
        if found is None:
            raise InputError("has no bytes in its row; embed the pictures in the Parquet")
        return io.BytesIO(as_ppm(found, self.raw[picture.source]) if self.is_raw(picture) else found)


def place_of(picture: Picture) -> tuple[str, int]:
    """File and row of a picture."""
    file, _, row = picture.source.rpartition("/")
    return file, int(row)


def edge_of(row: dict[str, Any]) -> int:
    """Edge of a picture of bare pixels; InputError (without the name) where it is not said."""
    edge = row.get("tile_size")
    if not isinstance(edge, int) or not 0 < edge < 1 << 16:
        raise InputError(f"its pixels are raw, but tile_size is {edge}")
    return edge


def as_ppm(pixels: bytes, edge: int) -> bytes:
    """Bare pixels (edge, edge, 3) as a file that Pillow opens."""
    if len(pixels) != edge * edge * 3:
        raise InputError(f"{len(pixels)} raw bytes are not {edge}x{edge} pixels of RGB")
    return b"P6 %d %d 255\n" % (edge, edge) + pixels
