"""Which tokens a network does not see: masks drawn for every patch by its seed.

The same patch in the same pass gets the same masks on any rank, in any batch, after any resume.
"""
# B batch, G global views, T tokens of a grid of h rows and w columns, N trials

from __future__ import annotations

import math

import torch
from torch import Tensor

from latentds.core.randomness import uniform

MAE_RATIO = 0.75  # He et al. 2022, section 3
MASKED_SHARE = 0.5  # of global views; DINOv2 ssl_default_config.yaml, mask_sample_probability
MASKED_RATIOS = (0.1, 0.5)  # of a masked view's tokens; the same file, mask_ratio_min_max
SMALLEST_BLOCK = 4  # tokens; DINOv2 data/masking.py, min_num_patches
LARGEST_ASPECT = 1 / 0.3  # the same file, min_aspect
TRIALS = 16  # blocks tried: of 14x14 tokens they leave 0.15 % of what is masked to single ones


def masked_count(tokens: int, ratio: float) -> int:
    """How many of T tokens `random_masks` masks: all but floor(T * (1 - ratio)), as in MAE."""
    return tokens - int(tokens * (1 - ratio))


def random_masks(seeds: Tensor, tokens: int, ratio: float = MAE_RATIO) -> Tensor:
    """Masks bool (B, T) with `masked_count` tokens each, every subset equally likely.

    seeds  int64 (B,), the patches' (`batch.seeds`); masks are on their device
    """
    return lowest(uniform(seeds, "token mask", tokens), masked_count(tokens, ratio))


def global_masks(
    seeds: Tensor,
    views: int,
    grid: tuple[int, int],
    share: float = MASKED_SHARE,
    ratios: tuple[float, float] = MASKED_RATIOS,
) -> Tensor:
    """Block masks of all global views, bool (G, B, T): what `SelfDistillation` takes."""
    names = [f"global {view} token mask" for view in range(views)]
    return torch.stack([block_masks(seeds, grid, name, share, ratios) for name in names])


def block_masks(
    seeds: Tensor,
    grid: tuple[int, int],
    op: str,
    share: float = MASKED_SHARE,
    ratios: tuple[float, float] = MASKED_RATIOS,
) -> Tensor:
    """Masks bool (B, T) made of blocks; `block_counts` tokens each, 0 for patches not masked.

    share   probability that a patch is masked at all
    ratios  between which the share of its tokens is drawn
    source  the rule of DINOv2's data/masking.py (after BEiT): blocks of random area and aspect are
            added while they fit what is left. Ours tries a fixed number of blocks for all patches
            at once and fills what is then missing with single tokens, so that the count is exact;
            which patches are masked is each one's own draw, not half of the batch exactly.
    """
    height, width = grid
    counts = block_counts(seeds, height * width, op, share, ratios)
    draws = uniform(seeds, f"{op} blocks", TRIALS * 4).double().view(-1, TRIALS, 4)
    masks = torch.zeros(len(seeds), height, width, dtype=torch.bool, device=seeds.device)
    for trial in range(TRIALS):
        masks |= fitting_blocks(masks, counts, draws[:, trial])
    singles = uniform(seeds, f"{op} singles", height * width)
    return lowest(singles - 2 * masks.flatten(1).float(), counts[:, None])


def block_counts(
    seeds: Tensor,
    tokens: int,
    op: str,
    share: float = MASKED_SHARE,
    ratios: tuple[float, float] = MASKED_RATIOS,
) -> Tensor:
    """How many tokens of every patch `block_masks` masks, int64 (B,)."""
    chosen, between = uniform(seeds, f"{op} count", 2).double().unbind(1)
    ratio = ratios[0] + between * (ratios[1] - ratios[0])
    return torch.where(chosen < share, (ratio * tokens).long(), 0)


def fitting_blocks(masks: Tensor, counts: Tensor, draws: Tensor) -> Tensor:
    """A block for every patch where one fits into what is left to mask, bool (B, h, w).

    masks   bool (B, h, w), so far
    counts  int64 (B,), to be masked in the end
    draws   float64 (B, 4) in [0, 1): of the block's area, aspect, row and column
    """
    height, width = masks.shape[1:]
    left = counts - masks.sum((1, 2))
    area = SMALLEST_BLOCK + draws[:, 0] * (left - SMALLEST_BLOCK)
    root = ((2 * draws[:, 1] - 1) * math.log(LARGEST_ASPECT) / 2).exp()
    edges = area.clamp(min=0).sqrt()
    inside = torch.ones_like(masks)
    for axis, length in enumerate((height, width)):
        size = (edges * root if axis == 0 else edges / root).round().long()
        start = (draws[:, 2 + axis] * (length - size + 1).clamp(min=1)).long()
        places = torch.arange(length, device=masks.device)
        along = (places >= start[:, None]) & (places < (start + size)[:, None])
        along &= (size < length)[:, None]
        inside &= along[:, :, None] if axis == 0 else along[:, None, :]
    fresh = (inside & ~masks).sum((1, 2))
    return inside & ((fresh > 0) & (fresh <= left))[:, None, None]


def lowest(draws: Tensor, count: Tensor | int) -> Tensor:
    """Where the `count` lowest draws of every row (B, T) are, bool."""
    return draws.argsort(dim=1, stable=True).argsort(dim=1) < count
