"""CSV, TSV and Parquet files as rows of text, lists as lines, all checked; CSV written at once."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from latentds.core.display import csv_cell, csv_text
from latentds.core.storage import check_regular, write_atomically
from latentds.errors import InputError, first_words

SEPARATORS = ",;\t|"
SUFFIXES = {".csv", ".tsv", ".parquet"}
MAX_BYTES = 1 << 32  # of a table; 24 million patches have 2 GB
MAX_CELLS = 1 << 28  # some bytes of Parquet can announce any number of rows
UNNAMED = re.compile(r"(unnamed: ?\d+)?", re.IGNORECASE)  # pandas' index, written and read again
WHOLE_FLOAT = re.compile(r"-?\d+\.0+")  # what pandas makes of whole numbers beside a missing one
DECIMAL_COMMA = re.compile(r"-?\d+(,\d+)?")


@dataclasses.dataclass(frozen=True)
class TextTable:
    """A file's columns and rows; `lines` are the rows' line numbers.

    Columns are called as in the file, without spaces around; `find_column` takes them by any case,
    and spaces and hyphens for underscores. Columns without a name, pandas' index, are left out.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[dict[str, str]]
    lines: list[int]

    def find_column(self, names: Sequence[str]) -> str | None:
        """The first of the names that is a column, None where none is."""
        known = {folded(column): column for column in reversed(self.columns)}
        return next((known[folded(name)] for name in names if folded(name) in known), None)

    def need_column(self, names: Sequence[str], what: str) -> str:
        """The first of the names that is a column; InputError where none is."""
        found = self.find_column(names)
        if found is None:
            raise InputError(
                f"{self.path}: no column for {what} ({', '.join(names)}); it has "
                f"{', '.join(self.columns)[:200] or 'none'}; rename one of those"
            )
        return found

    def values(self, column: str) -> list[str]:
        return [row[column].strip() for row in self.rows]


def folded(name: str) -> str:
    """A column's name for comparing: `Slide ID` is `slide_id`."""
    return re.sub(r"[\s-]+", "_", name.strip()).casefold()


def read_table(path: Path) -> TextTable:
    """The one reader of other people's tables: CSV by any usual separator, TSV, Parquet.

    The separator is the one that the first line has most of. UTF-8 with or without a mark, or what
    Excel calls Unicode text (UTF-16 with one). Columns of whole floats (12.0) become whole numbers;
    in files with semicolons, columns of decimal commas get points.

    raises  InputError where it is not there or cannot be read as such, names a column twice, or a
            line has more or fewer values than columns
    """
    try:
        check_regular(path, str(path))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; name a CSV that is there") from error
    lines = parquet_lines(path) if path.suffix.lower() == ".parquet" else text_lines(path)
    if not lines:
        raise InputError(f"{path}: is empty; its first line has to name the columns")
    header = [csv_text(name.strip()) for name in lines[0][1]]
    kept = [place for place, name in enumerate(header) if not UNNAMED.fullmatch(name)]
    columns = tuple(header[place] for place in kept)
    if len(set(map(folded, columns))) < len(columns):
        raise InputError(f"{path}: a column is there twice: {', '.join(columns)}")
    for number, row in lines[1:]:
        if len(row) != len(header):
            raise InputError(
                f"{path}, line {number}: {len(row)} values for {len(header)} columns; mend it"
            )
    rows = [{header[place]: csv_text(row[place]) for place in kept} for _, row in lines[1:]]
    for column in columns:
        rewrite(rows, column)
    return TextTable(path, columns, rows, [number for number, _ in lines[1:]])


def rewrite(rows: list[dict[str, str]], column: str) -> None:
    """Take the point from a column of whole floats alone."""
    values = [row[column] for row in rows if row[column].strip()]
    if values and all(WHOLE_FLOAT.fullmatch(value.strip()) for value in values):
        for row in rows:
            row[column] = row[column].partition(".")[0]


def read_lines(path: Path) -> list[str]:
    """The lines of other people's list, spaces around them and empty ones left out.

    raises  InputError where it is no text
    """
    check_regular(path, str(path))
    return [line.strip() for line in decoded(path).splitlines() if line.strip()]


def text_lines(path: Path) -> list[tuple[int, list[str]]]:
    """Line numbers and cells of a file of text, the header first; empty lines left out."""
    text = decoded(path)
    first = next(filter(str.strip, io.StringIO(text, newline="")), "")
    outside = re.sub(r'"[^"]*"', "", first)
    separator = max(SEPARATORS, key=outside.count)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise InputError(f"{path}: cannot be read as CSV ({error}); mend that line") from error
    if separator != ";":
        return lines
    width = len(lines[0][1]) if lines else 0
    for place in range(width):  # where semicolons part values, commas may be decimal points
        cells = [row[place].strip() for _, row in lines[1:] if len(row) == width]
        found = [cell for cell in cells if cell]
        if any("," in cell for cell in found) and all(map(DECIMAL_COMMA.fullmatch, found)):
            for _, row in lines[1:]:
                row[place : place + 1] = [cell.replace(",", ".") for cell in row[place : place + 1]]
    return lines


def decoded(path: Path) -> str:
    """A file's text; InputError that names where its encoding is none of those known here."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise InputError(f"{path}: {size} bytes; more than a table has")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is no "
            f"{'UTF-16' if is_utf16 else 'UTF-8'}, perhaps Windows-1252 or Latin-1; save it as "
            "UTF-8 (iconv -f windows-1252 -t utf-8)"
        ) from error


def parquet_lines(path: Path) -> list[tuple[int, list[str]]]:
    """Row numbers and cells of a Parquet file's columns of texts and numbers, the header first."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def is_plain(kind: Any) -> bool:
        nested, held = pa.types.is_nested(kind), pa.types.is_binary(kind)
        return not (nested or held or pa.types.is_large_binary(kind))

    try:
        with pq.ParquetFile(path) as file:
            columns = [field.name for field in file.schema_arrow if is_plain(field.type)]
            check_announced(path, file.metadata, len(columns))
            table = file.read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a table of Parquet ({first_words(error)})") from error
    cells = [[plain(value) for value in table[name].to_pylist()] for name in columns]
    return [(0, columns), *((n, list(row)) for n, row in enumerate(zip(*cells, strict=True), 1))]


def check_announced(path: Path, footer: Any, columns: int) -> None:
    """InputError where a Parquet file unpacks to more than a table has."""
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    size = sum(group.total_byte_size for group in groups)  # unpacked
    if footer.num_rows * columns > MAX_CELLS or size > MAX_BYTES:
        raise InputError(
            f"{path}: {footer.num_rows:,} rows of {columns} columns, {size:,} bytes unpacked; a "
            f"table has at most {MAX_CELLS:,} values and {MAX_BYTES:,} bytes. Keep the rows and "
            "columns that are needed"
        )


def plain(value: Any) -> str:
    """A cell as text; nothing for none and for NaN."""
    return "" if value is None or value != value else str(value)


def write_table(
    path: Path,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    line_end: str = "\n",
) -> None:
    """Write it atomically; floats in full precision, text as `display.csv_cell` has it."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=line_end)
    writer.writerow(map(csv_cell, columns))
    writer.writerows(map(csv_cell, row) for row in rows)
    write_atomically(path, text.getvalue().encode())
