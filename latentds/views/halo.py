"""How far a decoder sees: latent cells around a pixel that decide it, found by asking it."""
# C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import copy

import torch
from torch import Tensor

from latentds.autoencoders.autoencoder import Autoencoder, NetworkAutoencoder
from latentds.errors import ContractError

MOST_CELLS = 20  # TAESD sees 14, turbo-f32 13, tiny 10
TRIALS = 2  # latents; a clamped pixel or a resting unit hides a change in one, not in both
CHANGE = 3.0  # of the cell that is disturbed, about the latents' range
LEAST = {torch.float64: 1e-12, torch.float32: 1e-6}  # of a pixel that counts as changed


def measure_halo(autoencoder: Autoencoder, channels: int, factor: int) -> int:
    """Cells beyond a window that the window's pixels depend on, the larger of both directions.

    The middle of a strip one cell wide is disturbed; the furthest pixel that changes tells.

    raises  ContractError where all do: a decoder that normalizes over the patch, or attends to it
    """
    probed, dtype = exact_copy(autoencoder)
    generator = torch.Generator().manual_seed(0)
    shape = (TRIALS, channels, 1, 2 * MOST_CELLS + 1)
    latents = torch.randn(shape, generator=generator, dtype=dtype)
    # Up in one trial and down in the other: units that rest in one do not in both.
    disturbed = latents.clone()
    disturbed[..., MOST_CELLS] += CHANGE * (1 - 2 * (torch.arange(TRIALS) % 2)).view(-1, 1, 1)
    halo = max(
        reach(change_of(probed, latents, disturbed, upright), factor) for upright in (False, True)
    )
    if halo >= MOST_CELLS:
        raise ContractError(
            f"decoder {autoencoder.card.name!r} sees the whole patch (or over {MOST_CELLS} cells), "
            "as networks that normalize over it do: a window of its latents decodes to other "
            "pixels; leave out crop_windows"
        )
    return halo


def exact_copy(autoencoder: Autoencoder) -> tuple[Autoencoder, torch.dtype]:
    """The autoencoder on the CPU in float64, where it is one of torch modules; else as it is."""
    if not isinstance(autoencoder, NetworkAutoencoder):
        return autoencoder, torch.float32
    return copy.deepcopy(autoencoder).to("cpu", torch.float64), torch.float64


@torch.no_grad()
def change_of(probed: Autoencoder, before: Tensor, after: Tensor, upright: bool) -> Tensor:
    """Whether pixels along the strip change, bool; the strip upright, or lying."""
    turned = (part.transpose(2, 3) if upright else part for part in (before, after))
    images = [probed.decode(part) for part in turned]
    change = (images[0] - images[1]).abs() > LEAST[before.dtype]
    return change.any(0).any(0).any(1 if upright else 0)


def reach(changed: Tensor, factor: int) -> int:
    """Cells between the disturbed one, in the middle, and the furthest changed pixel's."""
    cells = changed.nonzero()[:, 0] // factor
    return int((cells - MOST_CELLS).abs().max()) if len(cells) else 0
