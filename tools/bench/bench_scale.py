"""latentds bench scale: what opening a set, its first batch and a state cost as sets grow."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

from latentds_tools.bench.harness import Case, Column, row_cells, run_cases, timed
from latentds_tools.reports.commands import show
from latentds_tools.reports.markdown import table

logger = logging.getLogger(__name__)
STATES = 200  # saved and loaded a set
BATCH_SIZE, BATCHES = 256, 200  # read before memory is measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Open synthetic sets of growing size, each in a fresh process with the page cache dropped."""

    patches: tuple[int, ...] = (100_000, 1_000_000, 24_000_000)
    """Sizes of the sets. Beyond --written patches, shards and the patch table are holes in the file
    system: 1,000,000,000 patches need 1 GB of disk."""
    written: int = 1_000_000
    """Patches up to which random codes are written (2 KiB each)."""
    rounds: int = 3
    """Rounds in which every set is opened; medians are reported."""
    json: bool = False
    """Print JSON."""


def run(config: Config) -> None:
    from latentds_tools.bench.synthetic import write_sparse, write_synthetic

    cases = []
    with tempfile.TemporaryDirectory() as work:
        for patches in config.patches:
            folder, is_whole = Path(work) / str(patches), patches <= config.written
            logger.info("making a set of %s patches", f"{patches:,}")
            (write_synthetic if is_whole else write_sparse)(folder, patches)
            once = functools.partial(open_once, folder)
            cases.append(Case({"patches": patches, "codes": is_whole}, once))
        run_cases(cases, config.rounds)
    show([case.row() for case in cases], config.json, as_text)


def open_once(folder: Path) -> dict[str, float]:
    """`look` and `count_fetched`, each in a fresh process, the page cache dropped."""
    from latentds_tools.bench.measuring_loaders import drop_page_cache

    drop_page_cache(folder)
    found: dict[str, float] = {}
    for figures in (look, count_fetched):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found |= pool.apply(figures, (folder,))
    return found


def count_fetched(folder: Path) -> dict[str, float]:
    """What is fetched of a set's location until its first batch is there: MB, requests, packs.

    Counted in `Transport.fetch`; tables that are fetched ahead meanwhile count.
    """
    from latentds import LatentLoader
    from latentds.store.cache import CacheConfig
    from latentds.store.transport import Transport

    fetched: list[tuple[str, int]] = []
    fetch = Transport.fetch

    def counted(self: Any, name: str, *rest: Any) -> bytes:
        content = fetch(self, name, *rest)
        fetched.append((name, len(content)))
        return content

    Transport.fetch = counted  # type: ignore[method-assign, assignment]
    # Removed with the sets, when this process is gone: it may still fetch ahead.
    cache = CacheConfig(dir=Path(tempfile.mkdtemp(dir=folder.parent)))
    loader = LatentLoader(
        f"file://{folder.resolve()}",
        batch_size=BATCH_SIZE,
        shuffle=True,
        decode="codes",
        cache=cache,
    )
    opened = sum(size for _, size in fetched)
    next(iter(loader))
    tables = [size for name, size in fetched if not name.startswith("data/")]
    return {
        "opened_mb": opened / 1e6,
        "fetched_mb": sum(tables) / 1e6,
        "requests": len(tables),
        "packs": len(fetched) - len(tables),
    }


def look(folder: Path) -> dict[str, float]:
    """Seconds and megabytes of one opening, in this process."""
    from latentds import LatentLoader

    before = memory()
    started = time.perf_counter()
    loader = LatentLoader(folder, batch_size=BATCH_SIZE, shuffle=True, decode="codes")
    opened = time.perf_counter()
    iterator = iter(loader)
    next(iterator)
    first = time.perf_counter()
    for _ in range(min(BATCHES, len(loader)) - 1):
        next(iterator)
    after = memory()
    state = loader.state_dict()
    load = functools.partial(loader.load_state_dict, state)
    return {
        "open_s": opened - started,
        "first_batch_s": first - started,
        "private_mb": (after["RssAnon"] - before["RssAnon"]) / 1e6,
        "mapped_mb": (after["RssFile"] - before["RssFile"]) / 1e6,
        "save_ms": 1e3 * timed(loader.state_dict, "cpu", steps=STATES)["seconds"],
        "load_ms": 1e3 * timed(load, "cpu", steps=STATES)["seconds"],
        "state_bytes": len(json.dumps(state)),
    }


def memory() -> dict[str, int]:
    """Bytes of this process in memory: its own, and pages of mapped files. Zeros off Linux."""
    sizes = {"RssAnon": 0, "RssFile": 0}
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        name, _, rest = line.partition(":")
        if name in sizes:
            sizes[name] = int(rest.split()[0]) * 1024
    return sizes


def as_text(rows: list[dict[str, Any]]) -> str:
    columns: dict[str, Column] = {
        "patches": ("patches", ","),
        "shards": ("codes", lambda row: "written" if row["codes"] else "holes"),
        "open s": ("open_s", ".3f"),
        "first batch s": ("first_batch_s", ".3f"),
        "own memory MB": ("private_mb", ".1f"),
        "mapped MB": ("mapped_mb", ".1f"),
        "fetched opening MB": ("opened_mb", ".2f"),
        "before a batch MB": ("fetched_mb", ".2f"),
        "requests": ("requests", ".0f"),
        "state save ms": ("save_ms", ".3f"),
        "load ms": ("load_ms", ".3f"),
        "state bytes": ("state_bytes", ".0f"),
    }
    return table(list(columns), [row_cells(columns, row) for row in rows])
