"""timm's vision transformers as they are pretrained: tokens masked or left out, scaled branches."""
# B batch, C channels, H W pixels or latent cells, T patch tokens, P prefix tokens (class and
# registers), K patch tokens kept, D features

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from latentds.embedders.weights import add_positions
from latentds.errors import InputError, ShapeError, missing_extra

SCALED = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}  # scale -> the layer it comes behind


def require_vit(network: Any, *, class_token: bool) -> None:
    """Raise InputError unless all of the network is trained by what reads its final tokens.

    class_token  whether its embedding has to be the class token
    """
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise missing_extra("timm", "train") from error
    kind = type(network).__name__
    if not isinstance(network, VisionTransformer):
        raise InputError(f"{kind}: not a timm VisionTransformer; take an arch such as vit_small_*")
    if class_token and network.global_pool != "token":
        raise InputError(
            f"{kind}: global_pool {network.global_pool!r}; self-distillation trains the class "
            "token, build it with global_pool='token'"
        )
    unused = {"attn_pool": None, "fc_norm": nn.Identity, "patch_drop": nn.Identity}
    for name, kind_wanted in (unused | {"head": nn.Identity}).items():
        part = getattr(network, name)
        if part is not None and (kind_wanted is None or not isinstance(part, kind_wanted)):
            raise InputError(
                f"{kind}: {name} is {type(part).__name__}, which pretraining would leave "
                "untrained; build it with num_classes=0, fc_norm=False, patch_drop_rate=0 and "
                "global_pool 'token' or 'avg'"
            )


def encode(
    vit: Any,
    values: Tensor,
    *,
    masks: Tensor | None = None,
    mask_token: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Final tokens, float (B, P + T, D), or (B, P + K, D) of the kept ones.

    vit         of timm; prefix tokens come first, then patch tokens row by row
    values      float (B, C, H, W)
    masks       bool (B, T): tokens that `mask_token` replaces before positions are added
    mask_token  (D,)
    kept        int64 (B, K): patch tokens that the blocks see; all without
    raises      ShapeError

    With neither, what the network's own `forward_features` gives, but for images of another size
    than its own: their positions are resampled as in DINOv2.
    """
    tokens = vit.patch_embed(values)  # (B, h, w, D), or (B, T, D) without dynamic_img_size
    if masks is not None and mask_token is not None:
        if masks.shape != (len(tokens), tokens[0, ..., 0].numel()):
            shape = tuple(tokens.shape[:-1])
            raise ShapeError(f"masks are {tuple(masks.shape)}; tokens are {shape}, flattened")
        masked = masks.view(*tokens.shape[:-1], 1)
        tokens = torch.where(masked, mask_token.to(tokens.dtype), tokens)
    tokens = add_positions(vit, tokens)
    if kept is not None:
        tokens = keep(tokens, kept, vit.num_prefix_tokens)
    encoded: Tensor = vit.norm(vit.blocks(vit.norm_pre(tokens)))
    return encoded


def keep(tokens: Tensor, kept: Tensor, prefix: int) -> Tensor:
    """The prefix tokens and the patch tokens of these indices: (B, P + K, D)."""
    indices = kept[..., None].expand(-1, -1, tokens.shape[-1])
    return torch.cat([tokens[:, :prefix], tokens[:, prefix:].gather(1, indices)], dim=1)


def add_layer_scales(vit: Any, start: float) -> None:
    """Put a scale a feature behind both branches of timm's ordinary blocks that have none.

    Other kinds of blocks, as in a few archs, stay as they are.
    """
    from timm.models.vision_transformer import LayerScale

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
