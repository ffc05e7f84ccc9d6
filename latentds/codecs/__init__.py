"""Image codecs with the same methods, to set latents beside what everyone has."""

from __future__ import annotations

from latentds.codecs.formats import FORMATS, is_available
from latentds.codecs.latent import LatentCodec, draw_samples, latent_bytes, with_quantizer
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

__all__ = [
    "CodecSpec",
    "FORMATS",
    "FittedQuality",
    "LatentCodec",
    "LatentSpec",
    "PictureCodec",
    "PictureSpec",
    "QuantizerSpec",
    "draw_samples",
    "fit_to_bytes",
    "is_available",
    "latent_bytes",
    "make_picture_codec",
    "parse_codec",
    "parse_codecs",
    "parse_quantizer",
    "with_quantizer",
]


def make_picture_codec(spec: PictureSpec) -> PictureCodec:
    """The codec of a picture format; ValueError while its bytes are open (`spec.at` sets them)."""
    return PictureCodec(spec.name, spec.quality, spec.max_bytes, spec.mean_bytes)
