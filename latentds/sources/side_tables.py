"""Tables that lie beside pictures: Hugging Face's metadata is read, of others it is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from latentds.core.foreign_json import parse_json
from latentds.errors import FormatError, InputError
from latentds.sources.csv_tables import TextTable, decoded, read_table
from latentds.sources.field_names import ALIASES, columns_of, note_unused
from latentds.sources.image_folder import SPLITS, numbers_of
from latentds.sources.picture import Listing, Picture

READ = {"metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet"}
SUFFIXES = {".csv", ".tsv", ".jsonl", ".parquet", ".xlsx", ".xls"}
FIELDS = ("path", "label", "slide", "patient", "x", "y", "mpp", "size_px", "split")
SHOWN = 3  # tables that a note names


def with_tables(root: Path, found: Listing, others: Sequence[str], use_labels: bool) -> Listing:
    """Pictures with what metadata files beside them say, and a note on tables that are not read."""
    tables = [path for path in others if PurePosixPath(path).suffix.lower() in SUFFIXES]
    facts: dict[str, dict[str, Any]] = {}
    notes, unread = list(found.notes), []
    known = {picture.source for picture in found.pictures}
    for path in tables:
        own = metadata_of(root, path, use_labels) if PurePosixPath(path).name in READ else None
        if own is None or not known & own[0].keys():
            unread.append(path)
            continue
        for source, fields in own[0].items():
            if facts.setdefault(source, fields) != fields:
                raise InputError(
                    f"{root / path}: tells of {source} otherwise than another metadata file; keep "
                    "one of them"
                )
        notes += own[1]
        if strangers := len(own[0].keys() - known):
            notes.append(f"{path}: {strangers:,} of its rows name no picture that is there")
    pictures = tuple(dataclasses.replace(p, **facts.get(p.source, {})) for p in found.pictures)
    return dataclasses.replace(
        found, pictures=pictures, notes=(*notes, *note_unread(root, unread, pictures))
    )


def metadata_of(
    root: Path, path: str, use_labels: bool
) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]] | None:
    """Fields by picture of a metadata file, and its unused columns; None where it names no files.

    raises  InputError where it cannot be read, names a file twice or has a value no table holds
    """
    full, folder = root / path, PurePosixPath(path).parent
    table = json_lines(full) if path.endswith(".jsonl") else read_table(full)
    columns = columns_of(table, FIELDS)
    name = columns.pop("path", None)
    if name is None:
        return None
    facts: dict[str, dict[str, Any]] = {}
    for line, row in zip(table.lines, table.rows, strict=True):
        where = f"{full}, line {line}"
        cells = {field: row[column].strip() for field, column in columns.items()}
        own: dict[str, Any] = {field: cell for field, cell in cells.items() if cell}
        own |= numbers_of(where, own)
        if not use_labels:
            own.pop("label", None)
        if "split" in own:
            own["split"] = SPLITS.get(own["split"].lower(), own["split"])
        source = (folder / row[name].strip().replace("\\", "/")).as_posix()
        if facts.setdefault(source, own) != own:
            raise InputError(f"{where}: {source} is there twice, in different ways; keep one line")
    return facts, note_unused(table, [name, *columns.values()])


def json_lines(path: Path) -> TextTable:
    """A file of an object a line; what is no text or number in it is left out."""
    rows, lines = [], []
    for number, text in enumerate(decoded(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            record = parse_json(text.encode(errors="replace"), f"{path}, line {number}", "mend it")
        except FormatError as error:
            raise InputError(str(error)) from error
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: no object of fields; mend it")
        rows.append({k: str(v) for k, v in record.items() if isinstance(v, (str, int, float))})
        lines.append(number)
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    return TextTable(path, columns, [{c: row.get(c, "") for c in columns} for row in rows], lines)


def note_unread(root: Path, paths: Sequence[str], pictures: Sequence[Picture]) -> tuple[str, ...]:
    """That tables were not read, with their rows; that labels may be in them where there are none.

    Of a table with columns that could be read, the option that reads it.
    """
    if not paths:
        return ()
    shown = ", ".join(f"{path}{counted_rows(root / path)}" for path in paths[:SHOWN])
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    bare = "" if any(picture.label is not None for picture in pictures) else "no labels; "
    return (f"{bare}not read: {shown}{more}; --slide-table reads one, or convert it itself",)


def counted_rows(path: Path) -> str:
    """A table's rows in brackets; nothing where they cannot be counted."""
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            return f" ({pq.read_metadata(path).num_rows:,} rows)"
        if path.suffix.lower() in (".csv", ".tsv", ".jsonl"):
            with path.open("rb") as file:
                count = sum(bool(line.strip()) for line in file)
            return f" ({max(count - (path.suffix.lower() != '.jsonl'), 0):,} rows)"
    except (OSError, ValueError):
        pass
    return ""


def label_column(names: Sequence[str]) -> str | None:
    """The column of labels among names, None where there is none."""
    return next((name for name in ALIASES["label"] if name in names), None)
