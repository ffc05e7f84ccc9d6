"""What a set is like: statistics of its latents' channels, how mixed its slides are, its steps.

Channel statistics are recorded in the manifest, or counted in a fixed sample, as steps are.
"""
# C latent channels, h w latent cells, N patches sampled, S codebooks

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from latentds.errors import FormatError, ShapeError
from latentds.quantizers.additive import AdditiveCodebook
from latentds.quantizers.codebooks import ChannelStatistics, pool, rounded
from latentds.quantizers.entropy.record_codebook import EntropyCodebook
from latentds.quantizers.scalar import MAX_LEVELS, Codebook

if TYPE_CHECKING:
    from latentds.store.reader import ShardSet

logger = logging.getLogger(__name__)

# 128 packs of 32 patches: 16 MB of codes on a disk, 128 MB from a server, which sends whole packs;
# of a set of 24 million patches as of one of a hundred thousand.
SAMPLE_PATCHES, SAMPLE_PACKS = 4096, 128
TRAIN = "train"
SHARES = (0, 5, 25, 50, 75, 95, 100)  # per cent of the patches


def channel_statistics(shards: ShardSet) -> ChannelStatistics:
    """The statistics that a set's manifest records; of an older set, those it would record."""
    if shards.manifest.statistics is not None:
        return shards.manifest.statistics
    logger.info(
        "%s: its manifest has no channel statistics (made before they were recorded); taking them "
        "from %d patches at fixed places", shards.folder, len(sample_rows(shards)),
    )  # fmt: skip
    return measure_statistics(shards)


def measure_statistics(shards: ShardSet) -> ChannelStatistics:
    """The statistics of a fixed sample of the training split, or of all where there is none.

    Counted in whole numbers, so the same on every machine and rank. DamagedPackError where a pack
    of the sample is damaged.
    """
    books = shards.manifest.codebooks
    scalar = [book for book in books if isinstance(book, Codebook)]
    if len(scalar) < len(books):  # one encoding a set: all or none
        return sum_latents(shards)
    channels = shards.manifest.contract.latents_shape[0]
    counts = np.zeros((len(books), channels, MAX_LEVELS), np.int64)
    for _, rows in split_by_pack(shards, sample_rows(shards)):
        number = int(shards.codebook_numbers(rows[:1])[0])
        counts[number] += count_codes(shards.read_codes(rows))
    return summarize(counts, scalar, shards.folder)


def sum_latents(shards: ShardSet) -> ChannelStatistics:
    """The same of latents that have no levels to be counted.

    Summed in double precision pack by pack; every processor's sums agree in the digits kept.
    """
    found = shards.manifest.codebooks
    books = [book for book in found if isinstance(book, AdditiveCodebook | EntropyCodebook)]
    channels = shards.manifest.contract.latents_shape[0]
    sums, squares, count = np.zeros(channels), np.zeros(channels), 0
    for _, rows in split_by_pack(shards, sample_rows(shards)):
        book = books[int(shards.codebook_numbers(rows[:1])[0])]
        codes = shards.read_codes(rows)
        if (fault := book.find_fault(codes)) is not None:
            raise FormatError(f"{shards.folder}: {fault}; damaged, fetch it anew")
        latents = book.latents(codes).astype(np.float64)
        sums += latents.sum((0, 2, 3))
        squares += np.square(latents).sum((0, 2, 3))
        count += latents[:, 0].size
    means = sums / count
    deviations = np.sqrt(np.maximum(squares / count - means**2, 0))
    return ChannelStatistics(
        tuple(map(rounded, means.tolist())), tuple(map(rounded, deviations.tolist())), count
    )


def sample_rows(shards: ShardSet) -> np.ndarray:
    """Rows of the patch table that are counted: some packs, evenly spaced, and some of each."""
    manifest = shards.manifest
    begin, end, patches = 0, manifest.packs, manifest.patches
    if TRAIN in manifest.splits:
        (begin, end), patches = manifest.pack_range(TRAIN), manifest.splits[TRAIN]
    # Small packs are counted more of, until there are as many patches.
    wanted = max(SAMPLE_PACKS, math.ceil(SAMPLE_PATCHES * (end - begin) / patches))
    chosen = begin + evenly(end - begin, wanted)
    each = math.ceil(SAMPLE_PATCHES / len(chosen))
    first, sizes = shards.first_patch[chosen], shards.first_patch.counts(chosen)
    return np.concatenate(
        [start + evenly(size, each) for start, size in zip(first, sizes, strict=True)]
    )


def evenly(size: int, wanted: int) -> np.ndarray:
    """At most `wanted` of the numbers below `size`, evenly spaced, each in the middle of a part."""
    count = min(int(size), wanted)
    return (2 * np.arange(count, dtype=np.int64) + 1) * int(size) // (2 * count)


def split_by_pack(shards: ShardSet, rows: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(pack, its rows) for every pack that the rows are of."""
    return [(pack, rows[places]) for pack, places in shards.first_patch.group(rows)]


def count_codes(codes: np.ndarray) -> np.ndarray:
    """How often every code stands in every channel, int64 (C, 256), of codes (N, C, h, w)."""
    by_channel = codes.swapaxes(0, 1).reshape(codes.shape[1], -1)
    return np.stack([np.bincount(channel, minlength=MAX_LEVELS) for channel in by_channel])


def summarize(counts: np.ndarray, books: Sequence[Codebook], where: str) -> ChannelStatistics:
    """Statistics of histograms (S, C, 256), one a codebook, rounded as float32 would."""
    channels = counts.shape[1]
    means, deviations = [], []
    for channel in range(channels):
        pairs = [pair for n, book in enumerate(books)
                 for pair in level_counts(counts[n, channel], book, channel, where)]  # fmt: skip
        total = sum(count for _, count in pairs)
        # fsum is exact: no order of summing, no processor's rounding
        mean = math.fsum(level * count for level, count in pairs) / total
        variance = math.fsum((level - mean) ** 2 * count for level, count in pairs) / total
        means.append(rounded(mean))
        deviations.append(rounded(math.sqrt(variance)))
    return ChannelStatistics(tuple(means), tuple(deviations), int(counts[:, 0].sum()))


def level_counts(
    counts: np.ndarray, book: Codebook, channel: int, where: str
) -> list[tuple[float, int]]:
    """(level, how often) of one channel's codes; FormatError for codes beyond the codebook."""
    levels = book.levels[channel if len(book.levels) > 1 else 0]
    if counts[len(levels) :].any():
        raise FormatError(
            f"{where}: code {int(np.flatnonzero(counts).max())}, but the codebook has "
            f"{len(levels)} levels; damaged, fetch it anew"
        )
    used = np.flatnonzero(counts)
    return list(zip(levels[used].astype(float).tolist(), counts[used].tolist(), strict=True))


def pool_sets(sets: Sequence[ShardSet], weights: Sequence[float]) -> ChannelStatistics:
    """The statistics of one set, or of a mixture of several by its weights."""
    parts = [channel_statistics(shards) for shards in sets]
    return parts[0] if len(parts) == 1 else pool(parts, weights)


def checked_statistics(given: ChannelStatistics, shards: ShardSet) -> ChannelStatistics:
    """The statistics that were given; ShapeError for those of other channels than a set's."""
    channels = shards.manifest.contract.latents_shape[0]
    if len(given.mean) != channels:
        raise ShapeError(
            f"{shards.folder}: latents of {channels} channels, the statistics given are of "
            f"{len(given.mean)}; give those of latents of this autoencoder"
        )
    return given


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
    parts = np.split(shards.patches["slide"], stops[:-1])
    found = {}
    for split in dict.fromkeys(record.split for record in records):
        held = [part for record, part in zip(records, parts, strict=True) if record.split == split]
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
    books = [book for book in shards.manifest.codebooks if isinstance(book, EntropyCodebook)]
    if not books:  # one encoding a set: all or none
        return None
    rows = sample_rows(shards)
    indices = shards.read_codes(rows)[:, 0].astype(np.int64)
    numbers = shards.codebook_numbers(rows)
    steps, last = np.zeros(len(rows), np.float32), np.zeros(len(rows), np.int64)
    for number, book in enumerate(books):
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
