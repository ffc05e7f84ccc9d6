"""Pictures of tested images: the image, its true labels and the predicted ones, side by side."""
# h w pixels

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from latentds.core.storage import write_atomically

COLOURS = (  # of the labels 1, 2, ...; told apart by colour-blind readers too (Okabe and Ito 2008)
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66),
    (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip
OPACITY = 0.5
GAP_PX, LINE_PX, LEGEND_PX = 8, 14, 20
HASH_DIGITS = 12


def write_picture(
    path: Path,
    image: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    classes: Sequence[str],
    unscored: Sequence[str] = (),
) -> None:
    """A PNG with three parts on white and a line that names the colours.

    image              uint8 (h, w, 3)
    truth, prediction  labels uint8 (h, w): 0 not labelled, then the classes
    unscored           classes that are left without a colour
    """
    shown = {
        label: COLOURS[(label - 1) % len(COLOURS)]
        for label, name in enumerate(classes, 1)
        if name not in unscored
    }
    parts = [image, painted(image, truth, shown), painted(image, prediction, shown)]
    height, width = image.shape[:2]
    sheet = np.full((height + LEGEND_PX, 3 * width + 2 * GAP_PX, 3), 255, np.uint8)
    for number, part in enumerate(parts):
        left = number * (width + GAP_PX)
        sheet[:height, left : left + width] = part
    picture = Image.fromarray(sheet)
    draw_legend(picture, height, width, {classes[label - 1]: c for label, c in shown.items()})
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def painted(
    image: np.ndarray, labels: np.ndarray, shown: dict[int, tuple[int, int, int]]
) -> np.ndarray:
    """The image with its labels as half transparent colours, uint8 (h, w, 3)."""
    pixels = image.astype(np.float32)
    for label, colour in shown.items():
        where = labels == label
        pixels[where] = (1 - OPACITY) * pixels[where] + OPACITY * np.array(colour, np.float32)
    rounded: np.ndarray = pixels.round().astype(np.uint8)
    return rounded


def draw_legend(
    picture: Image.Image, top: int, width: int, colours: dict[str, tuple[int, int, int]]
) -> None:
    """What the three parts are, and a square of every class's colour with its name."""
    draw, y = ImageDraw.Draw(picture), top + (LEGEND_PX - LINE_PX) // 2
    for number, name in enumerate(("image", "truth", "prediction")):
        draw.text((number * (width + GAP_PX) + 2, y), name, fill=(0, 0, 0))
    x = width + GAP_PX + 60
    for name, colour in colours.items():
        draw.rectangle((x, y + 2, x + 8, y + 10), fill=colour)
        draw.text((x + 12, y), name, fill=(0, 0, 0))
        x += 20 + int(draw.textlength(name))


def picture_name(fold: int, item: str) -> str:
    """File name of a tested image's picture, another for every item.

    The item's own where that is a PNG's; others are made plain and end in a hash of the item.
    """
    plain = re.sub(r"\.(png|jpe?g|tiff?|webp|bmp)(?=@|$)", "", item, flags=re.IGNORECASE)
    plain = re.sub(r"[^A-Za-z0-9.@,_-]+", "_", plain)
    if f"{plain}.png" != item:
        plain += f"-{hashlib.sha256(item.encode()).hexdigest()[:HASH_DIGITS]}"
    return f"fold-{fold}_{plain}.png"
