"""latentds bench decode: decoders under their options on a device, JPEG and AVIF beside them."""

from __future__ import annotations

import functools
from typing import Any

from latentds_tools.bench import harness
from latentds_tools.bench.decode_config import Config
from latentds_tools.reports.commands import listed, show

from latentds.errors import InputError

COLUMNS: dict[str, harness.Column] = {
    "decoder": ("decoder", ""),
    "weights": ("weights", ""),
    "GFLOP": ("gflop", ",.1f"),
    "options": ("options", ""),
    "batch": ("batch", ""),
    "patches/s": (
        "patches_per_s",
        lambda row: format(row["patches_per_s"], ",.0f" if row["patches_per_s"] >= 100 else ".3g"),
    ),
    "over one JPEG core": ("over_jpeg_core", ".3g"),
    "over float32": ("gain", ".2f"),
    "first batch s": ("first_batch_s", ".2g"),
    "largest change": ("largest_change", ".4f"),
    "graphs replayed": ("graph_replays", ",.0f"),
    "decoded on": ("device", ""),
}


def run(config: Config) -> None:
    """Print the table; InputError where an option never engaged, which its row says."""
    report = measure(config)
    show(report, config.json, as_text)
    for row in report["rows"]:
        if "never_engaged" in row:
            raise InputError(f"{row['decoder']}, {row['options']}: {row['error']}")


def measure(config: Config) -> dict[str, Any]:
    """All figures: every picture decoder and every network in turn, round by round."""
    from latentds_tools.bench import decode_networks, jpeg_decoding

    config = harness.on_device(config)
    names = listed(config.decoders)
    for name in names:
        decode_networks.check_decoder(name)
    patches = functools.cache(
        lambda: jpeg_decoding.load_patches(config.pictures, config.patch_size)
    )
    cases, files = jpeg_decoding.picture_cases(patches, config)
    for name in dict.fromkeys(names):
        cases += decode_networks.cases(name, patches, config)

    def report() -> dict[str, Any]:
        rows = with_ratios([case.row() for case in cases if case.rounds])
        return harness.report_of(config, pictures=files, rows=rows)

    harness.run_cases(cases, config.rounds, lambda: harness.write_report(config.out, report()))
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
    rows = [harness.row_cells(COLUMNS, row, "patches_per_s") for row in report["rows"]]
    return harness.report_text(head, list(COLUMNS), rows)
