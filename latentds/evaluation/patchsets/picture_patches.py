"""Originals: the patches of pictures, slides and archives, cut as a conversion would cut them."""
# N patches of the set, n of a request, H W pixels

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from latentds.core.storage import open_regular
from latentds.errors import InputError, unknown_name
from latentds.evaluation.patchsets.patch_set import PatchInput, PatchTable, canonical_order
from latentds.sources.cut_options import SourceOptions
from latentds.sources.opening import list_source, open_source
from latentds.sources.picture import Header, Picture
from latentds.sources.slides import Slides
from latentds.sources.source import TASK_REGIONS, PatchReader, Source, of_file, tasks_of
from latentds.store.format import sorted_names
from latentds.store.pack_columns import decode_mask, no_mask
from latentds.store.patch_record import Patch, Place

SAMPLED_SLIDES = 16  # whose tissue is found to draw a sample of patches
HASHED = 64  # pictures whose bytes are read, spread evenly over all
READ_BYTES = 1 << 16  # of each, from its start


@dataclasses.dataclass(frozen=True, eq=False)
class PictureLayout:
    """Where the patches lie: row by row the picture's number, its header, and the region in it."""

    table: PatchTable
    numbers: np.ndarray
    headers: Sequence[Header]
    regions: np.ndarray


class Pictures:
    """The pictures of an input, or of one of its slides.

    pictures  sorted by source
    headers   of all of them where they are known; those of slides are read, and their tissue is
              found, when their patches are asked for
    """

    def __init__(
        self,
        options: SourceOptions,
        source: Source,
        pictures: Sequence[Picture],
        classes: list[str],
        reader: PatchReader,
        headers: Sequence[Header] | None,
    ) -> None:
        self.options, self.source, self.pictures = options, source, pictures
        self.classes, self.reader, self.headers = classes, reader, headers

    @property
    def where(self) -> str:
        return str(self.options.source)

    @property
    def root(self) -> Path:
        """What sources start from, for messages."""
        given = self.options.slides or self.options.root or self.options.source
        return given.parent if given.is_file() else given

    @functools.cached_property
    def patch_px(self) -> tuple[int, int]:
        headers = self.headers or ()
        return self.source.patch_px(
            {
                picture.source: header
                for picture, header in zip(self.pictures, headers, strict=False)
            }
        )

    @functools.cached_property
    def has_masks(self) -> bool:
        return self.options.masks is not None or any(p.mask is not None for p in self.pictures)

    @property
    def table(self) -> PatchTable:
        return self.layout.table

    @functools.cached_property
    def layout(self) -> PictureLayout:
        """The patches found picture by picture, in canonical order."""
        headers = self.headers or read_headers(self.reader, self.pictures, self.root)
        numbers, regions, places = [], [np.zeros((0, 2), np.int32)], list[Place]()
        for number, (picture, header) in enumerate(zip(self.pictures, headers, strict=True)):
            found = self.source.regions(picture, header, self.patch_px)
            numbers += [number] * len(found)
            regions.append(found)
            places += self.source.whereabouts(
                picture, header, self.patch_px, [(x, y) for x, y in found.tolist()]
            )
        if not places:
            raise InputError(f"{self.where}: {len(self.pictures)} pictures, but no patch in them")
        x, y = (column(places, name, -1) for name in ("x_px_level0", "y_px_level0"))
        pictures = [self.pictures[number] for number in numbers]
        order = canonical_order([picture.source for picture in pictures], y, x)
        pictures = [pictures[row] for row in order.tolist()]
        labels = {None: -1} | {label: place for place, label in enumerate(self.classes)}
        table = PatchTable(
            sources=[picture.source for picture in pictures],
            slides=[picture.slide for picture in pictures],
            labels=np.array([labels[picture.label] for picture in pictures], np.int64),
            x=x[order],
            y=y[order],
            mpp=column(places, "mpp", np.nan).astype(np.float32)[order],
            size_px=column(places, "size_px_level0", 0)[order],
            splits=[picture.split for picture in pictures],
            patients=[picture.patient for picture in pictures],
        )
        numbered = np.array(numbers, np.int64)[order]
        return PictureLayout(table, numbered, headers, np.concatenate(regions)[order])

    def slides(self) -> list[str]:
        return sorted({picture.slide for picture in self.pictures if picture.slide is not None})

    def nameless(self) -> int:
        return sum(picture.slide is None for picture in self.pictures)

    def of_slide(self, slide: str) -> Pictures:
        return self.part([number for number, p in enumerate(self.pictures) if p.slide == slide])

    def part(self, chosen: Sequence[int]) -> Pictures:
        """Some of the pictures, with the patch size and the classes of all."""
        headers = [self.headers[number] for number in chosen] if self.headers else None
        pictures = [self.pictures[number] for number in chosen]
        part = Pictures(self.options, self.source, pictures, self.classes, self.reader, headers)
        part.patch_px = self.patch_px
        return part

    def fingerprint(self) -> str:
        """Hash, 16 hex digits, of the sizes of all files and the first bytes of some, with masks.

        raises  InputError for a file that cannot be read
        """
        known: Sequence[Header | None] = self.headers or [None] * len(self.pictures)
        chosen = np.linspace(0, len(known) - 1, min(HASHED, len(known))).round().astype(int)
        try:
            sizes = [
                (head.bytes, head.mask_bytes) if head else (size_of(self.source, picture), 0)
                for picture, head in zip(self.pictures, known, strict=True)
            ]
            digest = hashlib.sha256(np.array(sizes, np.int64).tobytes())
            for number in chosen.tolist():
                for content in first_bytes(self.source, self.pictures[number], known[number]):
                    digest.update(hashlib.sha256(content).digest())
        except (InputError, OSError) as error:
            raise InputError(f"{self.where}: cannot be read ({error})") from error
        return digest.hexdigest()[:16]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Pixels uint8 (n, H, W, 3) of distinct ascending rows."""
        pixels = np.empty((len(rows), *self.patch_px, 3), np.uint8)
        for place, patch in enumerate(self.read_patches(rows)):
            pixels[place] = patch.image
        return pixels

    def read_masks(self, rows: np.ndarray) -> np.ndarray:
        """Masks uint8 (n, H, W) of distinct ascending rows; InputError for a patch without."""
        masks = np.zeros((len(rows), *self.patch_px), np.uint8)
        for place, patch in enumerate(self.read_patches(rows)):
            if patch.mask_png is None:
                raise no_mask(f"{self.where}: {patch.source}")
            masks[place] = decode_mask(patch.mask_png, self.patch_px, patch.source)
        return masks

    def read_patches(self, rows: np.ndarray) -> Iterator[Patch]:
        """The patches of rows, read by the threads, a few of one picture at a time."""
        layout, tasks = self.layout, []
        for places in tasks_of(layout.numbers[rows]):
            part = rows[places]
            number, regions = int(layout.numbers[part[0]]), layout.regions[part].tolist()
            picture, header = self.pictures[number], layout.headers[number]
            places_xy = [(x, y) for x, y in regions]
            future = self.reader.submit(picture, header, self.patch_px, places_xy)
            tasks.append((self.root / picture.source, future))
        for path, future in tasks:
            for outcome in future.result():
                if isinstance(outcome, InputError):
                    raise of_file(path, outcome) from outcome
                yield outcome

    def sample(self, count: int, seed: int) -> Iterator[np.ndarray]:
        """Pixels of patches drawn by the seed, a few at a time; of slides, those of a few."""
        rng = np.random.default_rng([seed, 2])
        for part, wanted in self.drawn_parts(count, rng):
            rows = np.sort(rng.choice(len(part.table), min(wanted, len(part.table)), replace=False))
            for start in range(0, len(rows), TASK_REGIONS * TASK_REGIONS):
                yield part.read(rows[start : start + TASK_REGIONS * TASK_REGIONS])

    def drawn_parts(self, count: int, rng: np.random.Generator) -> list[tuple[Pictures, int]]:
        """What a sample is drawn from, and how many patches of each."""
        if self.headers is not None or len(self.pictures) == 1:
            return [(self, count)]
        slides = [
            str(slide) for slide in rng.permutation(self.slides())[: min(SAMPLED_SLIDES, count)]
        ]
        return [(self.of_slide(slide), -(-count // len(slides))) for slide in slides]

    def bytes_per_patch(self) -> float:
        """Mean bytes of the files a patch; of slides, of a few."""
        rng = np.random.default_rng([0, 2])
        parts = [part for part, _ in self.drawn_parts(SAMPLED_SLIDES, rng)]
        held = sum(header.bytes for part in parts for header in part.layout.headers)
        return held / sum(len(part.table) for part in parts)


def column(places: Sequence[Place], name: str, unknown: float) -> np.ndarray:
    """A field of all places, int64 unless `unknown` is NaN."""
    values = [getattr(place, name) for place in places]
    dtype = np.float64 if np.isnan(unknown) else np.int64
    return np.array([unknown if value is None else value for value in values], dtype)


def open_pictures(config: PatchInput) -> Pictures:
    """The originals of a config.

    raises  InputError for pictures that cannot be used, with their names; UnknownNameError for a
            split that is not there
    """
    options = config.source_options()
    source = open_source(options)
    listing = list_source(source, options)
    pictures = sorted(listing.pictures, key=lambda p: p.source)
    labels = {picture.label for picture in pictures if picture.label is not None}
    classes = [*listing.classes, *sorted_names(labels.difference(listing.classes))]
    if config.split is not None:
        splits = {picture.split for picture in pictures}
        if config.split not in splits:
            raise unknown_name(f"split of {config.data}", config.split, splits)
        pictures = [picture for picture in pictures if picture.split == config.split]
    reader = PatchReader(source, config.workers)
    opened = Pictures(options, source, pictures, classes, reader, None)
    if isinstance(source, Slides):
        if config.masks is not None:
            raise InputError(f"--masks {config.masks}: slides have no masks; leave it")
    else:
        opened.headers = read_headers(reader, pictures, opened.root)
    return opened


def read_headers(reader: PatchReader, pictures: Sequence[Picture], root: Path) -> list[Header]:
    """Headers of all pictures; InputError names the first that cannot be used."""
    outcomes = list(reader.headers(pictures))
    bad = [
        str(of_file(root / picture.source, outcome))
        for picture, outcome in zip(pictures, outcomes, strict=True)
        if isinstance(outcome, InputError)
    ]
    if bad:
        raise InputError(
            f"{bad[0]}; in all {len(bad)} of {len(pictures)} pictures cannot be used. Repair or "
            "remove them, or name the others with --only"
        )
    return [outcome for outcome in outcomes if isinstance(outcome, Header)]


def size_of(source: Source, picture: Picture) -> int:
    """Bytes of a picture's file, 0 for one in an archive."""
    file = source.file(picture)
    return file.stat().st_size if isinstance(file, Path) else 0


def first_bytes(source: Source, picture: Picture, header: Header | None) -> list[bytes]:
    """What the files of a picture and of its mask, where it has one, start with."""
    mask = None if header is None else source.mask_file(picture, header.size_px)
    found = []
    for file in (source.file(picture), mask):
        if file is not None:
            with open_regular(file) if isinstance(file, Path) else file as content:
                found.append(content.read(READ_BYTES))
    return found
