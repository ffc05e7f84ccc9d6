"""Folders of pictures in a layout of their own: SAM-Path's, trees of tiles named by place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from latentds.errors import InputError
from latentds.sources.csv_tables import read_table
from latentds.sources.cut_options import SourceOptions
from latentds.sources.image_folder import (
    DEFAULT_SPLIT,
    are_splits,
    is_identifier,
    list_pictures,
    picture_suffixes,
    walk,
)
from latentds.sources.names import split_of_fold
from latentds.sources.picture import MASK_SUFFIXES, Listing, Picture
from latentds.sources.picture_files import PictureFiles, read_header
from latentds.sources.slide_names import named_once
from latentds.sources.source import FOLDER_IMG, TILE_NAME, TILES, Inspection, Source

MAX_PX = 2**31 - 1


class SamPathFolder(PictureFiles):
    """img/NAME, mask/NAME.png and a CSV (img_id, fold): fold -1 is test, 0 val, others train."""

    kind = "img/, mask/ and a CSV of folds (SAM-Path's layout)"
    marks = frozenset({FOLDER_IMG})

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        return cls(found.options) if (found.root / "mask").is_dir() else None

    def listing(self) -> Listing:
        images = list(walk(self.root / "img"))
        found = [p for p in images if PurePosixPath(p).suffix.lower() in picture_suffixes()]
        masks = {
            str(PurePosixPath(p).with_suffix("")): p
            for p in walk(self.root / "mask")
            if PurePosixPath(p).suffix.lower() in MASK_SUFFIXES
        }
        folds, pictures = self.folds(), []
        for path in found:
            stem = str(PurePosixPath(path).with_suffix(""))
            if stem not in masks:
                raise InputError(f"{self.root}: img/{path} has no mask/{stem}.png")
            fold = folds.get(path, folds.get(stem))
            if folds and fold is None:
                raise InputError(f"{self.root}: img/{path} is in no row of the CSV of folds")
            split = DEFAULT_SPLIT if fold is None else split_of_fold(fold, self.root)
            pictures.append(Picture(f"img/{path}", split, mask=f"mask/{masks[stem]}"))
        if not pictures:
            raise InputError(f"{self.root}/img: no pictures in it")
        return Listing(tuple(pictures), len(images) - len(found))

    def folds(self) -> dict[str, str]:
        """Fold by picture (with or without suffix), of the only CSV there."""
        tables = sorted(self.root.glob("*.csv"))
        if len(tables) > 1:
            raise InputError(f"{self.root}: {tables[0].name} and {tables[1].name}; keep one CSV")
        if not tables:
            return {}
        table = read_table(tables[0])
        image, fold = (table.need_column([name], "folds") for name in ("img_id", "fold"))
        return dict(zip(table.values(image), table.values(fold), strict=True))


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
    marks = frozenset({TILES})

    def __init__(self, options: SourceOptions) -> None:
        super().__init__(options)
        if options.name_pattern:
            raise InputError("--name-pattern and tiles named <column>_<row>; leave the pattern")

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        options, kind = found.options, found.options.kind
        if not found.is_folder or kind is not None:
            return cls(options) if found.is_folder and kind == "tiles" else None
        if options.name_pattern or found.kinds.slides:
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
        named_once(self.root, ((str(p.slide), p.source.rpartition("/")[0]) for p in pictures))
        note = (
            "names <column>_<row> are taken for places, their folders for slides and those above "
            "for classes; --kind pictures takes them for names"
        )
        return dataclasses.replace(found, pictures=pictures, notes=(*found.notes, note))

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
