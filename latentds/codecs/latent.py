"""An autoencoder and a quantizer as a codec: what a data set stores, without its container."""
# B batch, C latent channels, M values a channel, H W pixels, h w latent cells

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from latentds.autoencoders.autoencoder import Autoencoder, AutoencoderCard
from latentds.codecs.naming import RECORDS, QuantizerSpec, latent_text, parse_quantizer
from latentds.codecs.picture_codecs import check_picture
from latentds.codecs.quantizers import Codes, Floats, Quantizer, latent_shape, packed_bytes
from latentds.codecs.refining import refine
from latentds.errors import ContractError, FormatError, ShapeError, WeightsError
from latentds.quantizers.additive import AdditiveCodebook
from latentds.quantizers.additive_fit import AdditiveReport, fit_additive
from latentds.quantizers.codebooks import shipped_records
from latentds.quantizers.scalar import MAX_LEVELS, AnyCodebook, Codebook
from latentds.quantizers.scalar_fit import FitReport, fit_codebook


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
        codebook = fit_quantizer(samples, spec, seed)[0]
    if codebook.text != spec.coder:
        raise ContractError(
            f"{card.name}+{spec.text}: the codebook is {codebook.text}, {codebook.summary}"
        )
    return LatentCodec(autoencoder, Codes(spec, codebook), patch_px)


def fit_quantizer(
    samples: np.ndarray, spec: QuantizerSpec, seed: int = 0
) -> tuple[Codebook | AdditiveCodebook, FitReport | AdditiveReport]:
    """The codebook of a quantizer for latents like float32 (C, M), and what it does to them."""
    if spec.planes is not None:
        return fit_additive(samples.T, spec.planes, seed=seed)
    return fit_codebook(samples, spec.kind, spec.levels or MAX_LEVELS, seed)


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
