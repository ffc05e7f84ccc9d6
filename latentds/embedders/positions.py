"""Position tables of vision transformers for grids of another size, as DINO and DINOv2 do it."""
# P prefix positions, h w cells of a grid, D features

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

OFFSET = 0.1  # of a cell: facebookresearch/dino and dinov2, interpolate_pos_encoding


def resample_positions(
    table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int
) -> Tensor:
    """The table (1, P + h*w, D) of a grid of `new` (h, w), from that of `old`; itself for the same.

    Bicubic without antialiasing, at steps of old / (new + 0.1) cells. timm antialiases: for local
    crops of 6x6 from 14x14 that is another table, by 0.8 of its norm where it is fresh noise.
    source  Caron et al. 2021 and Oquab et al. 2023, in their code (interpolate_antialias False,
            interpolate_offset 0.1)
    """
    if old == new:
        return table
    head, cells = table[:, :prefix], table[:, prefix:]
    maps = cells.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    scale = tuple((wanted + OFFSET) / had for wanted, had in zip(new, old, strict=True))
    made = functional.interpolate(maps, scale_factor=scale, mode="bicubic", align_corners=False)
    return torch.cat([head, made.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def add_positions(vit: Any, tokens: Tensor) -> Tensor:
    """Patch tokens of a timm ViT with prefix tokens before them and positions added, (B, P + T, D).

    As the network's own `_pos_embed`, but for grids of another size `resample_positions`.

    tokens  (B, h, w, D) with dynamic_img_size, else (B, T, D)
    """
    is_own = tokens.ndim == 3 or tuple(tokens.shape[1:3]) == tuple(vit.patch_embed.grid_size)
    if is_own or vit.pos_embed is None:
        own: Tensor = vit._pos_embed(tokens)
        return own
    prefix = 0 if vit.no_embed_class else int(vit.num_prefix_tokens)
    size = (int(tokens.shape[1]), int(tokens.shape[2]))
    table = resample_positions(vit.pos_embed, tuple(vit.patch_embed.grid_size), size, prefix)
    firsts = [part for part in (vit.cls_token, vit.reg_token) if part is not None]
    heads = [part.expand(len(tokens), -1, -1) for part in firsts]
    flat = tokens.flatten(1, 2)
    if vit.no_embed_class:
        flat = torch.cat([*heads, flat + table], dim=1)
    else:
        flat = torch.cat([*heads, flat], dim=1) + table
    placed: Tensor = vit.pos_drop(flat)
    return placed
