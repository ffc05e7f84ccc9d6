"""Rate against fidelity, as Fig. 2 of the paper: one panel an embedder."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

from latentds.errors import missing_extra

PANEL_IN = (5.2, 4.2)  # width and height in inches
MARKERS = {"picture": "s", "latent": "o"}
FRONT_IN, FRONT_DPI = (8.0, 4.3), 200
# Colours of Okabe and Ito, told apart by all; point whose label it is, its place, its side.
FRONT_STYLE: dict[str, tuple[str, int, tuple[int, int], str]] = {
    "AVIF": ("#0072B2", -2, (-2, 12), "right"),
    "JPEG XL": ("#56B4E9", -1, (10, 0), "left"),
    "JPEG": ("#555555", 2, (9, -8), "left"),
    "WebP": ("#CC79A7", 1, (12, -6), "left"),
    "tiny-v2": ("#D55E00", 1, (-8, 12), "right"),
    "tiny-v1": ("#D55E00", 0, (12, -4), "left"),
    "TAEF2": ("#D55E00", 0, (0, -18), "center"),
}


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


@dataclasses.dataclass(frozen=True)
class Curve:
    """A codec on the first page.

    kind    picture or latent
    points  (bytes, mean, low, high), sorted
    """

    label: str
    kind: str
    points: tuple[tuple[float, float, float, float], ...]


def draw_front(curves: Sequence[Curve], embedder: str) -> bytes:
    """The first page's picture: one panel, labels beside the curves, PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=FRONT_IN, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for curve in curves:
        draw_curve(axis, curve)
    axis.set_xscale("log", base=2)
    sizes = [1024 * 2**power for power in range(1, 6)]
    axis.set_xticks(sizes, [f"{size // 1024} KiB" for size in sizes])
    axis.minorticks_off()
    axis.set_xlim(1700, 50_000)
    axis.set_xlabel("a 256 px patch takes", fontsize=12)
    axis.set_title(
        f"Cosine similarity of {embedder} embeddings to those of the original",
        fontsize=12, loc="left",
    )  # fmt: skip
    axis.tick_params(labelsize=11, length=3)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=FRONT_DPI, metadata={"Software": None})
    return buffer.getvalue()


def draw_curve(axis: Any, curve: Curve) -> None:
    """Line, markers, intervals and label of one codec; latents stand out."""
    color, point, shift, side = FRONT_STYLE[curve.label]
    sizes, means, lows, highs = zip(*curve.points, strict=True)
    is_latent = curve.kind == "latent"
    below = [mean - low for mean, low in zip(means, lows, strict=True)]
    above = [high - mean for mean, high in zip(means, highs, strict=True)]
    axis.errorbar(
        sizes, means, yerr=(below, above), color=color, marker=MARKERS[curve.kind],
        markersize=11 if is_latent else 6, linewidth=1.6, elinewidth=1.0, zorder=3 + is_latent,
    )  # fmt: skip
    text = f"{curve.label} latents" if is_latent else curve.label
    axis.annotate(
        text, (sizes[point], means[point]), shift, textcoords="offset points", color=color,
        fontsize=13, fontweight="bold" if is_latent else "normal", ha=side, va="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5}, zorder=4,
    )  # fmt: skip
