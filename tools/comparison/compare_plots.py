"""Scores as bars that are as wide as the bytes (Fig. 2 of the paper), and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from latentds_tools.comparison.compare_page import size, title
from latentds_tools.reports.plots import add_legend, make_panels, saved

PANEL_IN = (6.0, 4.8)  # width and height in inches
COLUMNS, DPI = 2, 130
GAP = 0.03  # between bars, of all widths together
PLACE = 0.09  # of a bar at least, with its name under it
COLOURS = {
    "original": "C7",
    "picture format": "C1",
    "latents": "C0",
    "latents, decoder fine-tuned": "C2",
}
LEAST = 0.008  # width of the narrowest bar, of all widths together: it has to be seen


def draw_bars(report: dict[str, Any]) -> bytes:
    """PNG: a panel a family, a bar a source, as wide as its bytes and as high as its score."""
    families = report["families"]
    figure, axes = make_panels(len(families), PANEL_IN, COLUMNS)
    for axis, family in zip(axes, families, strict=True):
        draw_panel(axis, family)
    return saved_with_legend(figure, [row for family in families for row in family["rows"]])


def draw_differences(report: dict[str, Any]) -> bytes | None:
    """PNG: a panel a family, differences with their intervals; None where nothing is paired."""
    paired = []
    for family in report["families"]:
        rows = [row for row in family["rows"] if row["difference"] is not None]
        rows = [row for row in rows if row["difference"]["mean"] is not None]
        paired += [(family, rows)] if rows else []
    if not paired:
        return None
    figure, axes = make_panels(len(paired), PANEL_IN, COLUMNS)
    for axis, (family, rows) in zip(axes, paired, strict=True):
        for place, row in enumerate(reversed(rows), 1):
            found = row["difference"]
            mean = 100 * found["mean"]
            ends = [mean if found[n] is None else 100 * found[n] for n in ("low", "high")]
            axis.plot(ends, [place, place], color=colour(row), linewidth=2)
            axis.plot([mean], [place], "o", color=colour(row))
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(rows), 0, -1), [row["source"] for row in rows])
        axis.set_ylim(0.4, len(rows) + 0.6)
        low, high = axis.get_xlim()
        axis.set_xlim(min(low, -0.5), max(high, 0.5))
        axis.set_xlabel(
            f"{title(family['metric'])}: points above {family['reference']}, 95 % interval"
        )
        axis.set_title(family["title"], fontsize=10)
        axis.grid(alpha=0.3, axis="x", linewidth=0.5)
    return saved_with_legend(figure, [row for _, rows in paired for row in rows])


def saved_with_legend(figure: Any, rows: Sequence[dict[str, Any]]) -> bytes:
    """The figure's file with a legend of the colours that its rows have."""
    colours = {colour(row) for row in rows}
    add_legend(figure, {kind: shade for kind, shade in COLOURS.items() if shade in colours})
    return saved(figure, DPI)


def draw_panel(axis: Any, family: dict[str, Any]) -> None:
    metric = family["metric"]
    rows = [r for r in family["rows"] if (r["scores"].get(metric) or {}).get("mean") is not None]
    lefts, widths, total = bar_places([row["kilobytes"] for row in rows])
    for row, left, width in zip(rows, lefts, widths, strict=True):
        values = row["scores"][metric]
        mean, sd = 100 * values["mean"], 100 * (values["sd"] or 0.0)
        is_known = row["kilobytes"] is not None
        axis.bar(
            left, mean, width, align="edge", color=colour(row) if is_known else "none",
            edgecolor="black", linewidth=0.6, linestyle="-" if is_known else ":",
        )  # fmt: skip
        axis.errorbar(left + width / 2, mean, yerr=sd or None, color="black", capsize=2, lw=0.8)
    axis.set_xticks(
        [left + width / 2 for left, width in zip(lefts, widths, strict=True)],
        [f"{row['source']}, {f'{size(row)} KB' if row['kilobytes'] else 'size unknown'}"
         for row in rows],
        rotation=60, ha="right", rotation_mode="anchor", fontsize=8,
    )  # fmt: skip
    axis.set_xlim(0, total)
    low, high = score_limits([row["scores"][metric] for row in rows])
    axis.set_ylim(low, high)
    start = f"; the axis begins at {low:g}" if low else ""
    axis.set_ylabel(f"{title(metric)}, %{start}", fontsize=9)
    axis.set_title(f"{family['title']}\nwidth: bytes of a patch", fontsize=10)
    axis.grid(alpha=0.3, axis="y", linewidth=0.5)


def bar_places(kilobytes: Sequence[float | None]) -> tuple[list[float], list[float], float]:
    """Left ends, widths in proportion to the bytes, and where the last bar's place ends.

    Bars of unknown size have the width of the median; ones too narrow to be seen are widened.
    Every bar has a place wide enough for its name.
    """
    known = sorted(value for value in kilobytes if value)
    middle = known[len(known) // 2] if known else 1.0
    widths = [value or middle for value in kilobytes]
    whole = sum(widths)
    widths = [max(width, LEAST * whole) for width in widths]
    lefts, start = [], 0.0
    for width in widths:
        place = max(width + GAP * whole, PLACE * whole)
        lefts.append(start + (place - width) / 2)
        start += place
    return lefts, widths, start


def score_limits(scores: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Per cent: from a round number below all bars' spreads, 0 where that is near, to the top."""
    lows = [100 * (values["mean"] - (values["sd"] or 0)) for values in scores]
    highs = [100 * (values["mean"] + (values["sd"] or 0)) for values in scores]
    spread = max(highs) - min(lows)
    low = 5 * math.floor((min(lows) - 0.3 * max(spread, 2)) / 5)
    return (float(low) if low > 10 else 0.0), max(highs) + 0.1 * max(spread, 2)


def colour(row: dict[str, Any]) -> str:
    """Of what a source is."""
    if row["kind"] == "original":
        return COLOURS["original"]
    if not row["is_network"]:
        return COLOURS["picture format"]
    return COLOURS["latents, decoder fine-tuned" if row["fine_tuned"] else "latents"]
