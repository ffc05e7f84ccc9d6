"""Whole slides through OpenSlide: tissue found by a named rule, patches at an asked resolution."""
# H W pixels

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentds.core.display import number_of
from latentds.errors import InputError, UnusableError
from latentds.sources.cut_options import SourceOptions
from latentds.sources.image_folder import check_labels, check_names, note_empty, read_folders, walk
from latentds.sources.kinds import one_a_series, sort_files
from latentds.sources.picture import Header, Listing, Picture, Regions
from latentds.sources.side_tables import with_tables
from latentds.sources.slide_looks import LOOK_PX, Overview, SlideLook, draw_look
from latentds.sources.slide_names import named_once
from latentds.sources.slide_ranges import bring_regions, open_slide
from latentds.sources.slide_reading import (
    UNREADABLE,
    ReadRegion,
    cut_region,
    describe_slide,
    distinct,
    grid,
    has_edges,
    is_slide_error,
    on_white,
    overview_level,
    own_scale,
    reason_of,
    slide_mpp,
    small_view,
    thumbnail_of,
    tissue_mask,
    tissue_shares,
)
from latentds.sources.slide_regions import SlideRegions, note_unused_regions
from latentds.sources.source import Inspection, Kept, Source
from latentds.store.patch_record import Patch, Place
from latentds.store.transport import Transport

logger = logging.getLogger(__name__)
DEFAULT_PATCH_PX = 256
OPEN_SLIDES = 32
MOST_ENLARGED = 1.05  # resampling may enlarge by so much unless --enlarge asks for more
BLOCK_PX = 64  # of a broken overview, read or given up at once: no larger than its tiles


class Slides(Source):
    """Slides below a folder, or one, tissue of each cut into a grid of patches.

    A slide's own resolution is its mpp, 10 / magnification where only that is recorded, or
    --assume-mpp. Where a level is within --mpp-tolerance of the mpp asked for, patches are its own
    pixels, else resampled from the nearest finer level to just that mpp; x and y count pixels of
    level 0.
    """

    kind = "whole slides"
    has_looks = True

    def __init__(self, options: SourceOptions) -> None:
        self.options, self.root = options, options.folder
        self.edge = options.patch_size or DEFAULT_PATCH_PX
        self.handles: Kept[Any] = Kept(OPEN_SLIDES)
        self.transport = Transport(options.location) if options.location else None
        self.places: dict[str, np.ndarray] = {}
        self.empty: dict[str, str] = {}  # slides without a patch, and why
        self.looked_at: dict[str, int] = {}  # places of patches, those not taken included
        self.overviews: dict[str, Overview] = {}  # until a look is made of it
        self.looks: dict[str, SlideLook] = {}
        folder = options.regions
        self.chosen = SlideRegions(folder, options) if folder is not None else None
        self.repaired: set[str] = set()  # slides whose overview could not be read everywhere

    def __reduce__(self) -> tuple[Any, ...]:
        # Without handles and what was found, for a worker elsewhere.
        return type(self), (self.options,), {"chosen": self.chosen}

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        is_slides, notes = found.choice if found.is_open else (found.options.kind == "slides", ())
        if not is_slides:
            return None
        source = cls(found.options)
        source.notes = notes
        return source

    def listing(self) -> Listing:
        paths = list(walk(self.options.source))
        kinds = sort_files(self.root, paths)
        wanted = {*kinds.slides, *kinds.unsure}
        names = one_a_series(self.root, [p for p in paths if p in wanted], open_slide)
        if not names:
            source = self.options.source
            raise InputError(f"{source}: no slides in {number_of(len(paths), 'file')}")
        found = self.placed(names)
        named_once(self.root, ((name, path) for path, name in names.items()))
        others = sorted(set(paths) - wanted)
        found = dataclasses.replace(found, ignored=len(others))
        return with_tables(self.root, found, others, self.options.labels)

    def placed(self, names: Mapping[str, str]) -> Listing:
        """Slides by path and name, with what their folders say."""
        options, paths = self.options, list(names)
        check_names(self.root, paths)
        use_labels = options.labels and options.label_from is None
        folders = read_folders(self.root, paths, use_labels, options.split_folders)
        placed = [(folders.place(path), name) for path, name in names.items()]
        pictures = tuple(Picture(p.source, p.split, p.label, name) for p, name in placed)
        check_labels(self.root, pictures, folders.use_labels)
        notes = folders.notes + note_empty(self.root, paths, folders)
        notes += note_unused_regions(self.chosen, names.values())
        return Listing(pictures, notes=notes)

    def header(self, picture: Picture) -> Header:
        path = self.file(picture)
        with self.reading(picture):
            slide = self.open(picture)
            width, height = slide.dimensions
            self.check_enlarging(self.scale(picture, slide))
            found = self.find_places(picture, slide)
            overview = self.overviews.pop(picture.source, None)  # gone whatever fails below
            slide = self.open(picture)  # a broken overview may have closed the first
            if self.chosen is not None and len(found):
                edge = self.edge * self.scale(picture, slide)
                found, why = self.chosen.within(picture, slide.dimensions, found, edge)
                if not len(found):
                    self.empty[picture.source] = why
            self.places[picture.source] = found
            encoding = describe_slide(slide, path)
            if self.keeps_looks:
                self.looks[picture.source] = self.make_look(picture, overview)
        return Header((height, width), "RGB", encoding, path.stat().st_size)

    def file(self, picture: Picture) -> Path:
        return self.root / picture.source

    def open(self, picture: Picture) -> Any:
        """A slide's handle; the least recently used of many is closed by its last reader."""
        path = self.file(picture)
        name = path.relative_to(self.root).as_posix()
        try:
            return self.handles.get(str(path), lambda: open_slide(path, self.transport, name))
        except BaseException:
            self.handles.drop(str(path))  # a moment later it may open
            raise

    def find_places(self, picture: Picture, slide: Any) -> np.ndarray:
        """int32 (n, 2): x and y at level 0 of the patches that hold tissue."""
        options, scale = self.options, self.scale(picture, slide)
        step = (options.stride or self.edge) * scale
        unit = scale if scale in slide.level_downsamples else 1.0
        places = distinct(grid(slide, self.edge * scale, step, options.edges, unit))
        self.looked_at[picture.source] = len(places)
        if not len(places):
            self.empty[picture.source] = f"holds no patch of {self.edge * scale:.0f} px of level 0"
            return places
        if options.tissue == "none":
            return places
        if options.tissue == "dsmil":
            kept = np.array([self.has_edges(picture, at, scale) for at in places.tolist()], bool)
        else:
            thumbnail, factor = self.overview(picture, slide)
            mask = tissue_mask(thumbnail, options.tissue)
            boxes = np.concatenate([places, places + self.edge * scale], 1) / factor
            kept = tissue_shares(mask, boxes) >= options.min_tissue
            self.overviews[picture.source] = Overview(thumbnail, factor, mask)
        if not kept.any():
            self.empty[picture.source] = f"no tissue in any of {len(places)} places ({self.rule})"
        chosen: np.ndarray = places[kept]
        return chosen

    @property
    def rule(self) -> str:
        return f"--tissue {self.options.tissue}, --min-tissue {self.options.min_tissue}"

    def empty_reason(self, picture: Picture) -> str:
        return self.empty.get(picture.source, "no places in it")

    def look(self, picture: Picture) -> SlideLook | None:
        return self.looks.get(picture.source) or self.make_look(picture)

    def make_look(self, picture: Picture, overview: Overview | None = None) -> SlideLook:
        """What is shown of a slide whose places are known; of its overview, if one was read."""
        slide = self.open(picture)
        own, scale = self.own_mpp(picture, slide), self.scale(picture, slide)
        return SlideLook(
            picture_jpeg=self.draw(picture, overview, self.edge * scale),
            mpp_level0=own,
            mpp=None if own is None else own * scale,
            size_px=round(self.edge * scale),
            tissue=None if overview is None else float(overview.mask.mean()),
            places=self.looked_at.get(picture.source, 0),
            left_out=tuple(self.passed_over(picture)),
        )

    def draw(self, picture: Picture, overview: Overview | None, edge: float) -> bytes | None:
        """A small picture of a slide with its patches, None where no level is small.

        edge  of a patch at level 0
        """
        view = None if overview is None else (overview.pixels, overview.factor)
        if view is None or max(view[0].shape) < LOOK_PX:  # a small slide is read finer
            try:
                view = small_view(self.open(picture), LOOK_PX) or view
            except Exception as error:
                self.forget(picture, error)
        if view is None:
            return None
        places, mask = self.places[picture.source], overview.mask if overview else None
        return draw_look(view[0], mask, np.concatenate([places, places + edge], 1) / view[1])

    def label(self, picture: Picture, region: tuple[int, int]) -> str | None:
        if self.chosen is None or not self.chosen.by_class:
            return picture.label
        return self.chosen.labels[picture.source].at(region)

    def passed_over(self, picture: Picture) -> Iterator[str]:
        """Why patches of a slide were not taken, a sentence each."""
        places, held = self.looked_at.get(picture.source, 0), len(self.places[picture.source])
        outside = self.chosen.outside.get(picture.source, 0) if self.chosen else 0
        if not held:
            yield self.empty_reason(picture)
        elif places - outside > held:
            lost = places - outside - held
            yield f"{lost:,} of {places:,} places: too little tissue ({self.rule})"
        if outside:
            yield f"{outside:,} of {places:,} places: too little of it in its regions"
        if bare := self.chosen.bare.get(picture.source) if self.chosen else None:
            yield f"no patch of class {', '.join(bare)}: no region of it is a patch's largest share"
        if picture.source in self.repaired:
            yield "its overview cannot be read everywhere; what cannot counts as background"

    def has_edges(self, picture: Picture, at: tuple[int, int], scale: float) -> bool:
        """DSMIL's rule at one place; what cannot be read is kept, for its patch to be told."""
        try:
            return has_edges(cut_region(self.open(picture), at, scale, self.edge))
        except Exception as error:
            self.forget(picture, error)
            return True

    def overview(self, picture: Picture, slide: Any) -> tuple[np.ndarray, float]:
        """`thumbnail_of` a slide, past broken tiles: from a finer level, or with holes of white."""
        mpp = self.own_mpp(picture, slide)
        assert mpp is not None  # only coordinates go without
        for level in range(overview_level(slide, mpp), -1, -1):
            try:
                return thumbnail_of(self.open(picture), mpp, level)
            except Exception as error:
                self.forget(picture, error)
        blocks = [0, 0]
        found = thumbnail_of(self.open(picture), mpp, read=self.patched_reader(picture, blocks))
        if blocks[0] == blocks[1]:
            raise UnusableError(f"{UNREADABLE} (no part of its overview)")
        logger.warning(
            "%s: %d of %d parts of its overview cannot be read; taken for background",
            picture.source, blocks[0], blocks[1],
        )  # fmt: skip
        self.repaired.add(picture.source)
        return found

    def patched_reader(self, picture: Picture, blocks: list[int]) -> ReadRegion:
        """Reads a region block by block, white for those broken; counts [broken, all]."""

        def read(_: Any, at: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
            whole = Image.new("RGB", size, (255, 255, 255))
            step = self.open(picture).level_downsamples[level]
            for left in range(0, size[0], BLOCK_PX):
                for top in range(0, size[1], BLOCK_PX):
                    part = (min(BLOCK_PX, size[0] - left), min(BLOCK_PX, size[1] - top))
                    corner = (at[0] + round(left * step), at[1] + round(top * step))
                    blocks[1] += 1
                    try:
                        whole.paste(on_white(self.open(picture), corner, level, part), (left, top))
                    except Exception as error:
                        self.forget(picture, error)
                        blocks[0] += 1
            return whole

        return read

    def forget(self, picture: Picture, error: Exception) -> None:
        """Drop a handle that an error of OpenSlide broke; any other error is raised."""
        if not is_slide_error(error):
            raise error
        self.handles.drop(str(self.file(picture)))

    def check_enlarging(self, scale: float) -> None:
        """Refuse patches finer than the slide; InputError (without the name)."""
        if scale * MOST_ENLARGED < 1 and not self.options.enlarge:
            raise UnusableError(
                f"is coarser than asked: its patches would be enlarged {1 / scale:.3g} times; ask "
                "for a larger --mpp, or pass --enlarge",
                "resolution",
            )

    def scale(self, picture: Picture, slide: Any) -> float:
        """Pixels of level 0 a pixel of a slide's patches."""
        own = slide_mpp(slide, self.options.assume_mpp, picture.mpp)
        asked = (self.options.mpp or own) / own
        return own_scale(slide, asked, self.options.mpp_tolerance)

    def patch_px(self, headers: dict[str, Header]) -> tuple[int, int]:
        del headers
        return self.edge, self.edge

    def regions(self, picture: Picture, header: Header, patch_px: tuple[int, int]) -> np.ndarray:
        del header, patch_px
        return self.places[picture.source]

    def locate(
        self, picture: Picture, patch_px: tuple[int, int], place: tuple[int, int]
    ) -> tuple[Header, tuple[int, int]] | None:
        del picture, patch_px
        return Header(size_px=(0, 0), mode="RGB", encoding="", bytes=0), place

    def whereabouts(
        self, picture: Picture, header: Header, patch_px: tuple[int, int], regions: Regions
    ) -> list[Place]:
        del header, patch_px
        with self.reading(picture):
            slide = self.open(picture)
            scale, own = self.scale(picture, slide), self.own_mpp(picture, slide)
        size, mpp = round(self.edge * scale), None if own is None else own * scale
        return [Place(x, y, size, mpp) for x, y in regions]

    def read(
        self, picture: Picture, header: Header, patch_px: tuple[int, int], regions: Regions
    ) -> list[Patch]:
        with self.reading(picture):
            slide = self.open(picture)
            scale = self.scale(picture, slide)
            bring_regions(slide, regions, scale, self.edge)
            images = [cut_region(slide, at, scale, self.edge) for at in regions]
        return [
            Patch(
                image=image,
                source=picture.source,
                source_encoding=header.encoding,
                label=self.label(picture, at),
                slide=picture.slide,
                **place._asdict(),
            )
            for at, image, place in zip(
                regions, images, self.whereabouts(picture, header, patch_px, regions), strict=True
            )
        ]

    def own_mpp(self, picture: Picture, slide: Any) -> float | None:
        """Micrometres a pixel of level 0, None where they need not be known."""
        return slide_mpp(slide, self.options.assume_mpp, picture.mpp)

    @contextlib.contextmanager
    def reading(self, picture: Picture) -> Iterator[None]:
        """Turn what OpenSlide raises into an InputError, and forget the handle: it stays broken."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            self.handles.drop(str(self.file(picture)))
            if is_slide_error(error):
                raise UnusableError(f"{UNREADABLE} ({reason_of(error)})") from error
            raise

    def facts(self) -> dict[str, Any]:
        names = ("tissue", "min_tissue", "edges", "assume_mpp")
        found = {name: getattr(self.options, name) for name in names}
        return found | ({"overviews_with_holes": len(self.repaired)} if self.repaired else {})
