"""latentds bench loader: rates of loaders over the same patches, each in a process of its own."""

from __future__ import annotations

import dataclasses
import functools
import logging
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from latentds_tools.bench import harness
from latentds_tools.bench.harness import Case, row_cells
from latentds_tools.reports.commands import check_known, listed, picked, show

from latentds.errors import InputError

logger = logging.getLogger(__name__)

OURS = "latentds.loading.loader"


@dataclasses.dataclass(frozen=True)
class Peer:
    """A loader to compare.

    distribution  whose version is told
    imports   what is imported before a clock starts
    files     the format that it reads
    replays   it delivers the recorded order, and not one of its own
    images    its stored bytes are pictures
    """

    distribution: str
    imports: str
    files: str
    replays: bool = False
    images: bool = False


PEERS = {
    "latentds": Peer("latentds", OURS, "latentds", replays=True),
    "latentds-resident": Peer("latentds", OURS, "latentds", replays=True),
    "latentds-rows": Peer("latentds", OURS, "latentds", replays=True),
    "npy": Peer("numpy", "numpy", "npy", replays=True),
    "hdf5": Peer("h5py", "h5py", "hdf5", replays=True),
    "webdataset": Peer("webdataset", "webdataset", "webdataset"),
    "webdataset-packed": Peer("webdataset", "webdataset", "latentds"),
    "datasets": Peer("datasets", "datasets", "parquet"),
    "datasets-packed": Peer("datasets", "datasets", "parquet-packed"),
    "datasets-rows": Peer("datasets", "datasets", "arrow", replays=True),
    "ray": Peer("ray", "ray.data", "parquet"),
    "mds": Peer("mosaicml-streaming", "streaming", "mds"),
    "mds-packed": Peer("mosaicml-streaming", "streaming", "mds-packed"),
    "mds-rows": Peer("mosaicml-streaming", "streaming", "mds", replays=True),
    "litdata": Peer("litdata", "litdata", "litdata"),
    "litdata-rows": Peer("litdata", "litdata", "litdata", replays=True),
    "energon": Peer("megatron-energon", "megatron.energon", "energon"),
    "jpeg-folder": Peer("torchvision", "torchvision.datasets", "jpeg-folder", True, True),
    "jpeg-webdataset": Peer("webdataset", "webdataset", "jpeg-webdataset", images=True),
}
FOREIGN = ("mds", "litdata", "energon")  # of --peer-python
COMPARED = 8  # batches of a loader that are compared with the recorded ones
DECODES = ("codes", "latents", "pixels")
BUFFER = 5000  # samples that peers without an order of their own shuffle among


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure loaders on the same patches, machine and number of workers; all of them shuffle."""

    folder: Annotated[Path | None, tyro.conf.Positional] = None
    """Data set. By default random codes of 2,048 bytes a patch (no pixels)."""
    split: str = "train"
    """Split to read."""
    against: str = "jpeg-folder,jpeg-webdataset,webdataset,datasets"
    """Comma-separated peers: jpeg-folder, jpeg-webdataset, webdataset, datasets, ray, mds, litdata,
    energon, npy, hdf5; 'none' for latentds alone. Some are measured with one patch a sample, with
    packs of 256 and by rows. latentds-resident keeps all stored bytes on the device, and
    latentds-rows reads by rows. All peers that are addressed by rows replay latentds' order."""
    decode: str = "codes,latents,pixels"
    """Comma-separated contents of batches."""
    patches: int = 131_072
    """Patches to measure with, the first of the split."""
    pixel_patches: int = 2048
    """Patches to measure pixels with, by all loaders. JPEG files are made first, slowly on a
    CPU."""
    batch_size: int = 256
    """Patches a batch."""
    pixel_batch_size: int = 64
    """Patches a batch when pixels are measured."""
    workers: int = 2
    """Worker processes of every loader."""
    device: str = "auto"
    """Device on which batches end up and are decoded; auto takes a GPU if there is one."""
    autoencoder: str | None = None
    """Decoder to use instead of the recorded one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the decoder and its images."""
    channels_last: bool = False
    """Decode with channels last."""
    compile: bool = False
    """Compile the decoder."""
    cuda_graph: bool = False
    """Decode through a CUDA graph."""
    seconds: float = 5.0
    """Length of the warm phase. The cold one ends with the epoch, or after six times as long."""
    rounds: int = 3
    """Rounds in which everything is measured in turn; medians are reported."""
    peer_python: Path | None = None
    """Python of another environment, with torch and what mds, litdata or energon needs: each pins
    other versions."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        check_known("peer", self.peers(), {*PEERS} - {"latentds"})
        check_known("--decode", self.decodes(), DECODES)

    def peers(self) -> list[str]:
        return [name for name in listed(self.against) if name != "none"]

    def decodes(self) -> list[str]:
        """Names in --decode; no pixels without a set."""
        return [name for name in listed(self.decode) if self.folder or name != "pixels"]

    def contenders(self) -> list[tuple[str, str]]:
        """Who is measured with batches of what; files that are pictures give pixels alone."""
        names = ["latentds"]
        for peer in self.peers():
            names += [name for name in PEERS if name == peer or name.startswith(f"{peer}-")]
        return [
            (name, decode)
            for name in names
            for decode in self.decodes()
            if decode == "pixels" or not PEERS[name].images
        ]


def run(config: Config) -> None:
    """Print the table; InputError where no loader came to figures."""
    report = measure(config)
    show(report, config.json, as_text)
    errors = [row["error"] for row in report["results"] if "error" in row]
    if errors and len(errors) == len(report["results"]):
        raise InputError(errors[0])


def measure(config: Config) -> dict[str, Any]:
    config = harness.on_device(config)
    with tempfile.TemporaryDirectory() as work:
        specs = prepare(config, Path(work))
        cases = [Case(spec, functools.partial(measure_one, config, spec)) for spec in specs]
        harness.run_cases(cases, config.rounds)
    return {
        "machine": harness.machine(config.device),
        **picked(config, "workers", "batch_size", "pixel_batch_size", "rounds"),
        "results": [summarize(case) for case in cases],
    }


def prepare(config: Config, work: Path) -> list[dict[str, Any]]:
    """Write every peer's files; what each process is to be told."""
    from latentds_tools.bench import peer_formats

    @functools.cache
    def own(count: int) -> tuple[Path, Any]:
        folder = work / f"latentds-{count}"
        return folder, peer_formats.write_own(config.folder, folder, config.split, count)

    @functools.cache
    def stored(form: str, count: int) -> Path:
        folder, patches = own(count)
        if form == "latentds":
            return folder
        logger.info("writing %s", form)
        out = work / f"{form}-{count}"
        out.mkdir()
        python = python_of(config, form)
        peer_formats.write_format(form, patches, out, python, folder, config.autoencoder)
        return out

    @functools.cache
    def order(decode: str, count: int) -> dict[str, Any]:
        return describe_order(config, decode, *own(count), work)

    versions = functools.cache(harness.versions_of)
    specs = []
    for peer, decode in config.contenders():
        count = config.pixel_patches if decode == "pixels" else config.patches
        spec = describe_peer(peer, decode, stored(PEERS[peer].files, count), len(own(count)[1]))
        distributions = (PEERS[peer].distribution, "torch", "numpy")
        spec["versions"] = versions(python_of(config, peer), distributions)
        specs.append(spec | describe_set(config, own(count)[0], work) | order(decode, count))
    return specs


def describe_order(
    config: Config, decode: str, folder: Path, patches: Any, work: Path
) -> dict[str, Any]:
    """The order that is replayed: our own of epoch 0, and its first batches' checksums."""
    import numpy as np
    import torch
    from latentds_tools.bench import peer_formats, peers

    size = config.pixel_batch_size if decode == "pixels" else config.batch_size
    if len(patches) < size:
        raise InputError(
            f"{config.folder}: {len(patches)} patches are less than a batch of {size}; a smaller "
            "--batch-size or --pixel-batch-size"
        )
    order = peer_formats.record_order(folder, config.split, size)
    np.save(work / f"order-{decode}.npy", order)
    batches = order[: COMPARED * size].reshape(-1, size)
    arrays = torch.from_numpy(patches.codes), torch.from_numpy(patches.labels)
    return {
        "order": str(work / f"order-{decode}.npy"),
        "epoch_patches": len(order),
        "batch_size": size,
        "recorded": [peers.checksums(*(array[rows] for array in arrays)) for rows in batches],
    }


def describe_peer(peer: str, decode: str, folder: Path, count: int) -> dict[str, Any]:
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "peer": peer,
        "decode": decode,
        **dataclasses.asdict(PEERS[peer]),
        "ours": peer in ("latentds", "latentds-resident"),
        "folder": str(folder),
        "stored_patches": count,
        "stored_bytes_per_patch": stored / count,
    }


def describe_set(config: Config, own: Path, work: Path) -> dict[str, Any]:
    """What all processes are told: options, and what the set is like."""
    import numpy as np

    from latentds.quantizers.scalar import Codebook
    from latentds.store.reader import ShardSet

    manifest = ShardSet(own).manifest
    codebook, levels = manifest.contract.codebook, None
    if isinstance(codebook, Codebook):  # for peers in a Python without latentds
        levels = str(work / "levels.npy")
        np.save(levels, codebook.levels)
    return {
        **picked(config, "split", "workers", "device", "autoencoder", "dtype", "seconds"),
        "decoding": picked(config, "channels_last", "compile", "cuda_graph"),
        "set": str(own),
        "classes": list(manifest.classes),
        "levels": levels,
        "shape": list(manifest.contract.codes_shape),
        "buffer": BUFFER,
    }


def python_of(config: Config, peer: str) -> str:
    is_foreign = config.peer_python is not None and peer.partition("-")[0] in FOREIGN
    return str(config.peer_python) if is_foreign else sys.executable


def measure_one(config: Config, spec: dict[str, Any]) -> dict[str, Any]:
    """Figures of one contender; its error where it fails, so that the others are still told."""
    from latentds_tools.bench.measuring_loaders import measure_loader

    python = python_of(config, spec["peer"])
    if python != sys.executable and spec["decode"] == "pixels":
        return {"error": "its Python has no latentds to decode with"}
    try:
        return measure_loader(spec, python)
    except InputError as error:
        logger.warning("%s", error)
        return {"error": str(error)}


def summarize(case: Case) -> dict[str, Any]:
    """Medians over rounds, with the least and the greatest warm rate."""
    kept = ("peer", "decode", "stored_patches", "stored_bytes_per_patch", "batch_size")
    row = {name: case.head[name] for name in kept}
    sound = case.sound
    if not sound:
        return row | case.rounds[0]
    row |= {phase: harness.medians([found[phase] for found in sound]) for phase in ("cold", "warm")}
    row |= {
        "warm_range": harness.extent([found["warm"]["patches_per_s"] for found in sound]),
        "versions": case.head["versions"],
        "peak_mb": statistics.median(found["peak_mb"] for found in sound),
        "counters": (counters := dict(sound[-1]["counters"])),
        "recorded_batches": counters.pop("replayed", None),
    }
    pairs = [pair for found in sound for pair in found["ceilings"]]
    if pairs:
        shares = [pair["end_to_end"] / pair["decoder"] for pair in pairs]
        row["decoder_alone"] = statistics.median(pair["decoder"] for pair in pairs)
        row["share_of_decoder"] = statistics.median(shares)
    return row


def warm_text(row: dict[str, Any]) -> str:
    low, high = row["warm_range"]
    return f"{row['warm']['patches_per_s']:,.0f} ({low:,.0f}-{high:,.0f})"


def order_text(row: dict[str, Any]) -> str:
    count = row["recorded_batches"]
    return "its own" if count is None else f"recorded, {count} compared"


COLUMNS: dict[str, harness.Column] = {
    "batches of": ("decode", ""),
    "loader": ("peer", ""),
    "order": ("warm", order_text),
    "stored B": ("stored_bytes_per_patch", ",.0f"),
    "warm patches/s (range)": ("warm_range", warm_text),
    "cold patches/s": ("cold", lambda row: f"{row['cold']['patches_per_s']:,.0f}"),
    "first batch s": ("cold", lambda row: f"{row['cold']['first_batch_s']:.2f}"),
    "cores": ("warm", lambda row: f"{row['warm']['cores']:.2f}"),
    "CPU µs a patch": ("warm", lambda row: f"{row['warm']['cpu_s_per_1000'] * 1000:,.1f}"),
    "disk B read, cold": ("cold", lambda row: f"{row['cold']['bytes_read_per_patch']:,.0f}"),
    "peak MB": ("peak_mb", ",.0f"),
}


def as_text(report: dict[str, Any]) -> str:
    """The table, best rates first within what batches hold."""
    where = report["machine"]
    counts = {row["decode"]: row["stored_patches"] for row in report["results"]}
    told = ", ".join(f"{count:,} patches as {decode}" for decode, count in counts.items())
    head = (
        f"{where['gpu'] or where['cpu']}, {where['cores']} cores; {report['workers']} workers, "
        f"{told}; batches of {report['batch_size']} ({report['pixel_batch_size']} of pixels), "
        f"medians of {report['rounds']} rounds"
    )
    rows = sorted(
        report["results"],
        key=lambda row: (
            DECODES.index(row["decode"]),
            -row.get("warm", {}).get("patches_per_s", 0.0),
        ),
    )
    rest: list[str] = []
    for row in rows:
        if "decoder_alone" in row:
            rest += [
                "",
                f"{row['peer']}: decoder alone, in turn with the loader: "
                f"{row['decoder_alone']:,.1f} patches/s; end to end {row['share_of_decoder']:.1%} "
                "of it",
            ]
        if row.get("counters"):
            counted = harness.counters_text(row["counters"])
            rest += ["", f"{row['peer']}, {row['decode']}: {counted}"]
    versions = {n: v for row in rows for n, v in row.get("versions", {}).items()}
    rest += ["", ", ".join(f"{n} {v}" for n, v in sorted(versions.items()))]
    cells = [row_cells(COLUMNS, row, "warm_range") for row in rows]
    return harness.report_text(head, list(COLUMNS), cells, *rest)
