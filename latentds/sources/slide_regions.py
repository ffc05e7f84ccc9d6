"""Regions of slides that are to be taken, and their classes: masks and GeoJSON, by slide name."""
# H W pixels of a raster, n patches, k classes

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from latentds.codecs.formats import DECODE_ERRORS
from latentds.core.display import number_of
from latentds.core.storage import open_picture, read_json
from latentds.errors import FormatError, InputError, UnusableError
from latentds.sources.cut_options import SourceOptions
from latentds.sources.image_folder import walk
from latentds.sources.names import ALIASES
from latentds.sources.picture import Picture
from latentds.sources.slide_names import NameIndex, some
from latentds.sources.slide_reading import tissue_shares

SUFFIXES = (".geojson", ".json", ".png")
CELLS = 16  # pixels of the raster that a patch is wide: shares are right to some 2 %
MOST_PX = 4096  # of the raster's longer edge
MAX_JSON_BYTES = 1 << 27
JSON_TIMES = 16  # vertices are short lists, which take more memory than other JSON
MAX_CLASSES = 64  # more values are a picture's, not a mask's
ASPECT = 0.02  # by which a mask's proportions may differ from its slide's
MAX_DEPTH = 8  # of collections of geometries
MAX_MASK_PX = 1 << 28  # decoded whole: a slide of 100,000 px edge at a sixth
RUN_CROSSINGS = 1 << 20  # of outlines with rows of the raster, computed at once
MAX_CROSSINGS = 1 << 28  # of a polygon; honest ones have some millions
MASK_MODES = ("1", "L", "P")
# QuPath's class of what is to be left out; other names with a star are no class.
IGNORED = "ignore*"

Rings = Sequence[Sequence[Sequence[float]]]


class PlaceLabels(NamedTuple):
    """Classes of a slide's places: 9 bytes each.

    keys     int64 (n,) ascending, of x and y
    numbers  uint8 (n,), of `classes`
    """

    keys: np.ndarray
    numbers: np.ndarray
    classes: tuple[str, ...]

    def at(self, place: tuple[int, int]) -> str:
        row = np.searchsorted(self.keys, place_keys(np.array([place])))[0]
        return self.classes[int(self.numbers[row])]


def place_keys(places: np.ndarray) -> np.ndarray:
    keys: np.ndarray = (places[:, 0].astype(np.int64) << 32) | places[:, 1].astype(np.int64)
    return keys


class SlideRegions:
    """Which places of slides lie in --regions, a folder of files named as the slides are.

    SLIDE.geojson or .json   polygons in pixels of level 0: QuPath's annotations, TRIDENT's contours
    SLIDE.png                a mask of the whole slide at any scale; 0 is outside, other values are
                             classes

    least     share of a patch that must lie in regions
    by_class  whether only regions with a class count, and label what lies in them
    labels, outside, bare  of slides seen so far, by source: classes of places, how many places lie
                           outside, and classes that no place has
    raises    InputError for a folder without such files
    """

    def __init__(self, folder: Path, options: SourceOptions) -> None:
        self.folder, self.least = folder, options.min_tissue
        self.by_class = options.label_from is not None
        paths = [path for path in walk(folder) if PurePosixPath(path).suffix.lower() in SUFFIXES]
        if not paths:
            raise InputError(f"--regions {folder}: no {', '.join(SUFFIXES)} in it")
        self.paths = paths
        self.index = NameIndex([str(PurePosixPath(path).with_suffix("")) for path in paths])
        self.labels: dict[str, PlaceLabels] = {}
        self.outside: dict[str, int] = {}
        self.bare: dict[str, list[str]] = {}

    def within(
        self, picture: Picture, slide_px: tuple[int, int], places: np.ndarray, edge: float
    ) -> tuple[np.ndarray, str]:
        """The places of a slide that lie in its regions, and why there are none."""
        files = [self.paths[n] for n in self.index.find_all(picture.slide or picture.source)]
        if len(files) > 1:
            raise UnusableError(f"has several files in --regions: {some(files)}; keep one", "mask")
        if not files:
            return places[:0], "has no file in --regions"
        kept, numbers, classes = taken(
            self.folder / files[0], slide_px, places, edge, self.least, by_class=self.by_class
        )
        if lost := int((~kept).sum()):
            self.outside[picture.source] = lost
        if self.by_class:
            keys, numbers = place_keys(places[kept]), numbers[kept]
            order = np.argsort(keys)
            self.labels[picture.source] = PlaceLabels(keys[order], numbers[order], classes)
            bare = [name for number, name in enumerate(classes) if number not in numbers]
            self.bare[picture.source] = bare
        return places[kept], f"none of {len(places)} places lies in its regions"


def note_unused_regions(chosen: SlideRegions | None, slides: Iterable[str]) -> tuple[str, ...]:
    """A note on files of regions that belong to none of the slides."""
    if chosen is None:
        return ()
    used = {place for slide in slides for place in chosen.index.find_all(slide)}
    unused = [path for place, path in enumerate(chosen.paths) if place not in used]
    files = number_of(len(unused), "file")
    return (f"--regions: {files} of no slide: {some(unused)}",) if unused else ()


def taken(
    path: Path,
    slide_px: tuple[int, int],
    places: np.ndarray,
    edge: float,
    least: float,
    *,
    by_class: bool,
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Whether places lie in a file's regions, bool (n,); numbers of their classes; the classes.

    slide_px  (W, H) of level 0
    places    int (n, 2), corners of patches at level 0
    edge      of a patch there
    least     share of a patch that must lie in regions
    by_class  whether only regions with a class count
    returns   the numbers are uint8 (n,), by the largest share
    raises    UnusableError (without the slide's name) for a file that cannot be used
    """
    factor = max(edge / CELLS, max(slide_px) / MOST_PX, 1.0)
    size = (max(1, round(slide_px[0] / factor)), max(1, round(slide_px[1] / factor)))
    if path.suffix.lower() == ".png":
        masks = mask_regions(path, slide_px, size, by_class)
    else:
        masks = polygon_regions(path, slide_px, size, by_class)
    if not masks:  # nothing was annotated
        return np.zeros(len(places), bool), np.zeros(len(places), np.uint8), ()
    scale = np.tile([size[0] / slide_px[0], size[1] / slide_px[1]], 2)
    boxes = np.concatenate([places, places + edge], 1) * scale
    shares = np.stack([tissue_shares(mask, boxes) for mask in masks.values()])
    union = tissue_shares(np.logical_or.reduce(list(masks.values())), boxes)
    return (union > 0) & (union >= least), shares.argmax(0).astype(np.uint8), tuple(masks)


def mask_regions(
    path: Path, slide_px: tuple[int, int], size: tuple[int, int], by_class: bool
) -> dict[str, np.ndarray]:
    """bool (H, W) masks by class, a PNG's values as texts, resized to `size` (W, H)."""
    try:
        with open_picture(path, ["PNG"]) as image:
            if image.mode not in MASK_MODES:
                raise bad(path, f"is {image.mode}, not one channel of 8 bits")
            if image.width * image.height > MAX_MASK_PX:
                raise bad(path, f"has over {MAX_MASK_PX:,} px; save it at a smaller scale")
            aspect = image.width / image.height * slide_px[1] / slide_px[0]
            if abs(math.log(aspect)) > ASPECT:
                raise bad(path, "has other proportions than its slide of {}x{}".format(*slide_px))
            values = np.asarray(image.convert("L") if image.mode == "1" else image)
    except DECODE_ERRORS as error:
        raise bad(path, f"cannot be read as PNG ({type(error).__name__})") from error
    values = np.asarray(Image.fromarray(values, "L").resize(size, Image.Resampling.NEAREST))
    if not by_class:
        return {"": values > 0}
    classes = [value for value in np.unique(values).tolist() if value]
    if len(classes) > MAX_CLASSES:
        raise bad(
            path, f"has {len(classes)} values beside 0, no mask of 1 to {MAX_CLASSES} classes"
        )
    return {str(value): values == value for value in classes}


def polygon_regions(
    path: Path, slide_px: tuple[int, int], size: tuple[int, int], by_class: bool
) -> dict[str, np.ndarray]:
    """bool (H, W) masks by class of a GeoJSON's polygons, drawn at `size` (W, H).

    Where polygons of several classes overlap, a pixel is of the smallest: annotations are drawn
    within others. What QuPath's class Ignore* covers is in no mask.
    """
    scale = (size[0] / slide_px[0], size[1] / slide_px[1])
    found: list[tuple[bool, float, str, list[np.ndarray]]] = []
    try:
        values = read_json(path, MAX_JSON_BYTES, "export it anew", times=JSON_TIMES)
        for name, rings in polygons_of(values):
            is_ignored, name = name.lower() == IGNORED, name if not name.endswith("*") else ""
            outlines = outlines_of(rings, scale)
            if outlines and (name or is_ignored or not by_class):
                found.append((is_ignored, -area_of(outlines[0]), name * by_class, outlines))
        classes = sorted({name for is_ignored, _, name, _ in found if not is_ignored})
        if len(classes) > MAX_CLASSES:
            raise bad(path, f"has polygons of more than {MAX_CLASSES} classes")
        drawn = np.zeros(size[::-1], np.uint8)
        for is_ignored, _, name, outlines in sorted(found, key=lambda one: one[:2]):
            draw_polygon(drawn, outlines, 0 if is_ignored else classes.index(name) + 1)
    except FormatError as error:
        raise bad(path, str(error).removeprefix(f"{path}: ")) from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise bad(path, f"is no GeoJSON ({type(error).__name__}: {str(error)[:80]})") from error
    if not classes and features_of(values):
        raise bad(path, f"has no {'polygons with a class' if by_class else 'polygons'}")
    return {name: drawn == number for number, name in enumerate(classes, 1)}


def outlines_of(rings: Rings, scale: tuple[float, float]) -> list[np.ndarray]:
    """Closed outlines of a polygon, float (n, 2) of x and y in pixels of the raster."""
    outlines = [np.asarray([point[:2] for point in ring], np.float64) * scale for ring in rings]
    return [outline for outline in outlines if len(outline) > 2]


def area_of(outline: np.ndarray) -> float:
    """What an outline encloses, in pixels of the raster."""
    (x, y), (to_x, to_y) = outline.T, np.roll(outline, -1, 0).T
    return float(abs((x * to_y - to_x * y).sum()) / 2)


def polygons_of(values: Any) -> Iterator[tuple[str, Rings]]:
    """Class ("" for none) and rings of every polygon of a feature, a list or collection of them."""
    for feature in features_of(values):
        geometry = feature.get("geometry") if feature.get("type") == "Feature" else feature
        name = class_of(feature.get("properties") or {})
        yield from ((name, rings) for rings in rings_of(geometry or {}))


def features_of(values: Any) -> list[Any]:
    """Of a feature, a list or collection of them; none where nothing was annotated."""
    features = values["features"] if isinstance(values, dict) and "features" in values else values
    return features if isinstance(features, list) else [features]


def class_of(properties: Mapping[str, Any]) -> str:
    """The class of a feature: QuPath's classification, or a property that tables call a label."""
    found = properties.get("classification")
    if isinstance(found, dict):
        found = found.get("name")
    if found is None:
        found = next((properties[name] for name in ALIASES["label"] if name in properties), None)
    return "" if found is None else str(found)[:200].strip()


def rings_of(geometry: Mapping[str, Any], depth: int = 0) -> Iterator[Rings]:
    """Rings of a geometry's polygons, outer ring first; points and lines have none."""
    kind = geometry.get("type")
    if kind == "Polygon":
        yield geometry["coordinates"]
    elif kind == "MultiPolygon":
        yield from geometry["coordinates"]
    elif kind == "GeometryCollection" and depth < MAX_DEPTH:
        for part in geometry["geometries"]:
            yield from rings_of(part, depth + 1)


def draw_polygon(drawn: np.ndarray, outlines: Sequence[np.ndarray], number: int) -> None:
    """Set the pixels whose middles a polygon covers to a number; its holes stay as they are."""
    points, room = np.concatenate(outlines), np.array(drawn.shape[::-1])
    low = np.clip(np.floor(points.min(0)), 0, room - 1).astype(int)
    high = np.clip(np.ceil(points.max(0)), low + 1, room).astype(int)
    inside = even_odd([outline - low for outline in outlines], *(high - low).tolist())
    drawn[low[1] : high[1], low[0] : high[0]][inside] = number


def even_odd(outlines: Sequence[np.ndarray], width: int, height: int) -> np.ndarray:
    """bool (H, W), pixels whose middles lie inside of closed outlines, float (n, 2) of x and y.

    Exact, where Pillow's polygons reach half a pixel too far on every side.
    """
    starts = np.concatenate(outlines)
    ends = np.concatenate([np.roll(outline, -1, 0) for outline in outlines])
    sides = np.stack([starts[:, 1], ends[:, 1]])
    first = np.clip(np.ceil(sides.min(0) - 0.5), 0, height).astype(int)
    counts = np.clip(np.ceil(sides.max(0) - 0.5), 0, height).astype(int) - first
    if counts.sum() > MAX_CROSSINGS:
        raise ValueError("an outline that goes to and fro without end")
    turns = np.zeros((height, width + 1), np.int32)
    runs = np.flatnonzero(np.diff(np.cumsum(counts) // RUN_CROSSINGS)) + 1
    for part in np.split(np.arange(len(starts)), runs):
        edge = np.repeat(part, counts[part])
        behind = np.repeat(np.cumsum(counts[part]) - counts[part], counts[part])
        rows = np.arange(len(edge)) - behind + first[edge]
        (x, y), (to_x, to_y) = starts[edge].T, ends[edge].T
        crossings = x + (rows + 0.5 - y) / (to_y - y) * (to_x - x)
        np.add.at(turns, (rows, np.clip(np.ceil(crossings - 0.5), 0, width).astype(int)), 1)
    inside: np.ndarray = turns[:, :-1].cumsum(1) % 2 == 1
    return inside


def bad(path: Path, words: str) -> UnusableError:
    return UnusableError(f"its file of regions ({path.name}) {words}", "mask")
