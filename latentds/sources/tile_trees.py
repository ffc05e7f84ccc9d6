"""Trees of tiles named by their place: DSMIL's `<column>_<row>.jpeg`, PixCell's, ZoomLDM's."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path, PurePosixPath

from latentds.conversion.config import ConvertConfig
from latentds.errors import InputError
from latentds.sources.image_folder import are_splits, list_pictures, walk
from latentds.sources.picture_files import PictureFiles
from latentds.sources.pictures import read_header
from latentds.sources.source import Listing, Picture

TILE_NAME = re.compile(r"(\d+)_(\d+)\.(?:jpe?g|png)")
LOOK_AT = 200
MAX_PX = 2**31 - 1


def is_tile_tree(root: Path) -> bool:
    """Whether the first files of a folder are tiles, in a folder a slide."""
    if not root.is_dir():
        return False
    first = list(itertools.islice(walk(root), LOOK_AT))
    return bool(first) and all("/" in p and TILE_NAME.fullmatch(Path(p).name) for p in first)


class TileTree(PictureFiles):
    """[.../][class/]slide/<column>_<row>.jpeg: the slide is the folder, the class the one above.

    x and y are column and row times the tile's width times --tile-downsample: DSMIL's tiler does
    not record level 0, which for tiles of 20x from a slide of 40x has twice their pixels.
    """

    kind = "a tree of tiles named <column>_<row>"

    def __init__(self, config: ConvertConfig) -> None:
        super().__init__(config)
        if config.name_pattern:
            raise InputError("--name-pattern and tiles named <column>_<row>; leave the pattern")

    def listing(self) -> Listing:
        found = list_pictures(self.root, use_labels=False, use_splits=self.config.split_folders)
        height, width = self.first_size(found.pictures)
        has_splits = self.config.split_folders and are_splits(
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
        return dataclasses.replace(found, pictures=pictures)

    def first_size(self, pictures: tuple[Picture, ...]) -> tuple[int, int]:
        """(H, W) of the first tile that can be read; all must be alike, as headers will show."""
        for picture in pictures:
            try:
                return read_header(self.root / picture.source, self.config.max_px).size_px
            except InputError:
                continue
        raise InputError(f"{self.root}: none of {len(pictures)} tiles can be read")

    def placed(self, picture: Picture, width: int, height: int, has_splits: bool) -> Picture:
        """What a tile's path says."""
        path = PurePosixPath(picture.source)
        match = TILE_NAME.fullmatch(path.name)
        if match is None:
            raise InputError(f"{picture.source}: not <column>_<row>; move it, or rename its folder")
        factor = self.config.tile_downsample
        x, y = round(int(match[1]) * width * factor), round(int(match[2]) * height * factor)
        if max(x, y) > MAX_PX:
            raise InputError(f"{picture.source}: lies at ({x}, {y}); no slide is so large")
        above = path.parts[has_splits:-2]
        label = above[-1] if above and self.config.labels else None
        return dataclasses.replace(
            picture, label=label, slide=path.parts[-2], x=x, y=y, size_px=round(width * factor)
        )
