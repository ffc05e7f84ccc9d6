"""Canonical order: what originals and shards converted from them are both sorted by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def canonical_order(sources: Sequence[str], y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """int64 (N,): places of patches sorted by source (by code points), y and x."""
    rank = {source: place for place, source in enumerate(sorted(set(sources)))}
    numbers = np.fromiter((rank[source] for source in sources), np.int64, len(sources))
    return np.lexsort((x, y, numbers)).astype(np.int64)
