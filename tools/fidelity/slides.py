"""Which slide each picture is of: a pattern, TCGA barcodes, folders, or each picture for itself."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from latentds.errors import InputError

RULES = {
    "pattern": "the group 'slide' of --name-pattern",
    "tcga": "the TCGA slide barcode in each name",
    "patient": "the TCGA patient in each name",
    "folder": "the folder each picture lies in",
    "picture": "each picture is taken for a slide of its own",
}


@dataclasses.dataclass(frozen=True)
class Found:
    """A picture in one of the folders: where it lies, what it is called, its slide."""

    path: Path
    source: str
    slide: str


def find_slides(
    folders: Sequence[Path], name_pattern: str | None, slides: str
) -> tuple[list[Found], str]:
    """All pictures below the folders with their slides, and the rule in words.

    slides  auto (barcodes, else folders where pictures lie two deep, else pictures), folder or
            picture; a pattern goes before
    raises  InputError for a pattern without the group 'slide', or a name it does not match
    """
    from latentds.sources.image_folder import list_pictures

    listed = [
        (folder, picture.source)
        for folder in folders
        for picture in list_pictures(folder, use_labels=False, use_splits=False).pictures
    ]
    names = [name for _, name in listed]
    rule = "pattern" if name_pattern else choose_rule(names, slides)
    pattern = compile_pattern(name_pattern) if name_pattern else None
    several = len(folders) > 1
    found = []
    for folder, name in listed:
        full = f"{folder.name}/{name}" if several else name
        found.append(Found(folder / name, full, slide_of(name, full, rule, pattern)))
    return found, RULES[rule]


def choose_rule(names: Sequence[str], slides: str) -> str:
    """The rule that all names allow."""
    from latentds.sources.names import TCGA_SLIDE

    if slides != "auto":
        return slides
    if all(TCGA_SLIDE.search(name) for name in names):
        return "tcga"
    if all(patient_in(name) for name in names):
        return "patient"
    # One level of folders is classes far more often than slides.
    is_deep = all(len(PurePosixPath(name).parts) > 2 for name in names)
    return "folder" if is_deep else "picture"


def slide_of(name: str, full: str, rule: str, pattern: re.Pattern[str] | None) -> str:
    """The slide of one picture."""
    from latentds.sources.names import TCGA_SLIDE, parse_barcode

    if pattern is not None:
        match = pattern.search(name)
        if match is None or not match["slide"]:
            raise InputError(f"{name}: does not match --name-pattern {pattern.pattern!r}")
        return match["slide"]
    if rule == "tcga":
        barcode = parse_barcode(TCGA_SLIDE.search(name)[0])  # type: ignore[index]
        return barcode.slide if barcode else full
    if rule == "patient":
        return patient_in(name)
    return str(PurePosixPath(full).parent) if rule == "folder" else full


def patient_in(name: str) -> str:
    """The TCGA patient in a path, empty where there is none."""
    from latentds.sources.names import patient_of

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
