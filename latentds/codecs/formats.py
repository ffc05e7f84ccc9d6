"""The picture formats that latents are compared with: their encoders, settings and qualities."""
# H W pixels

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import io
import struct
import threading
from collections.abc import Callable

import numpy as np
from PIL import Image

from latentds.core.storage import open_picture

DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
# ITU-T T.81 tables K.1 and K.2, which libjpeg takes at quality 50.
JPEG_LUMA_AT_50 = (
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
)
JPEG_CHROMA_AT_50 = (
    *(17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99),
    *(24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99, 99, 99, 99),
    *(99,) * 32,
)
JPEG_TABLES_AT_50 = np.array([JPEG_LUMA_AT_50, JPEG_CHROMA_AT_50])
AVIF_THREADS = threading.Lock()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A picture format as it is compared here.

    label      what tables call it
    settings   what its files depend on beside the quality
    encode     bytes of a picture uint8 (H, W, 3) at a quality, on one thread where it has threads
    decode     the picture of such bytes, on one thread, too; one of DECODE_ERRORS where they are
               none
    qualities  lowest and highest; None for a lossless format, whose quality is ignored
    step       the smallest change of quality that a search looks at
    needs      the optional feature of Pillow, or the package, that it needs
    """

    label: str
    settings: str
    encode: Callable[[np.ndarray, float], bytes]
    decode: Callable[[bytes], np.ndarray]
    qualities: tuple[float, float] | None
    step: float = 1
    needs: str | None = None


def save_with_pillow(image: np.ndarray, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


def open_with_pillow(encoded: bytes, format: str) -> np.ndarray:
    """The picture of a file's bytes by Pillow, which may hold that format only."""
    with open_picture(io.BytesIO(encoded), [format]) as image:
        return np.asarray(image.convert("RGB"))


def encode_jpeg(
    image: np.ndarray, quality: float, subsampling: str, shapes: np.ndarray = JPEG_TABLES_AT_50
) -> bytes:
    """JPEG by libjpeg's rule for its tables, carried on to qualities between whole numbers.

    shapes  (2, 64): the tables of luma and chroma at quality 50, row by row
    """
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    if quality == int(quality):
        scale = int(scale)  # as libjpeg rounds it
    tables = [np.clip((table * scale + 50) // 100, 1, 255).astype(int).tolist() for table in shapes]
    return save_with_pillow(image, "JPEG", qtables=tables, subsampling=subsampling, optimize=True)


def encode_unfitted(_: np.ndarray, __: float) -> bytes:
    """No picture: what fits the tables puts `encode_jpeg` with them in this one's place."""
    raise ValueError("jpeg-fitted: has no tables; 'latentds bench fidelity' fits some")


def encode_avif(image: np.ndarray, quality: float, subsampling: str, speed: int) -> bytes:
    """AVIF by libavif; it has 64 quantizers, so that some neighbouring qualities are one file."""
    options = {"speed": speed, "subsampling": subsampling, "max_threads": 1}
    return save_with_pillow(image, "AVIF", quality=round(quality), **options)


def decode_avif(encoded: bytes) -> np.ndarray:
    """The picture of AVIF bytes on one thread; Pillow would take one a core."""
    from PIL import AvifImagePlugin

    with AVIF_THREADS:  # Pillow has no other way to say it, and asks when it opens a file
        before = AvifImagePlugin.DEFAULT_MAX_THREADS
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
        try:
            return open_with_pillow(encoded, "AVIF")
        finally:
            AvifImagePlugin.DEFAULT_MAX_THREADS = before


def encode_jpeg2000(image: np.ndarray, quality: float) -> bytes:
    """JPEG 2000 of `quality` dB of PSNR, by the encoder's own estimate.

    Whole coding passes are left out, of which a 256 px picture has few: steps of up to a tenth of
    the bytes at 4 KB.
    """
    return save_with_pillow(
        image, "JPEG2000", quality_mode="dB", quality_layers=[quality], irreversible=True, mct=1,
        no_jp2=True,
    )  # fmt: skip


def encode_jpegxl(image: np.ndarray, quality: float) -> bytes:
    """JPEG XL by libjxl's scale of qualities, which imagecodecs would round to whole numbers."""
    import imagecodecs

    # JxlEncoderDistanceFromQuality of libjxl 0.11
    distance = 0.1 + (100 - quality) * 0.09
    if quality < 30:
        distance = 53 / 3000 * quality**2 - 23 / 20 * quality + 25
    encoded = imagecodecs.jpegxl_encode(
        image, distance=distance, effort=7, lossless=False, usecontainer=False, numthreads=1
    )
    return bytes(encoded)


def decode_jpegxl(encoded: bytes) -> np.ndarray:
    import imagecodecs

    try:
        image = np.asarray(imagecodecs.jpegxl_decode(encoded, numthreads=1))
    except imagecodecs.JpegxlError as error:
        raise ValueError(str(error)) from error
    if image.dtype != np.uint8 or image.shape[2:] != (3,):
        raise ValueError(f"a {image.dtype} picture of shape {image.shape}")
    return image


JPEG = functools.partial(
    Format,
    decode=functools.partial(open_with_pillow, format="JPEG"),
    qualities=(1, 100),
    step=0.1,
)
AVIF = functools.partial(Format, decode=decode_avif, qualities=(0, 100), needs="avif")
FORMATS = {
    "png": Format(
        label="PNG",
        settings="lossless, zlib level 9",
        encode=lambda image, _: save_with_pillow(image, "PNG", optimize=True),
        decode=functools.partial(open_with_pillow, format="PNG"),
        qualities=None,
    ),
    "jpeg": JPEG(
        label="JPEG 4:2:0",
        settings="libjpeg's tables, 4:2:0, baseline, optimized Huffman tables",
        encode=functools.partial(encode_jpeg, subsampling="4:2:0"),
    ),
    "jpeg444": JPEG(
        label="JPEG 4:4:4",
        settings="libjpeg's tables, 4:4:4, baseline, optimized Huffman tables",
        encode=functools.partial(encode_jpeg, subsampling="4:4:4"),
    ),
    "jpeg-fitted": JPEG(
        label="JPEG, fitted tables",
        settings="4:2:0, baseline, optimized Huffman tables; quantization tables fitted",
        encode=encode_unfitted,
    ),
    "webp": Format(
        label="WebP",
        settings="libwebp, lossy, 4:2:0, method 6",  # the most thorough one
        encode=lambda image, quality: save_with_pillow(image, "WEBP", quality=quality, method=6),
        decode=functools.partial(open_with_pillow, format="WEBP"),
        qualities=(0, 100),
        step=0.05,
        needs="webp",
    ),
    "avif": AVIF(
        label="AVIF",
        settings="libavif, 4:2:0, 8 bits, speed 4, one thread both ways",
        encode=functools.partial(encode_avif, subsampling="4:2:0", speed=4),
    ),
    "avif444": AVIF(  # the best that AVIF does
        label="AVIF 4:4:4",
        settings="libavif, 4:4:4, 8 bits, speed 2, one thread both ways",
        encode=functools.partial(encode_avif, subsampling="4:4:4", speed=2),
    ),
    "jxl": Format(
        label="JPEG XL",
        settings="libjxl, lossy VarDCT, effort 7, no container",
        encode=encode_jpegxl,
        decode=decode_jpegxl,
        qualities=(0, 100),
        step=0.05,
        needs="imagecodecs",
    ),
    "j2k": Format(
        label="JPEG 2000",
        settings="OpenJPEG, 9/7, one tile, 64x64 blocks, qualities in dB, no container",
        encode=encode_jpeg2000,
        decode=functools.partial(open_with_pillow, format="JPEG2000"),
        qualities=(10, 60),
        step=0.01,
        needs="jpg_2000",
    ),
}


def is_available(format: str) -> bool:
    """Whether the libraries installed here write and read the format."""
    needs = FORMATS[format].needs
    if needs == "imagecodecs":
        if importlib.util.find_spec(needs) is None:
            return False
        import imagecodecs

        return bool(imagecodecs.JPEGXL.available)  # not all are built with libjxl
    from PIL import features

    return needs is None or bool(features.check(needs))
