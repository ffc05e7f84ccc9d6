"""What other people's config.json may ask timm for, checked before timm sees it.

`timm.create_model` opens the file that `checkpoint_path` names, and before 1.0.20 or so unpickled
it: arguments of its own never come from a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from latentds.autoencoders.foreign_networks import is_numbers
from latentds.embedders.timm_models import create
from latentds.errors import FormatError, LatentdsError, WeightsError

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
