"""One picture file to uint8 RGB, or a reason why not; how the file was coded; a patch of it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from latentds.codecs.formats import DECODE_ERRORS
from latentds.core.storage import known_formats, open_picture
from latentds.errors import Reason, UnusableError
from latentds.sources.cut_options import SourceOptions
from latentds.sources.picture import Header

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
BITS_PER_SAMPLE = 258  # TIFF tag
CONVERTED = ("1", "L", "P", "CMYK", "RGBA", "LA", "PA", "RGBX", "YCbCr")  # to RGB, and counted
# First quantizer of the luma table in libjpeg's quality scale: table 16 at quality 50.
JPEG_LUMA_AT_50 = np.array(
    [16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55], dtype=np.int64
)  # ITU-T T.81 table K.1, first two rows


def picture_suffixes() -> set[str]:
    """Lower-case file suffixes of the formats that are opened as pictures."""
    suffixes, formats = Image.registered_extensions(), known_formats()
    return {suffix for suffix, name in suffixes.items() if name in formats}


def read_header(file: Path | BinaryIO, max_px: int) -> Header:
    """Size, mode and coding, no pixel decoded, of a path or an open file.

    InputError (without the name) where it cannot be converted.
    """
    try:
        with open_picture(file) as image:
            check_mode(image.mode)
            check_depth(image)
            width, height = image.size
            if width * height > max_px:
                raise UnusableError(
                    f"{width}x{height} px is more than --max-px {max_px}", "too_large"
                )
            return Header((height, width), image.mode, describe_encoding(image), size_of(file))
    except DECODE_ERRORS as error:
        raise UnusableError(f"cannot be read ({first_line(error)})", reason_of(error)) from error


def size_of(file: Path | BinaryIO) -> int:
    return file.stat().st_size if isinstance(file, Path) else file.seek(0, io.SEEK_END)


def read_picture(file: Path | BinaryIO, max_px: int) -> tuple[np.ndarray, str]:
    """Pixels uint8 (H, W, 3) and the mode they were converted from; InputError (without name)."""
    try:
        with open_picture(file) as image:
            check_mode(image.mode)
            if image.width * image.height > max_px:
                raise UnusableError(
                    f"{image.width}x{image.height} px is more than --max-px {max_px}", "too_large"
                )
            image.load()
            check_alpha(image)
            return np.asarray(image.convert("RGB")), image.mode
    except DECODE_ERRORS as error:
        raise UnusableError(f"cannot be decoded ({first_line(error)})", reason_of(error)) from error


def find_mask(folder: Path, source: str, size_px: tuple[int, int]) -> Path:
    """The mask of a picture below `folder`, its header checked; InputError (without the name)."""
    stem = folder / source
    paths = [stem.with_suffix(suffix) for suffix in MASK_SUFFIXES]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UnusableError(
            f"has no mask under --masks ({Path(source).with_suffix('.png')})", "mask"
        )
    try:
        with open_picture(path) as image:
            check_mask(image, size_px)
    except DECODE_ERRORS as error:
        raise UnusableError(f"its mask cannot be read ({first_line(error)})", "mask") from error
    return path


def check_mask(image: Image.Image, size_px: tuple[int, int]) -> None:
    """Refuse masks that are not 8-bit grey or palette, or not of the picture's size."""
    if image.mode not in ("L", "1", "P"):
        raise UnusableError(
            f"its mask is of mode {image.mode}; 8-bit grey or palette masks only", "mask"
        )
    if image.size != size_px[::-1]:
        raise UnusableError(f"its mask is {image.size} px, the picture {size_px[::-1]}", "mask")


def read_mask(path: Path, size_px: tuple[int, int]) -> np.ndarray:
    """Mask uint8 (H, W) of just that size, values untouched; InputError (without the name)."""
    try:
        with open_picture(path) as image:
            check_mask(image, size_px)
            # A palette's indices are the classes; its colours are for looking at.
            mask = np.asarray(image)
            return mask.astype(np.uint8) * (255 if image.mode == "1" else 1)
    except DECODE_ERRORS as error:
        raise UnusableError(f"its mask cannot be decoded ({first_line(error)})", "mask") from error


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
    """Refuse several pages, and 16 bits a channel, which Pillow opens as 8-bit all the same."""
    pages = getattr(image, "n_frames", 1)
    if pages > 1:
        raise unsupported(f"has {pages} pages; split it into one file a page")
    # Pillow scales a PNG's 16 bits itself, and makes noise of those of a planar TIFF.
    tags, tiles = getattr(image, "tag_v2", {}), getattr(image, "tile", [])
    is_16_bit = any(";16" in str(tile[3]) for tile in tiles)
    bits = 16 if is_16_bit else int(np.max(tags.get(BITS_PER_SAMPLE, 8)))
    if bits > 8:
        raise unsupported(
            f"has {bits} bits a channel; convert to 8-bit RGB with a scaling you choose"
        )


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
    luma = np.asarray(tables.get(0, ()))[:16]
    for quality in range(100, 0, -1):
        scale = 5000 // quality if quality < 50 else 200 - 2 * quality
        expected = np.clip((JPEG_LUMA_AT_50 * scale + 50) // 100, 1, 255)
        if len(luma) == 16 and (luma == expected).all():
            return str(quality)
    return "?"


def reason_of(error: Exception) -> Reason:
    return "truncated" if "truncated" in str(error) else "unreadable"


def first_line(error: Exception) -> str:
    """An error's first line; Pillow repeats the path in some, which a manifest must not carry."""
    text = str(error).strip().splitlines()
    line = text[0] if text else type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        line = error.strerror
    return "not a picture Pillow knows" if line.startswith("cannot identify image") else line


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
