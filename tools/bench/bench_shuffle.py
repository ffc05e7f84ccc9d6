"""latentds bench shuffle: how far an order is from uniform, and what it makes ranks read."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from latentds_tools.bench.harness import Column, report_text, row_cells
from latentds_tools.reports.commands import show
from latentds_tools.reports.markdown import table

from latentds.loading.options import Order

BUFFER = 5000  # samples webdataset's documentation shuffles among
TOPOLOGIES = ((1, 1), (2, 4), (4, 8))  # ranks, workers
ORDERS: dict[str, Column] = {
    "order": ("order", ""),
    "neighbours of one slide": ("same_slide", ".2%"),
    "slides a batch": ("slides", ".1f"),
    "label distance": ("label_distance", ".3f"),
    "displacement": ("displacement", ".3f"),
}
READS: dict[str, Column] = {
    "ranks x workers": ("ranks", lambda row: f"{row['ranks']} x {row['workers']}"),
    "nodes": ("nodes", ""),
    "lanes": ("lanes", ""),
    "cached packs": ("cached_packs", ","),
    "read over delivered, a node": ("read_over_delivered", ".3f"),
}
CACHE_SHARE = 0.1  # of the set's packs in a node's cache; at least two windows of the order
MAX_PATCHES = 2_000_000  # places of the epoch to look at
PREFETCH = 2  # batches a DataLoader worker is ahead


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compare orders of a set by slide and label; count the packs that ranks and workers fetch."""

    folder: tyro.conf.Positional[Path]
    """Data set."""
    global_batch_size: int = 256
    """Patches a global batch."""
    json: bool = False
    """Print JSON."""


def run(config: Config) -> None:
    from latentds import LatentDataset

    batch = config.global_batch_size
    data = LatentDataset(config.folder, order=Order(global_batch_size=batch), shuffle=True)
    result = {
        "patches": data.patches,
        "slides": len(data.shards.manifest.slides),
        "global_batch_size": batch,
        "orders": compare_orders(data, batch),
        "reads": [
            count_reads(data, batch, ranks, workers, nodes, lanes)
            for ranks, workers in TOPOLOGIES
            for nodes, lanes in ([(1, 1)] if ranks == 1 else [(1, 1), (2, 1), (2, 2)])
        ],
    }
    show(result, config.json, as_text)


def compare_orders(data: Any, batch: int) -> list[dict[str, Any]]:
    """Figures of the stored order, a shuffle buffer, ours, and a uniform shuffle."""
    count = min(data.patches, MAX_PATCHES)
    first, end = data.shards.patch_range("train")
    table = data.shards.patches
    rng = np.random.default_rng(0)
    orders = {
        "stored": np.arange(first, first + count),
        f"shuffle buffer of {BUFFER:,}": first + buffered(np.arange(count), rng),
        "latentds": data.sampler.draw(0, 0, count).rows,
        "uniform": first + rng.permutation(end - first)[:count],
    }
    slides, labels = table["slide"][first:end], table["label"][first:end]
    return [
        {"order": name} | measure(rows - first, slides, labels, batch)
        for name, rows in orders.items()
    ]


def buffered(places: np.ndarray, rng: Any) -> np.ndarray:
    """What a shuffle buffer makes of a sequence: each output frees a place for the next input."""
    buffer, out = places[:BUFFER].copy(), []
    picks = rng.integers(0, len(buffer), max(len(places) - BUFFER, 0))
    for pick, place in zip(picks.tolist(), places[BUFFER:].tolist(), strict=True):
        out.append(buffer[pick])
        buffer[pick] = place
    return np.concatenate([np.array(out, np.int64), rng.permutation(buffer)])


def measure(
    positions: np.ndarray, slides: np.ndarray, labels: np.ndarray, batch: int
) -> dict[str, float]:
    """Figures of one order.

    same_slide     share of neighbours that are of one slide
    slides         distinct slides a global batch
    label_distance mean total variation distance between a batch's labels and the set's
    displacement   mean distance between a patch's place and its stored position, over the set's
                   size; 1/3 for a uniform shuffle
    """
    shown, classes = slides[positions], labels[positions] + 1
    batches = len(positions) // batch
    whole = np.bincount(labels + 1) / len(labels)
    groups = shown[: batches * batch].reshape(batches, batch)
    distances = [
        np.abs(np.bincount(part, minlength=len(whole)) / batch - whole).sum() / 2
        for part in classes[: batches * batch].reshape(batches, batch)
    ]
    return {
        "same_slide": float(np.mean(shown[1:] == shown[:-1])),
        "slides": float(np.mean([len(np.unique(part)) for part in groups])) if batches else 0.0,
        "label_distance": float(np.mean(distances)) if batches else 0.0,
        "displacement": float(np.mean(np.abs(positions - np.arange(len(positions)))) / len(labels)),
    }


def count_reads(
    data: Any, batch: int, ranks: int, workers: int, nodes: int, lanes: int
) -> dict[str, Any]:
    """Bytes fetched over bytes delivered, of the node that fetches most.

    Every worker is PREFETCH batches ahead; the ranks of a node share a cache of packs, of which the
    least recently used go first.
    """
    from latentds.loading.order import Batching

    batching = Batching(size=data.patches, global_batch=batch, ranks=ranks, lanes=lanes)
    shards, size = data.shards, data.shards.manifest.contract.bytes_per_patch
    window = -(-data.sampler.layout.window // data.sampler.layout.usual)
    capacity = max(int(len(data.sampler.layout) * CACHE_SHARE), 2 * window * lanes)
    batches = min(len(batching), MAX_PATCHES // batch)
    shares = []
    for node in range(nodes):
        cache: OrderedDict[int, None] = OrderedDict()
        fetched = delivered = 0
        for number in read_sequence(batches, workers):
            for rank in range(node * ranks // nodes, (node + 1) * ranks // nodes):
                stretches = batching.stretches(number, rank)
                rows = np.concatenate([data.sampler.draw(0, *s).rows for s in stretches])
                delivered += len(rows) * size
                packs = np.unique(shards.packs_of(rows))
                fetched += fetch(cache, packs, shards.first_patch.counts(packs), capacity)
        shares.append(fetched * size / delivered)
    return {
        "ranks": ranks,
        "workers": workers,
        "nodes": nodes,
        "lanes": lanes,
        "cached_packs": capacity,
        "read_over_delivered": max(shares),
    }


def read_sequence(batches: int, workers: int) -> list[int]:
    """The sequence in which a rank's workers read: each PREFETCH batches at a time, in turn."""
    turn = workers * PREFETCH
    return [
        start + worker + step * workers
        for start in range(0, batches, turn)
        for worker in range(workers)
        for step in range(PREFETCH)
        if start + worker + step * workers < batches
    ]


def fetch(cache: OrderedDict[int, None], packs: Any, counts: Any, capacity: int) -> int:
    """Patches fetched, their packs not being in the cache; afterwards they are."""
    fetched = 0
    for pack, count in zip(packs.tolist(), counts.tolist(), strict=True):
        if pack in cache:
            cache.move_to_end(pack)
            continue
        cache[pack] = None
        fetched += count
        if len(cache) > capacity:
            cache.popitem(last=False)
    return fetched


def as_text(result: dict[str, Any]) -> str:
    head = (
        f"{result['patches']:,} patches of {result['slides']:,} slides, global batch "
        f"{result['global_batch_size']:,}"
    )
    orders = [row_cells(ORDERS, row) for row in result["orders"]]
    reads = [row_cells(READS, row) for row in result["reads"]]
    return report_text(head, list(ORDERS), orders, "", table(list(READS), reads))
