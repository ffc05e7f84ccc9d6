"""A folder of pictures.

Class folders as labels, train/val/test folders as splits, a slide folder below.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from latentds.core.storage import check_regular
from latentds.errors import InputError, no_folder
from latentds.sources.data_cards import CARD, card_files
from latentds.sources.names import (
    HOLDERS,
    check_masks_apart,
    is_identifier,
    numbers_of,
    path_fields,
)
from latentds.sources.picture import Header, Listing, Picture
from latentds.sources.picture_decoding import picture_suffixes
from latentds.sources.slide_names import some
from latentds.store.format import patch_key

SPLITS = {
    **{"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"},
    **{"training": "train", "testing": "test"},  # CAMELYON16's
    **{"trainset": "train", "valset": "val", "validationset": "val", "testset": "test"},
    **{"dev": "val", "eval": "test", "evaluation": "test"},  # so `datasets` reads file names
    **{"nct-crc-he-100k": "train", "nct-crc-he-100k-nonorm": "train", "crc-val-he-7k": "val"},
}
DEFAULT_SPLIT = "train"
PACKED = re.compile(r"\.(?:gz|tgz|bz2|xz|zst|zip|7z|rar|tar\.\w+|part\d+)$")
LOOKED_AT = 10_000  # files of a hidden folder: a .git or .cache may have millions
NO_LABELS = "--no-labels (--no-use-labels in an evaluation)"
# SAM-Path's folds: -1 is the test set, 0 validation, the others training.
FOLDS = {"-1": "test", "0": "val"}
LABELLED = re.compile(r"(.+\])-labelled\.\w+")  # a mask of QuPath's TileExporter


def list_pictures(root: Path, use_labels: bool = True, use_splits: bool = True) -> Listing:
    """Every picture below `root`; InputError for an empty folder.

    [split/][class/[slide/...]]picture: top folders are splits when all of them have split names.
    """
    if root.is_file():
        raise InputError(
            f"{root}: is neither a folder nor an archive or table of pictures; name one, or the "
            "picture's folder"
        )
    if not root.is_dir():
        raise no_folder(root)
    suffixes = picture_suffixes()
    found: list[str] = []
    ignored: list[str] = []
    hidden: list[str] = []
    for path in walk(root, hidden):
        (found if PurePosixPath(path).suffix.lower() in suffixes else ignored).append(path)
    if not found:
        raise InputError(
            f"{root}: no pictures in it ({len(ignored)} other files{packed_among(ignored)}); name "
            "a folder of pictures or slides"
        )
    check_names(root, found)
    check_masks_apart(root, found)
    has_card = CARD in ignored or root.name == "data"  # the one above that folder, too
    card = card_files(root, found) if use_splits and has_card else None
    if card is not None:
        ignored += [path for path in found if path not in card.splits]
        found = [path for path in found if path in card.splits]
        tops = {PurePosixPath(path).parts[0].lower() for path in found}
        use_splits = tops <= SPLITS.keys()  # else the card alone tells them
    folders = read_folders(root, found, use_labels, use_splits)
    pictures = tuple(folders.place(path) for path in found)
    if card is not None:
        named = {path: SPLITS.get(split.lower(), split) for path, split in card.splits.items()}
        pictures = tuple(dataclasses.replace(p, split=named[p.source]) for p in pictures)
    notes = (*(card.notes if card else ()), *folders.notes, *note_hidden(root, hidden))
    return Listing(pictures, len(ignored), notes, tuple(ignored))


def packed_among(paths: Sequence[str]) -> str:
    """That files have to be unpacked first, for a message; nothing where none has."""
    packed = [path for path in paths if PACKED.search(path.lower())]
    return f"; {len(packed)} to unpack first, e.g. {packed[0]}" if packed else ""


def are_splits(root: Path, paths: Sequence[str]) -> bool:
    """Whether the top folders are splits; InputError where some are and others are not."""
    tops = {PurePosixPath(path).parts[0] for path in paths if "/" in path}
    named = {top for top in tops if top.lower() in SPLITS}
    others = sorted(tops - named) + [path for path in paths if "/" not in path]
    if named and others:
        raise InputError(
            f"{root}: {', '.join(sorted(named))} are named like splits, {others[0]} is not; move "
            "it, or pass --no-split-folders to take all of them as classes"
        )
    check_words(root, {top: top.lower() for top in named})
    return bool(named)


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


def check_words(root: Path, words: Mapping[str, str]) -> None:
    """Refuse names that different words would put into one split; words by name, of SPLITS."""
    first: dict[str, str] = {}
    for name in sorted(words):
        other = first.setdefault(SPLITS[words[name]], name)
        if words[other] != words[name]:
            raise InputError(
                f"{root}: {other} and {name} would both be split {SPLITS[words[name]]!r}, though "
                "their names differ; take the one that is not meant out, or rename it"
            )


@dataclasses.dataclass(frozen=True)
class Folders:
    """What folders mean: whether the top ones are splits, the next ones classes.

    held  splits whose next folder only holds, as `images` does
    """

    has_splits: bool
    use_labels: bool
    held: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def place(self, path: str) -> Picture:
        split, folders = self.parts(path)
        label = folders.pop(0) if folders and self.use_labels else None
        return Picture(path, split, label, "/".join(folders) or None)

    def parts(self, path: str) -> tuple[str, list[str]]:
        """Split, and the folders below it that say something."""
        folders = list(PurePosixPath(path).parts[:-1])
        split = SPLITS[folders.pop(0).lower()] if self.has_splits else DEFAULT_SPLIT
        return split, folders[1:] if split in self.held else folders


def read_folders(root: Path, paths: Sequence[str], use_labels: bool, use_splits: bool) -> Folders:
    """What the folders of these files mean, and what that assumes.

    raises  InputError where some top folders are named like splits and others are not
    """
    rule = Folders(use_splits and are_splits(root, paths), use_labels)
    tops: dict[str, set[str]] = {}
    for path in paths:
        split, folders = rule.parts(path)
        tops.setdefault(split, set()).add(folders[0] if folders else "")
    held = tuple(s for s, names in tops.items()
                 if len(names) == 1 and min(names).lower() in HOLDERS and use_labels)  # fmt: skip
    notes = [f"folder {min(tops[split])} is taken for no class; it only holds" for split in held]
    rule = dataclasses.replace(rule, held=held)
    names: dict[str, set[str]] = {}  # slides that file names tell, by the folder in a class's place
    for path in paths:
        if folders := rule.parts(path)[1]:
            names.setdefault(folders[0], set()).add(str(path_fields(path).get("slide", "")))
    odd = sorted(name for name, own in names.items() if is_identifier(name) or own == {name})
    if use_labels and odd and len(odd) == len(names):
        notes.append(
            f"no labels: the {len(odd)} folders are named by UUID, centre, patient or slide "
            f"({odd[0]}), which is no class"
        )
        rule = dataclasses.replace(rule, use_labels=False)
    elif use_labels and odd:
        notes.append(
            f"{len(odd)} of {len(names)} class folders are named by UUID, centre, patient or slide "
            f"({odd[0]}); {NO_LABELS} takes none for a class"
        )
    return dataclasses.replace(rule, notes=tuple(notes))


def with_labelled(found: Listing) -> Listing:
    """Tiles of QuPath with the masks that its exporter wrote beside them, which are no tiles."""
    masks = {match[1]: p.source for p in found.pictures if (match := LABELLED.fullmatch(p.source))}
    if not masks:
        return found
    pictures = tuple(
        dataclasses.replace(p, mask=masks.get(str(PurePosixPath(p.source).with_suffix(""))))
        for p in found.pictures
        if not LABELLED.fullmatch(p.source)
    )
    note = f"{len(masks):,} pictures named ]-labelled are taken for masks, as QuPath writes them"
    return dataclasses.replace(found, pictures=pictures, notes=(*found.notes, note))


def with_path_fields(picture: Picture) -> Picture:
    """A picture with what its source tells by known rules, and nothing else has told."""
    told = path_fields(picture.source).items()
    missing = {field: value for field, value in told if getattr(picture, field) is None}
    return dataclasses.replace(picture, **missing) if missing else picture


def note_hidden(root: Path, hidden: Iterable[str]) -> tuple[str, ...]:
    """Hidden pictures and folders with some, for people; macOS's `._x.png` are no pictures."""
    suffixes = picture_suffixes()

    def holds(path: str) -> bool:
        below = (name for _, _, names in os.walk(root / path) for name in names)
        seen = itertools.islice(below, LOOKED_AT) if path.endswith("/") else [path]
        names = map(PurePosixPath, seen)
        return any(n.suffix.lower() in suffixes and n.name[:2] != "._" for n in names)

    found = sorted(filter(holds, hidden))
    if not found:
        return ()
    return (f"not taken, as names with a dot in front are hidden: {some(found)}",)


def walk(root: Path, hidden: list[str] | None = None) -> Iterator[str]:
    """Posix paths of the files below `root`, by name in every folder; links followed, loops not.

    hidden  gets the paths whose names begin with a dot, those of folders with a slash at the end
    raises  InputError for a named pipe, a device or a socket among them
    """

    def visit(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
        real = os.path.realpath(folder)
        if real in above:
            return
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda e: e.name)
        for entry in found:
            if entry.name.startswith("."):
                if hidden is not None:
                    hidden.append(f"{prefix}{entry.name}{'/' if entry.is_dir() else ''}")
                continue
            if entry.is_dir():
                yield from visit(entry.path, f"{prefix}{entry.name}/", (*above, real))
                continue
            if not entry.is_file() and Path(entry.path).exists():  # a broken link is told later
                check_regular(Path(entry.path), entry.path)
            yield f"{prefix}{entry.name}"

    yield from visit(str(root), "", ())


def check_names(root: Path, paths: Sequence[str]) -> None:
    """Refuse names that no table can hold."""
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{root}: file name {path!r} is not UTF-8; rename it") from error


def check_keys(root: Path, sources: Sequence[str]) -> None:
    """Refuse two files that would be one patch."""
    first: dict[str, str] = {}
    for source in sources:
        other = first.get(patch_key(source))
        first[patch_key(source)] = source
        if other == source:
            raise InputError(f"{root}: {source} is named twice; keep one of the two")
        if other is not None:
            raise InputError(
                f"{root}: {other} and {source} have one key, {patch_key(source)!r}; rename or "
                "remove one"
            )


def check_labels(
    root: Path, pictures: Sequence[Picture], use_labels: bool, tables: Sequence[str] = ()
) -> None:
    """Refuse a folder where some pictures of a split have a class and others none.

    tables  files there that may have told the others'
    """
    bare = half_labelled(pictures) if use_labels else []
    if bare:
        place = " and have no label in ".join(["lie in no class folder", *tables[:1]])
        way = "give them one there, or move them into one" if tables else "move them into one"
        raise InputError(
            f"{root}: {len(bare)} of {len(pictures)} pictures {place} (first: {bare[0]}); {way}, "
            f"or pass {NO_LABELS}"
        )


def half_labelled(pictures: Sequence[Picture]) -> list[str]:
    """Sources without a label in splits where others have one: a whole split may have none."""
    labelled = {picture.split for picture in pictures if picture.label is not None}
    return [p.source for p in pictures if p.label is None and p.split in labelled]


def check_sizes(headers: dict[str, Header]) -> tuple[int, int]:
    """The one (H, W) of all pictures; InputError lists the sizes seen and the ways out."""
    sizes = Counter(header.size_px for header in headers.values())
    if len(sizes) == 1:
        return next(iter(sizes))
    examples = {header.size_px: source for source, header in reversed(headers.items())}
    seen = ", ".join(
        f"{w}x{h} ({count} files, e.g. {examples[h, w]})" for (h, w), count in sizes.most_common(4)
    )
    more = f" and {len(sizes) - 4} more sizes" if len(sizes) > 4 else ""
    raise InputError(
        f"pictures differ in size: {seen}{more}; choose --patch-size PX with --resize, --tile or "
        "--pad"
    )


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
