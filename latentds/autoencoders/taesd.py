"""TAESD-style autoencoders from their own pair of `.pth` files.

With and without TAEF2's mid-block GroupNorm. Topology after madebyollin/taesd (MIT): plain
nn.Sequential state dicts, images in [0, 1], latents unscaled.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from latentds.autoencoders.autoencoder import (
    AutoencoderCard,
    NetworkAutoencoder,
    hash_tensors,
    latent_identity,
)
from latentds.errors import WeightsError, first_words

WIDTH = 64
# What torch raises for files that are none of its own, or are damaged somewhere.
LOAD_ERRORS = (
    *(pickle.UnpicklingError, struct.error, EOFError, OSError, RuntimeError, ValueError),
    *(ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, MemoryError),
)


class Clamp(nn.Module):
    """Latents squashed to (-3, 3), the decoder's first step."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class TaesdBlock(nn.Module):
    """Three 3x3 convolutions on an identity path.

    A mid-block adds a grouped 1x1 bottleneck first.
    """

    def __init__(self, has_pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH)
        )
        self.pool = None
        if has_pool:
            self.pool = nn.Sequential(
                nn.Conv2d(WIDTH, 4 * WIDTH, 1, bias=False),
                nn.GroupNorm(4, 4 * WIDTH),
                nn.ReLU(),
                nn.Conv2d(4 * WIDTH, WIDTH, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, stride=stride, bias=bias)


def build_encoder(channels: int, has_pool: bool) -> nn.Sequential:
    """f8 encoder: three stride-2 groups of three blocks."""
    layers: list[nn.Module] = [conv(3, WIDTH), TaesdBlock()]
    for group in range(3):
        layers += [conv(WIDTH, WIDTH, stride=2, bias=False)]
        layers += [TaesdBlock(has_pool and group == 2) for _ in range(3)]
    return nn.Sequential(*layers, conv(WIDTH, channels))


def build_decoder(channels: int, has_pool: bool) -> nn.Sequential:
    """f8 decoder: three groups of nearest upsampling; indices as in the published files."""
    layers: list[nn.Module] = [Clamp(), conv(channels, WIDTH), nn.ReLU()]
    for group in range(3):
        layers += [TaesdBlock(has_pool and group == 0) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False)]
    return nn.Sequential(*layers, TaesdBlock(), conv(WIDTH, 3))


def find_pair(path: Path) -> tuple[Path, Path] | None:
    """The `*_encoder.pth` and `*_decoder.pth` in a folder or of a prefix; None if there is none."""
    if path.is_dir():
        encoders = sorted(path.glob("*_encoder.pth"))
        decoders = [Path(str(p).replace("_encoder.pth", "_decoder.pth")) for p in encoders]
        pairs = [pair for pair in zip(encoders, decoders, strict=True) if pair[1].is_file()]
        if len(pairs) > 1:
            names = ", ".join(str(p).removesuffix("_encoder.pth") for p, _ in pairs)
            raise WeightsError(f"{path}: several pairs; pass one of {names}")
        return pairs[0] if pairs else None
    encoder, decoder = (Path(f"{path}_{part}.pth") for part in ("encoder", "decoder"))
    return (encoder, decoder) if encoder.is_file() and decoder.is_file() else None


def load_pair(encoder_path: Path, decoder_path: Path) -> NetworkAutoencoder:
    """A TAESD-style autoencoder; WeightsError where a file is not the f8 topology."""
    encoder_tensors, decoder_tensors = read_tensors(encoder_path), read_tensors(decoder_path)
    channels = last_bias(encoder_tensors, encoder_path)
    encoder = build_encoder(channels, has_pool(encoder_tensors))
    decoder = build_decoder(channels, has_pool(decoder_tensors))
    fill(encoder, encoder_tensors, encoder_path)
    fill(decoder, decoder_tensors, decoder_path)
    card = AutoencoderCard(
        name=encoder_path.name.removesuffix("_encoder.pth"),
        class_name="TAESD",
        channels=channels,
        factor=8,
        licence="see the source of the files",
        latent_id=latent_identity(encoder_tensors, input_range=(0, 1)),
        decoder_id=hash_tensors(decoder_tensors, {}),
    )
    return NetworkAutoencoder(card, encoder, decoder)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The fp32 state dict in a `.pth` file, read without unpickling code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise WeightsError(f"{path}: not a plain state dict ({reason})") from error
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise WeightsError(f"{path}: not a state dict of tensors")
    return {str(name): tensor.float() for name, tensor in state.items()}


def has_pool(tensors: Mapping[str, Tensor]) -> bool:
    return any(".pool." in name for name in tensors)


def last_bias(tensors: Mapping[str, Tensor], path: Path) -> int:
    """Latent channels: the size of the last layer's bias."""
    biases = [name for name in tensors if name.count(".") == 1 and name.endswith(".bias")]
    if not biases:
        raise WeightsError(f"{path}: no TAESD-style encoder (no top-level convolution)")
    return len(tensors[max(biases, key=lambda name: int(name.split(".")[0]))])


def fill(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load every tensor, or say which did not fit."""
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = first_words(error, 200)
        raise WeightsError(f"{path}: not the f8 TAESD topology ({reason})") from error
