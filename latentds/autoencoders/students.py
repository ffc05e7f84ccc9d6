"""Students: small, fast decoders for the latents of a larger autoencoder.

All layers of the turbo students run at a quarter of the resolution or below and pixel-shuffle out:
cost is at full resolution, not in width. Beside them runs a linear shortcut, one convolution from
latents to pixels, which has a closed-form best start (`fit_shortcut`): training refines a picture
instead of finding one. The TAESD shape is the slower one that is known to do.
"""
# B patches, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentds.autoencoders.taesd import build_decoder
from latentds.autoencoders.tiny import ResidualBlock
from latentds.errors import ShapeError, unknown_name

PIXELS = 4  # pixels of a cell of the last layer, each way
BRANCH_SCALE = 0.1  # of a fresh block's residual: blocks start near the identity
OUTPUT_SCALE = 0.01  # of the fresh output layer: the shortcut starts alone
RIDGE = 1e-4  # of the mean of the normal equations' diagonal


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentSpec:
    """The shape of a student.

    factor    pixels a latent cell, each way
    stages    (width, blocks) at the latents' resolution, then at twice each time; empty for TAESD's
              own shape
    shortcut  cells the linear shortcut sees, each way
    rank      of the shortcut, which then is two convolutions with so many channels between them:
              with many latent channels, one convolution costs more than a block
    """

    factor: int
    stages: tuple[tuple[int, int], ...] = ()
    shortcut: int = 5
    rank: int | None = None


# GFLOP a 256 px patch and parameters, counted by torch's FlopCounterMode (tests/test_students.py)
STUDENTS = {
    # 0.38 GFLOP and 0.15 M for 32 channels: 2,900 multiply-adds a pixel, for CPUs
    "turbo-xs": StudentSpec(factor=8, stages=((64, 1), (24, 1)), shortcut=1),
    "turbo-s": StudentSpec(factor=8, stages=((128, 2), (64, 1))),  # 2.1 GFLOP, 0.73 M
    # 2.1 GFLOP and 0.77 M for 32 channels, of which turbo-s makes 2.5
    "turbo-s32": StudentSpec(factor=8, stages=((128, 2), (56, 1)), rank=32),
    "turbo-m": StudentSpec(factor=8, stages=((192, 3), (96, 2))),  # 7.3 GFLOP, 2.5 M
    # 7.1 GFLOP, 20.0 M
    "turbo-f32": StudentSpec(factor=32, stages=((512, 3), (256, 3), (128, 4), (64, 1))),
    "taesd": StudentSpec(factor=8),  # 35.3 GFLOP, 1.2 M
}


class Student(nn.Module):
    """Latents (B, C, h, w) to images (B, 3, h * factor, w * factor), nominally in [0, 1]."""

    def __init__(self, channels: int, spec: StudentSpec) -> None:
        super().__init__()
        self.spec = spec
        pixels, edge = 3 * spec.factor**2, spec.shortcut
        if spec.rank is None:
            shortcut = [nn.Conv2d(channels, pixels, edge, padding=edge // 2)]
        else:
            inner = nn.Conv2d(channels, spec.rank, edge, padding=edge // 2, bias=False)
            shortcut = [inner, nn.Conv2d(spec.rank, pixels, 1)]
        self.shortcut = nn.Sequential(*shortcut, nn.PixelShuffle(spec.factor))
        width = spec.stages[0][0]
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        for stage_width, blocks in spec.stages:
            if len(layers) > 1:
                layers += [nn.Conv2d(width, 4 * stage_width, 1), nn.PixelShuffle(2)]
            layers += [near_identity(stage_width) for _ in range(blocks)]
            width = stage_width
        output = nn.Conv2d(width, 3 * PIXELS**2, 3, padding=1)
        self.layers = nn.Sequential(*layers, output, nn.PixelShuffle(PIXELS))
        with torch.no_grad():
            output.weight.mul_(OUTPUT_SCALE)
            shortcut[-1].weight.mul_(OUTPUT_SCALE)

    def forward(self, latents: Tensor) -> Tensor:
        images: Tensor = (self.shortcut(latents) + self.layers(latents)) * 0.5 + 0.5
        return images


def near_identity(channels: int) -> ResidualBlock:
    """A residual block whose branch starts small."""
    block = ResidualBlock(channels)
    with torch.no_grad():
        block.conv2.weight.mul_(BRANCH_SCALE)
        nn.init.zeros_(block.conv2.bias)  # type: ignore[arg-type]
    return block


@torch.no_grad()
def fit_shortcut(student: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set a turbo student's shortcut to the least-squares linear decoder of some patches.

    student  a fresh one, on the CPU; others than turbo students are left as they are
    pairs    latents (B, C, h, w) and images (B, 3, H, W) in [0, 1]; a few hundred cells per latent
             channel in all
    """
    if not isinstance(student, Student):
        return
    *inner, outer = (layer for layer in student.shortcut if isinstance(layer, nn.Conv2d))
    assert outer.bias is not None
    factor, edge = student.spec.factor, student.spec.shortcut
    size = (inner or [outer])[0].in_channels * edge**2 + 1
    normal = torch.zeros(size, size, dtype=torch.float64)
    right = torch.zeros(size, outer.out_channels, dtype=torch.float64)
    for latents, images in pairs:
        seen = functional.unfold(latents.cpu().double(), edge, padding=edge // 2)
        rows = seen.transpose(1, 2).flatten(0, 1)
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
        wanted = functional.pixel_unshuffle(images.cpu().double() * 2 - 1, factor)
        normal += rows.T @ rows
        right += rows.T @ wanted.flatten(2).transpose(1, 2).flatten(0, 1)
    normal += RIDGE * normal.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    solution = torch.linalg.solve(normal, right)
    weight, bias = solution[:-1], solution[-1]
    outer.bias.copy_(bias)
    for layer in inner:  # reduced rank regression: the directions in which predictions vary most
        scatter = weight.T @ normal[:-1, :-1] @ weight
        directions = torch.linalg.eigh(scatter).eigenvectors[:, -layer.out_channels :]
        layer.weight.copy_((weight @ directions).T.reshape(layer.weight.shape))
        weight = directions.T
    outer.weight.copy_(weight.T.reshape(outer.weight.shape))


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
        return Student(channels, spec)
