"""Image codecs behind one protocol, to set latents beside what everyone has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from latentds.codecs.formats import FORMATS, is_available
from latentds.codecs.latent import LatentCodec, draw_samples, fit_quantizer, with_quantizer
from latentds.codecs.naming import (
    CodecSpec,
    LatentSpec,
    PictureSpec,
    QuantizerSpec,
    parse_codec,
    parse_codecs,
    parse_quantizer,
)
from latentds.codecs.picture_codecs import FittedQuality, PictureCodec, fit_to_bytes
from latentds.codecs.quantizers import latent_bytes

__all__ = [
    "Codec",
    "CodecSpec",
    "FORMATS",
    "FittedQuality",
    "LatentCodec",
    "LatentSpec",
    "PictureCodec",
    "PictureSpec",
    "QuantizerSpec",
    "draw_samples",
    "fit_quantizer",
    "fit_to_bytes",
    "is_available",
    "latent_bytes",
    "make_picture_codec",
    "parse_codec",
    "parse_codecs",
    "parse_quantizer",
    "with_quantizer",
]


class Codec(Protocol):
    """Pictures to bytes and back."""

    @property
    def name(self) -> str:
        """What its row is called, for example jpeg:75 or tiny-v1+kmeans."""
        ...

    def encode(self, image: np.ndarray) -> bytes:
        """Bytes of a uint8 (H, W, 3) picture."""
        ...

    def decode(self, encoded: bytes) -> np.ndarray:
        """Picture uint8 (H, W, 3) of those bytes; FormatError where they are not a codec's own."""
        ...

    def encode_batch(self, images: Sequence[np.ndarray]) -> list[bytes]:
        """Bytes of every picture; faster than one by one where there is a network."""
        ...

    def decode_batch(self, files: Sequence[bytes]) -> list[np.ndarray]:
        """Pictures of all those bytes."""
        ...


def make_picture_codec(spec: PictureSpec) -> PictureCodec:
    """The codec of a picture format; ValueError while its bytes are open (`spec.at` sets them)."""
    return PictureCodec(spec.name, spec.quality, spec.max_bytes, spec.mean_bytes)
