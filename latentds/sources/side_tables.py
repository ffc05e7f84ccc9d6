"""Tables that lie beside pictures: metadata of known names is read, of others it is told."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from latentds.core.display import number_of
from latentds.core.storage import parse_json, read_json
from latentds.errors import FormatError, InputError
from latentds.sources.csv_tables import TextTable, decoded, read_table, text_lines
from latentds.sources.names import ALIASES, columns_of, facts_of, note_splits, note_unused
from latentds.sources.picture import Listing, Picture
from latentds.sources.slide_names import plain_name

READ = {  # Hugging Face's imagefolder, and SPIDER's
    *("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet", "metadata.json"),
}
PAIRS = {"reference.csv", "stages.csv"}  # CAMELYON16's and CAMELYON17's: a slide's file, its class
SUFFIXES = {".csv", ".tsv", ".jsonl", ".parquet", ".xlsx", ".xls"}
MAX_JSON_BYTES = 1 << 28
SHOWN = 3  # tables that a note names
FIELDS = ("path", "label", "slide", "patient", "x", "y", "mpp", "size_px", "split")
Facts = dict[str, dict[str, Any]]  # fields of a Picture by its source


def with_tables(root: Path, found: Listing, others: Sequence[str], use_labels: bool) -> Listing:
    """Pictures with what metadata files beside them say, and a note on tables that are not read."""
    facts: Facts = {}
    notes, unread, closed = list(found.notes), list[str](), set[str]()
    known = {picture.source for picture in found.pictures}
    for path in others:
        table = PurePosixPath(path)
        if table.suffix.lower() not in SUFFIXES and table.name not in READ:
            continue
        own: Facts = {}
        told: tuple[str, ...] = ()
        if table.name in PAIRS and use_labels:
            own = pair_labels(root, path, found.pictures)
        elif table.name in READ:
            own, told = metadata_of(root, path, use_labels)
        if not known & own.keys():
            unread.append(path)
            continue
        if any("split" in fields for fields in own.values()):
            closed.add(f"{table.parent}/".removeprefix("./"))
        for source, fields in own.items():
            if facts.setdefault(source, fields) != fields:
                raise InputError(
                    f"{root / path}: tells of {source} otherwise than another metadata file; keep "
                    "one of them"
                )
        notes += told
        if strangers := len(own.keys() - known):
            notes.append(f"{path}: {strangers:,} of its rows name no picture that is there")
    kept = [p for p in found.pictures
            if p.source in facts or not p.source.startswith(tuple(closed))]  # fmt: skip
    if left := len(found.pictures) - len(kept):
        notes.append(
            f"{number_of(left, 'picture')} left out, which no table with splits beside them names"
        )
    pictures = tuple(dataclasses.replace(p, **facts.get(p.source, {})) for p in kept)
    if unread:
        bare = "" if any(p.label is not None for p in pictures) else "no labels; "
        what = "--slide-table reads one, or convert it itself"
        shown = ", ".join(f"{path!r}{counted_rows(root / path)}" for path in unread[:SHOWN])
        more = f" and {len(unread) - SHOWN:,} more" if len(unread) > SHOWN else ""
        notes.append(f"{bare}not read: {shown}{more}; {what}")
    ignored = found.ignored + left
    return dataclasses.replace(found, pictures=pictures, ignored=ignored, notes=tuple(notes))


def pair_labels(root: Path, path: str, pictures: Sequence[Picture]) -> Facts:
    """Labels of the slides that the first column names, below the table's folder; header or not.

    A class that folders have is called as there, in whatever case. Rows of no slide are patients'.
    """
    folder = PurePosixPath(path).parent
    inside = [p for p in pictures if PurePosixPath(p.source).is_relative_to(folder)]
    known = {plain_name(p.source).rpartition("/")[2]: p.source for p in inside}
    called = {p.label.casefold(): p.label for p in pictures if p.label is not None}
    found: Facts = {}
    for line, row in text_lines(root / path):
        source = known.get(plain_name(row[0]))
        if source is None or len(row) < 2 or not row[1].strip():
            continue
        label = called.get(row[1].strip().casefold(), row[1].strip())
        if found.setdefault(source, {"label": label}) != {"label": label}:
            raise InputError(f"{root / path}, line {line}: {row[0]} is there twice; keep one line")
    return found


def metadata_of(root: Path, path: str, use_labels: bool) -> tuple[Facts, tuple[str, ...]]:
    """Fields by picture of a metadata file, and notes; nothing where it names no files.

    raises  InputError where it cannot be read, names a file twice or has a value no table holds
    """
    full, folder = root / path, PurePosixPath(path).parent
    table = (json_table if full.suffix in (".json", ".jsonl") else read_table)(full)
    columns = columns_of(table, FIELDS)
    name = columns.pop("path", None)
    if name is None:
        return {}, ()
    facts: Facts = {}
    for line, row in zip(table.lines, table.rows, strict=True):
        where = f"{full}, line {line}"
        cells = {field: row[column].strip() for field, column in columns.items()}
        own = facts_of(cells, where, use_labels)
        source = placed(root, folder, row[name].strip().replace("\\", "/"))
        if facts.setdefault(source, own) != own:
            raise InputError(f"{where}: {source} is there twice, in different ways; keep one line")
    words = table.values(columns["split"]) if "split" in columns else []
    notes = note_unused(table, [name, *columns.values()])
    return facts, notes + note_splits(path, filter(None, words))


def placed(root: Path, folder: PurePosixPath, name: str) -> str:
    """A named picture's path: beside its table, or in the folder `images` there, as SPIDER's."""
    beside, below = folder / name, folder / "images" / name
    return (
        below if (root / below).is_file() and not (root / beside).is_file() else beside
    ).as_posix()


def json_table(path: Path) -> TextTable:
    """A .json file that is one list of objects, or one of an object a line.

    What is no text or number in an object is empty.
    """
    try:
        if path.suffix == ".json":
            found = read_json(path, MAX_JSON_BYTES, "mend it")
            records = dict(enumerate(found if isinstance(found, list) else [], 1))
        else:
            records = {
                line: parse_json(text.encode(errors="replace"), f"{path}, line {line}", "mend it")
                for line, text in enumerate(decoded(path).split("\n"), 1)
                if text.strip()
            }
    except FormatError as error:
        raise InputError(str(error)) from error
    for line, record in records.items():
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {line}: no object of fields; mend it")
    columns = tuple(dict.fromkeys(name for record in records.values() for name in record))
    rows = [{name: plain(record.get(name)) for name in columns} for record in records.values()]
    return TextTable(path, columns, rows, list(records))


def plain(value: Any) -> str:
    """A value as a cell, empty for what is no text or number."""
    return str(value) if isinstance(value, (str, int, float)) else ""


def counted_rows(path: Path) -> str:
    """A table's rows in brackets; nothing where they cannot be counted."""
    suffix = path.suffix.lower()
    with contextlib.suppress(OSError, ValueError):
        if suffix == ".parquet":
            import pyarrow.parquet as pq

            return f" ({number_of(pq.read_metadata(path).num_rows, 'row')})"
        if suffix in (".csv", ".tsv", ".jsonl"):
            with path.open("rb") as file:
                count = sum(bool(line.strip()) for line in file)
            return f" ({number_of(max(count - (suffix != '.jsonl'), 0), 'row')})"
    return ""


def label_column(names: Sequence[str]) -> str | None:
    """The column of labels among names, None where there is none."""
    return next((name for name in ALIASES["label"] if name in names), None)
