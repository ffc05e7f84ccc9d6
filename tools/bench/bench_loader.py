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
from latentds_tools.bench.harness import (
    Case,
    counters_text,
    extent,
    machine,
    medians,
    report_text,
    run_cases,
)
from latentds_tools.reports.commands import show

from latentds.errors import InputError, unknown_name

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
        for peer in self.peers():
            if peer not in {*PEERS} - {"latentds"}:
                raise unknown_name("peer", peer, {*PEERS} - {"latentds"})
        for decode in self.decodes():
            if decode not in ("codes", "latents", "pixels"):
                raise unknown_name("--decode", decode, ("codes", "latents", "pixels"))
        if "mds" in self.peers() and self.peer_python is None:
            raise InputError(
                "mds needs an environment of its own (it pins other versions): 'python -m venv "
                "peer; peer/bin/pip install torch mosaicml-streaming', then --peer-python "
                "peer/bin/python"
            )

    def peers(self) -> list[str]:
        """Names in --against."""
        return [name for name in self.against.split(",") if name not in ("", "none")]

    def decodes(self) -> list[str]:
        """Names in --decode; no pixels without a set."""
        names = [name for name in self.decode.split(",") if name]
        return names if self.folder else [name for name in names if name != "pixels"]

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
    """Measure and print."""
    show(measure(config), config.json, as_text)


def measure(config: Config) -> dict[str, Any]:
    """Prepare, and measure in turn."""
    from latentds.core.device_choice import choose_device

    config = dataclasses.replace(config, device=str(choose_device(config.device)))
    if config.cuda_graph and not config.device.startswith("cuda"):
        raise InputError(f"--cuda-graph needs a CUDA device, not {config.device}; leave it")
    with tempfile.TemporaryDirectory(dir=config.work) as work:
        specs = prepare(config, Path(work))
        cases = [Case(spec, functools.partial(measure_one, config, spec)) for spec in specs]
        run_cases(cases, config.rounds)
    return {
        "machine": machine(config.device),
        "workers": config.workers,
        "batch_size": config.batch_size,
        "pixel_batch_size": config.pixel_batch_size,
        "rounds": config.rounds,
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
    few = patches.first(config.pixel_patches)
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
    """What one process is told."""
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
    """What all processes are told."""
    import numpy as np

    from latentds.quantizers.scalar import Codebook
    from latentds.store.reader import ShardSet

    manifest = ShardSet(own).manifest
    codebook, levels = manifest.contract.codebook, None
    if isinstance(codebook, Codebook):  # for peers in a Python without latentds
        levels = str(work / "levels.npy")
        np.save(levels, codebook.levels)
    if count < config.batch_size:
        raise InputError(
            f"{config.folder}: {count} patches are less than a batch of {config.batch_size}; "
            "a smaller --batch-size"
        )
    return {
        "set": str(own),
        "split": config.split,
        "classes": list(manifest.classes),
        "levels": levels,
        "shape": list(manifest.contract.codes_shape),
        "workers": config.workers,
        "buffer": BUFFER,
        "device": config.device,
        "autoencoder": config.autoencoder,
        "dtype": config.dtype,
        "decoding": {
            "channels_last": config.channels_last,
            "compile": config.compile,
            "cuda_graph": config.cuda_graph,
        },
        "seconds": config.seconds,
    }


def write_format(config: Config, peer: str, patches: Any, folder: Path, own: Path) -> None:
    """Write a peer's files."""
    from latentds_tools.bench import peer_formats
    from latentds_tools.bench.measuring_loaders import SCRIPT

    pack = peer_formats.PACK if peer.endswith("-packed") else 1
    if peer.startswith("jpeg"):
        peer_formats.write_jpegs(patches, peer, folder, own, config.autoencoder)
    elif peer == "webdataset":
        peer_formats.write_webdataset(patches, folder)
    elif peer.startswith("datasets"):
        peer_formats.write_parquet(patches, folder, pack)
    else:
        peer_formats.write_mds(patches, folder, pack, str(config.peer_python), SCRIPT)


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
    row |= {phase: medians([found[phase] for found in sound]) for phase in ("cold", "warm")}
    row |= {
        "warm_range": extent([found["warm"]["patches_per_s"] for found in sound]),
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


def as_text(report: dict[str, Any]) -> str:
    """The table, best rates first within what batches hold."""
    where = report["machine"]
    head = (
        f"{where['gpu'] or where['cpu']}, {where['cores']} cores; {report['workers']} workers, "
        f"batches of {report['batch_size']} ({report['pixel_batch_size']} of pixels), medians of "
        f"{report['rounds']} rounds"
    )
    header = ("batches of", "loader", "patches", "stored B", "warm patches/s (range)",
              "cold patches/s", "first batch s", "CPU s/1000", "disk B read, cold",
              "peak MB")  # fmt: skip
    rank = {"codes": 0, "latents": 1, "pixels": 2}
    rows = sorted(
        report["results"],
        key=lambda r: (rank[r["decode"]], -r.get("warm", {}).get("patches_per_s", 0.0)),
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
            rest += ["", f"{row['peer']}, {row['decode']}: {counters_text(row['counters'])}"]
    versions = {n: v for row in rows for n, v in row.get("versions", {}).items()}
    rest += ["", ", ".join(f"{n} {v}" for n, v in sorted(versions.items()))]
    return report_text(head, header, map(row_cells, rows), *rest)


def row_cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    cells = [row["decode"], row["peer"], f"{row['stored_patches']:,}",
             f"{row['stored_bytes_per_patch']:,.0f}"]  # fmt: skip
    if "error" in row:
        return [*cells, row["error"], *[""] * 5]
    (low, high), warm, cold = row["warm_range"], row["warm"], row["cold"]
    return [
        *cells,
        f"{warm['patches_per_s']:,.0f} ({low:,.0f}-{high:,.0f})",
        f"{cold['patches_per_s']:,.0f}",
        f"{cold['first_batch_s']:.2f}",
        f"{warm['cpu_s_per_1000']:.3f}",
        f"{cold['bytes_read_per_patch']:,.0f}",
        f"{row['peak_mb']:,.0f}",
    ]
