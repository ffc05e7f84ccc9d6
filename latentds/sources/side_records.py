"""What a record beside a picture, JSON or a table's row, says of it; and what archives' names say.

Only the fields listed here are taken, whatever else a record holds: notes may name people.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from latentds.errors import InputError
from latentds.sources.data_cards import card_files
from latentds.sources.field_names import ALIASES
from latentds.sources.image_folder import DEFAULT_SPLIT, SPLITS, check_words
from latentds.sources.kinds import MAYBE, SUFFIXES
from latentds.sources.names import numbers_of

NAMES = {
    field: ALIASES[field] for field in ("label", "slide", "patient", "x", "y", "mpp", "size_px")
}
SCALE = ("tile_size", "level_downsample")  # OpenMidnight's: their product is size_px
COLUMNS = tuple(name for names in NAMES.values() for name in names) + SCALE
MAX_NAME = 200  # characters of a label or slide; more is a text
WORD = re.compile(r"[a-z]+")


def fields_of(record: Mapping[str, Any], use_labels: bool) -> dict[str, Any]:
    """A Picture's fields among a record's; InputError (without the name) for one it cannot hold."""
    found = {field: first_of(record, names) for field, names in NAMES.items()}
    if not use_labels:
        del found["label"]
    if isinstance(found["mpp"], (int, float)) and not found["mpp"] > 0:  # wsistream writes -1
        del found["mpp"]
    scale = [record.get(name) for name in SCALE]
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
