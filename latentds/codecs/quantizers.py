"""Latents to bytes and back: floats, or the codes of a codebook at ceil(log2 K) bits a value.

The codebook is one for a whole data set and not counted. The shards of a data set store a byte a
code whatever K is; here codes are packed, so that fewer levels are counted as fewer bytes.
"""
# B batch, C latent channels, K levels of a codebook, h w latent cells

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from latentds.autoencoders.autoencoder import AutoencoderCard, latent_cells
from latentds.codecs.naming import QuantizerSpec, parse_quantizer
from latentds.errors import ContractError, FormatError, ShapeError
from latentds.quantizers.entropy.record_codebook import EntropyCodebook
from latentds.quantizers.scalar import AnyCodebook, Codebook

LatentShape = tuple[int, int, int]  # C, h, w


@dataclasses.dataclass(frozen=True)
class Floats:
    """Latents as they are: 4 bytes a value as the paper counts, or 2."""

    spec: QuantizerSpec

    @property
    def dtype(self) -> str:
        return f"<f{self.spec.bits // 8}"

    def pack(self, latents: Tensor) -> list[bytes]:
        """The values, rounded where they have 16 bits."""
        with np.errstate(over="ignore"):
            values = latents.numpy().astype(self.dtype)
        if not np.isfinite(values).all():
            raise ContractError(
                f"latents of up to {float(latents.abs().max()):g} overflow {self.spec.text}; "
                "take another quantizer, or none"
            )
        return [patch.tobytes() for patch in values]

    def unpack(self, files: Sequence[bytes], shape: LatentShape) -> Tensor:
        values = np.frombuffer(b"".join(files), self.dtype).astype(np.float32)
        return torch.from_numpy(values).view(-1, *shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
    """The codes of a codebook: levels in as many bits as tell them apart, all others in bytes."""

    spec: QuantizerSpec
    codebook: AnyCodebook

    @property
    def bits(self) -> int:
        return self.spec.bits if isinstance(self.codebook, Codebook) else 8

    def pack(self, latents: Tensor) -> list[bytes]:
        codes = self.codebook.quantize(latents).flatten(1).numpy()
        return [patch.tobytes() for patch in pack_bits(codes, self.bits)]

    def unpack(self, files: Sequence[bytes], shape: LatentShape) -> Tensor:
        """What the codes stand for; FormatError for codes that the codebook has not."""
        codes_shape = self.codebook.codes_shape_of(shape)
        packed = np.frombuffer(b"".join(files), np.uint8).reshape(len(files), -1)
        unpacked = unpack_bits(packed, self.bits, math.prod(codes_shape))
        codes = unpacked.reshape(-1, *codes_shape)
        fault = self.codebook.find_fault(codes)
        stored = torch.from_numpy(codes)
        if not fault and isinstance(self.codebook, EntropyCodebook):
            is_whole = bool(self.codebook.integers(stored).intact.all())
            fault = None if is_whole else "a damaged record"
        if fault:
            raise FormatError(f"not the bytes of {self.spec.text}: {fault}")
        return self.codebook.dequantize(stored)


Quantizer = Floats | Codes  # latents of patches to bytes and back


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 (B, bytes): codes uint8 (B, values) at so many bits, the most significant first."""
    digits = np.unpackbits(codes[..., None], axis=2)[..., 8 - bits :]
    return np.packbits(digits.reshape(len(codes), -1), axis=1)


def unpack_bits(packed: np.ndarray, bits: int, values: int) -> np.ndarray:
    """Codes uint8 (B, values) of what `pack_bits` made of them."""
    digits = np.unpackbits(packed, axis=1, count=values * bits).reshape(len(packed), values, bits)
    padded = np.pad(digits, ((0, 0), (0, 0), (8 - bits, 0)))
    return np.packbits(padded, axis=2).reshape(len(packed), values)


def packed_bytes(quantizer: QuantizerSpec, shape: LatentShape) -> int:
    """Bytes of a patch's latents (C, h, w), by arithmetic."""
    if quantizer.record_bytes is not None:
        return quantizer.record_bytes
    if quantizer.planes is not None:
        return quantizer.planes * shape[1] * shape[2]
    return -(-math.prod(shape) * quantizer.bits // 8)


def latent_shape(card: AutoencoderCard, patch_px: tuple[int, int]) -> LatentShape:
    """(C, h, w) of the latents of (H, W) patches; ShapeError where the card does not know."""
    if not card.channels or not card.factor:
        raise ShapeError(
            f"{card.name}: its card tells no channels or factor before its weights are loaded"
        )
    return card.channels, *latent_cells(patch_px, card.factor)


def latent_bytes(
    card: AutoencoderCard, patch_px: tuple[int, int], quantizer: QuantizerSpec | str
) -> int:
    """Bytes of the latents of one (H, W) patch, by arithmetic: no weights, no picture.

    quantizer  float32 is 4 bytes a value, K levels are ceil(log2 K) bits a value. Codebooks are not
               counted.
    """
    spec = parse_quantizer(quantizer) if isinstance(quantizer, str) else quantizer
    return packed_bytes(spec, latent_shape(card, patch_px))
