"""Parquet files with a column of encoded pictures: what their footers say, and their row groups."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentds.core.storage import check_regular, parse_json
from latentds.errors import FormatError, InputError, UnusableError
from latentds.sources.names import COLUMNS
from latentds.sources.slide_reading import reason_of

# Decompressed pictures of a row group; a few are in memory at once.
MAX_GROUP_BYTES = 1 << 28
BATCH_ROWS = 64  # rows decompressed before their size is looked at
# Columns of plain bytes that are pictures; a struct with a field `bytes` is one by any name.
PICTURE_COLUMNS = ("image_bytes", "image", "img", "jpg", "jpeg", "png", "picture")
PATHS = ("path", "file_name", "filename", "image_path")  # a picture's own, nanopath's among them
RAW = ("image_dtype", "tile_size")  # OpenMidnight's: how image_bytes are coded, and their edge


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedTable:
    """A Parquet file of pictures.

    column   path of the bytes' column, for example `image.bytes`
    facts    columns that say something of a picture
    classes  names of class numbers by column, from Hugging Face's features
    starts   first row of every row group, and the number of rows
    unused   names of all other columns
    own_path path of the column of names that Hugging Face keeps beside the bytes, None for none
    """

    path: Path
    footer: Any
    column: str
    facts: tuple[str, ...]
    classes: dict[str, list[str]]
    starts: tuple[int, ...]
    unused: tuple[str, ...] = ()
    own_path: str | None = None

    def group_of(self, row: int) -> int:
        return bisect.bisect_right(self.starts, row) - 1

    def rows(self) -> Iterator[dict[str, Any]]:
        """What is said of every picture; the pictures' bytes are not read."""
        with reading(self.path), self.open() as file:
            columns = [*self.facts, *([self.own_path] if self.own_path else ())]
            if not columns:
                yield from ({} for _ in range(self.starts[-1]))
                return
            for batch in file.iter_batches(batch_size=4096, columns=columns):
                yield from (self.named(row) for row in batch.to_pylist())

    def named(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with its class numbers as names; -1 stands for none, others that name none stay."""
        for column, names in self.classes.items():
            number = row.get(column)
            if isinstance(number, int) and -1 <= number < len(names):
                row[column] = names[number] if number >= 0 else None
        if self.own_path:
            picture = row.pop(self.own_path.partition(".")[0])
            row.setdefault("path", (picture or {}).get("path"))
        return row

    def read_group(self, number: int) -> Any:
        """A row group as an Arrow table, for `picture_in`.

        InputError (without the name) where it is damaged, or more than the footer announced.
        """
        import pyarrow as pa

        parts, held = [], 0
        columns = [self.column, *(name for name in RAW if name in self.facts)]
        with reading(None), self.open() as file:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[number], columns=columns):
                held += batch.nbytes
                if held > MAX_GROUP_BYTES:
                    raise UnusableError(f"its row group {number} has more bytes than it announces")
                parts.append(batch)
            rows = pa.Table.from_batches(parts)
        return rows

    def picture_in(self, group: Any, row: int) -> bytes:
        """The file of a picture in its row group; InputError (without the name) for none."""
        (found,) = group.slice(row, 1).to_pylist()
        picture = found[self.column.partition(".")[0]]
        if isinstance(picture, dict):
            picture = picture["bytes"]
        if picture is None:
            raise UnusableError(
                "has no bytes in its row; embed the pictures in the Parquet", "missing"
            )
        is_raw = found.get("image_dtype") == "raw"
        return as_ppm(picture, found.get("tile_size")) if is_raw else picture

    def open(self) -> Any:
        import pyarrow.parquet as pq

        return pq.ParquetFile(self.path, metadata=self.footer, pre_buffer=False)


@contextlib.contextmanager
def reading(path: Path | None) -> Iterator[None]:
    """Turn what pyarrow raises into an InputError, with the file's name where it is given."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        where = f"{path}: " if path else ""
        raise UnusableError(
            f"{where}damaged Parquet ({reason_of(error)}); fetch it anew"
        ) from error


def has_pictures(path: Path) -> bool:
    """Whether a Parquet file has a column of pictures; a damaged one has none."""
    try:
        _, schema = read_footer(path)
    except InputError:
        return False
    return picture_column(schema, path) is not None


def read_footer(path: Path) -> tuple[Any, Any]:
    import pyarrow.parquet as pq

    check_regular(path, str(path))
    with reading(path), pq.ParquetFile(path) as file:
        return file.metadata, file.schema_arrow


def open_table(path: Path) -> EncodedTable:
    """A Parquet file's table of pictures.

    InputError where it has none, is damaged, or announces what no table of pictures has.
    """
    footer, schema = read_footer(path)
    column = picture_column(schema, path)
    if column is None:
        raise InputError(
            f"{path}: no column of pictures (image_bytes, or a struct with bytes) among "
            f"{', '.join(schema.names[:20])}; remove the file, or add one"
        )
    check_footer(path, footer, column)
    counts = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    struct = column.partition(".")[0]
    kind = schema.field(struct).type
    has_path = column != struct and any(field.name == "path" for field in kind)
    return EncodedTable(
        own_path=f"{struct}.path" if has_path else None,
        path=path,
        footer=footer,
        column=column,
        facts=tuple(name for name in schema.names if name in {*COLUMNS, *RAW, *PATHS}),
        classes=class_names(schema.metadata or {}),
        starts=tuple(itertools.accumulate(counts, initial=0)),
        unused=tuple(name for name in schema.names if name not in {*COLUMNS, *RAW, *PATHS, struct}),
    )


def picture_column(schema: Any, path: Path) -> str | None:
    """Path of the column of encoded pictures; InputError where several could be meant."""
    import pyarrow as pa

    found = {}
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and any(is_bytes(f.type) and f.name == "bytes" for f in kind):
            found[field.name] = f"{field.name}.bytes"
        elif field.name in PICTURE_COLUMNS and is_bytes(kind):
            found[field.name] = field.name
    named = [found[name] for name in PICTURE_COLUMNS if name in found]
    if not named and len(found) > 1:
        raise InputError(
            f"{path}: pictures in {', '.join(found)}; rename the column that is meant to 'image'"
        )
    return next(iter([*named, *found.values()]), None)


def is_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(
        types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    )


def check_footer(path: Path, footer: Any, column: str) -> None:
    """Refuse sizes that would not fit in memory, before a byte of them is read."""
    schema, size = footer.schema, path.stat().st_size
    index = next(i for i in range(len(schema)) if schema.column(i).path == column)
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        chunk = group.column(index)
        if chunk.total_uncompressed_size > MAX_GROUP_BYTES:
            raise InputError(
                f"{path}: row group {number} announces {chunk.total_uncompressed_size:,} bytes of "
                f"pictures, more than {MAX_GROUP_BYTES:,}; write it anew with smaller ones "
                "(pyarrow.parquet.write_table(..., row_group_size=1000))"
            )
        # A picture takes a byte at least: more rows than bytes are a lie that would fill memory.
        size -= max(chunk.total_compressed_size, 0)
        if size < 0 or group.num_rows > chunk.total_compressed_size:
            raise InputError(
                f"{path}: row group {number} announces {group.num_rows:,} pictures in "
                f"{chunk.total_compressed_size:,} bytes; refused"
            )


def class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Names of Hugging Face's ClassLabel columns; empty where the file has none."""
    try:
        features = parse_json(metadata[b"huggingface"], "huggingface")["info"]["features"]
        return {
            name: [str(label) for label in feature["names"]]
            for name, feature in features.items()
            if feature.get("_type") == "ClassLabel"
        }
    except (FormatError, KeyError, ValueError, TypeError, AttributeError):
        return {}


def as_ppm(pixels: bytes, edge: Any) -> bytes:
    """Bare pixels (edge, edge, 3) as a file that Pillow opens; InputError (without the name)."""
    if not isinstance(edge, int) or len(pixels) != edge * edge * 3:
        raise UnusableError(f"{len(pixels)} raw bytes are not RGB pixels of tile_size {edge}")
    return b"P6 %d %d 255\n" % (edge, edge) + pixels
