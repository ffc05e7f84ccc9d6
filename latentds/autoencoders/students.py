"""Students: small, fast decoders for the latents of a larger autoencoder.

All layers of the turbo students run at a quarter of the resolution or below and pixel-shuffle out:
cost is at full resolution, not in width. The TAESD shape is the slower one that is known to do.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from latentds.autoencoders.taesd import build_decoder
from latentds.autoencoders.tiny import ResidualBlock
from latentds.errors import ShapeError, unknown_name

PIXELS = 4  # pixels of a cell of the last layer, each way
BRANCH_SCALE = 0.1  # of a fresh block's residual: blocks start near the identity


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentSpec:
    """The shape of a student.

    factor  pixels a latent cell, each way
    stages  (width, blocks) at the latents' resolution, then at twice each time; empty for TAESD's
            own shape
    """

    factor: int
    stages: tuple[tuple[int, int], ...] = ()


# GFLOP a 256 px patch and parameters, counted by torch's FlopCounterMode (tests/test_students.py)
STUDENTS = {
    "turbo-s": StudentSpec(factor=8, stages=((128, 2), (64, 1))),  # 2.1 GFLOP, 0.73 M
    "turbo-m": StudentSpec(factor=8, stages=((192, 3), (96, 2))),  # 7.3 GFLOP, 2.5 M
    # 7.1 GFLOP, 20 M
    "turbo-f32": StudentSpec(factor=32, stages=((512, 3), (256, 3), (128, 4), (64, 1))),
    "taesd": StudentSpec(factor=8),  # 35.3 GFLOP, 1.2 M
}


class Student(nn.Module):
    """Latents (B, C, h, w) to images (B, 3, h * factor, w * factor), nominally in [0, 1]."""

    def __init__(self, channels: int, stages: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.stages = stages
        width = stages[0][0]
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        for stage_width, blocks in stages:
            if len(layers) > 1:
                layers += [nn.Conv2d(width, 4 * stage_width, 1), nn.PixelShuffle(2)]
            layers += [near_identity(stage_width) for _ in range(blocks)]
            width = stage_width
        layers += [nn.Conv2d(width, 3 * PIXELS**2, 3, padding=1), nn.PixelShuffle(PIXELS)]
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        images: Tensor = self.layers(latents) * 0.5 + 0.5
        return images


def near_identity(channels: int) -> ResidualBlock:
    """A residual block whose branch starts small."""
    block = ResidualBlock(channels)
    with torch.no_grad():
        block.conv2.weight.mul_(BRANCH_SCALE)
        nn.init.zeros_(block.conv2.bias)  # type: ignore[arg-type]
    return block


def build_student(name: str, channels: int, factor: int, seed: int = 0) -> nn.Module:
    """A student with random weights: latents to images, nominally in [0, 1] and not clamped.

    name      one of STUDENTS
    channels  of the latents
    factor    pixels a latent cell; must be the student's own
    seed      of the weights; the global random state stays as it is
    raises    UnknownNameError, ShapeError where the student reads latents of another factor
    """
    if name not in STUDENTS:
        raise unknown_name("student", name, STUDENTS)
    spec = STUDENTS[name]
    if factor != spec.factor:
        fitting = [known for known, other in STUDENTS.items() if other.factor == factor]
        raise ShapeError(
            f"student {name!r} reads latents of factor {spec.factor}, these have factor {factor}; "
            f"students for them: {', '.join(fitting) or 'none'}"
        )
    if channels < 1:
        raise ShapeError(f"a student of {channels} latent channels; at least 1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not spec.stages:
            return build_decoder(channels, has_pool=False)
        return Student(channels, spec.stages)
