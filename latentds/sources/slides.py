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
from latentds.opening import check_regular
from latentds.sources.image_folder import are_splits, check_labels, check_names, place, walk
from latentds.sources.patch import Patch, Place
from latentds.sources.slide_probe import probe_slide
from latentds.sources.source import Header, Listing, Picture
from latentds.sources.tissue import has_edges, tissue_mask, tissue_shares

SUFFIXES = {".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".zvi", ".czi"}
MAYBE = {".tif", ".tiff"}  # slides where they are tiled pyramids
DEFAULT_PATCH_PX = 256
THUMBNAIL_MPP = 8.0  # a 256 px patch at 0.5 mpp is 16 px of it
MAX_THUMBNAIL_PX = 4096
STRIP_PX = 1 << 24  # of a level at once, 64 MB
OPEN_SLIDES = 32
# A level up to 1 % finer than asked is not resampled from the one above it.
LEVEL_SLACK = 1.01
NO_PIXEL = 0.01  # parts of a pixel that are rounding's
PLAUSIBLE_MPP = (0.05, 20.0)
MAX_PLACES = 10**7  # a grid of more is a mistake in a resolution
MAGNIFICATION_MPP = 10.0  # mpp of 1x: 40x is 0.25, 20x 0.5, as TRIDENT and most others have it
UNREADABLE = "OpenSlide cannot read it"


def open_slide(path: Path) -> Any:
    """An open slide; InputError (without the name) where OpenSlide cannot."""
    try:
        import openslide
    except ImportError as error:
        raise missing_extra("openslide-python", "slides") from error
    check_regular(path)
    probe_slide(path)
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
        has_splits = self.config.split_folders and are_splits(self.root, found)
        pictures = tuple(self.picture(path, has_splits) for path in found)
        check_labels(self.root, pictures, self.config.labels)
        check_slide_names(self.root, pictures)
        others = sorted(set(paths) - set(found))
        return Listing(pictures, len(others), others[0] if others else "")

    def picture(self, path: str, has_splits: bool) -> Picture:
        """A slide, named by its file without the last suffix."""
        found = place(path, has_splits, self.config.labels)
        return Picture(path, found.split, found.label, PurePosixPath(path).stem)

    def chunk(self, picture: Picture) -> str | None:
        del picture  # a slide's patches stay together anyway
        return None

    def header(self, picture: Picture) -> Header:
        path = self.file(picture)
        with self.reading(picture):
            slide = self.open(picture)
            width, height = slide.dimensions
            self.places[picture.source] = self.find_places(picture, slide)
        encoding = describe_slide(slide, path)
        return Header((height, width), "RGB", encoding, path.stat().st_size)

    def file(self, picture: Picture) -> Path:
        """A slide's file."""
        return self.root / picture.source

    def mask_file(self, picture: Picture, size_px: tuple[int, int]) -> Path | None:
        del picture, size_px  # slides have none
        return None

    def open(self, picture: Picture) -> Any:
        """A slide's handle; the least recently used of many is closed."""
        with self.lock:
            handle = self.handles.pop(picture.source, None)
        if handle is None:
            handle = open_slide(self.file(picture))
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

    def lookup(self, source: str) -> Picture | None:
        return Picture(source=source, split="") if (self.root / source).is_file() else None

    def locate(
        self, picture: Picture, patch_px: tuple[int, int], place: tuple[int, int]
    ) -> tuple[Header, tuple[int, int]] | None:
        del picture, patch_px
        return Header(size_px=(0, 0), mode="RGB", encoding="", bytes=0), place

    def whereabouts(
        self,
        picture: Picture,
        header: Header,
        patch_px: tuple[int, int],
        regions: Sequence[tuple[int, int]],
    ) -> list[Place]:
        del header, patch_px
        with self.reading(picture):
            slide = self.open(picture)
            scale, own = self.scale(picture, slide), self.own_mpp(slide)
        size, mpp = round(self.edge * scale), None if own is None else own * scale
        return [Place(x, y, size, mpp) for x, y in regions]

    def read(
        self,
        picture: Picture,
        header: Header,
        patch_px: tuple[int, int],
        regions: Sequence[tuple[int, int]],
    ) -> list[Patch]:
        with self.reading(picture):
            slide = self.open(picture)
            scale = self.scale(picture, slide)
            images = [cut_region(slide, at, scale, self.edge) for at in regions]
        return [
            Patch(
                image=image,
                source=picture.source,
                source_encoding=header.encoding,
                label=picture.label,
                slide=picture.slide,
                **place._asdict(),
            )
            for image, place in zip(
                images, self.whereabouts(picture, header, patch_px, regions), strict=True
            )
        ]

    def own_mpp(self, slide: Any) -> float | None:
        """Micrometres a pixel of level 0, None where they need not be known."""
        return slide_mpp(slide, self.config.assume_mpp)

    @contextlib.contextmanager
    def reading(self, picture: Picture) -> Iterator[None]:
        """Turn what OpenSlide raises into an InputError, and forget the handle: it stays broken."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            with self.lock:
                self.handles.pop(picture.source, None)
            if type(error).__module__.startswith("openslide") or isinstance(error, OSError):
                raise InputError(f"{UNREADABLE} ({reason_of(error)})") from error
            raise

    def facts(self) -> dict[str, Any]:
        names = ("tissue", "min_tissue", "edges", "assume_mpp")
        return {name: getattr(self.config, name) for name in names}


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
    # A resolution of 72 dpi is what software writes that knows none.
    found = [v for v in values if v is not None and PLAUSIBLE_MPP[0] <= v <= PLAUSIBLE_MPP[1]]
    if len(found) == 2 and abs(found[0] - found[1]) > 0.02 * found[0]:
        raise InputError(f"its pixels are not square (mpp {found[0]:.4f} by {found[1]:.4f})")
    if found:
        return sum(found) / len(found)
    power = number(slide.properties.get("openslide.objective-power"))
    if power is not None:
        return MAGNIFICATION_MPP / power
    if assumed is not None:
        return assumed
    seen = [f"{value:.4g}" for value in values if value is not None]
    what = f"records an mpp of {seen[0]}, which no scanner has," if seen else "records neither mpp"
    raise InputError(f"{what} nor magnification; pass --assume-mpp")


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
    if (right - left) / step * ((bottom - top) / step) > MAX_PLACES:
        raise InputError(f"a grid every {step:.3g} px has over {MAX_PLACES:,} patches; see its mpp")
    columns = np.arange(0, max(right - left - room, -1) + 1e-6, step)
    rows = np.arange(0, max(bottom - top - room, -1) + 1e-6, step)
    x, y = np.meshgrid(left + np.rint(columns), top + np.rint(rows))
    return np.stack([x.ravel(), y.ravel()], 1).astype(np.int32)


def thumbnail_of(slide: Any, mpp: float) -> tuple[np.ndarray, float]:
    """A slide at about 8 micrometres a pixel, on white, and level-0 pixels a pixel of it.

    Read in strips: a level may be larger than the memory.
    """
    width, height = slide.dimensions
    factor = max(THUMBNAIL_MPP / mpp, max(width, height) / MAX_THUMBNAIL_PX, 1.0)
    columns, rows = max(1, round(width / factor)), max(1, round(height / factor))
    level = slide.get_best_level_for_downsample(factor * LEVEL_SLACK)
    step = slide.level_downsamples[level]
    across, down = slide.level_dimensions[level]
    high = down / rows  # pixels of the level a pixel of the thumbnail
    count = max(1, int(STRIP_PX / (across * high)))
    strips = []
    for first in range(0, rows, count):
        part = min(count, rows - first)
        top, bottom = math.floor(first * high), min(math.ceil((first + part) * high), down)
        region = on_white(slide, (0, round(top * step)), level, (across, bottom - top))
        box = (0, first * high - top, across, min((first + part) * high - top, bottom - top))
        strips.append(np.asarray(region.resize((columns, part), Image.Resampling.BOX, box=box)))
    return np.concatenate(strips), width / columns


def on_white(slide: Any, at: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
    """A region as RGB; what lies outside the slide is white."""
    region = slide.read_region(at, level, size)
    white = Image.new("RGB", region.size, (255, 255, 255))
    white.paste(region, mask=region.getchannel("A"))
    return white


def cut_region(slide: Any, at: tuple[int, int], scale: float, edge: int) -> np.ndarray:
    """uint8 (edge, edge, 3) of the square at level-0 pixel `at`, `edge * scale` of them wide.

    Read from the coarsest level that is not coarser than asked, resampled by Lanczos over just the
    asked area; what lies outside the slide is white.
    """
    level = slide.get_best_level_for_downsample(scale * LEVEL_SLACK)
    factor = slide.level_downsamples[level]
    size = edge * scale / factor
    # Whole pixels of the level: OpenSlide would blur in between, each patch differently.
    first = [math.floor(place / factor + NO_PIXEL) for place in at]
    offset = [max(place / factor - start, 0.0) for place, start in zip(at, first, strict=True)]
    whole = [max(1, math.ceil(part + size - NO_PIXEL)) for part in offset]
    corner = (round(first[0] * factor), round(first[1] * factor))
    white = on_white(slide, corner, level, (whole[0], whole[1]))
    if max(*offset, abs(size - edge)) <= NO_PIXEL and whole == [edge, edge]:
        return np.asarray(white)
    box = (*offset, min(offset[0] + size, whole[0]), min(offset[1] + size, whole[1]))
    return np.asarray(white.resize((edge, edge), Image.Resampling.LANCZOS, box=box))
