"""Whole slides through OpenSlide: tissue found by a named rule, patches at an asked resolution."""
# H W pixels

from __future__ import annotations

import contextlib
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from latentds.conversion.config import ConvertConfig
from latentds.errors import InputError, missing_extra
from latentds.sources.image_folder import are_splits, check_labels, check_names, place, walk
from latentds.sources.patch import Patch
from latentds.sources.source import Header, Listing, Picture
from latentds.sources.tissue import has_edges, tissue_mask, tissue_shares

SUFFIXES = {".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".zvi", ".czi"}
MAYBE = {".tif", ".tiff"}  # slides where they are tiled pyramids
DEFAULT_PATCH_PX = 256
THUMBNAIL_MPP = 8.0  # a 256 px patch at 0.5 mpp is 16 px of it
MAX_THUMBNAIL_PX = 4096
OPEN_SLIDES = 32
# A level up to 1 % finer than asked is not resampled from the one above it.
LEVEL_SLACK = 1.01
MAGNIFICATION_MPP = 10.0  # mpp of 1x: 40x is 0.25, 20x 0.5, as TRIDENT and most others have it
UNREADABLE = "OpenSlide cannot read it"


def open_slide(path: Path) -> Any:
    """An open slide; InputError (without the name) where OpenSlide cannot."""
    try:
        import openslide
    except ImportError as error:
        raise missing_extra("openslide-python", "slides") from error
    try:
        return openslide.OpenSlide(str(path))
    except (openslide.OpenSlideError, OSError) as error:
        raise InputError(f"{UNREADABLE} ({reason_of(error)})") from error


def reason_of(error: Exception) -> str:
    """An error's words without paths, which a manifest must not carry."""
    words = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"\S*/\S*", "...", words)[:160]


def is_slide(path: Path) -> bool:
    """Whether OpenSlide knows a file as a slide."""
    if path.suffix.lower() in SUFFIXES:
        return True
    if path.suffix.lower() not in MAYBE:
        return False
    try:
        import openslide
    except ImportError:
        return False
    return openslide.OpenSlide.detect_format(str(path)) is not None


class Slides:
    """Slides below a folder, tissue of each cut into a grid of patches.

    A slide's own resolution is its mpp, 10 / magnification where only that is recorded, or
    --assume-mpp. Patches are read from the nearest finer level and resampled to just the mpp asked
    for; x and y count pixels of level 0.
    """

    kind = "whole slides"

    def __init__(self, config: ConvertConfig) -> None:
        self.config, self.root = config, config.source
        self.edge = config.patch_size or DEFAULT_PATCH_PX
        self.handles: OrderedDict[str, Any] = OrderedDict()
        self.lock = threading.Lock()
        self.places: dict[str, np.ndarray] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.config,)  # without lock and handles, for a worker elsewhere

    def listing(self) -> Listing:
        paths = list(walk(self.root))
        found = [path for path in paths if is_slide(self.root / path)]
        if not found:
            raise InputError(f"{self.root}: no slides in it ({len(paths)} other files)")
        check_names(self.root, found)
        has_splits = self.config.splits and are_splits(self.root, found)
        pictures = tuple(self.picture(path, has_splits) for path in found)
        check_labels(self.root, pictures, self.config.labels)
        check_slide_names(self.root, pictures)
        others = sorted(set(paths) - set(found))
        return Listing(pictures, len(others), others[0] if others else "")

    def picture(self, path: str, has_splits: bool) -> Picture:
        """A slide, named by its file without the last suffix."""
        found = place(path, has_splits, self.config.labels)
        return Picture(path, found.split, found.label, PurePosixPath(path).stem)

    def header(self, picture: Picture) -> Header:
        path = self.path(picture)
        with reading():
            slide = self.open(picture)
            width, height = slide.dimensions
            self.places[picture.source] = self.find_places(picture, slide)
        encoding = describe_slide(slide, path)
        return Header((height, width), "RGB", encoding, path.stat().st_size)

    def path(self, picture: Picture) -> Path:
        """A slide's file."""
        return self.root / picture.source

    def open(self, picture: Picture) -> Any:
        """A slide's handle; the least recently used of many is closed."""
        with self.lock:
            handle = self.handles.pop(picture.source, None)
        if handle is None:
            handle = open_slide(self.path(picture))
        with self.lock:
            self.handles[picture.source] = handle
            if len(self.handles) > OPEN_SLIDES:
                self.handles.popitem(last=False)  # closed when its last reader is done
        return handle

    def find_places(self, picture: Picture, slide: Any) -> np.ndarray:
        """int32 (n, 2): x and y at level 0 of the patches that hold tissue."""
        config, scale = self.config, self.scale(picture, slide)
        places = grid(slide, self.edge * scale, (config.stride or self.edge) * scale, config.edges)
        if config.tissue == "dsmil":
            kept = [
                has_edges(cut_region(slide, (x, y), scale, self.edge)) for x, y in places.tolist()
            ]
            return places[np.array(kept, bool)] if len(places) else places
        thumbnail, factor = thumbnail_of(slide, slide_mpp(slide, config.assume_mpp))
        mask = tissue_mask(thumbnail, config.tissue)
        boxes = np.concatenate([places, places + self.edge * scale], 1) / factor
        return places[tissue_shares(mask, boxes) >= config.min_tissue]

    def scale(self, picture: Picture, slide: Any) -> float:
        """Pixels of level 0 a pixel of a slide's patches."""
        del picture
        own = slide_mpp(slide, self.config.assume_mpp)
        return (self.config.mpp or own) / own

    def patch_px(self, headers: dict[str, Header]) -> tuple[int, int]:
        del headers
        return self.edge, self.edge

    def regions(self, picture: Picture, header: Header, patch_px: tuple[int, int]) -> np.ndarray:
        del header, patch_px
        return self.places[picture.source]

    def read(
        self,
        picture: Picture,
        header: Header,
        patch_px: tuple[int, int],
        regions: Sequence[tuple[int, int]],
    ) -> list[Patch]:
        del patch_px
        with reading():
            slide = self.open(picture)
            scale = self.scale(picture, slide)
            images = [cut_region(slide, at, scale, self.edge) for at in regions]
            own = self.own_mpp(slide)
        return [
            Patch(
                image=image,
                source=picture.source,
                source_encoding=header.encoding,
                label=picture.label,
                slide=picture.slide,
                x_px_level0=x,
                y_px_level0=y,
                size_px_level0=round(self.edge * scale),
                mpp=None if own is None else own * scale,
            )
            for image, (x, y) in zip(images, regions, strict=True)
        ]

    def own_mpp(self, slide: Any) -> float | None:
        """Micrometres a pixel of level 0, None where they need not be known."""
        return slide_mpp(slide, self.config.assume_mpp)

    def facts(self) -> dict[str, Any]:
        names = ("tissue", "min_tissue", "edges", "assume_mpp")
        return {name: getattr(self.config, name) for name in names}


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turn what OpenSlide raises while it reads into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if type(error).__module__.startswith("openslide") or isinstance(error, OSError):
            raise InputError(f"{UNREADABLE} ({reason_of(error)})") from error
        raise


def check_slide_names(root: Path, pictures: Sequence[Picture]) -> None:
    """Refuse two slides of one name: their patches could not be told apart."""
    first: dict[str | None, str] = {}
    for picture in pictures:
        other = first.setdefault(picture.slide, picture.source)
        if other != picture.source:
            raise InputError(
                f"{root}: {other} and {picture.source} are both slide {picture.slide!r}; rename one"
            )


def slide_mpp(slide: Any, assumed: float | None) -> float:
    """Micrometres a pixel of level 0: recorded, by magnification, or assumed; else InputError."""
    names = ("openslide.mpp-x", "openslide.mpp-y")
    values = [number(slide.properties.get(name)) for name in names]
    found = [value for value in values if value is not None]
    if len(found) == 2 and abs(found[0] - found[1]) > 0.02 * found[0]:
        raise InputError(f"its pixels are not square (mpp {found[0]:.4f} by {found[1]:.4f})")
    if found:
        return sum(found) / len(found)
    power = number(slide.properties.get("openslide.objective-power"))
    if power is not None:
        return MAGNIFICATION_MPP / power
    if assumed is not None:
        return assumed
    raise InputError("records neither mpp nor magnification; pass --assume-mpp")


def number(text: str | None) -> float | None:
    """A positive number of a property, None where there is none."""
    try:
        value = float(text) if text is not None else 0.0
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def describe_slide(slide: Any, path: Path) -> str:
    """Format and coding, as far as a slide says: `svs:jpeg:q=30`; no other property leaves it."""
    vendor, suffix = slide.properties.get("openslide.vendor", ""), path.suffix.lower().lstrip(".")
    comment = slide.properties.get("openslide.comment", "") if vendor == "aperio" else ""
    quality = re.search(r"JPEG/RGB Q=(\d{1,3})\b", comment)
    if quality:
        return f"{suffix}:jpeg:q={quality[1]}"
    return f"{suffix}:j2k" if "J2K/" in comment else suffix


def grid(slide: Any, size: float, step: float, edges: str) -> np.ndarray:
    """int32 (n, 2): corners of a slide's grid at level 0, rows of y, within its bounds.

    edges  "drop" leaves out patches that reach beyond the slide, "pad" keeps them
    """
    width, height = slide.dimensions
    left = int(slide.properties.get("openslide.bounds-x", 0))
    top = int(slide.properties.get("openslide.bounds-y", 0))
    right = left + int(slide.properties.get("openslide.bounds-width", width - left))
    bottom = top + int(slide.properties.get("openslide.bounds-height", height - top))
    room = size if edges == "drop" else 1
    columns = np.arange(0, max(right - left - room, -1) + 1e-6, step)
    rows = np.arange(0, max(bottom - top - room, -1) + 1e-6, step)
    x, y = np.meshgrid(left + np.rint(columns), top + np.rint(rows))
    return np.stack([x.ravel(), y.ravel()], 1).astype(np.int32)


def thumbnail_of(slide: Any, mpp: float) -> tuple[np.ndarray, float]:
    """A slide at about 8 micrometres a pixel, on white, and level-0 pixels a pixel of it."""
    width, height = slide.dimensions
    factor = max(THUMBNAIL_MPP / mpp, max(width, height) / MAX_THUMBNAIL_PX, 1.0)
    size = (max(1, round(width / factor)), max(1, round(height / factor)))
    image = slide.get_thumbnail(size).convert("RGB")
    if image.size != size:
        image = image.resize(size, Image.Resampling.BOX)
    return np.asarray(image), width / size[0]


def cut_region(slide: Any, at: tuple[int, int], scale: float, edge: int) -> np.ndarray:
    """uint8 (edge, edge, 3) of the square at level-0 pixel `at`, `edge * scale` of them wide.

    Read from the coarsest level that is not coarser than asked, resampled by Lanczos over just the
    asked area; what lies outside the slide is white.
    """
    level = slide.get_best_level_for_downsample(scale * LEVEL_SLACK)
    if slide.level_downsamples[level] > scale * LEVEL_SLACK:
        level = 0
    size = edge * scale / slide.level_downsamples[level]
    whole = max(1, math.ceil(size - 1e-6))
    region = slide.read_region(at, level, (whole, whole))
    white = Image.new("RGB", region.size, (255, 255, 255))
    white.paste(region, mask=region.getchannel("A"))
    if abs(size - edge) > 1e-6:
        white = white.resize((edge, edge), Image.Resampling.LANCZOS, box=(0, 0, size, size))
    return np.asarray(white)
