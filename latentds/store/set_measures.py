"""What a set is like: how mixed its slides are, of which resolutions, how finely it is stored."""
# N patches sampled, S steps of a codebook

from __future__ import annotations

from typing import Any

import numpy as np

from latentds.quantizers.entropy.record_codebook import EntropyCodebook
from latentds.store.channel_statistics import sample_rows
from latentds.store.reader import ShardSet

SHARES = (0, 5, 25, 50, 75, 95, 100)  # per cent of the patches


def slide_entropy(slides: np.ndarray) -> float | None:
    """Shannon entropy in bits of slide numbers (N,); None where no patch has a slide (-1)."""
    known = slides[slides >= 0]
    if not len(known):
        return None
    shares = np.unique(known, return_counts=True)[1] / len(known)
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # -0.0 for one slide


def slide_entropies(shards: ShardSet) -> dict[str, dict[str, float]]:
    """Of every split with slides: the mean over its shards, and the split's own entropy, in bits.

    Equal where every shard is like the whole; 0 within shards of one slide each.
    """
    records = shards.manifest.shards
    stops = np.cumsum([record.patches for record in records])
    parts: dict[str, list[np.ndarray]] = {}
    for shard, part in zip(records, np.split(shards.patches["slide"], stops[:-1]), strict=True):
        parts.setdefault(shard.split, []).append(part)
    found = {}
    for split, held in parts.items():
        whole = slide_entropy(np.concatenate(held))
        within = [bits for part in held if (bits := slide_entropy(part)) is not None]
        if whole is not None:
            found[split] = {"shards": round(float(np.mean(within)), 3), "split": round(whole, 3)}
    return found


def resolutions(mpp: np.ndarray) -> dict[str, int]:
    """Patches by micrometres a pixel in three digits, ascending; `unknown` for NaN."""
    values, counts = np.unique(mpp, return_counts=True)  # NaN is one value
    found: dict[str, int] = {}
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        name = "unknown" if np.isnan(value) else f"{value:.3g}"
        found[name] = found.get(name, 0) + count
    return found


def are_several(found: dict[str, int]) -> bool:
    """Whether resolutions differ by more than 5 %, or some are known and others not."""
    known = [float(name) for name in found if name != "unknown"]
    return len(found) > len(known) > 0 or bool(known and max(known) > 1.05 * min(known))


def measure_steps(shards: ShardSet) -> dict[str, Any] | None:
    """The distribution of steps over a fixed sample of patches, some 4,096; None without records.

    returns  JSON values: `patches` sampled, `of` all; `step`, percentiles of the steps; `finest`
             and `coarsest`, the shares of patches at the ends of what the codebook has: a record
             has more bytes than those can use, or hardly enough
    """
    books = shards.manifest.codebooks
    if not isinstance(books[0], EntropyCodebook):
        return None
    rows = sample_rows(shards)
    indices = shards.read_codes(rows)[:, 0].astype(np.int64)
    numbers = shards.codebook_numbers(rows)
    steps, last = np.zeros(len(rows), np.float32), np.zeros(len(rows), np.int64)
    for number, book in enumerate(books):
        assert isinstance(book, EntropyCodebook)  # one encoding a set
        own = numbers == number
        last[own] = len(book.steps) - 1
        steps[own] = book.steps[np.minimum(indices[own], len(book.steps) - 1)]
    values = np.percentile(steps, SHARES).tolist()
    return {
        "patches": len(rows),
        "of": shards.manifest.patches,
        "step": {f"p{s}": float(f"{v:.4g}") for s, v in zip(SHARES, values, strict=True)},
        "finest": round(float((indices == 0).mean()), 4),
        "coarsest": round(float((indices >= last).mean()), 4),
    }
