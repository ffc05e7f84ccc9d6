"""Which quantization steps the records of a set have: how finely its patches are stored."""
# N patches sampled, S steps of a codebook

from __future__ import annotations

from typing import Any

import numpy as np

from latentds.quantizers.entropy.record_codebook import EntropyCodebook
from latentds.store.channel_statistics import sample_rows
from latentds.store.reader import ShardSet

SHARES = (0, 5, 25, 50, 75, 95, 100)  # per cent of the patches


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
