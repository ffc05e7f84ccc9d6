"""What the files of a folder are: slides, pictures, or tiled TIFF that could be either."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from latentds.codecs.formats import DECODE_ERRORS
from latentds.core.storage import open_picture, open_regular
from latentds.errors import InputError
from latentds.sources.image_folder import picture_suffixes
from latentds.sources.slide_names import some

# OpenSlide's own, slides even where they cannot be read; of all others OpenSlide is asked.
SUFFIXES = {".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".zvi", ".czi"}
MAYBE = {".tif", ".tiff"}  # slides where they are tiled pyramids
NEVER = {
    *(".csv", ".tsv", ".xls", ".xlsx", ".json", ".jsonl", ".xml", ".geojson", ".parquet", ".tar"),
    *(".gz", ".zip", ".h5", ".pt", ".pth", ".npy", ".npz", ".txt", ".md", ".pdf", ".html", ".yaml"),
}
PATCH_PX = 512  # a lone tiled TIFF up to this edge is a patch
LARGEST_PATCH_PX = 8192  # --patch-size goes no further


class Kinds(NamedTuple):
    """Paths by kind, in their order; `unsure` are generic tiled TIFF of one level."""

    slides: list[str]
    pictures: list[str]
    unsure: list[str]
    others: list[str]


def sort_files(root: Path, paths: Sequence[str]) -> Kinds:
    """What every file is; OpenSlide is asked of all that are no plain pictures."""
    found, suffixes = Kinds([], [], [], []), picture_suffixes()
    camera = {str(PurePosixPath(p).parent) for p in paths if p.lower().endswith((".vms", ".vmu"))}
    for path in paths:
        suffix = PurePosixPath(path).suffix.lower()
        if suffix in SUFFIXES:
            found.slides.append(path)
        elif suffix in suffixes and suffix not in MAYBE:
            # Hamamatsu's .vms is an index of the JPEGs beside it.
            is_part = suffix == ".jpg" and str(PurePosixPath(path).parent) in camera
            (found.others if is_part else found.pictures).append(path)
        elif suffix in NEVER:
            found.others.append(path)
        elif suffix in MAYBE:
            kind = tiff_kind(root / path)
            {"slide": found.slides, "unsure": found.unsure}.get(kind, found.pictures).append(path)
        else:
            (found.slides if asked(root / path) else found.others).append(path)
    if not found.slides:
        return found
    # Among slides, a TIFF that nobody opens is a damaged slide.
    tiffs = [p for p in found.pictures if PurePosixPath(p).suffix.lower() in MAYBE]
    lost = {path for path in tiffs if size_of(root / path)[0] == (0, 0)}
    pictures = [path for path in found.pictures if path not in lost]
    return found._replace(pictures=pictures, unsure=sorted([*found.unsure, *lost]))


def asked(path: Path) -> str | None:
    """What OpenSlide calls a file's format, None where it knows none or is not installed."""
    if not path.is_file():
        return None  # a pipe would hold it for ever
    try:
        import openslide
    except ImportError:
        return None
    found: str | None = openslide.OpenSlide.detect_format(str(path))
    return found


def tiff_kind(path: Path) -> str:
    """`slide`, `picture`, or `unsure` for a generic tiled TIFF of one level and modest size."""
    vendor = asked(path)
    if vendor != "generic-tiff":
        return "slide" if vendor else "picture"
    size, pages = size_of(path)
    return "slide" if pages > 1 or max(size) > LARGEST_PATCH_PX else "unsure"


def size_of(path: Path) -> tuple[tuple[int, int], int]:
    """(W, H) and number of pages of a TIFF; (0, 0) and 1 where Pillow cannot tell."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged directories, which are told elsewhere
            # Of an open file, which may have holes: no pixel is read.
            with open_regular(path) as file, open_picture(file, ["TIFF"]) as image:
                return image.size, getattr(image, "n_frames", 1)
    except (*DECODE_ERRORS, TypeError):  # Pillow's for a directory without a size
        return (0, 0), 1


def choose(root: Path, found: Kinds) -> tuple[bool, tuple[str, ...]]:
    """Whether a folder is one of slides, and what that assumes; nothing where all is plain.

    raises  InputError where it has slides and pictures, with one of each by name
    """
    if found.slides and found.pictures:
        raise InputError(
            f"{root}: holds slides ({len(found.slides)}, e.g. {found.slides[0]}) and pictures "
            f"({len(found.pictures)}, e.g. {found.pictures[0]}); pass --kind slides or --kind "
            "pictures to take the one and leave the other, or move them apart"
        )
    if not found.unsure:
        return bool(found.slides), ()
    is_slides, is_mixed = bool(found.slides), bool(found.slides or found.pictures)
    if not is_mixed:
        sizes = {size_of(root / path)[0] for path in found.unsure}
        is_one_size = len(sizes) == 1 and len(found.unsure) > 1
        is_slides = not is_one_size and max(max(size) for size in sizes) > PATCH_PX
    what, other = ("slides", "pictures") if is_slides else ("pictures", "slides")
    among = f" among {what}" if is_mixed else ""
    note = (
        f"{len(found.unsure)} TIFF that could be either{among} are taken for {what}; --kind "
        f"{other} takes them for the other"
    )
    return is_slides, (note,)


def note_strange(paths: Iterable[str]) -> tuple[str, ...]:
    """Files named neither as pictures nor as what lies beside them, for people."""
    known = picture_suffixes() | NEVER
    found = [path for path in paths if PurePosixPath(path).suffix.lower() not in known]
    return (f"not taken, as their names are no picture's: {some(found)}",) if found else ()


def one_a_series(root: Path, paths: Sequence[str], opened: Any) -> dict[str, str]:
    """Slide names by path, of a DICOM slide's many files only the first.

    opened  opens a path as a slide; InputError (without the name)
    """
    names: dict[str, str] = {}
    series: dict[str, str] = {}
    counts: dict[str, set[str]] = {}
    for path in paths:
        names[path] = PurePosixPath(path).stem
        if PurePosixPath(path).suffix.lower() in SUFFIXES | MAYBE or asked(root / path) != "dicom":
            continue
        try:
            with opened(root / path) as slide:
                uid = str(slide.properties.get("dicom.SeriesInstanceUID", path))
        except InputError:
            continue  # its header will say why
        counts.setdefault(str(PurePosixPath(path).parent), set()).add(uid)
        first = series.setdefault(uid, path)
        if first != path:
            del names[path]
            folder = PurePosixPath(first).parent
            names[first] = folder.name or PurePosixPath(first).stem
    for first in series.values():  # a folder of several series names none of them
        if first in names and len(counts[str(PurePosixPath(first).parent)]) > 1:
            names[first] = PurePosixPath(first).stem
    return names
