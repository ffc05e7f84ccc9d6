"""Golden patches: a few codes with what they were and what they decoded to.

With them anyone can check a decoder.
"""
# G golden patches, H W pixels

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from PIL import Image

from latentds.autoencoders.autoencoder import Autoencoder, exact_arithmetic
from latentds.core.storage import open_picture
from latentds.errors import FormatError
from latentds.quantizers.scalar import AnyCodebook, dequantize
from latentds.store.format import GOLDEN, Contract
from latentds.store.packs import decode_table, encode_table

if TYPE_CHECKING:
    from torch import Tensor

MIN_GOLDEN, MAX_GOLDEN = 8, 32
PATCHES_A_GOLDEN = 1000
THUMBNAIL_PX = 64
PEAK = 255
# Largest difference of a decoded value, of 255, that another machine may show: fp32 sums in another
# order move values by far less than half a level, but rounding can then tip either way.
TOLERANCE_LEVELS = 2
# A decoder of the same latents (fine-tuned, small) may look different, but not this different, in
# dB.
THUMBNAIL_SLACK_DB = 3.0
MAX_GOLDEN_BYTES = 1 << 28
SCHEMA = pa.schema(
    [
        ("row", pa.uint64()),
        ("codes", pa.binary()),
        ("thumbnail_png", pa.binary()),
        ("decoded_png", pa.binary()),
        ("thumbnail_psnr_db", pa.float32()),
        ("tolerance_levels", pa.uint8()),
    ]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Golden:
    """Golden patches as read back.

    Rows (G,), codes (G, *codes_shape), decoded (G, H, W, 3), thumbnails, PSNR.
    """

    rows: np.ndarray
    codes: np.ndarray
    decoded: np.ndarray
    thumbnails: list[np.ndarray]
    thumbnail_psnr_db: np.ndarray
    tolerance_levels: int


def choose_rows(patches: int, seed: int) -> np.ndarray:
    """Rows of the golden patches: one a thousand, 8 to 32, drawn by `seed`, ascending."""
    count = min(patches, int(np.clip(patches // PATCHES_A_GOLDEN, MIN_GOLDEN, MAX_GOLDEN)))
    rng = np.random.default_rng([seed, 2])
    return np.sort(rng.choice(patches, count, replace=False))


def decode_pixels(
    codes: np.ndarray,
    codebooks: Sequence[AnyCodebook],
    autoencoder: Autoencoder,
    patch_px: tuple[int, int],
    books: np.ndarray | None = None,
) -> np.ndarray:
    """Decoded uint8 (G, H, W, 3) of codes (G, *codes_shape), one patch at a time.

    books  int64 (G,), which of the codebooks each patch has; None for the first
    """
    import torch

    decoded = np.empty((len(codes), *patch_px, 3), np.uint8)
    for place in range(len(codes)):
        codebook = codebooks[0 if books is None else int(books[place])]
        latents = dequantize(torch.from_numpy(codes[place : place + 1].copy()), codebook)
        decoded[place] = latents_pixels(latents, autoencoder, patch_px)
    return decoded


def latents_pixels(
    latents: Tensor, autoencoder: Autoencoder, patch_px: tuple[int, int]
) -> np.ndarray:
    """Decoded uint8 (H, W, 3) of one patch's latents (1, C, h, w)."""
    import torch

    height, width = patch_px
    with torch.no_grad(), exact_arithmetic():
        image = autoencoder.decode(latents)[0, :, :height, :width].float().cpu()
    pixels: np.ndarray = image.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return pixels


def encode_golden(
    rows: np.ndarray, codes: np.ndarray, originals: Sequence[np.ndarray], decoded: np.ndarray
) -> bytes:
    thumbnails = [shrink(image) for image in originals]
    columns = {
        "row": rows.astype(np.uint64),
        "codes": [patch.tobytes() for patch in codes],
        "thumbnail_png": [to_png(image) for image in thumbnails],
        "decoded_png": [to_png(image) for image in decoded],
        "thumbnail_psnr_db": [likeness_db(d, t) for d, t in zip(decoded, thumbnails, strict=True)],
        "tolerance_levels": [TOLERANCE_LEVELS] * len(rows),
    }
    return encode_table(pa.table(columns, schema=SCHEMA))


def read_golden_table(folder: Path, sha256: str | None = None) -> pa.Table:
    """The golden file's rows as they are stored; FormatError where it is damaged.

    sha256  as the manifest records it; None leaves it to who checks files one by one
    """
    path = folder / GOLDEN
    if not path.is_file() or path.stat().st_size > MAX_GOLDEN_BYTES:
        raise FormatError(f"{path}: missing or too large; fetch it anew")
    content = path.read_bytes()
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise FormatError(f"{path}: not of the hash that the manifest records; fetch it anew")
    return decode_table(content, str(path), SCHEMA)


def renumbered(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """A golden table whose patches stand at other rows of the patch table, sorted by them.

    rows  where each stands now, -1 where it is no longer there: such are left out
    """
    table = table.set_column(0, SCHEMA.field("row"), pa.array(rows.clip(0), pa.uint64()))
    order = np.argsort(rows, kind="stable")
    return table.take(order[rows[order] >= 0])


def no_golden() -> bytes:
    return encode_table(SCHEMA.empty_table())


def read_golden(
    folder: Path, contract: Contract, patches: int, sha256: str | None = None
) -> Golden:
    """The golden patches of a data set of `patches`; FormatError where the file is damaged.

    There may be none: all were removed, or no decoder was at hand when the set was made.
    """
    codes_shape, patch_px = contract.codes_shape, contract.patch_px
    path = folder / GOLDEN
    table = read_golden_table(folder, sha256).to_pydict()
    thumbnail_px = shrink(np.zeros((*patch_px, 3), np.uint8)).shape[:2]
    try:
        if len(table["row"]) > MAX_GOLDEN or max(table["row"], default=-1) >= patches:
            raise FormatError(f"{path}: golden patches name rows that are not there")
        codes = [np.frombuffer(patch, np.uint8).reshape(codes_shape) for patch in table["codes"]]
        decoded = [from_png(encoded, patch_px) for encoded in table["decoded_png"]]
        return Golden(
            rows=np.array(table["row"], np.int64),
            codes=np.array(codes, np.uint8).reshape(-1, *codes_shape),
            decoded=np.array(decoded, np.uint8).reshape(-1, *patch_px, 3),
            thumbnails=[from_png(encoded, thumbnail_px) for encoded in table["thumbnail_png"]],
            thumbnail_psnr_db=np.array([float(value) for value in table["thumbnail_psnr_db"]]),
            tolerance_levels=max(table["tolerance_levels"], default=TOLERANCE_LEVELS),
        )
    except (OSError, SyntaxError, ValueError, TypeError, OverflowError) as error:
        raise FormatError(f"{path}: damaged golden patches ({error}); fetch it anew") from error


def shrink(image: np.ndarray) -> np.ndarray:
    """A thumbnail of at most 64 px a side, by area averaging."""
    picture = Image.fromarray(image)
    scale = THUMBNAIL_PX / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return np.asarray(picture.resize(size, Image.Resampling.BOX))


def psnr_db(image: np.ndarray, reference: np.ndarray) -> float:
    """PSNR in dB of uint8 (H, W, 3) pictures, peak 255; infinite for equal ones."""
    if np.array_equal(image, reference):
        return float("inf")
    error = np.square(reference.astype(np.float64) - image).mean()
    return float(10 * np.log10(PEAK**2 / error))


def likeness_db(decoded: np.ndarray, thumbnail: np.ndarray) -> float:
    """PSNR of a decoded picture to a thumbnail at the thumbnail's size, at most 99 dB."""
    return min(99.0, psnr_db(shrink(decoded), thumbnail))


def to_png(image: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def from_png(encoded: bytes, size_px: tuple[int, ...]) -> np.ndarray:
    """uint8 (H, W, 3) from PNG bytes of just that size, which is checked before decoding."""
    with open_picture(io.BytesIO(encoded), ["PNG"]) as image:
        if image.size != size_px[::-1]:
            raise ValueError(f"a picture of {image.size} px where {size_px[::-1]} were expected")
        return np.asarray(image.convert("RGB"))
