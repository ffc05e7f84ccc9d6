"""CSV and TSV files as rows of text, read whole and checked, written at once."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from latentds.display import csv_cell, csv_text
from latentds.errors import InputError
from latentds.opening import check_regular
from latentds.storage import write_atomically


@dataclasses.dataclass(frozen=True)
class TextTable:
    """A file's columns and rows; `lines` are the rows' line numbers."""

    path: Path
    columns: tuple[str, ...]
    rows: list[dict[str, str]]
    lines: list[int]

    def find_column(self, names: Sequence[str]) -> str | None:
        """The first of the names that is a column, None where none is."""
        return next((name for name in names if name in self.columns), None)

    def need_column(self, names: Sequence[str], what: str) -> str:
        """The first of the names that is a column; InputError where none is."""
        found = self.find_column(names)
        if found is None:
            raise InputError(
                f"{self.path}: no column for {what} ({', '.join(names)}); it has "
                f"{', '.join(self.columns)[:200] or 'none'}"
            )
        return found

    def values(self, column: str) -> list[str]:
        """A column's values without spaces around them."""
        return [row[column].strip() for row in self.rows]


def read_table(path: Path) -> TextTable:
    """A CSV or, by its first line, TSV file.

    raises  InputError where it is not there or cannot be read as such, names a column twice, or a
            line has more or fewer values than columns
    """
    try:
        check_regular(path, str(path))
        text = path.read_text("utf-8-sig")
        first = text.partition("\n")[0]
        delimiter = "\t" if "\t" in first and "," not in first else ","
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; name a CSV that is there") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error}); save it as UTF-8") from error
    if not lines:
        raise InputError(f"{path}: is empty; its first line has to name the columns")
    columns = tuple(csv_text(name.strip()) for name in lines[0][1])
    if len(set(columns)) < len(columns):
        raise InputError(f"{path}: a column is there twice: {', '.join(columns)}")
    for number, row in lines[1:]:
        if len(row) != len(columns):
            raise InputError(
                f"{path}, line {number}: {len(row)} values for {len(columns)} columns; mend it"
            )
    rows = [dict(zip(columns, map(csv_text, row), strict=True)) for _, row in lines[1:]]
    return TextTable(path, columns, rows, [number for number, _ in lines[1:]])


def write_table(
    path: Path,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    delimiter: str = ",",
) -> None:
    """Write it atomically; floats in full precision, text as `display.csv_cell` has it."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(map(csv_cell, columns))
    writer.writerows(map(csv_cell, row) for row in rows)
    write_atomically(path, text.getvalue().encode())
