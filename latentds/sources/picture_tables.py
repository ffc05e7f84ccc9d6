"""Pictures listed in a table: CSV, TSV or Parquet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from latentds.errors import InputError
from latentds.sources.csv_tables import SUFFIXES, TextTable, read_table
from latentds.sources.cut_options import SourceOptions
from latentds.sources.field_names import columns_of, note_unused
from latentds.sources.image_folder import (
    DEFAULT_SPLIT,
    NO_LABELS,
    facts_of,
    half_labelled,
    note_splits,
)
from latentds.sources.kinds import SUFFIXES as SLIDE_SUFFIXES
from latentds.sources.picture import Listing, Picture
from latentds.sources.picture_files import PictureFiles
from latentds.sources.side_records import slide_name
from latentds.sources.slide_names import path_ends
from latentds.sources.source import Inspection, Source

FIELDS = ("path", "label", "slide", "patient", "x", "y", "mpp", "size_px", "split", "mask")
DRIVE = re.compile(r"[A-Za-z]:/|//")  # how Windows begins a whole path, slashes turned


def is_table(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in SUFFIXES


class PictureTable(PictureFiles):
    """A table with a column `path`; also label, slide, patient, x, y, mpp, size_px, split, mask.

    Paths start from --root, by default the table's folder, and may not lead out of it.
    """

    kind = "a table of pictures"
    suffixes = frozenset(SUFFIXES)

    def __init__(self, options: SourceOptions) -> None:
        super().__init__(options)
        self.root = options.root or options.source.parent

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        return cls(found.options) if is_table(found.root) else None

    def listing(self) -> Listing:
        return list_table(self.options)


def list_table(options: SourceOptions) -> Listing:
    """The pictures that an input's rows name, and the columns that nobody reads."""
    table = read_table(options.source)
    if not table.rows:
        raise InputError(f"{table.path}: no rows")
    columns = path_columns(table)
    root = options.root or options.source.parent
    rows = [{field: row[c].strip() for field, c in columns.items()} for row in table.rows]
    pictures = tuple(
        row_picture(f"{table.path}, row {number}", root, row, options.labels)
        for number, row in enumerate(rows, 1)
    )
    check_filled(table, pictures, options.labels)
    words = [row["split"] for row in rows] if "split" in columns else []
    notes = note_unused(table, columns.values()) + note_splits(table.path.name, words)
    return Listing(pictures, notes=notes)


def check_filled(table: TextTable, pictures: Sequence[Picture], use_labels: bool) -> None:
    """Refuse a table where some rows of a split, a picture each, have a label and others none."""
    bare = half_labelled(pictures) if use_labels else []
    if bare:
        pairs = zip(table.lines, pictures, strict=True)
        first = next(line for line, p in pairs if p.source == bare[0] and p.label is None)
        raise InputError(
            f"{table.path}: {len(bare)} of its {len(pictures)} rows have no label, though others "
            f"of their split have (first: line {first}, {bare[0]}); fill it in, take those rows "
            f"out, or pass {NO_LABELS}"
        )


def path_columns(table: TextTable) -> dict[str, str]:
    """Columns by field; of a list of slides, as TRIDENT's, the slide is the path."""
    columns = columns_of(table, FIELDS)
    if "path" not in columns and "slide" in columns:
        columns["path"] = columns.pop("slide")
    return columns


def row_picture(where: str, root: Path, row: dict[str, str], use_labels: bool) -> Picture:
    if not row.get("path"):
        raise InputError(f"{where}: no path")
    own = {"split": DEFAULT_SPLIT} | facts_of(row, where, use_labels)
    if PurePosixPath(own.get("slide", "")).suffix.lower() in SLIDE_SUFFIXES:
        own["slide"] = slide_name(own["slide"], is_path=True)
    if "mask" in own:
        own["mask"] = inside(own["mask"], root, where)
    return Picture(inside(own.pop("path"), root, where), **own)


def inside(path: str, root: Path, where: str) -> str:
    """A path below the root as posix; InputError where it leads out.

    Of a whole path of another machine, the longest end that is a file below the root.
    """
    text = path if (root / path).is_file() else path.replace("\\", "/")
    full = Path(text)
    if full.is_absolute() and full.is_relative_to(root.resolve()):
        full = full.relative_to(root.resolve())
    is_whole = full.is_absolute() or DRIVE.match(text) is not None
    if is_whole and ".." not in full.parts:
        ends = path_ends(text.lstrip("/"))[1:]
        full = next((Path(end) for end in ends if (root / end).is_file()), full)
        is_whole = full.is_absolute() or DRIVE.match(full.as_posix()) is not None
    if is_whole or ".." in full.parts:
        raise InputError(
            f"{where}: {path} lies outside {root}; pass --root with a folder that holds all "
            "pictures"
        )
    return full.as_posix()
