"""CONCH v1.5, the patch encoder of TITAN: a ViT-L of timm whose tokens one learned query pools.

Sizes, steps and names of tensors are those of `conchv1_5.py` in TRIDENT v0.3, by the same group.
"""
# B batch, T tokens, C width of the ViT, D embedding dimensions

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentds.autoencoders.autoencoder import hash_tensors
from latentds.embedders.embedder import NetworkEmbedder, Preparation
from latentds.embedders.embedder_cards import CARDS
from latentds.embedders.timm_models import outline
from latentds.embedders.weights import fill, find_weights, read_weights, resample_positions
from latentds.errors import WeightsError

NAME, HEADS = "conch-v1.5", 8
POSITIONS = "trunk.pos_embed"
TRAINED = (14, 14)  # tokens of 224 px, whose positions those of any size are made of
CELLS = (28, 28)  # of 448 px


class Tower(nn.Module):
    """Prepared images to embeddings (B, D).

    trained_positions  (1, 1 + 14 x 14, C), where segmentation takes those of other sizes from
    """

    trained_positions: Tensor

    def __init__(self, width: int, **changes: Any) -> None:
        super().__init__()
        options = {"img_size": 448, "init_values": 1.0, "global_pool": ""} | changes
        self.trunk = outline(CARDS[NAME].class_name, **options)
        with torch.device("meta"):
            self.attn_pool_contrast = QueryPool(width, self.trunk.num_features)
            self.ln_contrast = nn.LayerNorm(width)

    @property
    def network(self) -> Any:
        """What makes the tokens, where segmentation takes them."""
        return self.trunk

    def forward(self, prepared: Tensor) -> Tensor:
        pooled: Tensor = self.ln_contrast(self.attn_pool_contrast(self.trunk(prepared)))
        return pooled


class QueryPool(nn.Module):
    """Tokens (B, T, C) to what one learned query attends to, (B, D)."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, width))
        self.ln_k, self.ln_q = nn.LayerNorm(tokens), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(tokens, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.to_q(self.ln_q(self.query)).expand(len(tokens), 1, -1)
        keys, values = self.to_kv(self.ln_k(tokens)).chunk(2, dim=-1)
        heads = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (query, keys, values))
        pooled: Tensor = functional.scaled_dot_product_attention(*heads)  # (B, HEADS, 1, D / HEADS)
        out: Tensor = self.to_out(pooled.flatten(1))
        return out


def load_conch(path: Path | None = None, *, width: int = 768, **changes: Any) -> NetworkEmbedder:
    """The embedder of the Hub, or of a local file of its weights (or its folder).

    width, changes  D and timm's arguments, for networks of another size
    raises          WeightsError, MissingExtraError
    """
    card = CARDS[NAME]
    path, revision = find_weights(card, path)
    network, tensors = Tower(width, **changes), read_weights(path)
    identity = hash_tensors(tensors, {})  # of the file: a processor's bits are in what is resampled
    if POSITIONS in tensors:
        network.trained_positions = trained_positions(tensors[POSITIONS], path)
        spread = resample_positions(network.trained_positions, TRAINED, CELLS, prefix=1)
        tensors[POSITIONS] = spread
    fill(network, tensors, path, f"{NAME} ({card.class_name})")
    card = dataclasses.replace(card, dim=width, revision=revision, weights_id=identity)
    return NetworkEmbedder(card, network, Preparation(card))


def trained_positions(positions: Tensor, path: Path) -> Tensor:
    """A file's positions as (1, 1 + 14 x 14, C); of another size resampled as TRIDENT does."""
    from timm.layers import resample_abs_pos_embed

    edge = math.isqrt(max(positions.shape[1] - 1, 0)) if positions.ndim == 3 else 0
    if not edge or positions.shape[:2] != (1, 1 + edge**2):
        raise WeightsError(
            f"{path}: tensor {POSITIONS!r} is {list(positions.shape)}; [1, 1 + n x n, C] is "
            "needed, of a class token and n x n patches"
        )
    if (edge, edge) == TRAINED:
        return positions
    made: Tensor = resample_abs_pos_embed(
        positions, list(TRAINED), interpolation="bilinear", antialias=False
    )
    return made
