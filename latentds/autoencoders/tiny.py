"""The `tiny` network: f8, 4 or more channels, every layer at a quarter of the resolution or below.

Pixels enter by pixel-unshuffle and leave by pixel-shuffle, so no convolution ever runs on a
full-size image: that, not a smaller width, is what makes decoding cheap (7.3 GFLOP a 256 px patch
against 622 for SD-1.5's decoder).
"""

from __future__ import annotations

import dataclasses
from importlib import resources
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional

from latentds.autoencoders.autoencoder import (
    AutoencoderCard,
    NetworkAutoencoder,
    hash_tensors,
    latent_identity,
)
from latentds.autoencoders.cards import TINY

CHANNELS = 4  # of tiny-v1
WIDTHS = (96, 160)  # of its encoder
BOUND = 3.0  # latents lie in (-3, 3)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions on an identity path.

    No normalization, so a patch never sees its batch.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.conv2(functional.silu(self.conv1(functional.silu(x))))
        return x + residual


class TinyEncoder(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to latents (B, C, H/8, W/8).

    channels    C
    widths      of the layers at a quarter and at an eighth of the resolution
    is_bounded  latents in (-3, 3), for codes that cover a range; entropy-coded ones need none
    """

    def __init__(
        self,
        channels: int = CHANNELS,
        widths: tuple[int, int] = WIDTHS,
        is_bounded: bool = True,
    ) -> None:
        super().__init__()
        quarter, eighth = widths
        self.channels, self.widths, self.is_bounded = channels, widths, is_bounded
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, quarter, 3, padding=1),
            ResidualBlock(quarter),
            ResidualBlock(quarter),
            nn.Conv2d(quarter, eighth, 3, stride=2, padding=1),
            ResidualBlock(eighth),
            ResidualBlock(eighth),
            nn.Conv2d(eighth, channels, 3, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        latents: Tensor = self.layers(images * 2 - 1)
        return BOUND * torch.tanh(latents / BOUND) if self.is_bounded else latents


class TinyDecoder(nn.Module):
    """Latents (B, C, h, w) to images (B, 3, 8h, 8w), nominally in [0, 1] and not clamped."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 192, 3, padding=1),
            ResidualBlock(192),
            ResidualBlock(192),
            ResidualBlock(192),
            nn.Conv2d(192, 384, 1),
            nn.PixelShuffle(2),
            ResidualBlock(96),
            ResidualBlock(96),
            nn.Conv2d(96, 48, 3, padding=1),
            nn.PixelShuffle(4),
        )

    def forward(self, latents: Tensor) -> Tensor:
        images: Tensor = self.layers(latents) * 0.5 + 0.5
        return images


def weights_folder() -> Any:
    return resources.files("latentds.autoencoders") / "weights"


def load_tiny(card: AutoencoderCard = TINY) -> NetworkAutoencoder:
    """`tiny-v1` with the weights that ship with latentds."""
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for name, tensor in load((weights_folder() / "tiny-v1.safetensors").read_bytes()).items():
        part, _, own = name.partition(".")
        parts[part][own] = tensor.float()
    with torch.device("meta"):  # random weights, to be replaced, took most of the time
        encoder, decoder = TinyEncoder(), TinyDecoder()
    encoder.load_state_dict(parts["encoder"], assign=True)
    decoder.load_state_dict(parts["decoder"], assign=True)
    card = dataclasses.replace(
        card,
        latent_id=latent_identity(parts["encoder"], input_range=(-1, 1)),
        decoder_id=hash_tensors(parts["decoder"], {}),
    )
    # Two CPU cores decode up to 1.4 times as fast so; pictures to encode come with channels last.
    return NetworkAutoencoder(card, encoder, decoder.to(memory_format=torch.channels_last))
