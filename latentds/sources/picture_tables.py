"""Pictures, slides, or places in slides, listed in a table: CSV, TSV or Parquet."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from latentds.core.display import number_of
from latentds.errors import InputError, UnusableError
from latentds.sources.csv_tables import SUFFIXES, TextTable, read_table
from latentds.sources.cut_options import SourceOptions
from latentds.sources.image_folder import DEFAULT_SPLIT, check_labels
from latentds.sources.kinds import SUFFIXES as SLIDE_SUFFIXES
from latentds.sources.kinds import sort_files
from latentds.sources.names import (
    columns_of,
    facts_of,
    note_splits,
    note_unused,
    patient_of,
    slide_name,
)
from latentds.sources.picture import Header, Listing, Picture
from latentds.sources.picture_files import PictureFiles
from latentds.sources.slide_names import NameIndex, named_once, path_ends, some
from latentds.sources.slide_regions import note_unused_regions
from latentds.sources.slides import Slides
from latentds.sources.source import Inspection, Source

SLIDE_FIELDS = ("path", "label", "slide", "patient", "mpp", "split")
PLACE_FIELDS = (*SLIDE_FIELDS, "x", "y", "size_px")
FIELDS = (*PLACE_FIELDS, "mask")
DRIVE = re.compile(r"[A-Za-z]:/|//")  # how Windows begins a whole path, slashes turned
FACTS = ("split", "label", "patient", "mpp")
CLAM_PARTS = ("train", "val", "test")
Facts = dict[str, Any]  # fields of a Picture


class PictureTable(PictureFiles):
    """A table with a column `path`; also label, slide, patient, x, y, mpp, size_px, split, mask.

    Paths start from --root, by default the table's folder, and may not lead out of it.
    """

    kind = "a table of pictures"
    marks = frozenset(SUFFIXES)

    def __init__(self, options: SourceOptions) -> None:
        super().__init__(options)
        self.root = options.root or options.source.parent

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        return cls(found.options) if found.is_file else None

    def listing(self) -> Listing:
        return list_table(self.options, FIELDS)

    def file(self, picture: Picture) -> Path:
        return listed_file(self.root / picture.source)


def listed_file(path: Path) -> Path:
    """A path that a row names; UnusableError (without the name) where nothing is there."""
    if path.exists():
        return path
    raise UnusableError("is not there; --root names the folder where a table's paths start",
                        "missing")  # fmt: skip


def list_table(options: SourceOptions, fields: Sequence[str]) -> Listing:
    """What an input's rows name, with those fields, and the columns that nobody reads."""
    table = read_table(options.source)
    if not table.rows:
        raise InputError(f"{table.path}: no rows")
    columns = {field: c for field, c in path_columns(table).items() if field in fields}
    root = options.root or options.source.parent
    rows = [{field: row[c].strip() for field, c in columns.items()} for row in table.rows]
    pictures = tuple(
        row_picture(f"{table.path}, row {number}", root, row, options.labels)
        for number, row in enumerate(rows, 1)
    )
    if not any((root / picture.source).exists() for picture in pictures):
        raise InputError(
            f"{table.path}: none of the files that it names is there (first: "
            f"{root / pictures[0].source}); pass --root with the folder where its paths start"
        )
    lack, way = "have no label, though others of their split have", "fill it in, or drop those rows"
    check_labels(table.path, pictures, options.labels, lack, way)
    words = [row["split"] for row in rows] if "split" in columns else []
    notes = note_unused(table, columns.values()) + note_splits(table.path.name, words)
    return Listing(pictures, notes=notes)


def path_columns(table: TextTable) -> dict[str, str]:
    """Columns by field; of a list of slides, as TRIDENT's, the slide is the path.

    raises  InputError where no column has paths, as in a list without a first line of names
    """
    columns = columns_of(table, FIELDS)
    if "path" not in columns and "slide" in columns:
        columns["path"] = columns.pop("slide")
    if "path" not in columns:
        raise InputError(
            f"{table.path}: no column 'path' of files; its first line names "
            f"{', '.join(table.columns)[:200] or 'none'}. Call the column of files 'path', or put "
            "a line of names before the first"
        )
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


@dataclasses.dataclass(frozen=True)
class SlideTable:
    """Facts by the name of a slide, or of a patient where `by` says so."""

    path: Path
    by: str
    facts: dict[str, Facts]
    notes: tuple[str, ...]


def read_slide_table(path: Path, use_labels: bool = True) -> SlideTable:
    """slide or patient, and any of split, label, patient, mpp; or CLAM's train, val, test.

    raises  InputError for a table that names neither, a row without a name, or a name with two
            different rows
    """
    table = read_table(path)
    if table.find_column(["train"]) and table.find_column(["test"]):
        return SlideTable(path, "slide", clam_parts(table), ())
    columns = columns_of(table, ("slide", *FACTS, "path"))
    if "slide" not in columns and "path" in columns:
        columns["slide"] = columns["path"]
    by = "slide" if "slide" in columns else "patient"
    if by not in columns or not columns.keys() & set(FACTS) - {by}:
        raise InputError(
            f"{path}: needs a column slide or patient, and of split, label, mpp, patient what it "
            f"is to set; it has {', '.join(table.columns)[:200]}"
        )
    taken = [name for name in FACTS if use_labels or name != "label"]
    wanted = [name for name in taken if name in columns and name != by]
    facts: dict[str, Facts] = {}
    for line, row in zip(table.lines, table.rows, strict=True):
        name, where = row[columns[by]].strip(), f"{path}, line {line}"
        if not name:
            raise InputError(f"{where}: no {by}; fill it, or take the line out")
        own = facts_of({f: row[columns[f]].strip() for f in wanted}, where)
        if facts.setdefault(name, own) != own:
            raise InputError(f"{where}: {name} is there twice, in different ways")
    used = [columns[name] for name in (by, *wanted)]
    words = table.values(columns["split"]) if "split" in columns else []
    notes = note_unused(table, used) + note_splits(path.name, filter(None, words))
    return SlideTable(path, by, facts, notes)


def clam_parts(table: TextTable) -> dict[str, Facts]:
    """Splits by slide of CLAM's splits_0.csv: a column a split."""
    facts: dict[str, Facts] = {}
    for part in CLAM_PARTS:
        column = table.find_column([part])
        for name in table.values(column) if column else []:
            if name and facts.setdefault(name, {"split": part}) != {"split": part}:
                raise InputError(f"{table.path}: {name} is in {part} and another split")
    return facts


def apply_slide_table(
    pictures: Sequence[Picture], table: SlideTable, is_split_file: bool, may_miss: bool = False
) -> tuple[tuple[Picture, ...], tuple[str, ...]]:
    """The pictures with what the table says of their slide or patient, and notes for people.

    is_split_file  whether every picture needs a split in it: InputError for one that has none
    may_miss       whether the pictures are a part of the input: of others a table may be
    raises         InputError for a table of which no row is used
    """
    index = NameIndex(list(table.facts))
    changed, places, bare = [], dict[tuple[str | None, ...], int | None](), dict[str, None]()
    for picture in pictures:
        key = (picture.slide, picture.patient, None if picture.slide else picture.source)
        if key not in places:
            places[key] = find(picture, table, index)
        place = places[key]
        facts = table.facts[index.names[place]] if place is not None else {}
        if is_split_file and "split" not in facts:
            what = "names neither" if place is None else "no split of"
            kind, name = "slide" if picture.slide else "picture", picture.slide or picture.source
            raise InputError(
                f"{table.path}: {what} {kind} {name!r} nor its patient; add it to the table, or "
                f"leave the {kind} out"
            )
        if not facts:
            bare[picture.slide or picture.source] = None
        changed.append(dataclasses.replace(picture, **facts))
    seen = {place for place in places.values() if place is not None}
    lost = [name for place, name in enumerate(index.names) if place not in seen]
    kind = "slides" if any(picture.slide for picture in pictures) else "pictures"
    if not (seen or may_miss):
        raise InputError(
            f"{table.path}: no {table.by} in it is of one of the {kind} here: it has "
            f"{some(lost) or 'no rows'}, here are {some(list(bare))}; take the table of these "
            f"{kind}, or name them as they are"
        )
    told = (kind[:-1], "not in it", list(bare)), ("row", f"of no {kind[:-1]} here", lost)
    notes = [f"{table.path.name}: {number_of(len(names), what)} {words}: {some(names)}"
             for what, words, names in told if names]  # fmt: skip
    return tuple(changed), (*table.notes, *notes)


def find(picture: Picture, table: SlideTable, index: NameIndex) -> int | None:
    """The row that means a picture's slide, else its patient."""
    own = picture.slide or picture.source
    if table.by == "slide":
        found = index.find(own, str(table.path))
        if found is not None:
            return found
    patients = [name for name in (picture.patient, patient_of(own)) if name]
    return next((index.exact[name][0] for name in patients if name in index.exact), None)


class ListedSlides(Slides):
    """Slides that a table names by path, with their labels, patients, splits and mpp."""

    kind = "a table of slides"
    marks = PictureTable.marks
    fields: tuple[str, ...] = SLIDE_FIELDS

    def __init__(self, options: SourceOptions) -> None:
        super().__init__(options)
        self.root = options.root or options.source.parent

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        columns = slide_columns(found.options) if found.is_file else {}
        if not columns:
            return None
        return (ListedPlaces if columns.keys() & {"x", "y"} else cls)(found.options)

    def listing(self) -> Listing:
        found = list_table(self.options, self.fields)
        slides = [(p.slide or PurePosixPath(p.source).stem, p) for p in found.pictures]
        pictures = tuple(dataclasses.replace(p, slide=name) for name, p in slides)
        named_once(self.root, ((name, p.source) for name, p in slides))
        told = note_unused_regions(self.chosen, [name for name, _ in slides])
        return dataclasses.replace(found, pictures=pictures, notes=(*found.notes, *told))

    def file(self, picture: Picture) -> Path:
        return listed_file(self.root / picture.source)


def slide_columns(options: SourceOptions) -> dict[str, str]:
    """A table's columns by field where the first row that names a file names a slide, else none."""
    table = read_table(options.source)
    columns = path_columns(table)
    root = options.root or options.source.parent
    names = (row[columns["path"]].strip().replace("\\", "/") for row in table.rows)
    first = next((name for name in names if name and (root / name).is_file()), None)
    if first is None:
        return {}
    # A tiled TIFF of one level is a patch.
    is_slide = options.kind == "slides" if options.kind else sort_files(root, [first]).slides
    return columns if is_slide else {}


class ListedPlaces(ListedSlides):
    """Places in slides, a row each: path, and x and y, a patch's corner in pixels of level 0.

    A patch is as wide as size_px says, else of --patch-size and --mpp. Its source is `slide/x_y`.
    """

    kind = "a table of places in slides"
    fields = PLACE_FIELDS
    has_looks = False  # a look is of a slide, a picture here of a place

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.options,), {"edge": self.edge}

    def listing(self) -> Listing:
        found = super().listing()
        self.rows = Counter(picture.source for picture in found.pictures)
        widths = {picture.size_px for picture in found.pictures}
        for number, picture in enumerate(found.pictures, 1):
            needed = ("x", "y", *(("size_px",) if widths != {None} else ()))
            if lacking := [name for name in needed if getattr(picture, name) is None]:
                raise InputError(
                    f"{self.options.source}, row {number}: no {lacking[0]}; a place in a slide "
                    f"needs {', '.join(needed)}"
                )
        self.take_width(widths)
        whole = sorted(found.pictures, key=lambda p: p.source)  # each slide is opened once
        pictures = tuple(dataclasses.replace(p, source=f"{p.source}/{p.x}_{p.y}") for p in whole)
        return dataclasses.replace(found, pictures=pictures)

    def take_width(self, widths: set[int | None]) -> None:
        """Patches are as wide as their places where one width is theirs and nothing else says."""
        if widths == {None}:
            return
        where = f"{self.options.source}: size_px says how large places are"
        if self.options.mpp is not None:
            raise InputError(f"{where}; leave --mpp and --magnification")
        if self.options.patch_size is None:
            if len(widths) > 1:
                raise InputError(f"{where}, and they differ; pass --patch-size")
            (self.edge,) = (width for width in widths if width)

    def file(self, picture: Picture) -> Path:
        return listed_file((self.root / picture.source).parent)

    def chunk(self, picture: Picture) -> str:
        return str(PurePosixPath(picture.source).parent)

    def header(self, picture: Picture) -> Header:
        header = super().header(picture)
        return dataclasses.replace(header, bytes=header.bytes // self.rows[self.chunk(picture)])

    def find_places(self, picture: Picture, slide: Any) -> np.ndarray:
        """The row's corner; none where its patch reaches beyond the slide and --edges drops it."""
        at, (width, height) = np.array([[picture.x, picture.y]], np.int32), slide.dimensions
        if (at >= (width, height)).any():
            raise UnusableError(f"lies outside of its slide of {width}x{height} px", "coordinates")
        reach = at + round(self.edge * self.scale(picture, slide))
        if self.options.edges == "drop" and (reach > (width, height)).any():
            self.empty[picture.source] = "reaches beyond its slide (--edges drop)"
            return at[:0]
        return at

    def scale(self, picture: Picture, slide: Any) -> float:
        return picture.size_px / self.edge if picture.size_px else super().scale(picture, slide)

    def own_mpp(self, picture: Picture, slide: Any) -> float | None:
        try:
            return super().own_mpp(picture, slide)
        except InputError:
            if picture.size_px is None:
                raise
            return None  # the table says where the patch lies all the same

    def facts(self) -> dict[str, Any]:
        return {"edges": self.options.edges}
