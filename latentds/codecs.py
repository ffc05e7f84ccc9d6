"""Image codecs behind one protocol, to set latents beside what everyone has.

JPEG, WebP, AVIF, and latents.
"""
# H W pixels

from __future__ import annotations

import dataclasses
import io
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from latentds.autoencoders.base import Autoencoder
from latentds.errors import missing_extra
from latentds.quantizer import Codebook, dequantize, quantize

QUALITIES = range(1, 96)


class Codec(Protocol):
    """Pictures to bytes and back."""

    name: str

    def encode(self, image: np.ndarray) -> bytes:
        """Bytes of a uint8 (H, W, 3) picture."""
        ...

    def decode(self, encoded: bytes) -> np.ndarray:
        """Picture uint8 (H, W, 3) of those bytes."""
        ...


@dataclasses.dataclass(frozen=True)
class PillowCodec:
    """A format of Pillow at one quality; JPEG is 4:2:0 with optimized Huffman tables."""

    format: str
    quality: int

    @property
    def name(self) -> str:
        """Format and quality, for example JPEG q20."""
        return f"{self.format} q{self.quality}"

    def encode(self, image: np.ndarray) -> bytes:
        """The file's bytes."""
        options: dict[str, object] = {"quality": self.quality}
        if self.format == "JPEG":
            options |= {"subsampling": "4:2:0", "optimize": True}
        if self.format == "AVIF":
            options |= {"speed": 4}
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, self.format, **options)
        return buffer.getvalue()

    def decode(self, encoded: bytes) -> np.ndarray:
        """The picture in a file's bytes."""
        with Image.open(io.BytesIO(encoded), formats=[self.format]) as image:
            return np.asarray(image.convert("RGB"))


@dataclasses.dataclass(frozen=True, eq=False)
class LatentCodec:
    """An autoencoder and a codebook: what a data set stores, without its container."""

    autoencoder: Autoencoder
    codebook: Codebook
    patch_px: tuple[int, int]

    @property
    def name(self) -> str:
        """The autoencoder's name."""
        return self.autoencoder.card.name

    def encode(self, image: np.ndarray) -> bytes:
        """Code bytes of a picture."""
        images = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float().div(255)
        return quantize(self.autoencoder.encode(images), self.codebook).numpy().tobytes()

    @torch.no_grad()
    def decode(self, encoded: bytes) -> np.ndarray:
        """The picture of code bytes."""
        (height, width), card = self.patch_px, self.autoencoder.card
        cells = (-(-height // card.factor), -(-width // card.factor))
        codes = torch.frombuffer(bytearray(encoded), dtype=torch.uint8).view(
            1, card.channels, *cells
        )
        images = self.autoencoder.decode(dequantize(codes, self.codebook))[0, :, :height, :width]
        return images.mul(255).round().byte().permute(1, 2, 0).numpy()


def is_available(format: str) -> bool:
    """Whether this Pillow writes the format."""
    from PIL import features

    return format == "JPEG" or bool(features.check(format.lower()))


def at_bytes(format: str, image: np.ndarray, target_bytes: int) -> tuple[PillowCodec, bytes]:
    """The codec whose file comes closest to `target_bytes` without exceeding it, and the file.

    The smallest quality's file, where even that is larger. Sizes grow with quality, so a bisection
    finds it.
    """
    if not is_available(format):
        raise missing_extra(f"{format} in Pillow", "bench")
    low, high = QUALITIES[0], QUALITIES[-1]
    best = PillowCodec(format, low)
    encoded = best.encode(image)
    while low <= high:
        middle = PillowCodec(format, (low + high) // 2)
        attempt = middle.encode(image)
        if len(attempt) <= target_bytes:
            best, encoded, low = middle, attempt, middle.quality + 1
        else:
            high = middle.quality - 1
    return best, encoded
