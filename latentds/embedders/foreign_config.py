"""What other people's config.json may ask timm for, checked before timm sees it.

`timm.create_model` opens the file that `checkpoint_path` names, and before 1.0.20 or so unpickled
it: arguments of its own never come from a file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

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
    """`pretrained_cfg` as it came; FormatError where a value cannot be."""
    for name, value in settings.items():
        is_good = SETTINGS.get(name, is_plain)
        if not is_good(value):
            raise FormatError(f"{path}: pretrained_cfg has {name} {value!r:.60}; refused")
    return settings


def is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(is_number, value))


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_size(value: Any) -> bool:
    """Channels, height and width."""
    return is_triple(value) and all(type(n) is int and 0 < n <= MAX_PX for n in value)


def is_word(value: Any) -> bool:
    return isinstance(value, str)


def is_word_or_words(value: Any) -> bool:
    return is_word(value) or (isinstance(value, list) and all(map(is_word, value)))


SETTINGS = {
    "input_size": is_size,
    "fixed_input_size": lambda value: isinstance(value, bool),
    "interpolation": is_word,
    "crop_pct": lambda value: is_number(value) and 0 < value <= 1,
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
