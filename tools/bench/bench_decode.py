"""latentds bench decode: what decoders take on a device, their options, and JPEG beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from latentds_tools.bench import harness
from latentds_tools.reports.commands import show
from latentds_tools.reports.markdown import number

DEFAULT_DECODERS = "taesd,sd15,dcae-f32,tiny,turbo-s,turbo-m,turbo-f32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Decode random latents under every option, and JPEGs of real patches, on one machine."""

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
    jpeg: bool = True
    """Also measure JPEG decoders: simplejpeg and torchvision, those that are installed."""
    pictures: Path | None = None
    """Folder of pictures whose patches are the JPEGs; by default scikit-image's immunostain."""
    cores: int | None = None
    """Cores of the JPEG rows on several; by default all."""
    seconds: float = 3.0
    """Length of a measurement."""
    rounds: int = 3
    """All are measured so often, in turn; medians are reported."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.patch_size < 1 or min(self.batch_sizes or (1,)) < 1:
            raise ValueError("rounds, patch size and batch sizes are at least 1")


def run(config: Config) -> None:
    """Print the table."""
    show(measure(config), config.json, as_text)


def measure(config: Config) -> dict[str, Any]:
    """All figures: every JPEG decoder and every network in turn, round by round."""
    from latentds_tools.bench import decode_networks, decode_shapes, jpeg_decoding

    from latentds.core.device_choice import choose_device

    config = dataclasses.replace(config, device=str(choose_device(config.device)))
    names = [name.strip() for name in config.decoders.split(",") if name.strip()]
    for name in names:
        decode_shapes.check_known(name)
    jpegs = jpeg_decoding.load_jpegs(config.pictures, config.patch_size) if config.jpeg else []
    cores = config.cores or harness.usable_cores()
    cases = jpeg_decoding.cases(jpegs, config.seconds, cores, config.device) if jpegs else []
    for name in dict.fromkeys(names):
        cases += decode_networks.cases(name, config)
    harness.run_cases(cases, config.rounds)
    return {
        "machine": harness.machine(config.device),
        "config": harness.recorded(config),
        "jpeg": jpeg_decoding.describe(jpegs) if jpegs else None,
        "rows": with_ratios([case.row() for case in cases]),
    }


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their rate over that of one core that decodes JPEGs, None where none was timed.

    Networks also with their gain over plain float32, the first at their batch.
    """
    is_jpeg = bool(rows) and rows[0]["decoder"].startswith("JPEG")
    core = rows[0]["patches_per_s"] if is_jpeg else None
    plain: dict[tuple[str, int], float] = {}
    for row in rows:
        rate: Any = row.get("patches_per_s")
        if "weights" in row:
            row["gain"] = rate / plain.setdefault((row["decoder"], row["batch"]), rate)
        row["over_jpeg_core"] = rate / core if core and rate else None
    return rows


def as_text(report: dict[str, Any]) -> str:
    """The table."""
    config, jpeg = report["config"], report["jpeg"]
    head = (
        f"{harness.machine_text(report['machine'])}; patches of {config['patch_size']} px on "
        f"{config['device']}, medians of {config['rounds']} rounds of {config['seconds']:g} s"
    )
    if jpeg:
        head += (
            f"\nJPEG: quality {jpeg['quality']}, {jpeg['subsampling']}, {jpeg['patches']} patches "
            f"of {jpeg['mean_bytes']:,.0f} bytes on average"
        )
    header = ("decoder", "weights", "GFLOP", "options", "batch", "patches/s", "over one JPEG core",
              "over float32", "first batch s", "largest change")  # fmt: skip
    return harness.report_text(head, header, map(row_cells, report["rows"]))


def row_cells(row: dict[str, Any]) -> list[str]:
    """A row of the table; what it has no figure for stays empty."""
    if "error" in row:
        return [row["decoder"], "", "", row["options"], "", row["error"], "", "", "", ""]
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
    ]
