"""Parquet files of encoded pictures as a source: OpenMidnight's columns, Hugging Face's images."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from latentds.errors import InputError
from latentds.sources.cut_options import SourceOptions
from latentds.sources.field_names import note_columns
from latentds.sources.image_folder import path_fields
from latentds.sources.names import name_fields
from latentds.sources.parquet_files import PATHS, EncodedTable, has_pictures, open_table
from latentds.sources.picture import MIXED_CHUNKS, Header, Listing, Picture
from latentds.sources.picture_files import PicturesInFiles
from latentds.sources.side_records import fields_of, splits_of
from latentds.sources.side_tables import label_column
from latentds.sources.source import Inspection, Kept, Source

# Row groups in memory: those that the plan mixes, and as many read ahead.
GROUPS_KEPT = 2 * MIXED_CHUNKS


class PictureParquet(PicturesInFiles):
    """Every *.parquet of a folder, or one. A picture's source is `file.parquet/row`.

    A row group is decompressed as a whole, so its pictures stay near each other in the order.
    """

    kind = "Parquet of encoded pictures"
    marks = frozenset({".parquet"})

    def __init__(self, options: SourceOptions, files: Sequence[str]) -> None:
        super().__init__(options, files)
        self.tables: dict[str, EncodedTable] = {}
        self.groups: Kept[Any] = Kept(GROUPS_KEPT)

    def table(self, file: str) -> EncodedTable:
        if file not in self.tables:
            self.tables[file] = open_table(self.root / file)
        return self.tables[file]

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        tables = [path for path in found.archives if path.lower().endswith(".parquet")]
        is_meant = bool(tables) and (found.is_folder or has_pictures(found.root))
        return cls(found.options, tables) if is_meant else None

    def listing(self) -> Listing:
        files = splits_of(self.root, list(self.files), self.options.split_folders)
        pictures = [p for file, split in files.splits.items() for p in self.rows_of(file, split)]
        if not pictures:
            raise InputError(f"{self.root}: {len(self.files)} Parquet files, no row in them")
        unused = note_columns(name for table in self.tables.values() for name in table.unused)
        notes = (*files.notes, *unused)
        return Listing(tuple(pictures), notes=notes, classes=self.class_order())

    def path_fields(self, row: Mapping[str, Any], source: str) -> dict[str, Any]:
        """What a picture's own path tells, else its source: by --name-pattern, or known rules."""
        column = next((name for name in PATHS if name in row), None)
        path = row[column] if column and isinstance(row[column], str) else source
        pattern = self.options.name_pattern
        found = name_fields(pattern)(path) if pattern else path_fields(path)
        if not self.options.labels:
            found.pop("label", None)
        return found

    def class_order(self) -> tuple[str, ...]:
        """Names of the classes by number where all files have the same, else none."""
        orders = {
            tuple(t.classes.get(label_column(t.facts) or "", ())) for t in self.tables.values()
        }
        return orders.pop() if self.options.labels and len(orders) == 1 else ()

    def rows_of(self, file: str, split: str) -> Iterator[Picture]:
        for number, row in enumerate(self.table(file).rows()):
            source, fields = f"{file}/{number}", {}
            try:
                fields = self.path_fields(row, source) | fields_of(row, self.options.labels)
            except InputError as error:
                self.broken[source] = str(error)
            yield Picture(source, split, **fields)

    def chunk(self, picture: Picture) -> str | None:
        file, row = self.row_of(picture)
        return f"{file}/{self.table(file).group_of(row)}"

    def header(self, picture: Picture) -> Header:
        header = super().header(picture)
        # Bare pixels are given to Pillow as a PPM file.
        return dataclasses.replace(header, encoding="raw") if header.encoding == "ppm" else header

    def file(self, picture: Picture) -> BinaryIO:
        file, row = self.row_of(picture)
        table = self.table(file)
        number = table.group_of(row)
        group = self.groups.get(f"{file}/{number}", lambda: table.read_group(number))
        return io.BytesIO(table.picture_in(group, row - table.starts[number]))
