"""An autoencoder and a quantizer as a codec: what a data set stores, without its container.

A codebook is one for a whole data set and not counted. The shards of a data set store a byte a code
whatever K is; here codes are packed, so that fewer levels are counted as fewer bytes.
"""
# B batch, C latent channels, K levels of a codebook, M values a channel, H W pixels, h w cells

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from latentds.autoencoders.autoencoder import Autoencoder, AutoencoderCard, latent_cells
from latentds.codecs.naming import RECORDS, QuantizerSpec, latent_text, parse_quantizer
from latentds.codecs.picture_codecs import check_picture
from latentds.codecs.refining import refine
from latentds.errors import ContractError, FormatError, ShapeError, WeightsError
from latentds.quantizers.additive_fit import fit_additive
from latentds.quantizers.codebooks import shipped_records
from latentds.quantizers.entropy.record_codebook import EntropyCodebook
from latentds.quantizers.scalar import MAX_LEVELS, AnyCodebook, Codebook
from latentds.quantizers.scalar_fit import fit_codebook

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


@dataclasses.dataclass(frozen=True, eq=False)
class LatentCodec:
    """Patches of one size to the bytes of their latents and back.

    autoencoder  on the device it is to run on
    patch_px     (H, W) of every patch; bytes do not tell it
    batch_size   patches the autoencoder sees at once
    """

    autoencoder: Autoencoder
    quantizer: Quantizer
    patch_px: tuple[int, int]
    batch_size: int = 16

    @property
    def card(self) -> AutoencoderCard:
        return self.autoencoder.card

    @property
    def name(self) -> str:
        """The autoencoder's own name and the quantizer, for example tiny-v1+kmeans."""
        return latent_text(self.card.name, self.quantizer.spec.text)

    @property
    def patch_bytes(self) -> int:
        shape = latent_shape(self.card, self.patch_px)
        return packed_bytes(self.quantizer.spec, shape)

    def encode(self, image: np.ndarray) -> bytes:
        return self.encode_batch([image])[0]

    def decode(self, encoded: bytes) -> np.ndarray:
        return self.decode_batch([encoded])[0]

    def encode_batch(self, images: Sequence[np.ndarray]) -> list[bytes]:
        """The bytes of every picture's latents; WeightsError for latents that are not finite."""
        if not images:
            return []
        latents, steps = self.latents(images), self.quantizer.spec.refine
        return self.quantizer.pack(self.refined(latents, images, steps) if steps else latents)

    def refined(self, latents: Tensor, images: Sequence[np.ndarray], steps: int) -> Tensor:
        """Latents float32 (B, C, h, w) of the pictures for better codes, on the CPU."""
        codebook = getattr(self.quantizer, "codebook", None)
        if codebook is None:
            raise ContractError(f"{self.name}: refinement is for codes of a codebook")
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        device = getattr(self.autoencoder, "device", "cpu")
        parts = [
            refine(own.to(device), part.to(device).float() / 255, self.autoencoder, codebook, steps)
            for own, part in zip(
                torch.split(latents, self.batch_size),
                torch.split(pixels, self.batch_size),
                strict=True,
            )
        ]
        return torch.cat(parts).cpu()

    @torch.no_grad()
    def decode_batch(self, files: Sequence[bytes]) -> list[np.ndarray]:
        """The pictures uint8 (H, W, 3) of such bytes; FormatError where they are none."""
        if not files:
            return []
        height, width = self.patch_px
        parts = torch.split(self.latents_of(files), self.batch_size)
        images = torch.cat([self.autoencoder.decode(part) for part in parts])
        return to_pictures(images[:, :, :height, :width].float())  # the padding cut off

    @torch.no_grad()
    def latents(self, images: Sequence[np.ndarray]) -> Tensor:
        """Latents float32 (B, C, h, w) of pictures, on the CPU, not quantized."""
        for image in images:
            check_picture(image)
            if image.shape[:2] != self.patch_px:
                raise ShapeError(f"picture has {image.shape[:2]} px, this codec {self.patch_px}")
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        latents = [
            self.autoencoder.encode(part.float().div(255)).float().cpu()
            for part in torch.split(pixels, self.batch_size)
        ]
        error = WeightsError(f"{self.card.name}: latents contain NaN or infinity; see its weights")
        return check_finite(torch.cat(latents), error)

    def latents_of(self, files: Sequence[bytes]) -> Tensor:
        """Latents float32 (B, C, h, w) of the bytes of patches, on the CPU."""
        shape = latent_shape(self.card, self.patch_px)
        wrong = [len(encoded) for encoded in files if len(encoded) != self.patch_bytes]
        if wrong:
            raise FormatError(
                f"{wrong[0]} bytes, but {self.name} has {self.patch_bytes} for a patch of "
                f"{self.patch_px[0]}x{self.patch_px[1]} px"
            )
        error = FormatError(f"not the bytes of {self.name}: they stand for NaN or infinity")
        return check_finite(self.quantizer.unpack(files, shape), error)


def with_quantizer(
    autoencoder: Autoencoder,
    quantizer: QuantizerSpec | str,
    *,
    patch_px: tuple[int, int],
    samples: np.ndarray | None = None,
    codebook: AnyCodebook | None = None,
    seed: int = 0,
) -> LatentCodec:
    """The codec of an autoencoder with a quantizer.

    samples   float32 (C, M) latents that a codebook is fitted to, as `draw_samples` lays them out
    codebook  used instead where given, for example one that was stored
    seed      of the subsample where there are more than a million values a row
    raises    ValueError where a codebook is needed and there is neither, ContractError for a
              codebook of another kind, number of levels, planes or bytes
    """
    spec = parse_quantizer(quantizer) if isinstance(quantizer, str) else quantizer
    card = autoencoder.card
    if not (spec.is_fitted or spec.kind == RECORDS):
        return LatentCodec(autoencoder, Floats(spec), patch_px)
    if codebook is None and spec.kind == RECORDS:
        codebook = shipped(spec, card, patch_px)
    elif codebook is None:
        if samples is None:
            raise ValueError(f"{card.name}+{spec.text}: needs a sample of latents or a codebook")
        if len(samples) != card.channels:
            raise ShapeError(f"samples have {len(samples)} channels, {card.name} {card.channels}")
        if spec.planes is not None:
            codebook = fit_additive(samples.T, spec.planes, seed=seed)[0]
        else:
            codebook = fit_codebook(samples, spec.kind, spec.levels or MAX_LEVELS, seed)[0]
    if codebook.text != spec.coder:
        raise ContractError(
            f"{card.name}+{spec.text}: the codebook is {codebook.text}, {codebook.summary}"
        )
    return LatentCodec(autoencoder, Codes(spec, codebook), patch_px)


def shipped(spec: QuantizerSpec, card: AutoencoderCard, patch_px: tuple[int, int]) -> AnyCodebook:
    """The tables of records that ship with the autoencoder; ContractError where none do."""
    stored = shipped_records(card.latent_id, latent_shape(card, patch_px), spec.record_bytes)
    if stored is None:
        raise ContractError(
            f"{card.name}+{spec.text}: no tables for entropy-coded records ship with it; tiny-v2 "
            "has some, and 'latentds convert --codebook rans' fits them to its input"
        )
    return stored.codebook


def draw_samples(latents: Tensor) -> np.ndarray:
    """Latents (B, C, h, w) as `fit_codebook` takes them: float32 (C, B * h * w)."""
    samples: np.ndarray = latents.float().cpu().transpose(0, 1).flatten(1).numpy()
    return samples


def to_pictures(images: Tensor) -> list[np.ndarray]:
    """Pictures uint8 (H, W, 3) of images (B, 3, H, W) in [0, 1]."""
    pixels = images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu()
    return list(pixels.contiguous().numpy())


def check_finite(latents: Tensor, error: Exception) -> Tensor:
    """The latents; raises the error where one is NaN or infinite."""
    if not bool(torch.isfinite(latents).all()):
        raise error
    return latents
