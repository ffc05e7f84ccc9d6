"""latentds bench decode: decoders under their options on a device, JPEG and AVIF beside them."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from latentds_tools.bench import harness
from latentds_tools.reports.commands import show
from latentds_tools.reports.markdown import number

from latentds.core.storage import write_atomically

DEFAULT_DECODERS = "taesd,sd15,dcae-f32,tiny-v2,tiny-v2-fast,tiny,turbo-s,turbo-m,turbo-f32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Decode latents under every option, and JPEG and AVIF of real patches, on one machine.

    Latents are random: time does not depend on them. Of autoencoders with entropy-coded records,
    records of the patches are decoded too, alone and to pixels.
    """

    decoders: str = DEFAULT_DECODERS
    """Decoders with commas between: shapes with random weights (taesd, sd15, sd3, dcae-f32,
    turbo-s, turbo-m, turbo-f32: time does not depend on them), tiny, the name or folder of an
    autoencoder, or a decoder's folder."""
    patch_size: int = 256
    """Edge of a patch in pixels."""
    batch_sizes: tuple[int, ...] | None = None
    """Patches decoded at once. By default 64 on a GPU; on a CPU 16, and 1 for decoders of more than
    50 GFLOP a patch."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU where there is one."""
    compile: bool = False
    """Also measure torch.compile (a C++ compiler on a CPU, minutes for large decoders)."""
    options: str | None = None
    """Only these, named as in the table, with commas between: 'float32,bfloat16 channels_last'."""
    jpeg: bool = True
    """Also measure JPEG decoders: simplejpeg and torchvision, or Pillow where neither is there."""
    avif: bool = False
    """Also measure AVIF of at most 4,096 bytes a patch of 256 px, decoded by Pillow."""
    pictures: Path | None = None
    """Folder of pictures whose patches are decoded; by default scikit-image's immunostain."""
    cores: int | None = None
    """Cores of the JPEG rows on several; by default all."""
    seconds: float = 3.0
    """Length of a measurement."""
    rounds: int = 3
    """All are measured so often, in turn; medians are reported."""
    out: Path | None = None
    """File for the JSON, written after every measurement: a run that is cut short leaves it."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.patch_size < 1 or min(self.batch_sizes or (1,)) < 1:
            raise ValueError("rounds, patch size and batch sizes are at least 1")


def run(config: Config) -> int:
    """Print the table; exit code 1 where an option never engaged, which its row says."""
    report = measure(config)
    show(report, config.json, as_text)
    return int(any("never_engaged" in row for row in report["rows"]))


def measure(config: Config) -> dict[str, Any]:
    """All figures: every picture decoder and every network in turn, round by round."""
    from latentds_tools.bench import decode_networks, decode_records, decode_shapes, jpeg_decoding

    from latentds.core.device_choice import choose_device

    config = dataclasses.replace(config, device=str(choose_device(config.device)))
    names = [name.strip() for name in config.decoders.split(",") if name.strip()]
    for name in names:
        decode_shapes.check_known(name)
    cores = config.cores or harness.usable_cores()
    patches = functools.cache(
        lambda: jpeg_decoding.load_patches(config.pictures, config.patch_size)
    )
    cases, files = jpeg_decoding.picture_cases(patches, config, cores)
    for name in dict.fromkeys(names):
        cases += decode_networks.cases(name, config)
        cases += decode_records.cases(name, patches, config)

    def report() -> dict[str, Any]:
        return {
            "machine": harness.machine(config.device),
            "config": harness.recorded(config),
            "pictures": files,
            "rows": with_ratios([case.row() for case in cases if case.rounds]),
        }

    def note() -> None:
        if config.out is not None:
            write_atomically(config.out, (json.dumps(report(), indent=1) + "\n").encode())

    harness.run_cases(cases, config.rounds, note)
    return report()


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their rate over that of one core that decodes JPEGs, None where none was timed.

    Networks also with their gain over plain float32 at their batch, where that was timed.
    """
    is_jpeg = bool(rows) and rows[0]["decoder"].startswith("JPEG")
    core = rows[0]["patches_per_s"] if is_jpeg else None
    plain = {
        (row["decoder"], row["batch"]): row["patches_per_s"]
        for row in rows
        if row["options"] == "float32" and "error" not in row
    }
    for row in rows:
        rate: Any = row.get("patches_per_s")
        row["over_jpeg_core"] = rate / core if core and rate else None
        if row.get("gflop") is not None:
            base = plain.get((row["decoder"], row["batch"]))
            row["gain"] = rate / base if rate and base else None
    return rows


def as_text(report: dict[str, Any]) -> str:
    """The table."""
    config = report["config"]
    head = (
        f"{harness.machine_text(report['machine'])}; patches of {config['patch_size']} px on "
        f"{config['device']}, medians of {config['rounds']} rounds of {config['seconds']:g} s"
    )
    for name, files in report["pictures"].items():
        head += (
            f"\n{name}: {files['coded']}, {files['patches']} patches of "
            f"{files['mean_bytes']:,.0f} bytes on average"
        )
    header = ("decoder", "weights", "GFLOP", "options", "batch", "patches/s", "over one JPEG core",
              "over float32", "first batch s", "largest change", "graphs replayed",
              "decoded on")  # fmt: skip
    return harness.report_text(head, header, map(row_cells, report["rows"]))


def row_cells(row: dict[str, Any]) -> list[str]:
    """A row of the table; what it has no figure for stays empty."""
    if "error" in row:
        return [row["decoder"], "", "", row["options"], "", row["error"], *[""] * 6]
    rate = row["patches_per_s"]
    return [
        row["decoder"],
        row.get("weights", ""),
        number(row.get("gflop"), ",.1f", ""),
        row["options"],
        str(row["batch"]),
        f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}",
        number(row["over_jpeg_core"], ".3g", ""),
        number(row.get("gain"), ".2f", ""),
        f"{row['first_batch_s']:.2g}",
        number(row.get("largest_change"), ".4f", ""),
        number(row.get("graph_replays"), ",.0f", ""),
        row.get("device", "cpu"),
    ]
