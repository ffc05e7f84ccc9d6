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

# name: (stored bytes are pictures, distribution whose version is told)
PEERS = {
    "latentds": (False, "latentds"),
    "latentds-resident": (False, "latentds"),
    "webdataset": (False, "webdataset"),
    "webdataset-packed": (False, "webdataset"),
    "datasets": (False, "datasets"),
    "datasets-packed": (False, "datasets"),
    "mds": (False, "mosaicml-streaming"),
    "mds-packed": (False, "mosaicml-streaming"),
    "jpeg-folder": (True, "torchvision"),
    "jpeg-webdataset": (True, "webdataset"),
}
READS = {"webdataset-packed": "latentds", "latentds-resident": "latentds"}  # others' files
HAVE_PACKED = ("webdataset", "datasets", "mds")
DECODES = ("codes", "latents", "pixels")
BUFFER = 5000  # samples that peers without an order of their own shuffle among


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure loaders on the same patches, machine and number of workers; all of them shuffle."""

    folder: Annotated[Path | None, tyro.conf.Positional] = None
    """Data set; without one, random codes of 2,048 bytes a patch (no pixels)."""
    split: str = "train"
    """Split."""
    against: str = "jpeg-folder,jpeg-webdataset,webdataset,datasets"
    """Peers with commas between: jpeg-folder, jpeg-webdataset, webdataset, datasets, mds. Those of
    latents are measured with one patch a sample and with packs of 256. latentds-resident is ours
    with all stored bytes on the device. 'none' measures ours alone."""
    decode: str = "codes,latents,pixels"
    """What batches are to hold, with commas between."""
    patches: int = 131_072
    """Patches to measure with, the first of the split."""
    pixel_patches: int = 2048
    """Patches that pixels are measured with, by all loaders: JPEG peers' files are decoded
    first, which is slow on a CPU."""
    batch_size: int = 256
    """Patches a batch."""
    pixel_batch_size: int = 64
    """Patches a batch where pixels are wanted."""
    workers: int = 2
    """Worker processes of every loader."""
    device: str = "auto"
    """Where batches end up and are decoded; auto takes a GPU where there is one."""
    autoencoder: str | None = None
    """Decoder instead of the recorded one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers of the decoder and its images."""
    channels_last: bool = False
    """Decode with channels last."""
    compile: bool = False
    """Compile the decoder."""
    cuda_graph: bool = False
    """Decode through a CUDA graph."""
    seconds: float = 5.0
    """Length of the warm phase; the cold one ends with the epoch, or after six times as long."""
    rounds: int = 3
    """All loaders are measured so often, in turn; medians are reported."""
    peer_python: Path | None = None
    """Python of another environment, with torch and mosaicml-streaming, for mds."""
    work: Path | None = None
    """Folder for the peers' files; a temporary one by default."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        check_known("peer", self.peers(), {*PEERS} - {"latentds"})
        check_known("--decode", self.decodes(), DECODES)
        if "mds" in self.peers() and self.peer_python is None:
            raise InputError(
                "mds needs an environment of its own (it pins other versions): 'python -m venv "
                "peer; peer/bin/pip install torch mosaicml-streaming', then --peer-python "
                "peer/bin/python"
            )

    def peers(self) -> list[str]:
        return [name for name in listed(self.against) if name != "none"]

    def decodes(self) -> list[str]:
        """Names in --decode; no pixels without a set."""
        return [name for name in listed(self.decode) if self.folder or name != "pixels"]

    def contenders(self) -> list[tuple[str, str]]:
        """Who is measured with batches of what; files that are pictures give pixels alone."""
        names = ["latentds"]
        for peer in self.peers():
            names += [peer, f"{peer}-packed"] if peer in HAVE_PACKED else [peer]
        return [
            (peer, decode)
            for peer in names
            for decode in self.decodes()
            if decode == "pixels" or not PEERS[peer][0]
        ]


def run(config: Config) -> None:
    show(measure(config), config.json, as_text)


def measure(config: Config) -> dict[str, Any]:
    config = harness.on_device(config)
    with tempfile.TemporaryDirectory(dir=config.work) as work:
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
    from latentds_tools.bench import peer_formats, synthetic

    own = work / "latentds"
    if config.folder:
        patches = peer_formats.write_subset(config.folder, own, config.split, config.patches)
    else:
        synthetic.write_synthetic(own, config.patches)
        patches = peer_formats.read_patches(own, config.split)
    common = describe_set(config, own, work, len(patches))
    most = config.pixel_patches
    few = peer_formats.Patches(patches.codes[:most], patches.labels[:most])
    sizes = {decode: few if decode == "pixels" else patches for decode in config.decodes()}
    folders = {("latentds", len(patches)): own}
    if "pixels" in sizes and len(few) < len(patches):
        folders["latentds", len(few)] = work / "latentds-few"
        peer_formats.write_subset(own, work / "latentds-few", config.split, len(few))
    specs = []
    for peer, decode in config.contenders():
        some, where = sizes[decode], READS.get(peer, peer)
        if (where, len(some)) not in folders:
            folders[where, len(some)] = folder = work / f"{peer}-{len(some)}"
            folder.mkdir()
            logger.info("writing %s", peer)
            write_format(config, peer, some, folder, own)
        specs.append(describe_one(config, peer, decode, folders[where, len(some)], some) | common)
    return specs


def describe_one(
    config: Config, peer: str, decode: str, folder: Path, patches: Any
) -> dict[str, Any]:
    size = config.pixel_batch_size if decode == "pixels" else config.batch_size
    count = len(patches)
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "peer": peer,
        "module": PEERS[peer][1],
        "images": PEERS[peer][0],
        "folder": str(folder),
        "decode": decode,
        "batch_size": size,
        "epoch_patches": count - count % size,
        "stored_patches": count,
        "stored_bytes_per_patch": stored / count,
        "resident": peer == "latentds-resident",
        "ceiling_rounds": 3 if PEERS[peer][1] == "latentds" and decode == "pixels" else 0,
    }


def describe_set(config: Config, own: Path, work: Path, count: int) -> dict[str, Any]:
    """What all processes are told: options, and what the set is like."""
    import numpy as np

    from latentds.quantizers.scalar import Codebook
    from latentds.store.reader import ShardSet

    if count < config.batch_size:
        raise InputError(
            f"{config.folder}: {count} patches are less than a batch of {config.batch_size}; "
            "a smaller --batch-size"
        )
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


def write_format(config: Config, peer: str, patches: Any, folder: Path, own: Path) -> None:
    from latentds_tools.bench import peer_formats

    pack = peer_formats.PACK if peer.endswith("-packed") else 1
    if peer.startswith("jpeg"):
        peer_formats.write_jpegs(patches, peer, folder, own, config.autoencoder)
    elif peer == "webdataset":
        peer_formats.write_webdataset(patches, folder, "npy", patches.codes)
    elif peer.startswith("datasets"):
        peer_formats.write_parquet(patches, folder, pack)
    else:
        peer_formats.write_mds(patches, folder, pack, str(config.peer_python))


def measure_one(config: Config, spec: dict[str, Any]) -> dict[str, Any]:
    """Figures of one contender; its error where it fails, so that the others are still told."""
    from latentds_tools.bench.measuring_loaders import measure_loader

    python = str(config.peer_python) if spec["peer"].startswith("mds") else sys.executable
    if spec["peer"].startswith("mds") and spec["decode"] == "pixels":
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
        "versions": sound[0]["versions"],
        "peak_mb": statistics.median(found["peak_mb"] for found in sound),
        "counters": sound[-1].get("counters"),
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


COLUMNS: dict[str, harness.Column] = {
    "batches of": ("decode", ""),
    "loader": ("peer", ""),
    "patches": ("stored_patches", ","),
    "stored B": ("stored_bytes_per_patch", ",.0f"),
    "warm patches/s (range)": ("warm_range", warm_text),
    "cold patches/s": ("cold", lambda row: f"{row['cold']['patches_per_s']:,.0f}"),
    "first batch s": ("cold", lambda row: f"{row['cold']['first_batch_s']:.2f}"),
    "CPU s/1000": ("warm", lambda row: f"{row['warm']['cpu_s_per_1000']:.3f}"),
    "disk B read, cold": ("cold", lambda row: f"{row['cold']['bytes_read_per_patch']:,.0f}"),
    "peak MB": ("peak_mb", ",.0f"),
}


def as_text(report: dict[str, Any]) -> str:
    """The table, best rates first within what batches hold."""
    where = report["machine"]
    head = (
        f"{where['gpu'] or where['cpu']}, {where['cores']} cores; {report['workers']} workers, "
        f"batches of {report['batch_size']} ({report['pixel_batch_size']} of pixels), medians of "
        f"{report['rounds']} rounds"
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
