"""Picture files as a source: decoded to uint8 RGB, or a reason why not, and cut into patches."""
# H W pixels

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from latentds.codecs.formats import DECODE_ERRORS, JPEG_LUMA_AT_50
from latentds.core.display import number_of
from latentds.core.storage import open_picture
from latentds.errors import InputError, Reason, UnusableError
from latentds.sources.cut_options import SourceOptions
from latentds.sources.image_folder import (
    check_labels,
    list_pictures,
    note_numbers,
    with_path_fields,
)
from latentds.sources.kinds import note_strange
from latentds.sources.names import name_fields
from latentds.sources.picture import (
    Header,
    Listing,
    Picture,
    Regions,
    find_mask,
    first_line,
    orientation_of,
    read_mask,
)
from latentds.sources.side_tables import PAIRS, READ, with_tables
from latentds.sources.source import Inspection, Kept, Source, check_sizes
from latentds.store.patch_record import Patch, Place

TILED_PICTURES = 2  # decoded pictures kept while their tiles are cut
BITS_PER_SAMPLE = 258  # TIFF tag
HEAD_BYTES = 1 << 16
CONVERTED = ("1", "L", "P", "CMYK", "RGBA", "LA", "PA", "RGBX", "YCbCr")  # to RGB, and counted
LABELLED = re.compile(r"(.+\])-labelled\.\w+")  # a mask of QuPath's TileExporter
Pixels = tuple[np.ndarray, np.ndarray | None]  # picture and mask


class PictureFiles(Source):
    """Picture files below a folder, or one; class folders are labels, split folders splits.

    A subclass that finds its pictures elsewhere gives another `listing`, or other bytes.

    broken  pictures whose record cannot be read, and why
    """

    kind = "a folder of pictures"

    def __init__(self, options: SourceOptions) -> None:
        self.options, self.root = options, options.folder
        self.decoded: Kept[Pixels] = Kept(TILED_PICTURES)
        self.broken: dict[str, str] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.options,)  # without lock and pixels, for a worker elsewhere

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        source = cls(found.options)
        source.notes = found.choice[1] if found.is_open else ()
        if found.is_file:
            found.check_picture()
            source.kind = "a picture"
        return source

    def listing(self) -> Listing:
        options = self.options
        found = with_labelled(list_pictures(options.source, options.labels, options.split_folders))
        if found.others:  # tables may be among them
            found = with_tables(self.root, found, found.others, options.labels)
            found = dataclasses.replace(found, notes=(*found.notes, *note_strange(found.others)))
        lack, way = "lie in no class folder", "move them into one"
        tables = [path for path in found.others if PurePosixPath(path).name in READ | PAIRS]
        if tables:
            lack, way = f"{lack} and have no label in {tables[0]}", f"give them one there, or {way}"
        check_labels(self.root, found.pictures, options.labels, lack, way)
        return self.named(found)

    def named(self, found: Listing) -> Listing:
        """Pictures with what their sources tell: by --name-pattern, and by known rules.

        Known rules tell only what nothing else does.
        """
        pictures, options = found.pictures, self.options
        if options.name_pattern:
            fields = name_fields(options.name_pattern, options.labels)
            pictures = tuple(dataclasses.replace(p, **fields(p.source)) for p in pictures)
        named = tuple(map(with_path_fields, pictures))
        told = note_numbers(p.source for p in named if p.x is None and not options.name_pattern)
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
        mask = self.mask_file(picture, header.size_px)
        return image, None if mask is None else read_mask(mask, header.size_px)


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
    note = f"taken for masks, as QuPath's: {number_of(len(masks), 'picture')} named ]-labelled"
    return dataclasses.replace(found, pictures=pictures, notes=(*found.notes, note))


class PicturesInFiles(PictureFiles):
    """Pictures inside files of a folder, or inside one file; a picture's source is `file/...`."""

    def __init__(self, options: SourceOptions, files: Sequence[str]) -> None:
        super().__init__(options)
        self.files = dict.fromkeys(files)  # in order, and found at once

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.options, tuple(self.files))

    def row_of(self, picture: Picture) -> tuple[str, int]:
        file, _, row = picture.source.rpartition("/")
        return file, int(row)


@contextlib.contextmanager
def opened(file: Path | BinaryIO, max_px: int, verb: str) -> Iterator[Image.Image]:
    """A picture whose mode and size can be converted; UnusableError (without the name) else."""
    try:
        with open_picture(file) as image:
            check_mode(image.mode)
            if image.width * image.height > max_px:
                raise UnusableError(
                    f"{image.width}x{image.height} px is more than --max-px {max_px}", "too_large"
                )
            yield image
    except DECODE_ERRORS as error:
        reason: Reason = "truncated" if "truncated" in str(error) else "unreadable"
        raise UnusableError(f"cannot be {verb} ({first_line(error)})", reason) from error


def read_header(file: Path | BinaryIO, max_px: int) -> Header:
    """Size, mode and coding, no pixel decoded, of a path or an open file; raises as `opened`."""
    with opened(file, max_px, "read") as image:
        check_depth(image)
        size = file.stat().st_size if isinstance(file, Path) else file.seek(0, io.SEEK_END)
        turn = orientation_of(image) if "exif" in image.info else 1
        return Header(image.size[::-1], image.mode, describe_encoding(image), size, 0, turn)


def read_picture(file: Path | BinaryIO, max_px: int) -> tuple[np.ndarray, str]:
    """Pixels uint8 (H, W, 3) and the mode they were converted from; raises as `opened`."""
    with opened(file, max_px, "decoded") as image:
        image.load()
        check_alpha(image)
        return np.asarray(image.convert("RGB")), image.mode


def unsupported(words: str) -> UnusableError:
    return UnusableError(words, "unsupported")


def check_mode(mode: str) -> None:
    """Refuse what has more than 8 bits or no way to RGB."""
    if mode[0] in "IF":
        raise unsupported(
            f"mode {mode} (16-bit or float); convert to 8-bit RGB with a scaling you choose"
        )
    if mode not in ("RGB", *CONVERTED):
        raise unsupported(f"mode {mode}; convert to RGB")


def check_depth(image: Image.Image) -> None:
    """Refuse several pages, and over 8 bits a channel, which Pillow opens as 8 all the same."""
    pages = getattr(image, "n_frames", 1)
    if pages > 1:
        raise unsupported(f"has {pages} pages; split it into one file a page")
    bits = bits_a_channel(image)
    if bits > 8:
        raise unsupported(
            f"has {bits} bits a channel; convert to 8-bit RGB with a scaling you choose"
        )


def bits_a_channel(image: Image.Image) -> int:
    """Bits of an opened picture's widest channel as its file has them, 8 where it does not say.

    Pillow opens files of more as 8-bit RGB, by a scaling of its own, or (planar TIFF) as noise.
    """
    tags = getattr(image, "tag_v2", None)
    if tags is not None:  # TIFF
        return int(np.max(tags.get(BITS_PER_SAMPLE, 8)))
    tiles = getattr(image, "tile", [])  # (decoder, box, offset, arguments with the raw mode)
    if any(";16" in str(tile[3]) or "16" in str(tile[0]) for tile in tiles):
        return 16
    largest = [tile[3][1] for tile in tiles if tile[0] in ("ppm", "ppm_plain")
               and isinstance(tile[3], tuple) and len(tile[3]) > 1]  # fmt: skip
    if largest:  # PPM says the largest value
        return max(int(value).bit_length() for value in largest)
    return box_bits(image) if image.format in ("JPEG2000", "AVIF") else 8


def box_bits(image: Image.Image) -> int:
    """Bits of JPEG 2000 or AVIF, from the box or marker near its beginning that tells."""
    file: BinaryIO | None = getattr(image, "fp", None)
    if file is None:
        return 8
    place = file.tell()
    file.seek(0)
    head = file.read(HEAD_BYTES)
    file.seek(place)
    if image.format == "AVIF":
        at = head.find(b"av1C", 0, -3)
        return 8 if at < 0 or not head[at + 6] & 0x40 else 12 if head[at + 6] & 0x20 else 10
    at = head.find(b"\xff\x4f\xff\x51")  # SOC, SIZ: Csiz at 38 of it, then 3 bytes a component
    if at < 0 or len(head) < at + 45:
        return 8
    count = int.from_bytes(head[at + 40 : at + 42], "big")
    depths = head[at + 42 : at + 42 + 3 * count : 3]
    return max([(depth & 0x7F) + 1 for depth in depths], default=8)


def check_alpha(image: Image.Image) -> None:
    """Refuse real transparency: which colour lies behind it is not ours to guess."""
    transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    if transparent and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        raise unsupported("has transparent pixels; flatten it onto a background first")


def describe_encoding(image: Image.Image) -> str:
    """`png`, `webp`, ..., or `jpeg:q=75:4:2:0` where the tables are libjpeg's at that quality."""
    name = (image.format or "unknown").lower()
    if name != "jpeg":
        return name
    from PIL import JpegImagePlugin

    sampling = {0: "4:4:4", 1: "4:2:2", 2: "4:2:0"}.get(
        JpegImagePlugin.get_sampling(image), "other"
    )
    return f"jpeg:q={jpeg_quality(getattr(image, 'quantization', {}))}:{sampling}"


def jpeg_quality(tables: dict[int, Any]) -> str:
    """libjpeg quality whose luma table (first two rows) is the file's, `?` where there is none."""
    luma, at_50 = np.asarray(tables.get(0, ()))[:16], np.array(JPEG_LUMA_AT_50[:16])
    for quality in range(100, 0, -1):
        scale = 5000 // quality if quality < 50 else 200 - 2 * quality
        expected = np.clip((at_50 * scale + 50) // 100, 1, 255)
        if len(luma) == 16 and (luma == expected).all():
            return str(quality)
    return "?"


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
