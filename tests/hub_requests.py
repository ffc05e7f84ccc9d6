"""Requests of an epoch from a server as the Hub is one: ours, and those of `datasets`.

    python -m tests.hub_requests --patches 100000 400000 1000000

A set of random codes of 2 KiB is served on this machine. Both read all of it once with an empty
cache, shuffled: ours into batches of 256, `datasets` from the same shards, as WebDataset, through a
buffer of 128 packs. The server sends who asks for a file to another address, as the Hub does, and
counts what is asked of itself, what of those addresses, and bytes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from latentds_tools.bench.synthetic import write_synthetic
from latentds_tools.reports.markdown import table

from latentds.loading.dataset import LatentDataset
from latentds.store.cache import CacheConfig
from tests.flaky_server import RESOLVED, FlakyServer, serving
from tests.mutations import say

TITLES = ("patches", "set MB", "reader", "to the Hub", "for shards", "for tables", "before a batch",
          "MB each", "seconds")  # fmt: skip


def ours(_: str, folder: Path, cache: Path) -> Iterator[int]:
    """How many patches every batch has."""
    del folder
    config = CacheConfig(dir=cache)
    yield from map(
        len,
        LatentDataset("hf://datasets/org/name@main", batch_size=256, shuffle=True, cache=config),
    )


def theirs(url: str, folder: Path, cache: Path) -> Iterator[int]:
    """The same of `datasets`, whose samples are packs."""
    import datasets

    names = [f"data/{path.name}" for path in sorted((folder / "data").glob("*.tar"))]
    shards = [f"{url}/{RESOLVED}{name}" for name in names]
    options: Any = {"data_files": {"train": shards}, "split": "train", "cache_dir": str(cache)}
    stream = datasets.load_dataset("webdataset", streaming=True, **options)
    for pack in stream.shuffle(seed=0, buffer_size=128):
        yield len(pack["codes.npy"])


def rows_of(patches: int, work: Path) -> Iterator[list[str]]:
    """A row of the table for each reader of a set of so many patches."""
    folder = work / "set"
    write_synthetic(folder, patches)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    for name, reader in (("latentds", ours), ("datasets", theirs)):
        with serving(folder) as server:
            constants.ENDPOINT, server.signature = server.url, "until=tomorrow"
            started, counts = time.perf_counter(), reader(server.url, folder, work / name)
            found, begun = next(counts), sum(fetched(server))
            found += sum(counts)
            seconds, (shards, tables) = time.perf_counter() - started, fetched(server)
            if found != patches:
                raise AssertionError(f"{name} gave {found} of {patches} patches")
            each = server.sent / 1e6 / (shards + tables)
            yield [f"{patches:,}", f"{size / 1e6:,.0f}", name, str(server.asked), str(shards),
                   str(tables), str(begun), f"{each:.1f}", f"{seconds:.0f}"]  # fmt: skip


def fetched(server: FlakyServer) -> tuple[int, int]:
    """Requests answered with parts of shards, and with the manifest or parts of tables."""
    counts = server.requests.items()
    shards, tables = (
        sum(number for path, number in counts if path.startswith(top))
        for top in ("data/", ".latentds/")
    )
    return shards, tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patches", type=int, nargs="+", default=[100_000])
    rows = []
    for patches in parser.parse_args().patches:
        with tempfile.TemporaryDirectory() as work:
            rows += rows_of(patches, Path(work))
    say(table(TITLES, rows))


if __name__ == "__main__":
    main()
