"""Blocks of a timm ViT as DINOv2 trains them: scaled branches, all left out at the same rate."""
# T tokens with prefix tokens, D features

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SCALED = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}  # scale -> the layer it comes behind


class LayerScale(nn.Module):
    """Tokens (B, T, D) times a trained factor a feature; named as timm's own is."""

    def __init__(self, features: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((features,), start))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


def add_layer_scales(vit: Any, start: float) -> None:
    """Put a LayerScale behind both branches of timm's ordinary blocks that have none.

    Other kinds of blocks, as in a few archs, stay as they are.
    """
    for block in vit.blocks:
        if type(block).__name__ != "Block":
            continue
        for name in ("ls1", "ls2"):
            if isinstance(getattr(block, name), nn.Identity):
                setattr(block, name, LayerScale(vit.embed_dim, start))


def even_drop_path(vit: Any) -> None:
    """Give every block the stochastic depth of the last: timm lets it rise from 0."""
    for name in ("drop_path1", "drop_path2"):
        last = getattr(vit.blocks[-1], name, None)
        if last is not None:
            for block in vit.blocks[:-1]:
                setattr(block, name, copy.deepcopy(last))


def fold_layer_scales(weights: Mapping[str, Tensor], wanted: Container[str]) -> dict[str, Tensor]:
    """Weights of the same function without the scales that are not wanted.

    weights  by name; scales go into the layer before them, which is linear
    wanted   names that the network to fill has
    """
    folded = dict(weights)
    for name in [name for name in weights if name not in wanted]:
        block, _, scale = name.rpartition(".ls")
        layer = SCALED.get(f"ls{scale}") if block else None
        if layer is None:
            continue
        gamma = folded.pop(name)
        for part in ("weight", "bias"):
            inner = f"{block}.{layer}.{part}"
            if inner in folded:
                folded[inner] = (folded[inner].movedim(0, -1) * gamma).movedim(-1, 0)
    return folded
