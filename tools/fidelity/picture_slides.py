"""Which slide each picture is of, by a rule for each folder.

A pattern, a table, TCGA barcodes, folders, or each picture for itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from latentds.errors import InputError
from latentds.sources.csv_tables import read_table
from latentds.sources.image_folder import list_pictures
from latentds.sources.names import TCGA_SLIDE, parse_barcode, patient_of

RULES = {
    "pattern": "the group 'slide' of --name-pattern",
    "table": "the column {column!r} of {table}",
    "tcga": "the TCGA slide barcode in each name",
    "patient": "the TCGA patient in each name",
    "folder": "the folder each picture lies in",
    "picture": "each picture is taken for a slide of its own",
}
NAMING = ("pattern", "table", "tcga", "patient")  # rules whose slides mean the same everywhere
OWN = "labels.csv"  # in a folder of pictures
PICTURES = ("path", "name", "file", "filename")
SLIDES = ("slide", "tma_core", "patient")  # the first that is there


@dataclasses.dataclass(frozen=True, eq=False)
class SlideColumns:
    """Slides by picture.

    name    of the file
    column  that its slides are from
    slides  slide by a path's end (class/1.png) or by a name without its suffix
    """

    name: str
    column: str
    slides: dict[str, str]

    def slide_of(self, path: Path) -> str | None:
        """The slide of a picture: of the line with the longest end of its path, None for none."""
        parts = path.absolute().parts[1:]
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        for end in (*ends, path.stem):
            if end in self.slides:
                return self.slides[end]
        return None


@dataclasses.dataclass(frozen=True)
class Found:
    """A picture in one of the folders: where it lies, what it is called, its slide and its rule."""

    path: Path
    source: str
    slide: str
    rule: str


@dataclasses.dataclass(frozen=True)
class SlideOptions:
    """What was asked for.

    name_pattern  regular expression with a group 'slide', for the folders with names it matches
    tables        for the folders whose pictures they list
    slides        for the rest: auto (the folder's own labels.csv, barcodes, else folders where
                  pictures lie two deep, else pictures), folder or picture
    """

    name_pattern: str | None = None
    tables: tuple[SlideColumns, ...] = ()
    slides: str = "auto"


def find_slides(
    folders: Sequence[Path], options: SlideOptions, must_match: bool = True
) -> tuple[list[Found], dict[str, str]]:
    """All pictures below the folders with their slides; by folder's name, the rule in words.

    must_match  whether a pattern or a table that is of none of the folders is a mistake
    raises      InputError for a pattern without the group 'slide'; for one, or a table, of some
                pictures of a folder only
    """
    pattern = compile_pattern(options.name_pattern) if options.name_pattern else None
    labels = label_folders(folders)
    found: list[Found] = []
    rules: dict[str, str] = {}
    used: set[object] = set()
    for folder, label in zip(folders, labels, strict=True):
        listed = list_pictures(folder, use_labels=False, use_splits=False).pictures
        names = [picture.source for picture in listed]
        rule, by, rules[label] = choose_rule(folder, names, options, pattern)
        used.add(by)
        for name in names:
            full = f"{label}/{name}" if len(folders) > 1 else name
            slide = find_slide(folder / name, name, full, rule, by)
            found.append(Found(folder / name, full, slide, rule))
    if must_match and pattern is not None and pattern not in used:
        raise InputError(f"--name-pattern {pattern.pattern!r}: matches no picture's path")
    for table in options.tables if must_match else ():
        if table not in used:
            raise InputError(f"{table.name}: lists none of the pictures")
    return found, rules


def label_folders(folders: Sequence[Path]) -> list[str]:
    """What folders are called: their names, with as much before them as tells them apart."""
    paths = [folder.resolve() for folder in folders]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-length:]).lstrip("/") for path in paths]
        if len(set(labels)) == len(set(paths)):
            break
    if len(set(labels)) < len(labels):
        raise InputError(f"{labels[0]}: a folder is given twice")
    return labels


def choose_rule(
    folder: Path, names: Sequence[str], options: SlideOptions, pattern: re.Pattern[str] | None
) -> tuple[str, re.Pattern[str] | SlideColumns | None, str]:
    """A folder's rule, what it goes by, and the rule in words."""
    if pattern is not None and any(pattern.search(name) for name in names):
        return "pattern", pattern, RULES["pattern"]
    own = own_table(folder) if options.slides == "auto" else None
    for table in (*options.tables, *([own] if own else [])):
        listed = sum(table.slide_of(folder / name) is not None for name in names)
        if listed == len(names):
            words = RULES["table"].format(column=table.column, table=table.name)
            return "table", table, words
        if listed and table is not own:
            raise InputError(
                f"{table.name}: lists {listed} of {len(names)} pictures of {folder}; list all"
            )
    rule = options.slides if options.slides != "auto" else rule_of_names(names)
    return rule, None, RULES[rule]


def rule_of_names(names: Sequence[str]) -> str:
    if all(TCGA_SLIDE.search(name) for name in names):
        return "tcga"
    if all(patient_in(name) for name in names):
        return "patient"
    # One level of folders is classes far more often than slides.
    is_deep = all(len(PurePosixPath(name).parts) > 2 for name in names)
    return "folder" if is_deep else "picture"


def find_slide(
    path: Path, name: str, full: str, rule: str, by: re.Pattern[str] | SlideColumns | None
) -> str:
    """The slide of a picture by its folder's rule; InputError where a pattern does not match."""
    if isinstance(by, SlideColumns):
        return str(by.slide_of(path))
    if by is not None:
        match = by.search(name)
        if match is None or not match["slide"]:
            raise InputError(f"{name}: does not match --name-pattern {by.pattern!r}")
        return match["slide"]
    if rule == "tcga":
        return barcode_in(name)
    if rule == "patient":
        return patient_in(name)
    return str(PurePosixPath(full).parent) if rule == "folder" else full


def barcode_in(name: str) -> str:
    """The TCGA slide in a path that has one."""
    match = TCGA_SLIDE.search(name)
    assert match is not None
    barcode = parse_barcode(match[0])
    return barcode.slide if barcode else match[0]


def patient_in(name: str) -> str:
    """The TCGA patient in a path, empty where there is none."""
    start = name.find("TCGA-")
    patient = patient_of(name[start:]) if start >= 0 else ""
    return patient if patient != name[start:] else ""


def compile_pattern(text: str) -> re.Pattern[str]:
    """A regular expression with a group `slide`."""
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise InputError(f"--name-pattern {text!r}: {error}") from error
    if "slide" not in pattern.groupindex:
        raise InputError(f"--name-pattern {text!r}: has no group (?P<slide>...)")
    return pattern


def read_slides(path: Path) -> SlideColumns:
    """A table; InputError where it has not the columns, or says two things of one picture."""
    table = read_table(path)
    picture = table.need_column(PICTURES, "pictures")
    slide = table.need_column(SLIDES, "slides")
    slides: dict[str, str] = {}
    cells = zip(table.lines, table.values(picture), table.values(slide), strict=True)
    for line, name, own in cells:
        key = name.replace("\\", "/").removeprefix("./").lstrip("/")
        if not key or not own:
            raise InputError(f"{path}: line {line} lacks a picture or a slide")
        if slides.setdefault(key, own) != own:
            raise InputError(f"{path}: two slides for {key}")
    return SlideColumns(path.name, slide, slides)


def own_table(folder: Path) -> SlideColumns | None:
    """The labels.csv of a folder, None where there is none or it says nothing of slides."""
    with contextlib.suppress(InputError):  # labels of something else, or none
        return read_slides(folder / OWN)
    return None
