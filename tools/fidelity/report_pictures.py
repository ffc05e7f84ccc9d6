"""A report's pictures: the contact sheet, as Fig. 1 of the paper, originals beside what every codec
makes of them; and rate against fidelity, as its Fig. 2, a panel an embedder."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from latentds_tools.fidelity.fidelity_crops import Crop
from latentds_tools.reports.plots import make_panels, saved

CAPTION_PX, MARGIN_PX, FONT_PX = 34, 6, 12
MIN_CELL_PX = 200  # captions need so much
SHOWN = 3
PANEL_IN, DPI = (5.2, 4.2), 150  # width and height in inches
MARKERS = {"picture": "s", "latent": "o"}


def pick_crops(crops: Sequence[Crop]) -> list[int]:
    """Numbers of the crops to show: SHOWN of different slides, evenly spread."""
    firsts = sorted({crop.slide: n for n, crop in reversed(list(enumerate(crops)))}.values())
    places = np.linspace(0, len(firsts) - 1, min(SHOWN, len(firsts)))
    return [firsts[round(place)] for place in places.tolist()]


def draw_sheet(
    report: dict[str, Any], originals: Sequence[np.ndarray], shown: Sequence[np.ndarray]
) -> bytes:
    """A PNG: a line a crop, a column a codec, pixels as they are.

    originals  uint8 (H, W, 3), of the crops in report["contact"]
    shown      for every row of the report, uint8 (k, H, W, 3)
    """
    from PIL import Image, ImageDraw, ImageFont

    edge = originals[0].shape[0]
    scale = -(-MIN_CELL_PX // edge)
    cell = edge * scale
    width, height = cell + MARGIN_PX, cell + CAPTION_PX
    size = (width * (1 + len(shown)) + MARGIN_PX, height * len(originals) + MARGIN_PX)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_PX)
    for line, (number, original) in enumerate(zip(report["contact"], originals, strict=True)):
        source = report["crops"][number]["source"].rpartition("/")[2]
        cells = [(original, f"original\n{source}")]
        cells += [
            (pictures[line], caption(row, number))
            for row, pictures in zip(report["rows"], shown, strict=True)
        ]
        for place, (picture, text) in enumerate(cells):
            left, top = MARGIN_PX + place * width, MARGIN_PX + line * height
            draw.text((left, top), shorten(text, font, cell), "black", font=font, spacing=1)
            image = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(image, (left, top + CAPTION_PX - 3))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def caption(row: dict[str, Any], number: int) -> str:
    """Codec; bytes and the first embedder's similarity, or PSNR where there is none."""
    values = row["per_crop"]
    similarity = next(iter(values["similarity"].items()), None)
    if similarity:
        figure = f"{similarity[0]} {similarity[1][number]:.3f}"
    else:
        psnr = values["psnr_db"][number]
        figure = "equal" if psnr is None else f"{psnr:.1f} dB"
    return f"{row['codec']}\n{values['bytes'][number]:,} B, {figure}"


def shorten(text: str, font: Any, width: int) -> str:
    lines = []
    for line in text.split("\n"):
        whole = line
        while line and font.getlength(line) > width:
            line = line[:-1]
        lines.append(line if line == whole else f"{line[:-2]}..")
    return "\n".join(lines)


def draw_plots(report: dict[str, Any]) -> bytes:
    """PNG of rate against fidelity; PSNR where no embedder was asked for."""
    panels = [("similarity", name) for name in report["embedders"]] or [("psnr_db", "")]
    figure, axes = make_panels(len(panels), PANEL_IN)
    for axis, (column, name) in zip(axes, panels, strict=True):
        draw_panel(axis, report["rows"], column, name)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return saved(figure, DPI)


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
