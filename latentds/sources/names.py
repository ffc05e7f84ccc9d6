"""What names, columns and records are called and say: fields of pictures, splits, patients.

Of a record, JSON or a table's row, only the fields listed here are taken, whatever else it holds:
notes may name people.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from latentds.core.randomness import key_of
from latentds.errors import InputError, UnknownNameError
from latentds.sources.csv_tables import TextTable, folded
from latentds.sources.data_cards import card_files
from latentds.sources.image_folder import DEFAULT_SPLIT, SPLITS, check_words, known_patient
from latentds.sources.kinds import MAYBE, SUFFIXES

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
NAMES = {
    field: ALIASES[field] for field in ("label", "slide", "patient", "x", "y", "mpp", "size_px")
}
SCALE = ("tile_size", "level_downsample")  # OpenMidnight's: their product is size_px
COLUMNS = tuple(name for names in NAMES.values() for name in names) + SCALE
MAX_NAME = 200  # characters of a label or slide; more is a text
WORD = re.compile(r"[a-z]+")


def patient_of(slide: str) -> str:
    """Patient of a slide where its name has one of the known schemes, else the slide itself."""
    found = known_patient(slide)
    return found[1] if found else slide


def name_fields(pattern: str, use_labels: bool = True) -> Callable[[str], dict[str, Any]]:
    """A function from a source path to the fields a `--name-pattern` finds in it.

    Groups may be called label, slide, x, y and mpp; a path that does not match is an InputError.
    """
    known = {"label", "slide", "x", "y", "mpp"}
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"--name-pattern {pattern!r} is not a regular expression ({error})"
        ) from error
    if not compiled.groupindex or set(compiled.groupindex) - known:
        raise InputError(f"--name-pattern {pattern!r} needs named groups among {sorted(known)}")

    def fields(source: str) -> dict[str, Any]:
        match = compiled.search(source)
        if match is None:
            raise InputError(f"{source}: does not match --name-pattern {pattern!r}")
        found = {name: value for name, value in match.groupdict().items() if value is not None}
        if not use_labels:
            found.pop("label", None)
        return found | numbers_of(source, found)

    return fields


def numbers_of(source: str, fields: dict[str, str]) -> dict[str, float]:
    """Places and resolutions; InputError for one that no table can hold."""
    numbers: dict[str, float] = {}
    for name in fields.keys() & {"x", "y", "mpp", "size_px"}:
        try:
            number = float(fields[name])
            number = number if name == "mpp" or number % 1 else int(number)
        except (ValueError, OverflowError) as error:
            raise InputError(f"{source}: {name} is {fields[name]!r}, not a number") from error
        low, high = (0.01, 100) if name == "mpp" else (int(name == "size_px"), 2**31 - 1)
        if not low <= number <= high:
            raise InputError(f"{source}: {name} is {number}, not between {low} and {high}")
        if name != "mpp" and number % 1:
            raise InputError(f"{source}: {name} is {fields[name]!r}, not a whole number")
        numbers[name] = number
    return numbers


def pattern_patient(pattern: str, name: str) -> str:
    """What --patient-pattern finds: its group `patient`, else its first group, else all of it.

    raises  InputError where it finds nothing
    """
    found = re.search(pattern, name)
    group = "patient" if found and "patient" in found.groupdict() else 1
    patient = found and (found[group] if found.re.groups else found[0])
    if not patient:
        raise InputError(f"--patient-pattern {pattern!r} finds no patient in {name!r}; mend it")
    return str(patient)


def parse_shares(text: str) -> dict[str, float]:
    """Splits and shares of `train=0.8,val=0.1,test=0.1`; InputError unless they add up to 1."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        shares = {name.strip(): float(share) for name, share in pairs}
    except ValueError as error:
        raise InputError(f"split shares {text!r} are not like train=0.8,val=0.2") from error
    if min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise InputError(f"split shares {text!r}: positive, and 1 together")
    return shares


def split_patients(
    names: Iterable[str],
    shares: dict[str, float],
    seed: int,
    hide: Callable[[str], str] = str,
) -> dict[str, str]:
    """Split of every patient: no patient in two.

    Patients are ordered by a hash of (seed, name) and cut: the same splits on every machine.
    hide  what stands for a name in that hash, so that a split tells nobody which patients it has
    """
    patients = sorted(set(names), key=lambda name: key_of("split", seed, hide(name)))
    ends = np.rint(np.cumsum(list(shares.values())) * len(patients)).astype(int).tolist()
    return {
        patient: name
        for name, start, end in zip(shares, [0, *ends], ends, strict=False)
        for patient in patients[start:end]
    }


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


def facts_of(row: Mapping[str, str], where: str, use_labels: bool = True) -> dict[str, Any]:
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


def fields_of(record: Mapping[str, Any], use_labels: bool) -> dict[str, Any]:
    """A Picture's fields among a record's; InputError (without the name) for one it cannot hold."""
    found = {field: first_of(record, names) for field, names in NAMES.items()}
    if not use_labels:
        del found["label"]
    if isinstance(found["mpp"], (int, float)) and not found["mpp"] > 0:  # wsistream writes -1
        del found["mpp"]
    scale: list[Any] = [record.get(name) for name in SCALE]
    if found["size_px"] is None and None not in scale:
        try:
            found["size_px"] = round(float(scale[0]) * float(scale[1]))
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"its {' and '.join(SCALE)} are no numbers") from error
    texts = {name: as_text(name, value) for name, value in found.items() if value is not None}
    if "slide" in texts:
        is_path = found["slide"] == record.get("slide_path")
        texts["slide"] = slide_name(texts["slide"], is_path)
    return texts | numbers_of("its record", texts)


def first_of(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    values = (record.get(name) for name in names)
    return next((value for value in values if value is not None and value != ""), None)


def as_text(name: str, value: Any) -> str:
    """A value as text, whole numbers without a point."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise InputError(f"its {name} is a {type(value).__name__}, not a name or a number")
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if not text or len(text) > MAX_NAME:
        raise InputError(f"its {name} has {len(text)} characters; 1 to {MAX_NAME} are a name")
    return text


def slide_name(text: str, is_path: bool) -> str:
    """A slide's file without folders and suffix: where it lay is nobody's business."""
    name = PurePosixPath(text.replace("\\", "/"))
    is_file = is_path or name.suffix.lower() in SUFFIXES | MAYBE
    return name.stem if is_file else name.name


class ArchiveSplits(NamedTuple):
    """Split by archive, those that a card leaves out not among them, and what that assumes.

    are_told  whether a card or names tell them
    """

    splits: dict[str, str]
    are_told: bool
    notes: tuple[str, ...] = ()


def splits_of(root: Path, archives: Sequence[str], use_splits: bool) -> ArchiveSplits:
    """Split of every archive: a card's, else train-*.tar, or in a folder train/; of all or none.

    raises  InputError where some names have the word of a split and others none, or names with
            different words would make one split
    """
    if not use_splits:
        return ArchiveSplits(dict.fromkeys(archives, DEFAULT_SPLIT), are_told=False)
    card = card_files(root, archives)
    if card is not None:
        named = {path: SPLITS.get(split.lower(), split) for path, split in card.splits.items()}
        return ArchiveSplits(named, True, card.notes)
    words = {path: split_word(path) for path in archives}
    bare = [path for path, word in words.items() if word is None]
    if bare and len(bare) < len(words):
        example = next(path for path, word in words.items() if word)
        raise InputError(
            f"{root}: {example} is named like a split, {bare[0]} is not; rename it, or pass "
            "--no-split-folders"
        )
    check_words(root, {path: word for path, word in words.items() if word})
    return ArchiveSplits({path: SPLITS[word] if word else DEFAULT_SPLIT
                          for path, word in words.items()}, not bare)  # fmt: skip


def split_word(path: str) -> str | None:
    """The word of a split in a file's name, else the folder above it that is called like one.

    raises  InputError for a name with the words of two splits
    """
    *folders, name = PurePosixPath(path).parts
    words = [word for word in WORD.findall(name.lower()) if word in SPLITS]
    if len({SPLITS[word] for word in words}) > 1:
        raise InputError(
            f"{path}: its name has the words of several splits ({', '.join(words)}); rename it, or "
            "pass --no-split-folders"
        )
    return next(iter([*words, *(f.lower() for f in folders if f.lower() in SPLITS)]), None)
