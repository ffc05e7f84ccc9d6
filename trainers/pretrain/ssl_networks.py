"""What `pretrain` trains: views, student and teacher or masked autoencoder, parameter groups."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from latentds_trainers.pretrain.config import PretrainConfig
from latentds_trainers.pretrain.schedules import RunConfig
from torch import Tensor, nn

from latentds.core.randomness import key_of
from latentds.embedders.latent_stem import LatentStemConfig, build_vit, timm_arguments
from latentds.errors import InputError, ShapeError
from latentds.models.masked_autoencoder import MaskedAutoencoder
from latentds.models.self_distillation import SelfDistillation, is_last_layer
from latentds.models.vit_tokens import add_layer_scales, even_drop_path, fold_layer_scales
from latentds.views.multicrop import MultiCrop

if TYPE_CHECKING:
    from latentds.views.latent_crops import LatentCrops

    Augmentation = MultiCrop | LatentCrops

BETA1 = 0.9  # of AdamW, all three methods
LAYER_SCALE = 1e-5  # DINOv2 ssl_default_config.yaml, student.layerscale
BLOCK = re.compile(r"\bbackbone\.blocks\.(\d+)\.")
FIRST = re.compile(r"^mask_token$|\bbackbone\.(patch_embed|pos_embed|cls_token|reg_token)\b")
FLAGS = (
    *("globals", "locals", "global_px", "local_px", "global_scale", "local_scale"),
    *("turns", "stain"),
)


def build_views(config: PretrainConfig, stem: LatentStemConfig | None) -> Augmentation:
    """The augmentation of the config: its preset, and what was given besides.

    raises  ShapeError where crops are no whole latent cells; InputError for fewer global crops than
            the method compares
    """
    given = {name: getattr(config, name) for name in FLAGS if getattr(config, name) is not None}
    preset = config.settings.views
    if config.method == "mae":
        given = {"globals": 1, "locals": 0} | given
    try:
        views = MultiCrop.preset(preset, **given)
    except ValueError as error:
        raise InputError(f"--views {preset}: {error}") from error
    if config.method != "mae" and views.globals < 2:
        raise InputError(
            f"views {preset} have {views.globals} global crop; {config.method} compares 2: "
            "give --globals 2, or other --views"
        )
    if stem is None:
        return views
    return latent_views(config.arch, views, stem)


def latent_views(arch: str, views: MultiCrop, stem: LatentStemConfig) -> LatentCrops:
    """The crops of views, made of latents: no colours there to change."""
    from latentds.views.latent_crops import LatentCrops

    for name, edge in (("global_px", views.global_px), ("local_px", views.local_px)):
        if edge % stem.factor:
            raise ShapeError(f"{name} is {edge}, and a latent cell has {stem.factor} px; take a "
                             f"multiple of {stem.factor}")  # fmt: skip
    own = {} if views.jitter_p else {"noise": 0.0, "drop": 0.0}  # what stands for colour changes
    return LatentCrops(
        globals=views.globals,
        locals=views.locals,
        global_cells=views.global_px // stem.factor,
        local_cells=views.local_px // stem.factor,
        align=(timm_arguments(arch, stem) or {}).get("patch_size", 1),  # tokens are the patch's
        flip=views.flip,
        turns=views.turns,
        **own,
    )


def edge_px(views: Augmentation, stem: LatentStemConfig | None) -> int:
    """Pixels that the edge of a global crop stands for."""
    if isinstance(views, MultiCrop):
        return views.global_px
    assert stem is not None
    return views.global_cells * stem.factor


def taken_alone(model: MaskedAutoencoder) -> list[nn.Parameter]:
    """Weights that are read without calling the module that has them."""
    vit = model.backbone
    parts = [getattr(vit, name, None) for name in ("cls_token", "reg_token", "pos_embed")]
    parts.append(model.decoder.mask_token)
    return [part for part in parts if isinstance(part, nn.Parameter)]


def build_backbone(config: RunConfig, stem: LatentStemConfig | None, drop_path: float) -> nn.Module:
    """The ViT, as the seed starts it; for dinov2, with its blocks' scales and even drop path."""
    edge, seed = config.global_px, config.seed
    vit = build_vit(config.arch, stem=stem, img_px=edge, drop_path=drop_path, seed=seed)
    if config.method == "dinov2":
        add_layer_scales(vit, LAYER_SCALE)
        even_drop_path(vit)
    return vit


def trained_backbone(
    config: RunConfig, stem: LatentStemConfig | None, weights: Mapping[str, Tensor]
) -> nn.Module:
    """timm's ViT of the arch, with the weights of one that was trained.

    weights  by name, of `build_backbone`'s; scales that the arch does not have are folded in
    """
    vit = build_vit(config.arch, stem=stem, img_px=config.global_px)
    vit.load_state_dict(fold_layer_scales(weights, vit.state_dict()))
    return vit


def build_model(config: RunConfig, stem: LatentStemConfig | None) -> nn.Module:
    """The module of one engine network: all that a checkpoint has to hold."""
    student = build_backbone(config, stem, config.drop_path)
    check_edges(config, student, stem)
    if config.method == "mae":
        return MaskedAutoencoder(
            student,
            width=config.mae_dim,
            depth=config.mae_depth,
            heads=config.mae_heads,
            ratio=config.mask_ratio,
            seed=config.seed,
        )
    return SelfDistillation(
        student,
        build_backbone(config, stem, 0.0),
        method=config.method,
        out_dim=config.out_dim,
        hidden_dim=config.hidden_dim,
        bottleneck_dim=config.bottleneck_dim,
        seed=config.seed,
    )


def check_edges(config: RunConfig, network: Any, stem: LatentStemConfig | None) -> None:
    """InputError for crops that are no whole tokens."""
    record, factor = config.views_record, 1 if stem is None else stem.factor
    token = max(network.patch_embed.patch_size[0] * factor, factor)
    names = {"global_px": "globals", "local_px": "locals"}
    for name, count in names.items():
        edge = record[name] if stem is None else record[f"{name[:-3]}_cells"] * factor
        if record[count] and edge % token:
            raise InputError(
                f"{name} is {edge}, and a token of {config.arch} has {token} px; take a multiple: "
                f"--{name.replace('_', '-')} {max(edge // token, 1) * token}"
            )


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW over what is trained.

    Its groups say whether their weights decay (`decays`), and whether they are of the heads' last
    layers (`is_last`).
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = [BLOCK.search(name) for name in trained]
    depth = 1 + max(int(match[1]) for match in found if match is not None)
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        decays = parameter.ndim > 1 and not name.endswith(".bias")
        key = decays, is_last_layer(name), lr_factor(name, depth, config)
        groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "lr": config.lr * factor, "decays": decays, "is_last": is_last,
             "weight_decay": config.weight_decay if decays else 0.0}
            for (decays, is_last, factor), members in groups.items()
        ],
        betas=(BETA1, config.beta2),
    )  # fmt: skip


def lr_factor(name: str, depth: int, config: RunConfig) -> float:
    """Share of the learning rate of a parameter: less, the earlier it is in the ViT.

    depth   blocks of the ViT
    source  DINOv2 utils/param_groups.py
    """
    block, layer = BLOCK.search(name), depth + 1
    if block is not None:
        layer = int(block[1]) + 1
    elif FIRST.search(name):
        layer = 0
    factor = config.layer_decay ** (depth + 1 - layer)
    return factor * (config.stem_lr if "backbone.patch_embed" in name else 1.0)


def token_grid(backbone: Any, values: Tensor) -> tuple[int, int]:
    """Rows and columns of the tokens of values (..., H, W)."""
    height, width = backbone.patch_embed.dynamic_feat_size(tuple(values.shape[-2:]))
    return int(height), int(width)


@contextlib.contextmanager
def seeded(device: torch.device, *words: int | str) -> Iterator[None]:
    """Draws of torch's own generators (stochastic depth) that follow from the words alone."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(key_of(*words) >> 1)
        yield
