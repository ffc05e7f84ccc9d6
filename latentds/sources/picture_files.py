"""Folders of picture files as a source: whole pictures, or tiles of them, with masks."""
# H W pixels

from __future__ import annotations

import dataclasses
import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from latentds.errors import InputError, UnusableError
from latentds.sources.cut_options import SourceOptions
from latentds.sources.image_folder import check_labels, check_sizes, list_pictures, name_fields
from latentds.sources.names import note_numbers, path_fields
from latentds.sources.picture import Header, Listing, Picture, Regions
from latentds.sources.picture_decoding import find_mask, read_header, read_mask, read_picture
from latentds.sources.side_tables import with_tables
from latentds.sources.source import Inspection, Kept, Source
from latentds.store.patch_record import Patch, Place

LABELLED = re.compile(r"(.+\])-labelled\.\w+")  # a mask of QuPath's TileExporter
TILED_PICTURES = 2  # decoded pictures kept while their tiles are cut

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
        check_labels(self.root, found.pictures, options.labels)
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
        told = note_numbers(p.source for p in named if p.x is None)
        return dataclasses.replace(found, pictures=named, notes=(*found.notes, *told))

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

    def origin(
        self, picture: Picture, header: Header, region: tuple[int, int]
    ) -> tuple[int | None, int | None]:
        """x and y of a region's patch in pixels of level 0, None where unknown."""
        if not self.options.tile:
            return picture.x, picture.y
        scale, (x, y) = pixel_scale(picture, header), region
        return (picture.x or 0) + round(x * scale), (picture.y or 0) + round(y * scale)

    def whereabouts(
        self, picture: Picture, header: Header, patch_px: tuple[int, int], regions: Regions
    ) -> list[Place]:
        options, width = self.options, patch_px[1]
        region_width = width if options.tile else header.size_px[1]
        size = round(region_width * pixel_scale(picture, header))
        mpp = picture.mpp if picture.mpp is not None else options.mpp
        if mpp is not None and options.resize:
            mpp *= region_width / width
        return [Place(*self.origin(picture, header, at), size, mpp) for at in regions]

    def lookup(self, source: str) -> Picture | None:
        if self.options.tile or not (self.root / source).is_file():
            return None  # where tiles lie, names and tables say
        return Picture(source=source, split="")

    def locate(
        self, picture: Picture, patch_px: tuple[int, int], place: tuple[int, int]
    ) -> tuple[Header, tuple[int, int]] | None:
        if not self.options.tile:
            return self.header(picture), (0, 0)
        return super().locate(picture, patch_px, place)

    def read(
        self, picture: Picture, header: Header, patch_px: tuple[int, int], regions: Regions
    ) -> list[Patch]:
        image, mask = self.decode(picture, header)
        return [self.cut(picture, header, patch_px, at, image, mask) for at in regions]

    def decode(self, picture: Picture, header: Header) -> Pixels:
        """Pixels and mask of a picture; a tiled one is kept for the chunks that follow."""
        if not self.options.tile:
            return self.decode_file(picture, header)
        return self.decoded.get(picture.source, lambda: self.decode_file(picture, header))

    def decode_file(self, picture: Picture, header: Header) -> Pixels:
        image, _ = read_picture(self.file(picture), self.options.max_px)
        if image.shape[:2] != header.size_px:
            raise UnusableError("changed its size while the conversion ran", "changed")
        size_px = (image.shape[0], image.shape[1])
        mask = self.mask_file(picture, size_px)
        return image, None if mask is None else read_mask(mask, size_px)

    def cut(
        self,
        picture: Picture,
        header: Header,
        patch_px: tuple[int, int],
        at: tuple[int, int],
        image: np.ndarray,
        mask: np.ndarray | None,
    ) -> Patch:
        (x, y), options = at, self.options
        (place,) = self.whereabouts(picture, header, patch_px, [at])
        fitted = None if mask is None else fit(mask, x, y, patch_px, options)
        return Patch(
            image=fit(image, x, y, patch_px, options),
            source=picture.source,
            source_encoding=header.encoding,
            label=picture.label,
            slide=picture.slide,
            **place._asdict(),
            mask_png=None if fitted is None else encode_png(fitted),
        )


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


def with_path_fields(picture: Picture) -> Picture:
    """A picture with what its source tells by known rules, and nothing else has told."""
    told = path_fields(picture.source).items()
    missing = {field: value for field, value in told if getattr(picture, field) is None}
    return dataclasses.replace(picture, **missing) if missing else picture


def pixel_scale(picture: Picture, header: Header) -> float:
    """Pixels of level 0 a pixel of the picture."""
    return (picture.size_px or header.size_px[1]) / header.size_px[1]


def fit(
    pixels: np.ndarray, x: int, y: int, size_px: tuple[int, int], options: SourceOptions
) -> np.ndarray:
    """The patch (H, W[, 3]) of a picture or mask: its tile, resized, padded, or as it is."""
    height, width = size_px
    if options.tile:
        return np.ascontiguousarray(pixels[y : y + height, x : x + width])
    if options.resize and pixels.shape[:2] != size_px:
        # Nearest for masks keeps their values; Lanczos in Pillow widens its kernel when it shrinks.
        kernel = Image.Resampling.LANCZOS if pixels.ndim == 3 else Image.Resampling.NEAREST
        return np.asarray(Image.fromarray(pixels).resize((width, height), kernel))
    if options.pad:
        missing = [(0, height - pixels.shape[0]), (0, width - pixels.shape[1])]
        return np.pad(pixels, missing + [(0, 0)] * (pixels.ndim - 2), mode="reflect")
    return pixels


def encode_png(mask: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG", optimize=False, compress_level=6)
    return buffer.getvalue()
