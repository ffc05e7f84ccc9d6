"""What is read of one slide: whether OpenSlide survives it, its grid, tissue, an overview, a patch.

GLib ends whoever asks it for absurd memory: a process of its own opens a slide first, and touches a
pixel of every level. A slide it dies of costs itself and nothing else.
"""
# H W pixels

from __future__ import annotations

import functools
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from latentds.core.storage import check_regular
from latentds.errors import UnusableError, missing_extra
from latentds.sources.cut_options import MAGNIFICATION_MPP

THUMBNAIL_MPP = 8.0  # a 256 px patch at 0.5 mpp is 16 px of it
MAX_THUMBNAIL_PX = 4096
MAX_LEVEL_PX = 1 << 27  # of a level that is read for a picture alone: some seconds
STRIP_PX = 1 << 24  # of a level at once, 64 MB
# A level up to 1 % finer than asked is not resampled from the one above it.
LEVEL_SLACK = 1.01
NO_PIXEL = 0.01  # parts of a pixel that are rounding's
ROUNDING = 1e-9  # of floats: 0.525 is within 5 % of 0.5
PLAUSIBLE_MPP = (0.05, 20.0)
MAX_PLACES = 10**7  # a grid of more is a mistake in a resolution
ReadRegion = Callable[[Any, tuple[int, int], int, tuple[int, int]], Image.Image]
# Saturation of 255 below which nothing is stained; CLAM's default (create_patches_fp.py, sthresh).
CLAM_SATURATION = 8
# Below it Otsu's split of an empty slide would call noise tissue.
LEAST_SATURATION = 12
MEDIAN_PX = 7  # CLAM's mthresh
DARK = 40  # value of 255: pen and coverslip edges, whose saturation is noise
DSMIL_EDGES = 15  # deepzoom_tiler.py, background_t
UNREADABLE = "OpenSlide cannot read it"
PATIENCE_S = 120.0  # a slide on a slow file server opens in seconds
MEMORY_BYTES = 1 << 32  # that a pixel of every level may take, Python included
# Without latentds, and its own end without destructors: 0.15 s of CPU a slide.
CODE = f"""
import os, sys
sys.path[:] = [place for place in sys.path if place]
import openslide, resource
try:
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
except (OSError, ValueError):
    pass
try:
    slide = openslide.OpenSlide(sys.argv[1])
    for level in range(min(slide.level_count, 64)):
        slide.read_region((0, 0), level, (1, 1))
except (openslide.OpenSlideError, OSError, ValueError, MemoryError):
    pass  # whoever opens it next says why; a slide with one broken tile may be read elsewhere
os._exit(0)
"""


def probe_slide(path: Path) -> None:
    """Return where OpenSlide survives a slide; InputError (without the name) where it does not."""
    found = path.stat()
    _probe(path, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=1 << 16)
def _probe(path: Path, size: int, mtime_ns: int) -> None:
    """Try a file, once for as long as it stays as it is."""
    del size, mtime_ns
    command = [sys.executable, "-c", CODE, os.fspath(path)]
    nothing = subprocess.DEVNULL
    try:
        ended = subprocess.run(
            command, stdin=nothing, stdout=nothing, stderr=nothing, timeout=PATIENCE_S
        )
    except subprocess.TimeoutExpired as error:
        raise UnusableError(f"OpenSlide does not open it in {PATIENCE_S:g} s") from error
    if ended.returncode:
        code = ended.returncode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise UnusableError(f"OpenSlide dies of it ({how}); damaged, or made to do that")


def open_whole(path: Path) -> Any:
    """OpenSlide's own, of a file; InputError (without the name) where it cannot."""
    try:
        import openslide
    except ImportError as error:
        raise missing_extra("openslide-python", "slides") from error
    check_regular(path)
    probe_slide(path)
    try:
        return openslide.OpenSlide(str(path))
    except (openslide.OpenSlideError, OSError) as error:
        raise UnusableError(f"{UNREADABLE} ({reason_of(error)})") from error


def reason_of(error: Exception) -> str:
    """An error's words without paths, which a manifest must not carry."""
    words = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"\S*/\S*", "...", words)[:160]


def is_slide_error(error: Exception) -> bool:
    return type(error).__module__.startswith("openslide") or isinstance(error, OSError)


def distinct(places: np.ndarray) -> np.ndarray:
    """int32 (n, 2) without what is there twice, in the same order: one place is one patch."""
    first = np.unique(places, axis=0, return_index=True)[1]
    kept: np.ndarray = places[np.sort(first)]
    return kept


def slide_mpp(slide: Any, assumed: float | None, given: float | None = None) -> float:
    """Micrometres a pixel of level 0: given, recorded, by magnification, assumed; or InputError."""
    if given is not None:
        return given
    names = ("openslide.mpp-x", "openslide.mpp-y")
    values = [number(slide.properties.get(name)) for name in names]
    # A resolution of 72 dpi is what software writes that knows none.
    found = [v for v in values if v is not None and PLAUSIBLE_MPP[0] <= v <= PLAUSIBLE_MPP[1]]
    if len(found) == 2 and abs(found[0] - found[1]) > 0.02 * found[0]:
        if assumed is not None:
            return assumed
        raise UnusableError(
            f"its pixels are not square (mpp {found[0]:.4f} by {found[1]:.4f}); pass --assume-mpp, "
            "or its mpp in a --slide-table",
            "resolution",
        )
    if found:
        return sum(found) / len(found)
    power = number(slide.properties.get("openslide.objective-power"))
    if power is not None:
        return MAGNIFICATION_MPP / power
    if assumed is not None:
        return assumed
    seen = [f"{value:.4g}" for value in values if value is not None]
    what = f"records an mpp of {seen[0]}, which no scanner has," if seen else "records neither mpp"
    raise UnusableError(
        f"{what} nor magnification; pass --assume-mpp, or its mpp in a --slide-table", "resolution"
    )


def number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else 0.0
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def own_scale(slide: Any, scale: float, tolerance: float) -> float:
    """The downsampling of a slide's level nearest to `scale`, where it will do; else `scale`.

    scale      level-0 pixels asked for a pixel
    tolerance  share of it by which the level's may differ
    """
    nearest = min(slide.level_downsamples, key=lambda factor: abs(factor - scale))
    return float(nearest) if abs(nearest - scale) <= tolerance * scale + ROUNDING else scale


def describe_slide(slide: Any, path: Path) -> str:
    """Format and coding, as far as a slide says: `svs:jpeg:q=30`; no other property leaves it."""
    vendor, suffix = slide.properties.get("openslide.vendor", ""), path.suffix.lower().lstrip(".")
    comment = slide.properties.get("openslide.comment", "") if vendor == "aperio" else ""
    quality = re.search(r"JPEG/RGB Q=(\d{1,3})\b", comment)
    if quality:
        return f"{suffix}:jpeg:q={quality[1]}"
    return f"{suffix}:j2k" if "J2K/" in comment else suffix


def grid(slide: Any, size: float, step: float, edges: str, unit: float = 1.0) -> np.ndarray:
    """int32 (n, 2): corners of a slide's grid at level 0, rows of y, within its bounds.

    edges  "drop" leaves out patches that reach beyond the slide, "pad" keeps them
    unit   level-0 pixels of which the first corner is a multiple: a level's whole pixels
    """
    width, height = slide.dimensions
    left = int(slide.properties.get("openslide.bounds-x", 0))
    top = int(slide.properties.get("openslide.bounds-y", 0))
    right = left + int(slide.properties.get("openslide.bounds-width", width - left))
    bottom = top + int(slide.properties.get("openslide.bounds-height", height - top))
    first_x, first_y = (math.ceil(first / unit) * unit for first in (left, top))
    room = size if edges == "drop" else 1
    if (right - left) / step * ((bottom - top) / step) > MAX_PLACES:
        raise UnusableError(
            f"a grid every {step:.3g} px has over {MAX_PLACES:,} patches; see its mpp", "resolution"
        )
    columns = np.arange(0, max(right - first_x - room, -1) + 1e-6, step)
    rows = np.arange(0, max(bottom - first_y - room, -1) + 1e-6, step)
    x, y = np.meshgrid(np.rint(first_x + columns), np.rint(first_y + rows))
    return np.stack([x.ravel(), y.ravel()], 1).astype(np.int32)


def on_white(slide: Any, at: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
    """A region as RGB; what lies outside the slide is white."""
    region = slide.read_region(at, level, size)
    white = Image.new("RGB", region.size, (255, 255, 255))
    white.paste(region, mask=region.getchannel("A"))
    return white


def overview_factor(slide: Any, mpp: float) -> float:
    """Level-0 pixels a pixel of a slide's thumbnail."""
    return max(THUMBNAIL_MPP / mpp, float(max(slide.dimensions)) / MAX_THUMBNAIL_PX, 1.0)


def overview_level(slide: Any, mpp: float) -> int:
    """The level that a slide's thumbnail is made from."""
    level: int = slide.get_best_level_for_downsample(overview_factor(slide, mpp) * LEVEL_SLACK)
    return level


def thumbnail_of(
    slide: Any, mpp: float, level: int | None = None, read: ReadRegion = on_white
) -> tuple[np.ndarray, float]:
    """A slide at about 8 micrometres a pixel, on white, and level-0 pixels a pixel of it.

    Read in strips: a level may be larger than the memory.

    level  to read from, by default the coarsest that is fine enough
    read   a region of it, as `on_white` does
    """
    level = overview_level(slide, mpp) if level is None else level
    return shrink_level(slide, overview_factor(slide, mpp), level, read)


def small_view(slide: Any, edge: int) -> tuple[np.ndarray, float] | None:
    """A slide about `edge` pixels long as `thumbnail_of` makes it; None where no level is small."""
    factor = max(float(max(slide.dimensions)) / edge, 1.0)
    level = slide.get_best_level_for_downsample(factor * LEVEL_SLACK)
    if math.prod(slide.level_dimensions[level]) > MAX_LEVEL_PX:
        return None
    return shrink_level(slide, factor, level)


def shrink_level(
    slide: Any, factor: float, level: int, read: ReadRegion = on_white
) -> tuple[np.ndarray, float]:
    """A level `factor` times smaller than level 0, and how many times exactly it is."""
    width, height = slide.dimensions
    columns, rows = max(1, round(width / factor)), max(1, round(height / factor))
    step = slide.level_downsamples[level]
    across, down = slide.level_dimensions[level]
    high = down / rows  # pixels of the level a pixel of the thumbnail
    count = max(1, int(STRIP_PX / (across * high)))
    strips = []
    for first in range(0, rows, count):
        part = min(count, rows - first)
        top, bottom = math.floor(first * high), min(math.ceil((first + part) * high), down)
        region = read(slide, (0, round(top * step)), level, (across, bottom - top))
        box = (0, first * high - top, across, min((first + part) * high - top, bottom - top))
        strips.append(np.asarray(region.resize((columns, part), Image.Resampling.BOX, box=box)))
    return np.concatenate(strips), width / columns


def cut_region(slide: Any, at: tuple[int, int], scale: float, edge: int) -> np.ndarray:
    """uint8 (edge, edge, 3) of the square at level-0 pixel `at`, `edge * scale` of them wide.

    Read from the coarsest level that is not coarser than asked, resampled by Lanczos over just the
    asked area; what lies outside the slide is white.
    """
    level = slide.get_best_level_for_downsample(scale * LEVEL_SLACK)
    factor = slide.level_downsamples[level]
    size = edge * scale / factor
    # Corners are whole pixels of level 0; between those of a level 4.0003 times coarser that is
    # rounding, and no reason to resample its own pixels.
    is_own = abs(size - edge) <= NO_PIXEL
    is_uneven = is_own and not float(factor).is_integer()
    slack = max(0.5 / factor, NO_PIXEL) if is_uneven else NO_PIXEL
    # Whole pixels of the level: OpenSlide would blur in between, each patch differently.
    first = [math.floor(place / factor + slack) for place in at]
    offset = [max(place / factor - start, 0.0) for place, start in zip(at, first, strict=True)]
    offset = [0.0 if is_own and part <= slack else part for part in offset]
    whole = [max(1, math.ceil(part + size - NO_PIXEL)) for part in offset]
    corner = (round(first[0] * factor), round(first[1] * factor))
    white = on_white(slide, corner, level, (whole[0], whole[1]))
    if max(*offset, abs(size - edge)) <= NO_PIXEL and whole == [edge, edge]:
        return np.asarray(white)
    box = (*offset, min(offset[0] + size, whole[0]), min(offset[1] + size, whole[1]))
    return np.asarray(white.resize((edge, edge), Image.Resampling.LANCZOS, box=box))


def tissue_mask(thumbnail: np.ndarray, rule: str) -> np.ndarray:
    """Whether each pixel of a thumbnail, uint8 (H, W, 3), is tissue: bool (H, W).

    otsu   HSV saturation, median of 7 px, above Otsu's threshold (12 of 255 at least), not dark
    clam   the same above 8 of 255, CLAM's default threshold
    """
    hsv = np.asarray(Image.fromarray(thumbnail).convert("HSV"))
    smooth = Image.fromarray(hsv[:, :, 1]).filter(ImageFilter.MedianFilter(MEDIAN_PX))
    saturation = np.asarray(smooth)
    threshold = CLAM_SATURATION
    if rule == "otsu":
        threshold = max(otsu(saturation), LEAST_SATURATION)
    mask: np.ndarray = (saturation > threshold) & (hsv[:, :, 2] > DARK)
    return mask


def otsu(values: np.ndarray) -> int:
    """Otsu's threshold of uint8 values: above it is the upper class (Otsu 1979)."""
    counts = np.bincount(values.reshape(-1), minlength=256).astype(np.float64)
    below, levels = np.cumsum(counts), np.arange(256)
    above = below[-1] - below
    sums = np.cumsum(counts * levels)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return int(np.nanargmax(between)) if np.isfinite(between).any() else 0


def tissue_shares(mask: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Share of tissue in boxes of a mask (H, W): boxes float (n, 4), left, top, right, bottom.

    A box smaller than a pixel takes that pixel.
    """
    height, width = mask.shape
    integral = np.zeros((height + 1, width + 1), np.int64)
    integral[1:, 1:] = mask.cumsum(0).cumsum(1)
    left = np.clip(np.floor(boxes[:, 0]), 0, width - 1).astype(int)
    top = np.clip(np.floor(boxes[:, 1]), 0, height - 1).astype(int)
    right = np.clip(np.ceil(boxes[:, 2]), left + 1, width).astype(int)
    bottom = np.clip(np.ceil(boxes[:, 3]), top + 1, height).astype(int)
    sums = (
        integral[bottom, right]
        - integral[top, right]
        - integral[bottom, left]
        + integral[top, left]
    )
    shares: np.ndarray = sums / ((right - left) * (bottom - top))
    return shares


def has_edges(patch: np.ndarray) -> bool:
    """DSMIL's rule: the mean over channels and pixels of Pillow's FIND_EDGES is above 15."""
    edges = np.asarray(Image.fromarray(patch).filter(ImageFilter.FIND_EDGES))
    return float(edges.mean()) > DSMIL_EDGES
