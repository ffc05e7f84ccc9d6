"""Folders of picture files as sources: plain ones, SAM-Path's, trees of tiles named by place."""
# H W pixels

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from latentds.errors import InputError, UnusableError
from latentds.sources.csv_tables import read_table
from latentds.sources.cut_options import SourceOptions
from latentds.sources.field_names import split_of_fold
from latentds.sources.image_folder import (
    DEFAULT_SPLIT,
    are_splits,
    check_labels,
    is_identifier,
    list_pictures,
    walk,
    with_path_fields,
)
from latentds.sources.names import name_fields
from latentds.sources.picture import Header, Listing, Picture, Regions
from latentds.sources.picture_decoding import (
    MASK_SUFFIXES,
    encode_png,
    find_mask,
    fit,
    picture_suffixes,
    read_header,
    read_mask,
    read_picture,
)
from latentds.sources.side_tables import PAIRS, READ, with_tables
from latentds.sources.slide_names import named_once
from latentds.sources.source import Inspection, Kept, Source, check_sizes
from latentds.store.patch_record import Patch, Place

TILED_PICTURES = 2  # decoded pictures kept while their tiles are cut
TILE_NAME = re.compile(r"(\d+)_(\d+)\.(?:jpe?g|png)")
MAX_PX = 2**31 - 1
LABELLED = re.compile(r"(.+\])-labelled\.\w+")  # a mask of QuPath's TileExporter
Pixels = tuple[np.ndarray, np.ndarray | None]  # picture and mask


class PictureFiles(Source):
    """Picture files below a folder; class folders are labels, split folders splits.

    A subclass that finds its pictures elsewhere gives another `listing`, or other bytes.

    broken  pictures whose record cannot be read, and why
    """

    kind = "a folder of pictures"

    def __init__(self, options: SourceOptions) -> None:
        self.options, self.root = options, options.source
        self.decoded: Kept[Pixels] = Kept(TILED_PICTURES)
        self.broken: dict[str, str] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.options,)  # without lock and pixels, for a worker elsewhere

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        source = cls(found.options)
        source.notes = found.choice.notes if found.is_open else ()
        return source

    def listing(self) -> Listing:
        options = self.options
        found = with_labelled(list_pictures(self.root, options.labels, options.split_folders))
        if found.others:  # tables may be among them
            found = with_tables(self.root, found, found.others, options.labels)
        tables = [path for path in found.others if PurePosixPath(path).name in READ | PAIRS]
        check_labels(self.root, found.pictures, options.labels, tables)
        return self.named(found)

    def named(self, found: Listing) -> Listing:
        """Pictures with what their sources tell: by --name-pattern, else by known rules.

        Known rules tell only what nothing else does.
        """
        if self.options.name_pattern:
            pattern = name_fields(self.options.name_pattern)
            named = tuple(dataclasses.replace(p, **pattern(p.source)) for p in found.pictures)
            return dataclasses.replace(found, pictures=named)
        named = tuple(with_path_fields(picture) for picture in found.pictures)
        return dataclasses.replace(found, pictures=named)

    def header(self, picture: Picture) -> Header:
        if picture.source in self.broken:
            raise UnusableError(self.broken[picture.source], "record")
        header = read_header(self.file(picture), self.options.max_px)
        self.check_tile(header)
        mask = self.mask_file(picture, header.size_px)
        if mask is None:
            return header
        return dataclasses.replace(header, mask_bytes=mask.stat().st_size)

    def file(self, picture: Picture) -> Path | BinaryIO:
        """What Pillow opens: a path here; InputError (without the name) where there is none."""
        return self.root / picture.source

    def mask_file(self, picture: Picture, size_px: tuple[int, int]) -> Path | None:
        """A picture's mask; the header of one below --masks is checked."""
        if self.options.masks is not None:
            return find_mask(self.options.masks, picture.source, size_px)
        if picture.mask is None:
            return None
        path = self.root / picture.mask
        if not path.is_file():
            raise UnusableError(f"its mask is not there ({picture.mask})", "mask")
        return path

    def check_tile(self, header: Header) -> None:
        """Refuse a picture too small for a single tile; InputError (without the name)."""
        (height, width), edge = header.size_px, self.options.patch_size
        if self.options.tile and edge and min(height, width) < edge:
            raise UnusableError(f"{width}x{height} px holds no tile of {edge}", "too_small")

    def patch_px(self, headers: dict[str, Header]) -> tuple[int, int]:
        options, edge = self.options, self.options.patch_size
        if edge is None:
            return check_sizes(headers)
        if options.resize:
            return edge, edge
        for source, header in headers.items():
            height, width = header.size_px
            if options.pad and (max(height, width) > edge or 2 * min(height, width) <= edge):
                raise InputError(
                    f"{source}: {width}x{height} px cannot be reflected to {edge}; it must be "
                    "larger than half and not larger than --patch-size"
                )
            if not (options.tile or options.pad) and (height, width) != (edge, edge):
                raise InputError(
                    f"{source}: {width}x{height} px, --patch-size is {edge}; choose --resize, "
                    "--tile or --pad"
                )
        return edge, edge

    def regions(self, picture: Picture, header: Header, patch_px: tuple[int, int]) -> np.ndarray:
        del picture
        if not self.options.tile:
            return np.zeros((1, 2), np.int32)
        (height, width), edge = header.size_px, patch_px[0]
        step = self.options.stride or edge
        rows, columns = range(0, height - edge + 1, step), range(0, width - edge + 1, step)
        return np.array([(x, y) for y, x in itertools.product(rows, columns)], np.int32)

    def empty_reason(self, picture: Picture) -> str:
        del picture
        return "holds no tile"

    def whereabouts(
        self, picture: Picture, header: Header, patch_px: tuple[int, int], regions: Regions
    ) -> list[Place]:
        options, width = self.options, patch_px[1]
        scale = (picture.size_px or header.size_px[1]) / header.size_px[1]  # to pixels of level 0
        region_width = width if options.tile else header.size_px[1]
        size = round(region_width * scale)
        mpp = picture.mpp if picture.mpp is not None else options.mpp
        if mpp is not None and options.resize:
            mpp *= region_width / width
        if not options.tile:
            return [Place(picture.x, picture.y, size, mpp) for _ in regions]
        left, top = picture.x or 0, picture.y or 0
        return [
            Place(left + round(x * scale), top + round(y * scale), size, mpp) for x, y in regions
        ]

    def locate(
        self, picture: Picture, patch_px: tuple[int, int], place: tuple[int, int]
    ) -> tuple[Header, tuple[int, int]] | None:
        if not self.options.tile:
            return self.header(picture), (0, 0)
        return super().locate(picture, patch_px, place)

    def read(
        self, picture: Picture, header: Header, patch_px: tuple[int, int], regions: Regions
    ) -> list[Patch]:
        options = self.options
        if options.tile:  # kept for the chunks that follow
            image, mask = self.decoded.get(picture.source, lambda: self.decode(picture, header))
        else:
            image, mask = self.decode(picture, header)
        patches = []
        places = self.whereabouts(picture, header, patch_px, regions)
        for (x, y), place in zip(regions, places, strict=True):
            fitted = None if mask is None else fit(mask, x, y, patch_px, options)
            patch = Patch(
                image=fit(image, x, y, patch_px, options),
                source=picture.source,
                source_encoding=header.encoding,
                label=picture.label,
                slide=picture.slide,
                **place._asdict(),
                mask_png=None if fitted is None else encode_png(fitted),
            )
            patches.append(patch)
        return patches

    def decode(self, picture: Picture, header: Header) -> Pixels:
        """Pixels and mask of a picture."""
        image, _ = read_picture(self.file(picture), self.options.max_px)
        if image.shape[:2] != header.size_px:
            raise UnusableError("changed its size while the conversion ran", "changed")
        size_px = (image.shape[0], image.shape[1])
        mask = self.mask_file(picture, size_px)
        return image, None if mask is None else read_mask(mask, size_px)


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


class PicturesInFiles(PictureFiles):
    """Pictures inside files of a folder, or inside one file; a picture's source is `file/...`."""

    def __init__(self, options: SourceOptions, files: Sequence[str]) -> None:
        super().__init__(options)
        if self.root.is_file():
            self.root = self.root.parent
        self.files = dict.fromkeys(files)  # in order, and found at once

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.options, tuple(self.files))

    def row_of(self, picture: Picture) -> tuple[str, int]:
        file, _, row = picture.source.rpartition("/")
        return file, int(row)


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
        if options.name_pattern or not any(TILE_NAME.search(path) for path in found.paths):
            return None
        if found.kinds.slides:
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
