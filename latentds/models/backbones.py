"""Classifiers of patches: a network of timm with a new head, to be trained as a whole."""
# B batch, K classes, H W pixels

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentds.embedders.embedder import resize
from latentds.embedders.latent_stem import LatentStemConfig, build_vit, image_px
from latentds.embedders.timm_models import configured_card, create
from latentds.embedders.weights import fill, find_weights, read_weights
from latentds.errors import WeightsError

RANDOM, PUBLISHED = "random", "timm"  # weights to start from, beside a file


class PatchClassifier(nn.Module):
    """Logits (B, K) of images (B, 3, H, W) in [0, 1], normalized as timm's configuration says.

    network  timm's, with a head of K classes
    size_px  (H, W) that images are resized to; None for a network that takes any size
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any, size_px: tuple[int, int] | None) -> None:
        super().__init__()
        self.network, self.size_px = network, size_px
        config = network.pretrained_cfg
        self.interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.size_px is not None and images.shape[-2:] != self.size_px:
            images = resize(images, self.size_px, self.interpolation)
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


def build_classifier(
    arch: str, classes: int, *, weights: str = RANDOM, seed: int = 0
) -> PatchClassifier:
    """A classifier whose head, and whatever else `weights` leaves out, is drawn from the seed.

    arch     timm's name of the network, a tag included where weights are timm's
    weights  random, timm (its pretrained ones, from the Hub), or a file of tensors of this network;
             a classifier among them is left out
    raises   UnknownNameError, WeightsError, MissingExtraError
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = create(arch, num_classes=classes)
    if weights != RANDOM:
        load_body(network, arch, weights_path(arch, network, weights))
    config = network.pretrained_cfg
    size_px = tuple(config["input_size"][1:]) if config.get("fixed_input_size") else None
    return PatchClassifier(network, size_px)


def build_latent_classifier(
    arch: str, classes: int, stem: LatentStemConfig, *, weights: str = RANDOM, seed: int = 0
) -> nn.Module:
    """Logits (B, K) of normalized latents (B, C, h, w): a ViT of timm behind a latent stem.

    weights  as of `build_classifier`; a patch embedding for pixels among them is left out
    raises   as `build_vit`, and WeightsError
    """
    network = build_vit(arch, stem=stem, img_px=image_px(arch), seed=seed, num_classes=classes)
    if weights != RANDOM:
        load_body(network, arch, weights_path(arch, network, weights), stem="patch_embed.")
    return network


def weights_path(arch: str, network: Any, weights: str) -> Path:
    """The file of the weights to start from, fetched where they are timm's own."""
    if weights != PUBLISHED:
        return Path(weights)
    if not network.pretrained_cfg.get("hf_hub_id"):
        raise WeightsError(f"timm model {arch!r}: no weights on the Hub; give a file of them")
    card = configured_card(arch, network)
    return find_weights(card, None)[0]


def load_body(network: Any, arch: str, path: Path, stem: str | None = None) -> None:
    """Load all weights but the head's.

    stem  prefix of weights that stay as they are where the file has them in other shapes
    """
    heads = network.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    state = network.state_dict()
    found = read_weights(path)
    if stem is not None and any(
        name.startswith(stem) and (name not in found or found[name].shape != tensor.shape)
        for name, tensor in state.items()
    ):
        prefixes = (*prefixes, stem)
    head = {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}
    body = {n: t for n, t in found.items() if not n.startswith(prefixes)}
    fill(network, body | head, path, arch)
