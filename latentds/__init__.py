"""Pathology patches stored as autoencoder latents, decoded while you train.

Importing this costs nothing: each public name loads its module, and torch, when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from latentds.version import __version__

_HOMES = {
    "Autoencoder": "latentds.autoencoders",
    "Batch": "latentds.loading.batch",
    "CacheConfig": "latentds.store.cache",
    "Codebook": "latentds.quantizers.scalar",
    "ConvertConfig": "latentds.conversion.convert_config",
    "Decode": "latentds.loading.decoding",
    "LatentArray": "latentds.loading.array",
    "LatentDataset": "latentds.loading.dataset",
    "LatentLoader": "latentds.loading.loader",
    "LatentdsError": "latentds.errors",
    "Mixture": "latentds.loading.options",
    "MultiCrop": "latentds.views.multicrop",
    "Order": "latentds.loading.options",
    "Select": "latentds.loading.options",
    "ShardSet": "latentds.store.reader",
    "Workers": "latentds.loading.options",
    "Writer": "latentds.edit.sink",
    "convert": "latentds.conversion.converting",
    "load_autoencoder": "latentds.autoencoders",
    "SlideBags": "latentds.loading.bags",
    "split_patients": "latentds.loading.selection",
    "uniform": "latentds.core.randomness",
    "unpack": "latentds.loading.unpacking",
    "verify": "latentds.store.verification",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'latentds' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
