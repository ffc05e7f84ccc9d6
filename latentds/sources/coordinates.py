"""Slides with coordinates that TRIDENT or CLAM found: h5 files of corners at level 0."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latentds.core.display import number_of
from latentds.core.storage import expands_to
from latentds.errors import InputError, UnusableError
from latentds.sources.cut_options import SourceOptions
from latentds.sources.image_folder import walk
from latentds.sources.kinds import sort_files
from latentds.sources.patch_arrays import open_h5, own_dataset
from latentds.sources.picture import Header, Listing, Picture
from latentds.sources.slide_names import named_once
from latentds.sources.slide_reading import distinct, slide_mpp
from latentds.sources.slides import Slides
from latentds.sources.source import Inspection, Source

logger = logging.getLogger(__name__)
MAX_COORDINATES = 10**8
MAX_CUSTOM = 64
SUFFIX = "_patches"  # TRIDENT's <slide>_patches.h5; CLAM's is <slide>.h5


class Coordinates(NamedTuple):
    """Corners of a slide's patches.

    places        int32 (n, 2), x and y at level 0
    size_px       width of a patch at level 0
    patch_px      width of a patch as it was asked for
    slide_px      (W, H) of level 0 that the file was made for, None where it does not say
    level         of the slide whose pixels size_px counts, where the file does not say how large
    """

    places: np.ndarray
    size_px: int
    patch_px: int
    slide_px: tuple[int, int] | None
    level: int = 0


def job_files(paths: Iterable[str]) -> list[str]:
    """TRIDENT's or CLAM's files of coordinates, `patches/*.h5` among a folder's, by name."""
    return [path for path in paths if Path(path).parent.name == "patches"
            and path.endswith(".h5")]  # fmt: skip


def read_coordinates(path: Path) -> Coordinates:
    """What a coordinates file says; InputError (without the name) where it is none."""
    try:
        with open_h5(path, "coordinates") as file:
            coords = own_dataset(file, "coords")
            if coords is None:
                raise misfit("has no data set 'coords' of its own")
            fits = coords.dtype.kind in "iu" and coords.ndim == 2 and coords.shape[1] == 2
            if not fits and coords.size:  # TRIDENT writes no places as float64 (0,)
                raise misfit(f"'coords' is {coords.dtype} {coords.shape}, not integers (n, 2)")
            if len(coords) > MAX_COORDINATES:
                raise misfit(f"'coords' has {len(coords)} rows; refused")
            if wrong := expands_to(coords, path):
                raise misfit(f"'coords' {wrong}")
            places, attributes = coords[:], dict(coords.attrs)
    except (OSError, KeyError, RuntimeError) as error:
        raise misfit(f"is no readable h5 file ({type(error).__name__})") from error
    return Coordinates(places.astype(np.int64).reshape(-1, 2), *sizes_of(attributes))


def misfit(words: str) -> UnusableError:
    return UnusableError(words, "coordinates")


def sizes_of(attributes: dict[str, Any]) -> tuple[int, int, tuple[int, int] | None, int]:
    """The fields of Coordinates after its places, from either tool's attributes."""
    try:
        patch = int(attributes["patch_size"])
        if "patch_size_level0" in attributes:  # TRIDENT
            size = int(attributes["patch_size_level0"])
            sides = [int(attributes.get(f"level0_{side}", 0)) for side in ("width", "height")]
            return size, patch, (sides[0], sides[1]) if all(sides) else None, 0
        # CLAM: patch_size counts pixels of patch_level.
        level, downsample = int(attributes.get("patch_level", 0)), attributes.get("downsample")
        size_unknown = level if downsample is None else 0  # forks of CLAM leave it to the slide
        # Fishing-Rod's CLAM resamples by whole steps where a slide lacks the level asked for.
        custom = int(attributes.get("custom_downsample", 1))
        if not 1 <= custom <= MAX_CUSTOM:
            raise misfit(f"'coords' has custom_downsample {custom}, not 1 to {MAX_CUSTOM}")
        factor = float(np.ravel(1.0 if downsample is None else downsample)[0]) * custom
        return round(patch * factor), patch, None, size_unknown
    except (KeyError, TypeError, ValueError) as error:
        raise misfit(
            f"'coords' has no usable attribute {error}; not TRIDENT's or CLAM's"
        ) from error


class CoordinateJob(Slides):
    """The slides of a job, cut where its coordinates say.

    Slides are found by name below --slides; their labels and splits are what those folders say.
    """

    kind = "coordinates of slides (TRIDENT or CLAM)"
    marks = frozenset({".h5"})

    def __init__(self, options: SourceOptions) -> None:
        super().__init__(options)
        if options.slides is None:
            raise InputError(
                f"{options.source}: coordinates only; say where the slides lie, --slides, or name "
                "the folder of patches that were dumped beside them (patch_images)"
            )
        if options.mpp is not None:
            raise InputError(
                "--mpp or --magnification, but the coordinates say how large patches are; leave it"
            )
        self.job, self.root = options.source, options.slides
        self.files: dict[str, Path] = {}
        self.scales: dict[str, float] = {}
        self.dropped: dict[str, int] = {}  # patches that reach beyond their slide
        self.twice: dict[str, int] = {}  # corners that a file has more than once

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"edge": self.edge, "scales": self.scales, "chosen": self.chosen}
        return type(self), (self.options,), state

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        return cls(found.options) if found.is_folder and job_files(found.paths) else None

    def listing(self) -> Listing:
        """Slides with coordinates; those without are left alone."""
        jobs = [(name_of(path), path) for path in job_files(walk(self.job))]
        files = named_once(self.job, jobs, "coordinates of slide")
        kinds = sort_files(self.root, list(walk(self.root)))
        slides = sorted([*kinds.slides, *kinds.unsure])
        paths = named_once(self.root, ((Path(path).stem, path) for path in slides))
        lost = sorted(files.keys() - paths.keys())
        if lost:
            raise InputError(
                f"{self.job / files[lost[0]]}: no slide {lost[0]!r} below {self.root} (nor "
                f"{len(lost) - 1} more); mend --slides, or remove the file"
            )
        found = self.placed({paths[name]: name for name in sorted(files)})
        self.files = {p.source: self.job / files[str(p.slide)] for p in found.pictures}
        self.edge = self.options.patch_size or self.first_edge()
        return dataclasses.replace(found, ignored=len(slides) - len(found.pictures))

    def first_edge(self) -> int:
        """The width that the first readable file asks for."""
        for file in self.files.values():
            try:
                return read_coordinates(file).patch_px
            except InputError as error:
                logger.warning("%s: %s", file, error)
        raise InputError(f"{self.job}: none of {len(self.files)} files of coordinates can be read")

    def locate(
        self, picture: Picture, patch_px: tuple[int, int], place: tuple[int, int]
    ) -> tuple[Header, tuple[int, int]] | None:
        del patch_px
        return self.header(picture), place  # its file says how large a patch is

    def find_places(self, picture: Picture, slide: Any) -> np.ndarray:
        """The file's corners, checked against the slide."""
        file = self.files[picture.source]
        found = at_level_0(read_coordinates(file), slide)
        size = (int(slide.dimensions[0]), int(slide.dimensions[1]))
        if found.slide_px is not None and found.slide_px != size:
            raise misfit(
                f"its coordinates are of a slide of {found.slide_px[0]}x{found.slide_px[1]} px, "
                f"this one has {size[0]}x{size[1]} ({file.name})"
            )
        if self.options.patch_size is None and found.patch_px != self.edge:
            raise misfit(
                f"its coordinates ask for patches of {found.patch_px} px, the first file for "
                f"{self.edge}; pass --patch-size to resample all ({file.name})"
            )
        outside = ((found.places < 0) | (found.places >= np.array(size))).any(1)
        if outside.any():
            x, y = found.places[int(np.argmax(outside))].tolist()
            raise misfit(
                f"its coordinates lie outside of it, x {x} y {y} of {size[0]}x{size[1]} "
                f"({file.name})"
            )
        if self.options.edges == "drop":
            reach = (found.places + found.size_px > np.array(size)).any(1)
            self.dropped[picture.source] = int(reach.sum())
            found = found._replace(places=found.places[~reach])
        self.scales[picture.source] = found.size_px / self.edge
        self.check_enlarging(self.scales[picture.source])
        self.looked_at[picture.source] = len(found.places) + self.dropped.get(picture.source, 0)
        places = distinct(found.places.astype(np.int32))
        if len(places) < len(found.places):
            self.twice[picture.source] = len(found.places) - len(places)
        if not len(places):
            self.empty[picture.source] = "no coordinates of patches within it"
        return places

    def scale(self, picture: Picture, slide: Any) -> float:
        del slide
        return self.scales.get(picture.source, 1.0)  # known once the file was read

    def own_mpp(self, picture: Picture, slide: Any) -> float | None:
        try:
            return slide_mpp(slide, self.options.assume_mpp, picture.mpp)
        except InputError:  # the file says where the patches lie all the same
            return None

    def passed_over(self, picture: Picture) -> Iterator[str]:
        if not len(self.places[picture.source]):
            yield self.empty_reason(picture)
        if dropped := self.dropped.get(picture.source):
            yield f"{number_of(dropped, 'place')} beyond the edge of the slide (--edges drop)"
        if twice := self.twice.get(picture.source):
            yield f"{number_of(twice, 'place')} twice in its file"
        if outside := self.chosen.outside.get(picture.source) if self.chosen else 0:
            yield f"{outside:,} places: too little of it in its regions"

    def facts(self) -> dict[str, Any]:
        found = {"edges": self.options.edges, "reached_beyond": sum(self.dropped.values())}
        return found | ({"there_twice": sum(self.twice.values())} if self.twice else {})


def at_level_0(found: Coordinates, slide: Any) -> Coordinates:
    """Coordinates with the width of a patch at level 0, of the slide where the file has it not."""
    if not found.level:
        return found
    factors = slide.level_downsamples
    if not 0 < found.level < len(factors):
        raise misfit(f"its coordinates are of level {found.level}, it has {len(factors)}")
    return found._replace(size_px=round(found.size_px * factors[found.level]), level=0)


def name_of(path: str) -> str:
    return Path(path).stem.removesuffix(SUFFIX)
