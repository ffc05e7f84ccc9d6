"""A folder of pictures: what its folders and the names in it say of splits, classes and slides."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from latentds.core.display import number_of
from latentds.core.storage import check_regular, known_formats
from latentds.errors import InputError, no_folder
from latentds.sources.data_cards import CARD, card_files
from latentds.sources.picture import Listing, Picture
from latentds.sources.slide_names import some
from latentds.store.format import alike_names

SPLITS = {
    **{"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"},
    **{"training": "train", "testing": "test"},  # CAMELYON16's
    **{"trainset": "train", "valset": "val", "validationset": "val", "testset": "test"},
    **{"dev": "val", "eval": "test", "evaluation": "test"},  # so `datasets` reads file names
    **{"nct-crc-he-100k": "train", "nct-crc-he-100k-nonorm": "train", "crc-val-he-7k": "val"},
}
DEFAULT_SPLIT = "train"
LOOKED_AT = 10_000  # files of a hidden folder: a .git or .cache may have millions
NO_LABELS = "--no-labels (--no-use-labels in an evaluation)"
# Patients in the names of public slides: the whole match, at the beginning of a name.
PATIENTS = {
    "TCGA": re.compile(r"(TCGA-[0-9A-Z]{2}-[0-9A-Z]{4})(?:-|$)"),
    "CPTAC": re.compile(r"(C3[LN]-\d{5})(?:[-_.]|$)"),
    "GTEx": re.compile(r"(GTEX-[0-9A-Z]{4,5})(?:-|$)"),
    "CAMELYON17": re.compile(r"(patient_\d{3})(?:_node_\d+.*|\.zip)?$"),
    "CAMELYON16": re.compile(  # a slide a patient; PCam has camelyon16_ before it
        r"(?:camelyon16_(?:train_)?)?((?:normal|tumor|test)_\d{3})(?:_mask)?$"
    ),
}
# Folders that only hold: `images` alone at its place is no class.
HOLDERS = {"images", "image", "img", "imgs", "slides", "wsi", "wsis", "patches", "tiles", "data"}
# What holds the masks of the pictures in a folder of HOLDERS beside it.
MASK_FOLDERS = {
    *("mask", "masks", "label", "labels", "gt", "groundtruth", "ground_truth", "instances"),
    *("annotation", "annotations", "segmentation", "segmentations"),
}
MASK_SUFFIX = re.compile(r"[_-](?:masks?|labels?|seg|gt|instances?)$", re.IGNORECASE)
# A slide of those at the beginning of a tile's or folder's name; of TCGA with its UUID.
SLIDE_IN_NAME = re.compile(
    r"(TCGA-[0-9A-Z]{2}-[0-9A-Z]{4}-\d{2}[A-Z]?-\d{2}[A-Z]?-(?:DX|TS|BS|MS)[0-9A-Z]+"
    r"(?:\.[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12})?"
    r"|C3[LN]-\d{5}-\d+|GTEX-[0-9A-Z]{4,5}-\d{4}|patient_\d{3}_node_\d)(?![0-9A-Za-z])"
)
NO_CLASS = {"na", "n/a", "#n/a", "nan", "null", "none", "-1"}  # what programs write for no value
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
DICOM_UID = re.compile(r"\d+(?:\.\d+){5,}")
CENTRE = re.compile(r"cent(?:er|re)_?\d+", re.IGNORECASE)  # CAMELYON17's folders
# x and y in a tile's name where it says so, in either order: `..._x1024_y2048`, `x=1024,y=2048`,
# `y512_x256` (UCSB), `xini_46290_yini_19855` (SICAPv2).
NAMED_PLACE = re.compile(
    r"(?<![a-z\d])([xy])(s|ini|init|min|pos|start|px)?[=_-]*(\d{1,9})[_,; -]*"
    r"(?!\1)([xy])(?(2)\2)[=_-]*(\d{1,9})(?!\d)",
    re.IGNORECASE,
)
# In which a name ends, each perhaps behind a word of a grid: places, or who knows.
NUMBER = r"\d+(?:\.\d+)?"
NUMBERS = re.compile(rf"(?:[a-z]|row|col)?=?{NUMBER}(?:[_-]+(?:[a-z]|row|col)?=?{NUMBER})+[_-]*$")
DUMPED = re.compile(r"\d{6}_x\d+_y\d+\.\w+")  # TRIDENT's patch_images/SLIDE/000000_x0_y512.png
# QuPath's TileExporter: `slide [d=2,x=0,y=512,w=512,h=512].png`, in pixels of level 0.
QUPATH = re.compile(
    r"(.+?) ?\[(?:d=[\d.]+,)?x=(-?\d{1,9}),y=(-?\d{1,9}),w=(\d{1,9}),h=\d{1,9}[^\]]*\][^/]*$"
)


def picture_suffixes() -> set[str]:
    """Lower-case file suffixes of the formats that are opened as pictures."""
    suffixes, formats = Image.registered_extensions(), known_formats()
    return {suffix for suffix, name in suffixes.items() if name in formats}


def list_pictures(root: Path, use_labels: bool = True, use_splits: bool = True) -> Listing:
    """Every picture below `root`, or that itself; InputError for an empty folder.

    [split/][class/[slide/...]]picture: top folders are splits when all of them have split names.
    """
    if not root.exists():
        raise no_folder(root, "file or folder")
    if not root.is_dir():
        check_regular(root, str(root))
    suffixes = picture_suffixes()
    found: list[str] = []
    ignored: list[str] = []
    hidden: list[str] = []
    for path in walk(root, hidden):
        (found if PurePosixPath(path).suffix.lower() in suffixes else ignored).append(path)
    if not found:
        raise InputError(
            f"{root}: no pictures in it ({number_of(len(ignored), 'other file')}); name a folder "
            "of pictures or slides, or unpack it"
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
    notes = (*(card.notes if card else ()), *folders.notes, *note_empty(root, found, folders))
    notes += note_hidden(root, hidden)
    return Listing(pictures, len(ignored), notes, tuple(ignored))


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
        are = number_of(len(odd), "folder is", "folders are")
        notes.append(
            f"no labels: {are} named by UUID, centre, patient or slide ({odd[0]}), as no class is"
        )
        rule = dataclasses.replace(rule, use_labels=False)
    elif use_labels and odd:
        notes.append(
            f"{len(odd)} of {len(names)} class folders are named by UUID, centre, patient or slide "
            f"({odd[0]}); {NO_LABELS} takes none for a class"
        )
    return dataclasses.replace(rule, notes=tuple(notes))


def note_empty(root: Path, paths: Iterable[str], rule: Folders) -> tuple[str, ...]:
    """Folders beside class folders that hold none of these files, for people."""
    folders = {PurePosixPath(path).parent for path in paths if rule.use_labels and "/" in path}
    depths = ((folder, len(rule.parts(f"{folder}/_")[1])) for folder in folders)
    taken = {(folder, *folder.parents)[depth - 1] for folder, depth in depths if depth}
    above = sorted({folder.parent for folder in taken})
    beside = [place / path.name for place in above for path in sorted((root / place).iterdir())
              if path.is_dir() and path.name[0] != "."]  # fmt: skip
    bare = [str(folder) for folder in beside if folder not in taken]
    return (f"no classes, as nothing in them is taken: folders {some(bare)}",) if bare else ()


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

    Of a file it is its name.

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
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself, which is told later
                is_folder = is_file = False
            if entry.name.startswith("."):
                if hidden is not None:
                    hidden.append(f"{prefix}{entry.name}{'/' if is_folder else ''}")
                continue
            if is_folder:
                yield from visit(entry.path, f"{prefix}{entry.name}/", (*above, real))
                continue
            if not is_file and Path(entry.path).exists():  # a broken link is told later
                check_regular(Path(entry.path), entry.path)
            yield f"{prefix}{entry.name}"

    if root.is_file():
        yield root.name
    else:
        yield from visit(str(root), "", ())


def check_names(root: Path, paths: Sequence[str]) -> None:
    """Refuse names that no table can hold."""
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{root}: file name {path!r} is not UTF-8; rename it") from error


def check_labels(
    root: Path,
    pictures: Sequence[Picture],
    use_labels: bool,
    lack: str = "lie in no class folder",
    way: str = "move them into one",
) -> None:
    """Refuse pictures of which some of a split have a class and others none."""
    bare = half_labelled(pictures) if use_labels else []
    if bare:
        raise InputError(
            f"{root}: {len(bare)} of {len(pictures)} pictures {lack} (first: {bare[0]}); {way}, "
            f"or pass {NO_LABELS}"
        )


def half_labelled(pictures: Sequence[Picture]) -> list[str]:
    """Sources without a label in splits where others have one: a whole split may have none."""
    labelled = {picture.split for picture in pictures if picture.label is not None}
    return [p.source for p in pictures if p.label is None and p.split in labelled]


def known_patient(slide: str) -> tuple[str, str] | None:
    """Scheme and patient of a slide's name, or of the end of its path; None where none fits."""
    last = slide.rpartition("/")[2]
    for scheme, pattern in PATIENTS.items():
        if found := pattern.match(last):
            return scheme, found[1]
    return None


def is_identifier(folder: str) -> bool:
    """Whether a folder is named by UUID, DICOM UID, centre, patient or slide, as no class is."""
    is_number = any(kind.fullmatch(folder) for kind in (UUID, DICOM_UID, CENTRE))
    return is_number or known_patient(folder) is not None


def path_fields(path: str) -> dict[str, Any]:
    """What a picture's own path tells by known rules: a slide of a known scheme, a named place."""
    found: dict[str, Any] = {}
    parts = path.replace("\\", "/").split("/")
    slides = [SLIDE_IN_NAME.match(part) for part in parts]
    named = [match[1] for match in slides if match]
    if named:
        found["slide"] = named[-1]
    if tile := QUPATH.match(parts[-1]):
        found["size_px"] = int(tile[4])
        if "-" not in tile[2] + tile[3]:  # beyond the slide's corner is no place of a table
            found |= {"x": int(tile[2]), "y": int(tile[3])}
        found.setdefault("slide", tile[1])
    elif place := NAMED_PLACE.search(parts[-1]):
        found |= {place[1].lower(): int(place[3]), place[4].lower(): int(place[5])}
        if DUMPED.fullmatch(parts[-1]) and len(parts) > 1:
            found.setdefault("slide", parts[-2])
    return found


def note_numbers(paths: Iterable[str]) -> tuple[str, ...]:
    """That numbers in which names end are not read, in their commonest form; else nothing."""
    ends = [NUMBERS.search(PurePosixPath(path).stem) for path in paths]
    forms = Counter(re.sub(NUMBER, "#", end[0]) for end in ends if end)
    if not forms:
        return ()
    ((form, count),) = forms.most_common(1)
    share = "" if count == len(ends) else f"{count:,} "
    what = f"{share}names end in {form}, which is not read"
    return (f"{what}; --name-pattern reads places, slides",)


def check_class_names(labels: Iterable[str | None], where: object) -> tuple[str, ...]:
    """Notes for people on labels that say there is none.

    raises  InputError for two classes whose names differ in case, spaces, - or _ alone
    """
    counts = Counter(label for label in labels if label)
    if alike := alike_names(counts):
        told = " and ".join(f"{name!r} ({counts[name]:,})" for name in alike)
        raise InputError(
            f"{where}: classes {told} would be two, and differ in case, spaces, - or _ alone; give "
            "them one name"
        )
    return tuple(
        f"label {word!r} ({count:,}) is taken for a class; where it means none, leave it empty or "
        "take those out"
        for word, count in counts.items()
        if word.casefold() in NO_CLASS
    )


def check_masks_apart(root: Path, paths: Sequence[str], first: str = "") -> None:
    """Refuse a folder of pictures beside one of their masks, which would be a class of patches.

    first  what has to be done before the folders can be passed
    """
    below: dict[str, dict[str, set[str]]] = {}  # stems by the folder that holds, by the one above
    for path in paths:
        parts = path.split("/")
        holding = [n for n, name in enumerate(parts[:-1]) if name.lower() in MASK_FOLDERS | HOLDERS]
        if holding:
            above, rest = "/".join(parts[: holding[0]]), PurePosixPath(*parts[holding[0] + 1 :])
            stem = str(rest.parent / MASK_SUFFIX.sub("", rest.stem))
            below.setdefault(above, {}).setdefault(parts[holding[0]], set()).add(stem)
    for above, stems in below.items():
        holders = sorted(name for name in stems if name.lower() in HOLDERS)
        for pictures, masks in itertools.product(holders, sorted(stems.keys() - {*holders})):
            shared = stems[pictures] & stems[masks]
            if 2 * len(shared) > min(len(stems[pictures]), len(stems[masks])):
                where = root / above
                raise InputError(
                    f"{where}: {masks}/ has files of the same names as {pictures}/ (first: "
                    f"{min(shared)}), as masks have, which are no patches; {first}pass "
                    f"{where / pictures}, and --masks {where / masks} where they are to be kept"
                )
