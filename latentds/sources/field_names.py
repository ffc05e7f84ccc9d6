"""What columns and keys are called by whom, for all tables and records alike."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from latentds.errors import InputError, UnknownNameError
from latentds.sources.csv_tables import TextTable, folded

# A picture's field, and what it is called: here, by TRIDENT, hs2p, CLAM, wsistream, OpenMidnight,
# Hugging Face's imagefolder, GDC, others. The first that is there counts.
ALIASES: dict[str, tuple[str, ...]] = {
    "path": (
        *("path", "file_name", "filename", "file", "file_path", "filepath", "image_path"),
        *("img_path", "patch_path", "tile_path", "image", "img", "image_name", "name"),
    ),
    "label": (
        *("label", "labels", "class_name", "class", "cls", "oncotree_code", "category"),
        "biological_class",  # PathoROB's
    ),
    "slide": (
        *("slide", "slide_id", "slide_name", "slide_path", "wsi", "wsi_id", "wsi_name"),
        *("wsi_path", "bag", "bag_name"),
    ),
    "patient": (
        *("patient", "patient_id", "case_id", "case", "tma_core", "case_submitter_id"),
        *("subject", "subject_id"),
    ),
    "x": ("x", "x_px_level0", "coord_x"),
    "y": ("y", "y_px_level0", "coord_y"),
    "mpp": ("mpp",),
    "size_px": ("size_px", "size_px_level0", "patch_size_level0", "tile_size_lv0"),
    "split": ("split", "partition", "subset"),
    "mask": ("mask", "mask_path"),
}
ONE_OF = ("slide", "patient", "x", "y", "mpp", "size_px", "split", "mask")
MOST = 40  # unused columns that a note names
CLOSE = 0.8  # of difflib: `lable` is meant for `label`


def columns_of(table: TextTable, fields: Sequence[str]) -> dict[str, str]:
    """The column of a table for every field that it has, among `fields`.

    raises  InputError where two columns could be one and differ; UnknownNameError for a column
            that looks like a misspelt one
    """
    known = {folded(column): column for column in table.columns}
    found: dict[str, str] = {}
    for field in fields:
        columns = [known[name] for name in ALIASES[field] if name in known]
        if columns:
            found[field] = columns[0]
        others = columns[1:] if field in ONE_OF else []
        if any(row[column] != row[columns[0]] for column in others for row in table.rows):
            raise InputError(
                f"{table.path}: {', '.join(table.columns)}: two columns are one "
                f"({', '.join(columns)}) and differ; drop one"
            )
    refuse_misspelt(table, found, fields)
    return found


def refuse_misspelt(table: TextTable, found: Mapping[str, str], fields: Sequence[str]) -> None:
    """Refuse a column whose name is nearly that of a field which has none."""
    missing = [field for field in fields if field not in found and len(field) > 1]
    for column in unused(table, found.values()):
        close = difflib.get_close_matches(folded(column), missing, n=1, cutoff=CLOSE)
        if close:
            raise UnknownNameError(
                f"unknown column of {table.path} {column!r}; did you mean {close[0]!r}? Rename it, "
                "or take it out"
            )


def unused(table: TextTable, used: Iterable[str]) -> list[str]:
    taken = set(used)
    return [column for column in table.columns if column not in taken]


def note_unused(table: TextTable, used: Iterable[str]) -> tuple[str, ...]:
    """That columns are not used, for people; nothing where all are."""
    left = unused(table, used)
    return (f"{table.path.name}: columns not used: {', '.join(left)}",) if left else ()


def note_columns(names: Iterable[str]) -> tuple[str, ...]:
    """That columns or keys of records are not used, for people; nothing where all are."""
    left = sorted(set(names))
    more = f" and {len(left) - MOST} more" if len(left) > MOST else ""
    return (f"columns not used: {', '.join(left[:MOST])}{more}",) if left else ()
