"""Pictures laid out by a rule of others: listed in a table, SAM-Path's folders, trees of tiles."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from latentds.errors import InputError
from latentds.sources.csv_tables import SUFFIXES, TextTable, read_table
from latentds.sources.cut_options import SourceOptions
from latentds.sources.field_names import columns_of, note_unused
from latentds.sources.image_folder import (
    DEFAULT_SPLIT,
    SPLITS,
    are_splits,
    check_labels,
    facts_of,
    list_pictures,
    walk,
)
from latentds.sources.kinds import SUFFIXES as SLIDE_SUFFIXES
from latentds.sources.names import is_identifier
from latentds.sources.picture import Listing, Picture
from latentds.sources.picture_decoding import MASK_SUFFIXES, picture_suffixes, read_header
from latentds.sources.picture_files import PictureFiles
from latentds.sources.side_records import slide_name
from latentds.sources.slide_names import path_ends
from latentds.sources.source import Inspection, Source

FIELDS = ("path", "label", "slide", "patient", "x", "y", "mpp", "size_px", "split", "mask")
DRIVE = re.compile(r"[A-Za-z]:/|//")  # how Windows begins a whole path, slashes turned
# SAM-Path's folds: -1 is the test set, 0 validation, the others training.
FOLDS = {"-1": "test", "0": "val"}
TILE_NAME = re.compile(r"(\d+)_(\d+)\.(?:jpe?g|png)")
MAX_PX = 2**31 - 1


def is_table(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in SUFFIXES


class PictureTable(PictureFiles):
    """A table with a column `path`; also label, slide, patient, x, y, mpp, size_px, split, mask.

    Paths start from --root, by default the table's folder, and may not lead out of it.
    """

    kind = "a table of pictures"
    suffixes = frozenset(SUFFIXES)

    def __init__(self, options: SourceOptions) -> None:
        super().__init__(options)
        self.root = options.root or options.source.parent

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        return cls(found.options) if is_table(found.root) else None

    def listing(self) -> Listing:
        return list_table(self.options)


def list_table(options: SourceOptions) -> Listing:
    """The pictures that an input's rows name, and the columns that nobody reads."""
    table = read_table(options.source)
    if not table.rows:
        raise InputError(f"{table.path}: no rows")
    columns = path_columns(table)
    root = options.root or options.source.parent
    rows = [{field: row[c].strip() for field, c in columns.items()} for row in table.rows]
    pictures = tuple(
        row_picture(f"{table.path}, row {number}", root, row, options.labels)
        for number, row in enumerate(rows, 1)
    )
    check_labels(table.path, pictures, options.labels)
    return Listing(pictures, notes=note_unused(table, columns.values()))


def path_columns(table: TextTable) -> dict[str, str]:
    """Columns by field; of a list of slides, as TRIDENT's, the slide is the path."""
    columns = columns_of(table, FIELDS)
    if "path" not in columns and "slide" in columns:
        columns["path"] = columns.pop("slide")
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


class SamPathFolder(PictureFiles):
    """img/NAME, mask/NAME.png and a CSV (img_id, fold): fold -1 is test, 0 val, others train."""

    kind = "img/, mask/ and a CSV of folds (SAM-Path's layout)"

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        has_both = all((found.root / name).is_dir() for name in ("img", "mask"))
        return cls(found.options) if has_both else None

    def listing(self) -> Listing:
        images, masks = list(walk(self.root / "img")), list(walk(self.root / "mask"))
        suffixes = picture_suffixes()
        found = [p for p in images if PurePosixPath(p).suffix.lower() in suffixes]
        by_stem = {
            str(PurePosixPath(p).with_suffix("")): p
            for p in masks
            if PurePosixPath(p).suffix.lower() in MASK_SUFFIXES
        }
        folds = dict(self.folds())
        pictures = []
        for path in found:
            stem = str(PurePosixPath(path).with_suffix(""))
            if stem not in by_stem:
                raise InputError(f"{self.root}: img/{path} has no mask/{stem}.png")
            fold = folds.get(path, folds.get(stem))
            if folds and fold is None:
                raise InputError(f"{self.root}: img/{path} is in no row of the CSV of folds")
            split = DEFAULT_SPLIT if fold is None else split_of_fold(fold, self.root)
            pictures.append(Picture(f"img/{path}", split, mask=f"mask/{by_stem[stem]}"))
        if not pictures:
            raise InputError(f"{self.root}/img: no pictures in it")
        return Listing(tuple(pictures), len(images) - len(found))

    def folds(self) -> Iterator[tuple[str, str]]:
        """Picture (with or without suffix) and fold, of the only CSV there."""
        tables = sorted(self.root.glob("*.csv"))
        if len(tables) > 1:
            raise InputError(f"{self.root}: {tables[0].name} and {tables[1].name}; keep one CSV")
        if tables:
            table = read_table(tables[0])
            columns = [table.need_column([name], "folds") for name in ("img_id", "fold")]
            for line, row in zip(table.lines, table.rows, strict=True):
                image, fold = (row[column].strip() for column in columns)
                if not image or not fold:
                    raise InputError(f"{table.path}, line {line}: needs img_id and fold")
                yield image, fold


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


def is_tile_tree(options: SourceOptions, pictures: Sequence[str]) -> bool:
    """Whether all pictures of a folder are tiles, in a folder a slide.

    raises  InputError where the folders may as well be classes
    """
    if not pictures or not all("/" in p and TILE_NAME.fullmatch(Path(p).name) for p in pictures):
        return False
    has_splits = options.split_folders and are_splits(options.source, pictures)
    folders = [PurePosixPath(path).parts[has_splits:-1] for path in pictures]
    is_told = options.tile_downsample != 1 or min(map(len, folders)) > 1
    if is_told or all(parts and is_identifier(parts[-1]) for parts in folders):
        return True
    raise InputError(
        f"{options.source}: {pictures[0]} is named like a tile, <column>_<row> of a slide, and its "
        "folder may be a slide or a class; pass --kind tiles for slides with places, or --kind "
        "pictures for classes"
    )


class TileTree(PictureFiles):
    """[.../][class/]slide/<column>_<row>.jpeg: the slide is the folder, the class the one above.

    x and y are column and row times the tile's width times --tile-downsample: DSMIL's tiler does
    not record level 0, which for tiles of 20x from a slide of 40x has twice their pixels.
    """

    kind = "a tree of tiles named <column>_<row>"

    def __init__(self, options: SourceOptions) -> None:
        super().__init__(options)
        if options.name_pattern:
            raise InputError("--name-pattern and tiles named <column>_<row>; leave the pattern")

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        options, kind = found.options, found.options.kind
        if not found.is_folder or kind is not None:
            return cls(options) if found.is_folder and kind == "tiles" else None
        if found.kinds.slides or options.name_pattern:
            return None
        pictures = sorted([*found.kinds.pictures, *found.kinds.unsure])
        return cls(options) if is_tile_tree(options, pictures) else None

    def listing(self) -> Listing:
        found = list_pictures(self.root, use_labels=False, use_splits=self.options.split_folders)
        height, width = self.first_size(found.pictures)
        has_splits = self.options.split_folders and are_splits(
            self.root, [p.source for p in found.pictures]
        )
        pictures = tuple(self.placed(p, width, height, has_splits) for p in found.pictures)
        slides: dict[str, str] = {}
        for picture in pictures:
            folder = str(PurePosixPath(picture.source).parent)
            other = slides.setdefault(str(picture.slide), folder)
            if other != folder:
                raise InputError(
                    f"{self.root}: {other} and {folder} are both slide {picture.slide!r}; rename "
                    "or remove one"
                )
        note = (
            "names <column>_<row> are taken for places, their folders for slides and those above "
            "for classes; --kind pictures takes them for names"
        )
        return dataclasses.replace(found, pictures=pictures, notes=(note,))

    def first_size(self, pictures: tuple[Picture, ...]) -> tuple[int, int]:
        """(H, W) of the first tile that can be read; all must be alike, as headers will show."""
        for picture in pictures:
            try:
                return read_header(self.root / picture.source, self.options.max_px).size_px
            except InputError:
                continue
        raise InputError(f"{self.root}: none of {len(pictures)} tiles can be read")

    def placed(self, picture: Picture, width: int, height: int, has_splits: bool) -> Picture:
        path = PurePosixPath(picture.source)
        match = TILE_NAME.fullmatch(path.name)
        if match is None or len(path.parts) < 2 + has_splits:
            raise InputError(f"{picture.source}: not <column>_<row>; move it, or rename its folder")
        factor = self.options.tile_downsample
        x, y = round(int(match[1]) * width * factor), round(int(match[2]) * height * factor)
        if max(x, y) > MAX_PX:
            raise InputError(f"{picture.source}: lies at ({x}, {y}); no slide is so large")
        above = path.parts[has_splits:-2]
        label = above[-1] if above and self.options.labels else None
        return dataclasses.replace(
            picture, label=label, slide=path.parts[-2], x=x, y=y, size_px=round(width * factor)
        )
