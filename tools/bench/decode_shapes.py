"""Decoders to time: known shapes with random weights, or any that can be loaded.

Time does not depend on the weights, so shapes whose weights are not here are built without them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from latentds.autoencoders import load_for_decoding
from latentds.autoencoders.autoencoder import AutoencoderCard, NetworkAutoencoder
from latentds.autoencoders.cards import ALIASES, SHORT_NAMES
from latentds.autoencoders.efficientvit_keys import F32C32
from latentds.autoencoders.students import build_student
from latentds.errors import unknown_name

# Both configs of diffusers' AutoencoderKL: config.json of stabilityai/sd-vae-ft-ema, and the vae
# folder of stabilityai/stable-diffusion-3.5-large (16 channels, no quant_conv).
SD15: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32,
}
SD3 = SD15 | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """A decoder's architecture and the latents it reads."""

    build: Callable[[], nn.Module]
    channels: int
    factor: int


def student(name: str, channels: int, factor: int) -> DecodeShape:
    """One of the library's students, random weights."""
    return DecodeShape(functools.partial(build_student, name, channels, factor), channels, factor)


def diffusers_half(class_name: str, config: dict[str, Any], factor: int) -> DecodeShape:
    """The decoder half of a diffusers class, random weights."""

    def build() -> nn.Module:
        from latentds.autoencoders.diffusers_ae import build_decoder

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_decoder(class_name, config)

    return DecodeShape(build, int(config["latent_channels"]), factor)


SHAPES = {
    "taesd": student("taesd", 4, 8),
    "sd15": diffusers_half("AutoencoderKL", SD15, 8),
    "sd3": diffusers_half("AutoencoderKL", SD3, 8),
    "dcae-f32": diffusers_half("AutoencoderDC", F32C32, 32),
    "turbo-s": student("turbo-s", 4, 8),
    "turbo-m": student("turbo-m", 4, 8),
    "turbo-f32": student("turbo-f32", 32, 32),
}


def check_known(name: str) -> None:
    """Refuse a name that is no shape, no autoencoder, nothing here and none of the Hub's form."""
    known = {*SHAPES, *SHORT_NAMES}
    if name not in known | set(ALIASES) and "/" not in name and not Path(name).exists():
        raise unknown_name("decoder", name, known)


def find_decoder(name: str) -> tuple[NetworkAutoencoder, str]:
    """A decoder to time, in float32 on the CPU, and what its weights are: random or loaded.

    name    a known shape, the name or folder of an autoencoder, or a decoder's folder or Hub name
    raises  what loading raises
    """
    shape = SHAPES.get(name)
    if shape is None:
        return load_for_decoding(name), "loaded"
    card = AutoencoderCard(
        name=name, class_name="random", channels=shape.channels, factor=shape.factor
    )
    return NetworkAutoencoder(card, nn.Identity(), shape.build()), "random"


def gigaflops(autoencoder: NetworkAutoencoder, patch_px: int) -> float:
    """GFLOP to decode a patch (two a multiplication with its addition), counted without running."""
    cells = -(-patch_px // autoencoder.card.factor)
    decoder = copy.deepcopy(autoencoder.decoder).to("meta")
    latents = torch.zeros(1, autoencoder.card.channels, cells, cells, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder(latents)
    return float(counter.get_total_flops() / 1e9)
