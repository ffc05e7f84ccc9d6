"""Rate against fidelity, as Fig. 2 of the paper: one panel an embedder."""

from __future__ import annotations

from typing import Any

from latentds_tools.reports.plots import make_panels, saved

PANEL_IN, DPI = (5.2, 4.2), 150  # width and height in inches
MARKERS = {"picture": "s", "latent": "o"}


def draw_plots(report: dict[str, Any]) -> dict[str, bytes]:
    """rate_fidelity.png and .svg; PSNR where no embedder was asked for."""
    panels = [("similarity", name) for name in report["embedders"]] or [("psnr_db", "")]
    figure, axes = make_panels(len(panels), PANEL_IN)
    for axis, (column, name) in zip(axes, panels, strict=True):
        draw_panel(axis, report["rows"], column, name)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return {f"rate_fidelity.{suffix}": saved(figure, DPI, suffix) for suffix in ("png", "svg")}


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
