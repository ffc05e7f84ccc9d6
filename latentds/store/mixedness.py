"""How mixed slides are: entropy of slides within shards, beside the split's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from latentds.store.format import PATCH_DTYPE, PATCHES_TABLE, block_sums
from latentds.store.manifest import Manifest
from latentds.store.tables import Table


def slide_entropy(slides: np.ndarray) -> float | None:
    """Shannon entropy in bits of slide numbers (N,); None where no patch has a slide (-1)."""
    known = slides[slides >= 0]
    if not len(known):
        return None
    shares = np.unique(known, return_counts=True)[1] / len(known)
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # -0.0 for one slide


def slide_entropies(folder: Path, manifest: Manifest) -> dict[str, dict[str, float]]:
    """Of every split with slides: the mean over its shards, and the split's own entropy, in bits.

    Equal where every shard is like the whole; 0 within shards of one slide each.
    """
    stops = np.cumsum([shard.patches for shard in manifest.shards])
    slides = patch_table(folder, manifest)["slide"]
    parts: dict[str, list[np.ndarray]] = {}
    for shard, part in zip(manifest.shards, np.split(slides, stops[:-1]), strict=True):
        parts.setdefault(shard.split, []).append(part)
    found = {}
    for split, held in parts.items():
        whole = slide_entropy(np.concatenate(held))
        within = [bits for part in held if (bits := slide_entropy(part)) is not None]
        if whole is not None:
            found[split] = {"shards": round(float(np.mean(within)), 3), "split": round(whole, 3)}
    return found


def patch_table(folder: Path, manifest: Manifest) -> Table:
    """The patch table, checked as it is read."""
    sums = block_sums(manifest.tables.get(PATCHES_TABLE, {}), manifest.patches)
    return Table(folder / PATCHES_TABLE, PATCH_DTYPE, manifest.patches, sums)


def resolutions(mpp: np.ndarray) -> dict[str, int]:
    """Patches by micrometres a pixel in three digits, ascending; `unknown` for NaN."""
    values, counts = np.unique(mpp, return_counts=True)  # NaN is one value
    found: dict[str, int] = {}
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        name = "unknown" if np.isnan(value) else f"{value:.3g}"
        found[name] = found.get(name, 0) + count
    return found


def stored_resolutions(folder: Path, manifest: Manifest) -> dict[str, int]:
    """Patches of a finished set by micrometres a pixel."""
    return resolutions(patch_table(folder, manifest)["mpp"])


def are_several(found: dict[str, int]) -> bool:
    """Whether resolutions differ by more than 5 %, or some are known and others not."""
    known = [float(name) for name in found if name != "unknown"]
    return len(found) > len(known) > 0 or bool(known and max(known) > 1.05 * min(known))
