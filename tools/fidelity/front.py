"""The first page's picture and its table of costs, from the tables in docs/fidelity.md.

    python -m latentds_tools.fidelity.front docs/fidelity.md docs/front.png

Nothing is measured here: figures are those that were recorded there with their commands.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from latentds_tools.fidelity.fidelity_plots import Curve, draw_front

from latentds.core.display import say
from latentds.errors import InputError

SECTION, EMBEDDER = "MoNuSeg", "efficientnet-lite0"
PATCHES = 24_000_000
CONTAINER = 53  # bytes a patch: columns, tables, tar (`latentds bench container`)
CURVES = {  # label: (kind, codecs)
    "AVIF": ("picture", ("avif@2048", "avif@4096", "avif:60", "avif:80", "avif:90")),
    "JPEG XL": ("picture", ("jxl@2048", "jxl@4096", "jxl@8192", "jxl@16384", "jxl@32768")),
    "JPEG": ("picture", ("jpeg:10", "jpeg@4096", "jpeg:20", "jpeg:50", "jpeg:75", "jpeg:95")),
    "WebP": ("picture", ("webp@2048", "webp@4096", "webp:75", "webp:95")),
    "tiny-v2": ("latent", ("tiny-v2+rans:2048", "tiny-v2+rans:4096")),
    "tiny-v1": ("latent", ("tiny+kmeans",)),
    "TAEF2": ("latent", ("taef2+kmeans",)),
}
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


def main(report: Path, picture: Path) -> None:
    """Draw the picture, print the table."""
    rows = read_rows(report)
    picture.write_bytes(draw_front([curve(label, rows) for label in CURVES], EMBEDDER))
    say(cost_table(rows))


def read_rows(report: Path) -> dict[str, dict[str, str]]:
    """Cells by codec and column, of all tables in the section; InputError where there are none."""
    rows: dict[str, dict[str, str]] = {}
    header: list[str] = []
    for line in section_of(report.read_text()):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells
        elif not cells[0].startswith("-"):
            rows[cells[0].strip("`")] = dict(zip(header, cells, strict=True))
    if not rows:
        raise InputError(f"{report}: no table in a section {SECTION!r}")
    return rows


def section_of(text: str) -> list[str]:
    """Lines under the heading that starts with SECTION."""
    parts = re.split(r"^## ", text, flags=re.MULTILINE)
    return next((part for part in parts if part.startswith(SECTION)), "").splitlines()


def cell(rows: dict[str, dict[str, str]], codec: str, column: str) -> str:
    """One cell; InputError where it was not recorded."""
    if codec not in rows or column not in rows[codec]:
        raise InputError(f"{SECTION}: no {column!r} of {codec!r} is recorded; measure it first")
    return rows[codec][column]


def curve(label: str, rows: dict[str, dict[str, str]]) -> Curve:
    """A codec's points: bytes, mean, and the ends of its interval."""
    kind, codecs = CURVES[label]
    points = []
    for codec in codecs:
        numbers = re.findall(r"[\d.]+", cell(rows, codec, EMBEDDER))
        mean, low, high = map(float, numbers)
        points.append((float(stored(rows, codec)), mean, low, high))
    return Curve(label, kind, tuple(sorted(points)))


def stored(rows: dict[str, dict[str, str]], codec: str) -> int:
    """Bytes a patch as measured, without a container."""
    return int(cell(rows, codec, "bytes").replace(",", ""))


def cost_table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: bytes a patch, and those and the container's 53 times 24 million."""
    lines = ["| stored as | bytes a 256 px patch | 24 million patches |", "|---|---:|---:|"]
    for name, source in COSTS.items():
        size = source if isinstance(source, int) else stored(rows, source)
        lines.append(f"| {name} | {size:,} | {shown((size + CONTAINER) * PATCHES)} |")
    return "\n".join(lines)


def shown(count: int) -> str:
    """Bytes with three digits."""
    if count >= 1e12:
        return f"{count / 1e12:.2f} TB"
    return f"{count / 1e9:.0f} GB" if count >= 1e11 else f"{count / 1e9:.1f} GB"


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
