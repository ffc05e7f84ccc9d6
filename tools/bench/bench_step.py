"""latentds bench step: what loading, decoding and augmenting add to a training step."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentds_tools.bench.machine import machine
from latentds_tools.bench.step_config import Config, with_defaults

from latentds.core.display import say

if TYPE_CHECKING:
    from latentds_tools.bench.step_rounds import Way

STEP, VIEWS_TOO, LOADER = "cached views", "cached images, views made", "loader, views made"
READ, DECODE, VIEWS = "reading codes", "decoding", "making views"


def run(config: Config) -> None:
    """Measure and print."""
    report = measure(config)
    say(json.dumps(report, indent=1) if config.json else as_text(report))


def measure(config: Config) -> dict[str, Any]:
    """All figures."""
    from latentds_tools.bench.step_feeding import Feeding
    from latentds_tools.bench.step_rounds import run_rounds
    from latentds_tools.bench.step_sets import check_enough, open_source

    from latentds.conversion.patch_encoding import choose_device

    device = choose_device(config.device)
    config = with_defaults(config, device.type == "cuda")
    with tempfile.TemporaryDirectory(dir=config.work) as work:
        source = open_source(config, Path(work))
        check_enough(source.folder, config.split, int(config.batch_size or 0))
        with Feeding(source, config, device) as feeding:
            ways = make_ways(feeding)
            run_rounds(list(ways.values()), config.rounds, int(config.steps or 0), device)
            facts = feeding.facts()
    return {
        "machine": machine(str(device)),
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "source": facts | {"decoder": source.decoder, "weights": source.weights},
        **summarize(ways, int(config.batch_size or 0)),
    }


def make_ways(feeding: Any) -> dict[str, Way]:
    """What is timed, by name: steps, then the parts of a loader alone."""
    from latentds_tools.bench.step_rounds import Way

    timed = {
        STEP: feeding.step_on_cached_views,
        VIEWS_TOO: feeding.step_on_cached_images,
        LOADER: feeding.step_on_loader,
        READ: feeding.read,
        VIEWS: feeding.make_views,
    }
    if feeding.has_decoder:
        timed[DECODE] = feeding.decode
    return {name: Way(name, once) for name, once in timed.items()}


def summarize(ways: dict[str, Way], batch_size: int) -> dict[str, Any]:
    """Times, costs and the arithmetic of what ran at the same time."""
    from latentds_tools.bench.step_rounds import cost, describe, overlap

    parts = [ways[name] for name in (DECODE, VIEWS) if name in ways]
    return {
        "steps": {name: describe(ways[name], batch_size) for name in (STEP, VIEWS_TOO, LOADER)},
        "alone": {
            name: describe(way, batch_size)
            for name, way in ways.items()
            if name in (READ, DECODE, VIEWS)
        },
        "loader_over_cached_views": cost(ways[LOADER], ways[STEP]),
        "loader_over_cached_images": cost(ways[LOADER], ways[VIEWS_TOO]),
        "views_over_cached_views": cost(ways[VIEWS_TOO], ways[STEP]),
        "overlap": overlap(ways[STEP], ways[LOADER], parts),
    }


def as_text(report: dict[str, Any]) -> str:
    """The table and what it says."""
    where, config, source = report["machine"], report["config"], report["source"]
    crops = f"{config['globals']} x {config['global_px']} px"
    if config["locals"]:
        crops += f" and {config['locals']} x {config['local_px']} px"
    decoding = f"{source['decoder']} ({source['weights']} weights, {config['dtype']})"
    options = ["channels_last", "compile", "cuda_graph"]
    options = [name for name in options if config[name]]
    lines = [
        f"{where['gpu'] or where['cpu']}, {where['cores']} cores ({where['torch_threads']} threads "
        f"of torch), torch {where['torch']}; {config['method']} on {config['arch']}, crops "
        f"{crops}, batch {config['batch_size']}, {config['device']}; "
        + (f"decoder {' '.join([decoding, *options])}" if source["weights"] else "no decoding")
        + f", {source['bytes_per_patch']:,} bytes a patch of {source['patch_px']} px, "
        f"{config['num_workers']} workers; medians of {config['rounds']} rounds of "
        f"{config['steps']} steps",
        "",
        "| | ms a step (range) | patches/s | peak GPU memory |",
        "|---|---|---|---|",
        *(row_text(f"step on {name}", row) for name, row in report["steps"].items()),
        *(row_text(f"{name} alone", row) for name, row in report["alone"].items()),
        "",
        *costs_text(report),
    ]
    return "\n".join(lines)


def row_text(name: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    low, high = row["ms_range"]
    peak = "" if row["peak_gb"] is None else f"{row['peak_gb']:.2f} GB"
    times = f"{row['ms']:,.1f} ({low:,.1f} to {high:,.1f})"
    return f"| {name} | {times} | {row['patches_per_s']:,.1f} | {peak} |"


def costs_text(report: dict[str, Any]) -> list[str]:
    """What a loader costs, in three lines."""

    def told(name: str) -> str:
        low, high = report[name]["percent_range"]
        return f"{report[name]['percent']:+.1f} % ({low:+.1f} to {high:+.1f})"

    found = report["overlap"]
    hidden = min(max(found["hidden_percent"], 0.0), 100.0)  # beyond is noise
    parts = "decoding and views" if DECODE in report["alone"] else "views"
    return [
        f"the loader over cached images, whose views are made: {told('loader_over_cached_images')}",
        f"the loader over cached views: {told('loader_over_cached_views')}, of which views "
        f"{told('views_over_cached_views')}",
        f"one after another: step {found['step_ms']:,.1f} + {parts} "
        f"{found['parts_ms']:,.1f} = {found['one_after_another_ms']:,.1f} ms; measured "
        f"{found['measured_ms']:,.1f} ms, {hidden:.0f} % of {parts} hidden",
    ]
