"""Rate against fidelity, as Fig. 2 of the paper: one panel an embedder."""

from __future__ import annotations

import io
from typing import Any

from latentds.errors import missing_extra

PANEL_IN = (5.2, 4.2)  # width and height in inches
MARKERS = {"picture": "s", "latent": "o"}


def check_matplotlib() -> None:
    """MissingExtraError where plots cannot be drawn."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise missing_extra("matplotlib", "bench")


def draw_plots(report: dict[str, Any]) -> dict[str, bytes]:
    """rate_fidelity.png and .svg; PSNR where no embedder was asked for."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [("similarity", name) for name in report["embedders"]] or [("psnr_db", "")]
    figure = Figure(figsize=(PANEL_IN[0] * len(panels), PANEL_IN[1]), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (column, name) in zip(axes, panels, strict=True):
        draw_panel(axis, report["rows"], column, name)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    files = {}
    # A fixed salt and no date: the same report, the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "latentds", "svg.fonttype": "none"}):
        for suffix, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, **options)
            files[f"rate_fidelity.{suffix}"] = buffer.getvalue()
    return files


def draw_panel(axis: Any, rows: list[dict[str, Any]], column: str, name: str) -> None:
    """Curves of codec families: means over crops, bars for the 95 % intervals."""
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        series.setdefault(row["series"], []).append(row)
    for number, (label, members) in enumerate(series.items()):
        points = sorted(point for row in members if (point := point_of(row, column, name)))
        if not points:
            continue
        sizes, means, lows, highs = zip(*points, strict=True)
        kind = members[0]["kind"]
        axis.errorbar(
            sizes, means, yerr=(lows, highs), label=label,
            marker=MARKERS[kind], linestyle="-" if kind == "latent" else "--",
            color=f"C{number % 10}", markersize=5, linewidth=1.2, capsize=2, elinewidth=0.8,
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel("bytes a patch")
    axis.set_ylabel("PSNR, dB" if column == "psnr_db" else "cosine similarity")
    axis.set_title(name or "PSNR")
    axis.grid(alpha=0.3, which="both", linewidth=0.5)


def point_of(
    row: dict[str, Any], column: str, name: str
) -> tuple[float, float, float, float] | None:
    """Bytes, mean, and how far the interval reaches down and up; None where there is no mean."""
    group = row["groups"]["all"]
    values = group[column][name] if name else group[column]
    mean = values["mean"]
    if mean is None:
        return None
    low, high = values["ci95"] or (mean, mean)
    return group["bytes"], mean, max(0.0, mean - low), max(0.0, high - mean)
