"""latentds bench resume: what loaders lose, repeat and move when a run is killed and resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from latentds_tools.bench import harness
from latentds_tools.reports.commands import check_known, listed, show

from latentds.errors import InputError

SCRIPT = Path(__file__).with_name("resuming.py")
GIVE_UP_S = 300
# peer: distributions it is made of, and the format that it reads
PEERS: dict[str, tuple[tuple[str, ...], str]] = {
    "latentds": (("latentds",), "latentds"),
    "webdataset": (("webdataset",), "webdataset"),
    "webdataset-stateful": (("webdataset", "torchdata"), "webdataset"),
    "datasets": (("datasets", "torchdata"), "parquet"),
    "torchdata": (("torchdata",), ""),  # its samples are their own numbers
    "mds": (("mosaicml-streaming",), "mds"),
    "litdata": (("litdata",), "litdata"),
}
# ranks and workers, until the stop and after it
TOPOLOGIES = (
    ((1, 0), (1, 0)),
    ((1, 2), (1, 2)),
    ((2, 2), (2, 2)),
    ((2, 2), (1, 2)),
)
STOPS = (0.2, 0.7)  # checkpoints, as shares of an epoch
SAMPLES, BATCH_SIZE = 2000, 16  # of an epoch; of a step, over all ranks
FILES = 16  # of a peer
BUFFER = 200  # samples that peers without an order of their own shuffle among

Ranks = list[list[list[int]]]  # sample numbers by rank and batch
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Kill runs after a checkpoint, resume them, and compare them with an uninterrupted run."""

    against: str = "webdataset,webdataset-stateful,datasets,torchdata"
    """Comma-separated, of webdataset, webdataset-stateful, datasets, torchdata, mds, litdata."""
    peer_python: Path | None = None
    """Python of another environment for mds and litdata."""
    out: Path | None = None
    """Write the report to this JSON file too."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        check_known("peer", listed(self.against), {*PEERS} - {"latentds"})


def run(config: Config) -> None:
    """Measure every peer and print; the report is written behind every peer."""
    versions: dict[str, str] = {}
    results: list[dict[str, Any]] = []
    report = harness.report_of(config, versions=versions, results=results)
    report["config"] |= {"samples": SAMPLES, "batch_size": BATCH_SIZE}
    with tempfile.TemporaryDirectory() as work:
        for peer in ("latentds", *listed(config.against)):
            results += measure_peer(config, peer, Path(work), versions)
            harness.write_report(config.out, report)
    show(report, config.json, as_text)


def measure_peer(
    config: Config, peer: str, work: Path, versions: dict[str, str]
) -> list[dict[str, Any]]:
    """Rows of a peer: a topology and a stop each. Its versions are noted."""
    is_other = config.peer_python is not None and peer in ("mds", "litdata")
    python = str(config.peer_python) if is_other else sys.executable
    distributions, form = PEERS[peer]
    found = harness.versions_of(python, distributions)
    versions |= found
    missing = [name for name in distributions if name not in found]
    if missing:
        return [{"peer": peer, "error": f"not installed: {', '.join(missing)}"}]
    folder = work / peer
    folder.mkdir()
    write_samples(form, folder, python)
    spec = {"peer": peer, "folder": str(folder), "samples": SAMPLES, "buffer": BUFFER}
    rows = []
    for topology in TOPOLOGIES:
        rows += measure_topology(python, spec, *topology, work)
    return rows


def write_samples(form: str, folder: Path, python: str) -> None:
    """Samples whose labels are their numbers; of ours the row is the number."""
    import numpy as np
    from latentds_tools.bench.peer_formats import Patches, write_format
    from latentds_tools.bench.synthetic import write_synthetic

    if form == "latentds":
        write_synthetic(folder, SAMPLES, shape=(1, 2, 2), patch_px=16)
        return
    codes = np.zeros((SAMPLES, 1, 16, 16), np.uint8)
    write_format(form, Patches(codes, np.arange(SAMPLES), FILES), folder, python)


def measure_topology(
    python: str, spec: dict[str, Any], before: tuple[int, int], after: tuple[int, int], work: Path
) -> list[dict[str, Any]]:
    """Rows of a topology: a stop each, compared with one run that nobody stopped."""
    logger.info("%s, %dx%d, resumed %dx%d", spec["peer"], *before, *after)
    head = {"peer": spec["peer"], "before": before, "after": after}
    try:
        whole = run_ranks(python, spec | {"phase": "whole"}, before, work)
    except InputError as error:
        return [head | {"error": str(error)}]
    rows = []
    for share in STOPS:
        stop = max(1, round(share * min(map(len, whole))))
        row: dict[str, Any] = head | {"stop": stop}
        try:
            first = run_ranks(python, spec | {"phase": "stopped", "stop": stop}, before, work)
            rest = run_ranks(python, spec | {"phase": "resumed", "stop": stop}, after, work)
            row |= compare(whole, first, rest, SAMPLES)
        except InputError as error:
            row["error"] = str(error)
        rows.append(row)
    return rows


def compare(whole: Ranks, first: Ranks, rest: Ranks, samples: int) -> dict[str, Any]:
    """What became of an epoch's samples.

    lost      those of the run that nobody stopped, which neither part delivered
    repeated  deliveries over those of that run
    moved     deliveries after resuming that this run has in another step, or not at all
    missing   samples of the epoch that this run does not deliver either; extra: those over one
    repeatable  whether the stopped run began as the other
    """
    expected = Counter(samples_of(whole))
    got = Counter(samples_of(first)) + Counter(samples_of(rest))
    stop = max(map(len, first))
    return {
        "lost": (expected - got).total(),
        "repeated": (got - expected).total(),
        "moved": (steps_of(rest, stop) - steps_of(whole, 0)).total(),
        "missing": samples - len(expected),
        "extra": expected.total() - len(expected),
        "repeatable": steps_of(first, 0) <= steps_of(whole, 0),
    }


def samples_of(ranks: Ranks) -> list[int]:
    return [sample for batches in ranks for batch in batches for sample in batch]


def steps_of(ranks: Ranks, start: int) -> Counter[tuple[int, int]]:
    """How often a step delivers a sample, on whatever rank; the first one is `start`."""
    return Counter(
        (step, sample)
        for batches in ranks
        for step, batch in enumerate(batches, start)
        for sample in batch
    )


def run_ranks(python: str, spec: dict[str, Any], topology: tuple[int, int], work: Path) -> Ranks:
    """Run a phase on all ranks at once; what every rank delivered. InputError where one fails."""
    ranks, workers = topology
    spec = spec | {"ranks": ranks, "workers": workers, "batch_size": BATCH_SIZE // ranks}
    outs = [work / f"out-{rank}.json" for rank in range(ranks)]
    if spec["phase"] == "stopped":
        for old in work.glob("state-*.pt"):
            old.unlink()
    port = free_port()
    with contextlib.ExitStack() as started:
        processes = []
        for rank, out in enumerate(outs):
            out.unlink(missing_ok=True)
            # A state is a rank's own where there are as many ranks as before, else the first's.
            kept = work / f"state-{rank}.pt"
            state = kept if kept.exists() or spec["phase"] != "resumed" else work / "state-0.pt"
            own = json.dumps(spec | {"out": str(out), "state": str(state)})
            launcher = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            rank_of = harness.child(
                [python, str(SCRIPT), own],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {name: str(value) for name, value in launcher.items()},
            )
            processes.append(started.enter_context(rank_of))
        words = [wait_for(process) for process in processes]
    for out, text in zip(outs, words, strict=True):
        if not out.exists():
            raise InputError(f"{spec['peer']}: {text}")
    return [json.loads(out.read_text()) for out in outs]


def wait_for(process: subprocess.Popen[str]) -> str:
    try:
        return harness.last_words(process.communicate(timeout=GIVE_UP_S)[1])
    except subprocess.TimeoutExpired:
        return f"no end within {GIVE_UP_S} s"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def place_text(row: dict[str, Any]) -> str:
    before, after = ("x".join(map(str, row[name])) for name in ("before", "after"))
    return before if before == after else f"{before}, then {after}"


COLUMNS: dict[str, harness.Column] = {
    "loader": ("peer", ""),
    "ranks x workers": ("before", place_text),
    "killed after step": ("stop", ""),
    "lost": ("lost", ","),
    "repeated": ("repeated", ","),
    "in another step": (
        "moved",
        lambda row: f"{row['moved']:,}" if row["repeatable"] else "no order to repeat",
    ),
    "missing, extra without a stop": (
        "missing", lambda row: f"{row['missing']:,}, {row['extra']:,}"
    ),
}  # fmt: skip


def row_cells(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        row = row | {"error": row["error"].removeprefix(f"{row['peer']}: ")}
    return harness.row_cells(COLUMNS, row, "lost")


def as_text(report: dict[str, Any]) -> str:
    """The table, the stops of a topology in one row: each of their cells, or what they all are."""
    config = report["config"]
    head = (
        f"{config['samples']:,} samples, {config['batch_size']} a step; "
        f"{harness.machine_text(report['machine'])}"
    )
    versions = ", ".join(f"{n} {v}" for n, v in sorted(report["versions"].items()))
    groups: dict[Any, list[list[str]]] = {}
    for row in report["results"]:
        peer, place, *cells = row_cells(row)
        groups.setdefault((peer, place), []).append(cells)
    rows = [
        [
            *names,
            *(
                "; ".join(each if len({*each}) > 1 else each[:1])
                for each in zip(*cells, strict=True)
            ),
        ]
        for names, cells in groups.items()
    ]
    return harness.report_text(head, list(COLUMNS), rows, "", versions)
