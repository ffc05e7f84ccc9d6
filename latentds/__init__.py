"""Pathology patches stored as autoencoder latents, decoded while you train.

Importing this costs nothing: each public name loads its module, and torch, when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from latentds.version import __version__

_HOMES = {
    "Autoencoder": "latentds.autoencoders",
    "Batch": "latentds.batch",
    "CacheConfig": "latentds.cache",
    "Codebook": "latentds.quantizer",
    "ConvertConfig": "latentds.conversion.config",
    "LatentArray": "latentds.array",
    "LatentDataset": "latentds.dataset",
    "LatentLoader": "latentds.loader",
    "LatentdsError": "latentds.errors",
    "Mixture": "latentds.mixture",
    "MultiCrop": "latentds.views.multicrop",
    "ShardSet": "latentds.reader",
    "convert": "latentds.conversion.pipeline",
    "load_autoencoder": "latentds.autoencoders",
    "SlideBags": "latentds.bags",
    "split_patients": "latentds.selection",
    "uniform": "latentds.randomness",
    "verify": "latentds.verification",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'latentds' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
