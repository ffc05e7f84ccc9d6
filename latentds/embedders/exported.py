"""Embedders that are folders or Hub repositories in timm's format, trained backbones among them.

FOLDER/config.json         architecture, model_args, pretrained_cfg, as timm's `save_for_hf` has
FOLDER/model.safetensors   every tensor of that network, a classifier's left out
FOLDER/latentds.json       of backbones trained here: compared with the tensors

What a config.json of other people may ask timm for is checked before timm sees it:
`timm.create_model` opens the file that `checkpoint_path` names, and before 1.0.20 or so unpickled
it: arguments of its own never come from a file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from latentds.autoencoders.foreign_networks import check_hash, download, is_numbers
from latentds.embedders.backbone_record import (
    CONFIG,
    LATENTS,
    READS,
    RECORD,
    WEIGHTS,
    read_json,
    read_record,
)
from latentds.embedders.embedder import NetworkEmbedder, without_resizing
from latentds.embedders.timm_models import configured_card, create, load
from latentds.errors import FormatError, LatentdsError, WeightsError

PREFIX, HUB_PREFIX = "timm-dir:", "timm:hf-hub:"
LATENT_PREFIX = "latent-dir:"
MAX_NUMBER, MAX_PX = 1 << 16, 1 << 14
# What timm's builders take for themselves.
OF_TIMM = frozenset(
    {
        *("model_name", "model_cls", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"),
        *("pretrained_strict", "pretrained_filter_fn", "pretrained_custom_load", "variant"),
        *("checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit", "strict"),
        *("features_only", "feature_cfg", "kwargs_filter", "url", "file", "hf_hub_id", "source"),
    }
)


def is_exported(text: str) -> bool:
    """Whether a name means a folder in timm's format that is there, or one on the Hub."""
    if text.startswith((PREFIX, HUB_PREFIX)):
        return True
    return any((Path(text) / name).is_file() for name in (CONFIG, RECORD))


def check_exported(text: str) -> None:
    """Raise as `load_exported` does for a folder that is not there, or has no configuration."""
    if not text.startswith(HUB_PREFIX):
        read_config(Path(text.removeprefix(PREFIX)))


def load_exported(text: str, *, native: bool = False) -> NetworkEmbedder:
    """The embedder of `timm-dir:FOLDER`, of the folder alone, of `timm:hf-hub:ORG/NAME[@REV]`.

    Images are resized to the size its pretrained_cfg has: of backbones trained here, training's.
    native  feed whole images, where the network takes any size
    raises  WeightsError, FormatError for what lies there; ShapeError for a network that has one
            size, UnknownNameError for an architecture that timm does not know, MissingExtraError
    """
    if text.startswith(HUB_PREFIX):
        return load_from_hub(text.removeprefix(HUB_PREFIX), native)
    return load_folder(Path(text.removeprefix(PREFIX)), text, native)


def load_from_hub(name: str, native: bool) -> NetworkEmbedder:
    """The embedder of a repository on the Hub, fetched or from the Hub's cache."""
    repository, _, revision = name.partition("@")
    advice = f"Without the Hub, pass the folder of a copy as '{PREFIX}FOLDER'."
    folder, commit = download(repository, (CONFIG, WEIGHTS), revision or None, advice)
    embedder = load_folder(folder, f"{HUB_PREFIX}{name}", native)
    embedder.card = dataclasses.replace(embedder.card, repository=repository, revision=commit)
    return embedder


def load_folder(folder: Path, text: str, native: bool) -> NetworkEmbedder:
    """The embedder of a folder, under the name it was asked for by."""
    config = read_config(folder)
    settings = config["pretrained_cfg"]
    network = create_foreign(
        folder / CONFIG, config["architecture"], config["model_args"], pretrained_cfg=settings
    )
    card = dataclasses.replace(
        configured_card(config["architecture"], network),
        name=text if text.startswith((PREFIX, HUB_PREFIX)) else f"{PREFIX}{folder}",
        class_name=config["architecture"],
        repository=None,
        file=WEIGHTS,
        multiple_px=(
            int(network.patch_embed.patch_size[0])
            if getattr(network, "dynamic_img_size", False)
            else 1
        ),
    )
    if native:
        card = without_resizing(card)
    embedder = load(card, network, folder, config["architecture"])
    if (folder / RECORD).is_file():
        stated = read_record(folder).weights_id
        check_hash(folder / WEIGHTS, embedder.card.weights_id, folder / RECORD, stated)
    return embedder


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json: checked, its pretrained_cfg cut to what a card is made from.

    raises  WeightsError where there is none, or the network reads latents; FormatError where it is
            damaged
    """
    if (folder / RECORD).is_file() and read_record(folder).stem is not None:
        raise WeightsError(
            f"{folder}: this backbone reads latents, not pictures; pass '{LATENT_PREFIX}{folder}' "
            "with a latentds data set"
        )
    path = folder / CONFIG
    if not path.is_file():
        raise WeightsError(
            f"{folder}: no {CONFIG} there; a folder in timm's format is wanted, such as "
            "'backbone' in the folder of a pretraining"
        )
    config = read_json(path)
    if config.get(READS) == LATENTS:
        raise WeightsError(f"{path}: this backbone reads latents, not pictures")
    if not isinstance(config.get("architecture"), str):
        raise FormatError(f"{path}: names no architecture; not a configuration of timm's")
    settings = config.get("pretrained_cfg", config)  # timm's older files have it all in one
    if not isinstance(settings, dict):
        raise FormatError(f"{path}: pretrained_cfg is {settings!r:.60}, not an object; damaged")
    arguments = checked_arguments(config.get("model_args") or {}, path)
    if arguments.get("in_chans", 3) != 3:
        raise WeightsError(f"{path}: the network reads {arguments['in_chans']} channels, not RGB")
    arguments.pop("num_classes", None)
    return config | {"pretrained_cfg": checked_settings(settings, path), "model_args": arguments}


def checked_arguments(arguments: Any, path: Path) -> dict[str, Any]:
    """`model_args` as arguments of a network; FormatError for any other.

    Numbers are bounded, for networks are built before their weights are seen.
    """
    if not isinstance(arguments, dict):
        raise FormatError(f"{path}: model_args is {arguments!r:.60}, not an object; damaged")
    for name, value in arguments.items():
        if name in OF_TIMM:
            raise FormatError(f"{path}: model_args has {name!r}, no argument of a network; refused")
        if not is_plain(value):
            raise FormatError(f"{path}: model_args has {name} {value!r:.60}; refused")
    return dict(arguments)


def is_plain(value: Any) -> bool:
    """None, a word, a bounded number, or a list of such."""
    if isinstance(value, list):
        return len(value) <= MAX_NUMBER and all(is_plain(part) for part in value)
    if isinstance(value, (int, float)):
        return math.isfinite(value) and abs(value) <= MAX_NUMBER
    return value is None or isinstance(value, str)


def checked_settings(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """Of `pretrained_cfg`, what a network's card is made from; FormatError for what cannot be."""
    kept = {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
    for name, value in kept.items():
        if not SETTINGS[name](value):
            raise FormatError(f"{path}: pretrained_cfg has {name} {value!r:.60}; refused")
    return kept


def is_triple(value: Any) -> bool:
    return is_numbers(value) and len(value) == 3


def is_word(value: Any) -> bool:
    return isinstance(value, str)


def is_word_or_words(value: Any) -> bool:
    return is_word(value) or (isinstance(value, list) and all(map(is_word, value)))


SETTINGS: dict[str, Callable[[Any], bool]] = {
    "input_size": lambda value: (
        is_triple(value) and all(type(n) is int and 0 < n <= MAX_PX for n in value)
    ),
    "fixed_input_size": lambda value: isinstance(value, bool),
    "interpolation": is_word,
    "crop_pct": lambda value: is_numbers([value]) and 0 < value <= 1,
    "crop_mode": is_word,
    "mean": is_triple,
    "std": lambda value: is_triple(value) and min(value) > 0,
    "classifier": is_word_or_words,
    "first_conv": is_word_or_words,
    "license": is_word,
}


def create_foreign(path: Path, architecture: str, arguments: dict[str, Any], **more: Any) -> Any:
    """The network that a file asks for, its weights random; WeightsError if timm cannot build it.

    arguments  its model_args, checked
    """
    try:
        with torch.random.fork_rng(devices=[]):  # not on "meta": some buffers are in no file
            return create(architecture, **checked_arguments(arguments, path), **more)
    except LatentdsError:
        raise
    except Exception as error:  # whatever a network's code makes of such arguments
        told = f"{type(error).__name__}: {error}"[:200]
        raise WeightsError(
            f"{path}: timm cannot build {architecture!r} with its model_args ({told})"
        ) from error
