"""What columns and keys are called by whom, and what their cells mean, in tables and records."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentds.errors import InputError, UnknownNameError
from latentds.sources.csv_tables import TextTable, folded
from latentds.sources.image_folder import DEFAULT_SPLIT, SPLITS
from latentds.sources.names import numbers_of

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
# SAM-Path's folds: -1 is the test set, 0 validation, the others training.
FOLDS = {"-1": "test", "0": "val"}
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


def facts_of(row: Mapping[str, str], where: str, use_labels: bool) -> dict[str, Any]:
    """A row's cells as fields of a Picture, empty ones left out; InputError for bad numbers."""
    found: dict[str, Any] = {name: value for name, value in row.items() if value}
    if not use_labels:
        found.pop("label", None)
    if "split" in found:
        found["split"] = SPLITS.get(found["split"].lower(), found["split"])
    return found | numbers_of(where, found)


def note_splits(table: str, words: Iterable[str]) -> tuple[str, ...]:
    """Words of a table that are taken for another split, and splits of unusual names, for people.

    No word is the default split.
    """
    meant = {word: SPLITS.get(word.lower(), word or DEFAULT_SPLIT) for word in words}
    others = [f"{word!r} for {split}" for word, split in sorted(meant.items()) if word != split]
    own = sorted({*meant.values()} - {*SPLITS.values()})
    told = {"split names taken for others": others, "splits beside train, val and test": own}
    return tuple(f"{table}: {what}: {', '.join(names)}" for what, names in told.items() if names)


def split_of_fold(fold: str, where: Path) -> str:
    """Split of a fold, a number (pandas writes -1.0 for -1) or a split's name."""
    if fold.lower() in SPLITS:
        return SPLITS[fold.lower()]
    try:
        number = float(fold)
    except ValueError as error:
        raise InputError(f"{where}: fold {fold!r} is no number") from error
    if number < -1 or number != int(number):
        raise InputError(f"{where}: fold {fold!r}; -1 is test, 0 val, others train")
    return FOLDS.get(str(int(number)), DEFAULT_SPLIT)
