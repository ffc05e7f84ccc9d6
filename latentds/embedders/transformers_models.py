"""Phikon-v2 and Midnight, Dinov2 networks of transformers, from the Hub or a local folder.

The only file of embedders that imports transformers: safetensors only, no code of a repository.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentds.autoencoders.autoencoder import hash_tensors
from latentds.embedders.embedder import (
    ClassToken,
    EmbedderCard,
    NetworkEmbedder,
    Preparation,
    without_resizing,
)
from latentds.embedders.embedder_cards import CARDS
from latentds.embedders.weights import fetch, read_weights
from latentds.errors import WeightsError, first_words, missing_extra

PUBLISHED = "preprocessor_config.json"
FILES = ("config.json", PUBLISHED, "model.safetensors")
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


class Tokens(nn.Module):
    """Prepared images to the tokens (B, T, D) after the last layer, the class token first."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, prepared: Tensor) -> Tensor:
        tokens: Tensor = self.network(pixel_values=prepared).last_hidden_state
        return tokens

    def checkpoint_gradients(self) -> None:
        """Recompute each layer in the backward pass (transformers does so in train mode only)."""
        for layer in self.network.encoder.layer:
            layer.forward = functools.partial(recomputed, layer.forward)


def recomputed(forward: Any, *arguments: Any, **named: Any) -> Any:
    """What a layer returns, its activations dropped where gradients are wanted."""
    if not torch.is_grad_enabled():
        return forward(*arguments, **named)
    return checkpoint(forward, *arguments, use_reentrant=False, **named)


def load_dinov2(name: str, folder: Path | None = None, native: bool = False) -> NetworkEmbedder:
    """phikon-v2, an embedder of class tokens, or midnight, which has the patches' mean beside.

    folder  with config.json and model.safetensors; None for the Hub
    native  do not resize or crop: both edges must be multiples of the patch
    raises  WeightsError, MissingExtraError
    """
    card, has_mean = CARDS[name], name == "midnight"
    revision = card.revision
    if folder is None:  # the page of midnight states its preparation, no file of its does
        folder, revision = fetch(card, [f for f in FILES if not (has_mean and f == PUBLISHED)])
    network = load_network(folder)
    card = dataclasses.replace(
        card,
        dim=int(network.config.hidden_size) * (2 if has_mean else 1),
        multiple_px=int(network.config.patch_size),
        revision=revision,
        weights_id=hash_tensors(read_weights(folder / "model.safetensors"), {}),
    )
    stretch_px = None
    if not has_mean:
        card, stretch_px = published_rule(card, folder / PUBLISHED)
    if native:
        card, stretch_px = without_resizing(card), None
    prepare, tokens = Preparation(card, stretch_px), Tokens(network)
    pooled = ClassToken(tokens, mean_from=1 if has_mean else None)
    return NetworkEmbedder(card, pooled, prepare, checkpoint=tokens.checkpoint_gradients)


def load_network(folder: Path) -> Any:
    """The Dinov2 network of a folder, float32; WeightsError where a tensor is missing."""
    network, absent = pretrained(folder, "dinov2", "a Dinov2 network", "embedders")
    if absent:
        raise WeightsError(f"{folder}: tensor {absent[0]!r} is missing ({len(absent)} in all)")
    return network


def load_transformers(extra: str) -> Any:
    """The library, when it is needed: importing it takes a second."""
    try:
        import transformers
    except ImportError as error:
        raise missing_extra("transformers", extra) from error
    return transformers


def pretrained(folder: Path, model_type: str, what: str, extra: str) -> tuple[Any, list[str]]:
    """A folder's network of transformers, float32, and the tensors that it lacks, sorted.

    what    the network in words, for messages
    raises  WeightsError for another architecture and what cannot be read, MissingExtraError
    """
    try:
        found = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"{folder}/config.json: cannot be read ({error})") from error
    if found != model_type:
        raise WeightsError(f"{folder}/config.json: model_type {found!r}, {model_type!r} is wanted")
    if not (folder / "model.safetensors").is_file():
        raise WeightsError(f"{folder}: no model.safetensors; other files of weights are not read")
    try:
        network, report = load_transformers(extra).AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise WeightsError(f"{folder}: cannot load {what} ({first_words(error, 300)})") from error
    return network, sorted(report["missing_keys"])


def published_rule(card: EmbedderCard, path: Path) -> tuple[EmbedderCard, tuple[int, int] | None]:
    """The card with what a preprocessor_config.json says, and the (H, W) it stretches images to.

    The card as it is where there is no such file; None where nothing is stretched.
    """
    if not path.is_file():
        return card, None
    try:
        said = json.loads(path.read_text())
        if not said.get("do_rescale", True) or not said.get("do_normalize", True):
            raise ValueError("it neither rescales nor normalizes")
        size = said["size"] if said.get("do_resize", True) else {}
        resize_px = int(size["shortest_edge"]) if "shortest_edge" in size else None
        stretch_px = None if resize_px or not size else (int(size["height"]), int(size["width"]))
        is_cropped = "crop_size" in said and said.get("do_center_crop", True)
        crop = said["crop_size"] if is_cropped else None
        if crop and crop["height"] != crop["width"]:
            raise ValueError("its crop is not square")
        input_px = int(crop["height"]) if crop else None
        interpolation = INTERPOLATIONS[said["resample"]] if size else card.interpolation
        mean, std = tuple(said["image_mean"]), tuple(said["image_std"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path}: not a preparation of resizing and cropping ({error!r})"
        ) from error
    return dataclasses.replace(
        card,
        resize_px=resize_px,
        input_px=input_px,
        interpolation=interpolation,
        mean=mean,
        std=std,
        rule=describe_rule(resize_px, stretch_px, input_px, interpolation),
    ), stretch_px


def describe_rule(
    resize_px: int | None, stretch_px: tuple[int, int] | None, input_px: int | None, how: str
) -> str:
    steps = []
    if resize_px:
        steps.append(f"shorter edge to {resize_px} px ({how})")
    if stretch_px:
        steps.append(f"stretched to {stretch_px[1]}x{stretch_px[0]} px ({how})")
    if input_px:
        steps.append(f"centre crop of {input_px} px")
    steps.append("mean and std of preprocessor_config.json; class token")
    return ", ".join(steps)
