"""Trees of tiles named by their place: DSMIL's `<column>_<row>.jpeg`, PixCell's, ZoomLDM's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from latentds.errors import InputError
from latentds.sources.cut_options import SourceOptions
from latentds.sources.image_folder import are_splits, list_pictures
from latentds.sources.names import is_identifier
from latentds.sources.picture import Listing, Picture
from latentds.sources.picture_decoding import read_header
from latentds.sources.picture_files import PictureFiles
from latentds.sources.source import Inspection, Source

TILE_NAME = re.compile(r"(\d+)_(\d+)\.(?:jpe?g|png)")
MAX_PX = 2**31 - 1


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
