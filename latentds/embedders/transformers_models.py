"""Phikon-v2 and Midnight, Dinov2 networks of transformers, from the Hub or a local folder.

The only file of embedders that imports transformers: safetensors only, no code of a repository.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

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
    if not has_mean:
        card = published_rule(card, folder / PUBLISHED)
    if native:
        card = without_resizing(card)
    pooled = ClassToken(Tokens(network), mean_from=1 if has_mean else None)
    return NetworkEmbedder(card, pooled, Preparation(card))


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


def published_rule(card: EmbedderCard, path: Path) -> EmbedderCard:
    """The card with the resizing, crop, mean and std that a preprocessor_config.json says.

    The card as it is where there is no such file; WeightsError for another kind of preparation.
    """
    if not path.is_file():
        return card
    try:
        said = json.loads(path.read_text())
        steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        crop = said["crop_size"]
        if not all(said.get(step, True) for step in steps) or crop["height"] != crop["width"]:
            raise ValueError("it does not resize, crop a square and normalize")
        resize_px, input_px = int(said["size"]["shortest_edge"]), int(crop["height"])
        interpolation = INTERPOLATIONS[said["resample"]]
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
        rule=f"shorter edge to {resize_px} px ({interpolation}), centre crop of {input_px} px, "
        f"mean and std of {PUBLISHED}; class token",
    )
