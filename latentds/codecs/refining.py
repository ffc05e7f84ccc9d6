"""Latents refined for the codes they become: gradient steps through the frozen decoder.

An encoder makes latents in one go, and does not see where its codebook rounds them to. A few steps
per patch on the decoded picture's squared error find latents whose codes keep more of it, in the
same bytes, for the same decoder. Straight-through: the gradient is taken where the codes are.
"""
# B patches, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from latentds.autoencoders.autoencoder import Autoencoder
from latentds.errors import ContractError
from latentds.quantizers.entropy.record_codebook import EntropyCodebook
from latentds.quantizers.entropy.record_encoding import round_at_steps
from latentds.quantizers.scalar import AnyCodebook

MAX_STEPS = 256  # hundreds bring nothing more
# Found on six crops of held-out patients, for tiny-v1, tiny-v2 and TAEF2, whose decoder is 140
# times as steep in some directions as on average: a step for all of them is one that adapts.
FIRST = 0.25  # of the quantization error: the length of the first step
SHARE = 0.8  # of the inverse of the curvature met on the way, the step after
GROWTH = 8.0  # at most, from one step to the next
LAST = 0.2  # of its length, the last step: lengths fall evenly
LARGEST_PULL = 0.5  # towards the codes, of the way there
# Squared quantization steps that a bit is worth; 2 ln 2 / 12 where steps are small. Without it
# values grow, and the patch's step with them.
BIT_WORTH = 0.1

Rounding = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # latents to points, pull of bits


def refine(
    latents: Tensor, images: Tensor, autoencoder: Autoencoder, codebook: AnyCodebook, steps: int
) -> Tensor:
    """Latents whose codes decode to pictures nearer to the images, in the same bytes.

    latents      float32 (B, C, h, w) of `images`, finite, on the autoencoder's device
    images       float32 (B, 3, H, W) in [0, 1], as they were encoded
    steps        gradient steps a patch, 0 to 256
    returns      float32 (B, C, h, w): a patch's refined latents, or its own where those, once
                 coded and decoded, are no nearer in mean squared error. On a CPU a patch is refined
                 by itself, whatever the batch; elsewhere batches are to be of one size
    raises       ContractError where the decoder gives no gradient, ValueError on NaN or infinity
                 and for other numbers of steps
    source       iterative inference with straight-through rounding, Yang, Bamler and Mandt 2020;
                 step lengths, Barzilai and Borwein 1988
    """
    if not 0 <= steps <= MAX_STEPS:
        raise ValueError(f"refine: {steps} steps are not between 0 and {MAX_STEPS}")
    if not steps:
        return latents
    size = 1 if latents.device.type == "cpu" else max(1, len(latents))
    codes = codebook.quantize(latents)
    pictures = torch.split(images, size)
    with fixed_kernels(latents.device):
        found = torch.cat([
            descend(own, picture, autoencoder, rounding_of(codebook, coded), steps)
            for own, picture, coded in zip(
                torch.split(latents, size), pictures, torch.split(codes, size), strict=True
            )
        ])  # fmt: skip
        is_finite = torch.isfinite(found).flatten(1).all(1)
        found = torch.where(of_patches(is_finite), found, latents)
        before, after = (
            torch.cat([
                errors(points, picture, autoencoder)
                for points, picture in zip(
                    torch.split(codebook.dequantize(each), size), pictures, strict=True
                )
            ])
            for each in (codes, codebook.quantize(found))
        )  # fmt: skip
    return torch.where(of_patches(after < before), found, latents)


def descend(
    latents: Tensor, images: Tensor, autoencoder: Autoencoder, rounding: Rounding, steps: int
) -> Tensor:
    """Latents after gradient steps on error, bits and distance to the codes, whatever they bring.

    Distances count as the decoder's mean curvature says: near the codes the error is
    curvature / 2 times the squared distance, so that a value stays at its code unless the gradient
    there would carry it more than half of the way to the next one.
    """
    points, bits = rounding(latents)
    gradient = error_gradient(points, images, autoencoder)
    offset = points - latents
    curvature = (inner(gradient, offset) / inner(offset, offset)).nan_to_num(0, 0, 0).clamp(min=0)
    length = FIRST * (inner(offset, offset) / inner(gradient, gradient)).sqrt().nan_to_num(0, 0, 0)
    for step in range(steps):
        if step:
            earlier_points, earlier = points, gradient
            points, bits = rounding(latents)
            gradient = error_gradient(points, images, autoencoder)
            length = adapt(length, points - earlier_points, gradient - earlier)
            length = length.minimum(FIRST / curvature)  # longer, and values jump about the codes
        share = 1 - (1 - LAST) * step / steps
        force = gradient
        if bits is not None:
            force = force + of_patches(BIT_WORTH / 2 * curvature) * bits
        pull = (length * curvature * share).clamp(max=LARGEST_PULL)
        latents = latents - of_patches(length * share) * force
        latents = latents + of_patches(pull) * (points - latents)
    return latents


def adapt(length: Tensor, moved: Tensor, turned: Tensor) -> Tensor:
    """The next step's length (B,): a share of the inverse curvature that a gradient's turn tells.

    moved, turned  (B, C, h, w): how far the codes' points moved, how the gradient changed
    """
    inverse = (inner(moved, turned) / inner(turned, turned)).nan_to_num(0, 0, 0)
    wanted = torch.where(inverse > 0, SHARE * inverse, length)
    return wanted.clamp(min=length / 4).minimum(GROWTH * length)


def rounding_of(codebook: AnyCodebook, codes: Tensor) -> Rounding:
    """What latents become on the way: their codes' points, those of records at `codes`' steps."""
    if isinstance(codebook, EntropyCodebook):
        return lambda latents: round_at_steps(latents, codes[:, 0].long(), codebook)
    return lambda latents: (codebook.dequantize(codebook.quantize(latents)), None)


def error_gradient(points: Tensor, images: Tensor, autoencoder: Autoencoder) -> Tensor:
    """(B, C, h, w): the gradient of every patch's error; ContractError where there is none."""
    with torch.enable_grad():
        leaf = points.detach().requires_grad_()
        total = errors_of(leaf, images, autoencoder).sum()
        if not total.requires_grad:
            raise ContractError(
                f"{autoencoder.card.name}: its decode gives no gradient to the latents, which "
                "--refine needs; decode without torch.no_grad, or leave --refine"
            )
        return torch.autograd.grad(total, leaf)[0]


@torch.no_grad()
def errors(points: Tensor, images: Tensor, autoencoder: Autoencoder) -> Tensor:
    return errors_of(points, images, autoencoder)


def errors_of(points: Tensor, images: Tensor, autoencoder: Autoencoder) -> Tensor:
    """The same, with a gradient where it is on; the decoder's padding is cut off."""
    height, width = images.shape[2:]
    decoded = autoencoder.decode(points)[:, :, :height, :width].float()
    return (decoded - images).square().flatten(1).mean(1)


def inner(one: Tensor, other: Tensor) -> Tensor:
    """Inner products (B,) of every patch's values."""
    return (one * other).flatten(1).sum(1)


def of_patches(values: Tensor) -> Tensor:
    return values[:, None, None, None]


@contextlib.contextmanager
def fixed_kernels(device: torch.device) -> Iterator[None]:
    """Deterministic kernels of gradients on a GPU, where there are any; a CPU's are."""
    if device.type == "cpu":
        yield
        return
    saved = torch.are_deterministic_algorithms_enabled()
    is_lenient = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(saved, warn_only=is_lenient)
