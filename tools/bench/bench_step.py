"""latentds bench step: what loading, decoding and augmenting add to a training step."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentds_tools.bench import harness
from latentds_tools.bench.harness import Case
from latentds_tools.bench.step_config import CPU, GPU, LEAD, Config
from latentds_tools.reports.commands import show

STEP, VIEWS_TOO, LOADER = "cached views", "cached images, views made", "loader, views made"
READ, DECODE, VIEWS = "reading codes", "decoding", "making views"
REPLAYED_TOO, REPLAYED = "cached images, views replayed", "replaying views"  # of --cuda-graph
COLUMNS: dict[str, harness.Column] = {
    "ms a step (range)": (
        "ms",
        lambda row: "{:,.1f} ({:,.1f} to {:,.1f})".format(row["ms"], *row["ms_range"]),
    ),
    "patches/s": ("patches_per_s", ",.1f"),
    "peak GPU memory": ("peak_gb", lambda row: f"{row['peak_gb']:.2f} GB"),
}


def run(config: Config) -> None:
    show(measure(config), config.json, as_text)


def measure(config: Config) -> dict[str, Any]:
    import torch
    from latentds_tools.bench.step_feeding import Feeding, open_source

    config = harness.on_device(config)
    device = torch.device(config.device)
    config = harness.for_device(config, device.type == "cuda", GPU, CPU)
    assert config.batch_size is not None and config.steps is not None
    lead = LEAD[device.type == "cuda"]
    with tempfile.TemporaryDirectory() as work, harness.no_fallback():
        source = open_source(config, Path(work))
        with Feeding(source, config, device) as feeding:
            steps = make_steps(feeding)
            for once in steps.values():  # kernels are chosen, compiled and captured; pools fill
                harness.timed(once, device, steps=max(lead, 1))
            feeding.counters()  # before minutes are spent on what does not engage
            ways = harness.timed_cases(steps, device, steps=config.steps, lead=lead)
            harness.run_cases(list(ways.values()), config.rounds)
            facts, counters = feeding.facts(), feeding.counters()
    facts |= {"decoder": source.decoder, "weights": source.weights}
    return harness.report_of(
        config, source=facts, counters=counters, **summarize(ways, config.batch_size)
    )


def make_steps(feeding: Any) -> dict[str, Callable[[], object]]:
    """What is timed, by name: steps, then the parts of a loader alone."""
    timed: dict[str, Callable[[], object]] = {
        STEP: feeding.step_on_cached_views,
        VIEWS_TOO: functools.partial(feeding.step_on_cached_images, feeding.views),
        LOADER: feeding.step_on_loader,
        READ: feeding.read,
        VIEWS: functools.partial(feeding.make_views, feeding.views),
    }
    if feeding.replayed is not None:
        timed[REPLAYED_TOO] = functools.partial(feeding.step_on_cached_images, feeding.replayed)
        timed[REPLAYED] = functools.partial(feeding.make_views, feeding.replayed)
    if feeding.has_decoder:
        timed[DECODE] = feeding.decode
    return timed


def summarize(ways: dict[str, Case], batch_size: int) -> dict[str, Any]:
    """Times, and what ways cost over others."""
    steps = [name for name in (STEP, VIEWS_TOO, REPLAYED_TOO, LOADER) if name in ways]
    times = {name: describe_time(way, batch_size) for name, way in ways.items()}
    has_graph = REPLAYED in ways  # as the loader then has
    made = REPLAYED_TOO if has_graph else VIEWS_TOO
    graph = {"replayed_over_made": harness.cost(ways[made], ways[VIEWS_TOO])} if has_graph else {}
    return graph | {
        "steps": {name: times[name] for name in steps},
        "alone": {name: found for name, found in times.items() if name not in steps},
        "loader_over_cached_views": harness.cost(ways[LOADER], ways[STEP]),
        "loader_over_cached_images": harness.cost(ways[LOADER], ways[made]),
        "views_over_cached_views": harness.cost(ways[made], ways[STEP]),
    }


def describe_time(case: Case, count: int) -> dict[str, Any]:
    """Milliseconds a step and things a second, `count` a step, of the middle round and of all."""
    peak = max(figures["peak"] for figures in case.rounds)
    return {
        "ms": 1000 * case.seconds,
        "ms_range": harness.extent([1000 * figures["seconds"] for figures in case.rounds]),
        "patches_per_s": count / case.seconds,
        "peak_gb": peak / 1e9 if peak else None,
    }


def as_text(report: dict[str, Any]) -> str:
    config, source = report["config"], report["source"]
    crops = f"{config['globals']} x {config['global_px']} px"
    if config["locals"]:
        crops += f" and {config['locals']} x {config['local_px']} px"
    decoding = f"{source['decoder']} ({source['weights']} weights, {config['dtype']})"
    options = [name for name in ("channels_last", "compile", "cuda_graph") if config[name]]
    head = (
        f"{harness.machine_text(report['machine'])}; DINO on {config['arch']}, crops "
        f"{crops}, batch {config['batch_size']}, {config['device']}; "
        + (f"decoder {' '.join([decoding, *options])}" if source["weights"] else "no decoding")
        + f", {source['bytes_per_patch']:,} bytes a patch of {source['patch_px']} px, "
        f"{config['num_workers']} workers; medians of {config['rounds']} rounds of "
        f"{config['steps']} steps"
    )
    names = {f"step on {name}": row for name, row in report["steps"].items()}
    names |= {f"{name} alone": row for name, row in report["alone"].items()}
    rows = [[name, *harness.row_cells(COLUMNS, row)] for name, row in names.items()]
    counted = harness.counters_text(report["counters"])
    return harness.report_text(head, ["", *COLUMNS], rows, "", *costs_text(report), counted)


def costs_text(report: dict[str, Any]) -> list[str]:

    def told(name: str) -> str:
        low, high = report[name]["percent_range"]
        return f"{report[name]['percent']:+.1f} % ({low:+.1f} to {high:+.1f})"

    graph = "replayed_over_made"
    return [
        *([f"views replayed over views made: {told(graph)}"] if graph in report else []),
        f"the loader over cached images, whose views are made: {told('loader_over_cached_images')}",
        f"the loader over cached views: {told('loader_over_cached_views')}, of which views "
        f"{told('views_over_cached_views')}",
    ]
