"""The first page's picture and its table of costs, from the tables in docs/fidelity.md.

    python -m latentds_tools.fidelity.front docs/fidelity.md docs/front.png

Nothing is measured here: figures are those that were recorded there with their commands.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from latentds_tools.fidelity.fidelity_page import MARKERS
from latentds_tools.reports.markdown import table
from latentds_tools.reports.plots import make_panels, saved

from latentds.core.display import say
from latentds.errors import InputError

SECTION, EMBEDDER = "MoNuSeg", "efficientnet-lite0"
PATCHES = 24_000_000
CONTAINER = 53  # bytes a patch: columns, tables, tar (`latentds bench container`)
COSTS: dict[str, str | int] = {  # what it is called: the codec whose files were measured, or bytes
    "PNG": "png",
    "JPEG, quality 95": "jpeg:95",
    "JPEG, quality 75": "jpeg:75",
    "AVIF, quality 90": "avif:90",
    "AVIF, at most 4 KiB": "avif@4096",
    "latents of SD-3.5": 16_384,
    "latents of `tiny-v2`, SD-1.5, TAESD": "tiny-v2+rans:4096",
    "latents of DC-AE f32": 2_048,
}
FRONT_IN, FRONT_DPI = (8.0, 4.3), 200


class Curve(NamedTuple):
    """A codec's line: its kind (picture or latent) and codecs, by bytes; how it is drawn.

    color  of Okabe and Ito, told apart by all
    point, shift, side  whose label it is, where that stands from it, which side is there
    """

    kind: str
    codecs: tuple[str, ...]
    color: str
    point: int
    shift: tuple[int, int]
    side: str


CURVES = {
    "AVIF": Curve("picture", ("avif@2048", "avif@4096", "avif:60", "avif:80", "avif:90"),
                  "#0072B2", -2, (-2, 12), "right"),
    "JPEG XL": Curve("picture", ("jxl@2048", "jxl@4096", "jxl@8192", "jxl@16384", "jxl@32768"),
                     "#56B4E9", -1, (10, 0), "left"),
    "JPEG": Curve("picture", ("jpeg:10", "jpeg@4096", "jpeg:20", "jpeg:50", "jpeg:75", "jpeg:95"),
                  "#555555", 2, (9, -8), "left"),
    "WebP": Curve("picture", ("webp@2048", "webp@4096", "webp:75", "webp:95"),
                  "#CC79A7", 1, (12, -6), "left"),
    "tiny-v2": Curve("latent", ("tiny-v2+rans:2048", "tiny-v2+rans:4096", "tiny-v2+rans:8192"),
                     "#D55E00", 1, (-8, 12), "right"),
    "tiny-v1": Curve("latent", ("tiny+kmeans",), "#D55E00", 0, (12, -4), "left"),
    "TAEF2": Curve("latent", ("taef2+kmeans",), "#D55E00", 0, (0, -18), "center"),
}  # fmt: skip


def main(report: Path, picture: Path) -> None:
    rows = read_rows(report)
    picture.write_bytes(draw_front(rows))
    say(cost_table(rows))


def read_rows(report: Path, section: str = SECTION) -> dict[str, dict[str, str]]:
    """Cells by codec and column, of all tables in the section; InputError where there are none."""
    rows: dict[str, dict[str, str]] = {}
    header: list[str] = []
    parts = re.split(r"^## ", report.read_text(), flags=re.MULTILINE)
    found = next((part for part in parts if part.startswith(section)), "")
    for line in found.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells
        elif not cells[0].startswith("-"):
            rows[cells[0].strip("`")] = dict(zip(header, cells, strict=True))
    if not rows:
        raise InputError(f"{report}: no table in a section {section!r}")
    return rows


def cell(rows: dict[str, dict[str, str]], codec: str, column: str) -> str:
    if codec not in rows or column not in rows[codec]:
        raise InputError(f"{SECTION}: no {column!r} of {codec!r} is recorded; measure it first")
    return rows[codec][column]


def points_of(label: str, rows: dict[str, dict[str, str]]) -> list[tuple[float, ...]]:
    """A codec's points, sorted: bytes, mean, and the ends of its interval."""
    points = []
    for codec in CURVES[label].codecs:
        numbers = re.findall(r"[\d.]+", cell(rows, codec, EMBEDDER))
        points.append((float(stored(rows, codec)), *map(float, numbers)))
    return sorted(points)


def stored(rows: dict[str, dict[str, str]], codec: str) -> int:
    """Bytes a patch as measured, without a container."""
    return int(cell(rows, codec, "bytes").replace(",", ""))


def draw_front(rows: dict[str, dict[str, str]]) -> bytes:
    """The first page's picture: one panel, labels beside the curves, PNG."""
    figure, (axis,) = make_panels(1, FRONT_IN)
    for label in CURVES:
        draw_curve(axis, label, points_of(label, rows))
    axis.set_xscale("log", base=2)
    sizes = [1024 * 2**power for power in range(1, 6)]
    axis.set_xticks(sizes, [f"{size // 1024} KiB" for size in sizes])
    axis.minorticks_off()
    axis.set_xlim(1700, 50_000)
    axis.set_xlabel("a 256 px patch takes", fontsize=12)
    axis.set_title(
        f"Cosine similarity of {EMBEDDER} embeddings to those of the original",
        fontsize=12, loc="left",
    )  # fmt: skip
    axis.tick_params(labelsize=11, length=3)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    return saved(figure, FRONT_DPI)


def draw_curve(axis: Any, label: str, points: Sequence[tuple[float, ...]]) -> None:
    """Line, markers, intervals and label of one codec; latents stand out."""
    kind, _, color, point, shift, side = CURVES[label]
    sizes, means, lows, highs = zip(*points, strict=True)
    is_latent = kind == "latent"
    below = [mean - low for mean, low in zip(means, lows, strict=True)]
    above = [high - mean for mean, high in zip(means, highs, strict=True)]
    axis.errorbar(
        sizes, means, yerr=(below, above), color=color, marker=MARKERS[kind],
        markersize=11 if is_latent else 6, linewidth=1.6, elinewidth=1.0, zorder=3 + is_latent,
    )  # fmt: skip
    text = f"{label} latents" if is_latent else label
    axis.annotate(
        text, (sizes[point], means[point]), shift, textcoords="offset points", color=color,
        fontsize=13, fontweight="bold" if is_latent else "normal", ha=side, va="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5}, zorder=4,
    )  # fmt: skip


def cost_table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: bytes a patch, and those and the container's 53 times 24 million."""
    lines = []
    for name, source in COSTS.items():
        size = source if isinstance(source, int) else stored(rows, source)
        lines.append([name, f"{size:,}", shown((size + CONTAINER) * PATCHES)])
    return table(["stored as", "bytes a 256 px patch", "24 million patches"], lines)


def shown(count: int) -> str:
    """Bytes with three digits."""
    if count >= 1e12:
        return f"{count / 1e12:.2f} TB"
    return f"{count / 1e9:.0f} GB" if count >= 1e11 else f"{count / 1e9:.1f} GB"


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
