"""The patch table as Arrow columns: names by their numbers, unknown values null."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from latentds.store.manifest import Manifest

NUMBERS = ("x", "y", "mpp", "size_px")


def named(numbers: np.ndarray, names: Sequence[str]) -> pa.DictionaryArray:
    """Numbers of names as the names; null for -1."""
    places = pa.array(numbers.astype(np.int32), mask=numbers < 0)
    return pa.DictionaryArray.from_arrays(places, pa.array(list(names), pa.string()))


def numbered(name: str, stored: np.ndarray) -> pa.Array:
    """x, y, mpp or size_px of patches; null where unknown."""
    unknown = stored == 0 if name == "size_px" else ~(stored >= 0)  # NaN is not >= 0 either
    return pa.array(stored, mask=unknown)


def patch_columns(rows: np.ndarray, stored: np.ndarray, manifest: Manifest) -> pa.Table:
    """Row, split, label, slide, x, y, mpp and size_px of patches.

    stored  PATCH_DTYPE, of these rows
    """
    ends = np.cumsum(list(manifest.splits.values()))
    columns = {
        "row": pa.array(rows),
        "split": named(np.searchsorted(ends, rows, side="right"), list(manifest.splits)),
        "label": named(stored["label"], manifest.classes),
        "slide": named(stored["slide"], manifest.slides),
    }
    return pa.table(columns | {name: numbered(name, stored[name]) for name in NUMBERS})
