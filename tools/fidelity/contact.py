"""The contact sheet, as Fig. 1 of the paper: originals beside what every codec makes of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from latentds_tools.fidelity.fidelity_crops import Crop

from latentds.errors import InputError

CAPTION_PX, MARGIN_PX, FONT_PX = 34, 6, 12
MIN_CELL_PX = 200  # captions need so much
SHOWN = 3


def pick_crops(text: str | None, crops: Sequence[Crop]) -> list[int]:
    """Numbers of the crops to show: those given, else SHOWN of different slides, evenly spread."""
    if text is None:
        firsts = sorted({crop.slide: n for n, crop in reversed(list(enumerate(crops)))}.values())
        places = np.linspace(0, len(firsts) - 1, min(SHOWN, len(firsts)))
        return [firsts[round(place)] for place in places.tolist()]
    try:
        numbers = list(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError as error:
        raise InputError(f"--contact {text!r}: numbers with commas between") from error
    wrong = [number for number in numbers if not 0 <= number < len(crops)]
    if wrong or not numbers:
        raise InputError(f"--contact {text!r}: crops are 0 to {len(crops) - 1}")
    return numbers


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
