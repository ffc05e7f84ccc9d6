"""Which source an input is: detected from what lies there, and said aloud."""

from __future__ import annotations

import dataclasses
import itertools
import logging

from latentds.conversion.config import ConvertConfig
from latentds.errors import InputError
from latentds.format import SPLIT_PATTERN
from latentds.sources.coordinates import CoordinateJob, is_job
from latentds.sources.image_folder import walk
from latentds.sources.names import parse_shares, patient_of, split_patients
from latentds.sources.picture_files import PictureFiles
from latentds.sources.picture_tables import (
    PictureTable,
    SamPathFolder,
    apply_splits,
    is_sampath,
    is_table,
)
from latentds.sources.slides import Slides, is_slide
from latentds.sources.source import Listing, Source
from latentds.sources.tile_trees import TileTree, is_tile_tree

logger = logging.getLogger(__name__)
LOOK_AT = 1000  # files, before it is settled that there is no slide among them


def open_source(config: ConvertConfig) -> Source:
    """The source of a conversion's input."""
    source = detect(config)
    logger.info("%s: %s", config.source, source.kind)
    return source


def list_source(source: Source, config: ConvertConfig) -> Listing:
    """A source's pictures, in the splits that the options ask for."""
    listing = source.listing()
    pictures = listing.pictures
    if config.splits_file is not None:
        pictures = apply_splits(pictures, config.splits_file)
    if config.split_patients is not None:
        bare = next((p.source for p in pictures if p.slide is None), None)
        if bare is not None:
            raise InputError(f"--split-patients, but {bare} has no slide to tell its patient")
        shares = parse_shares(config.split_patients)
        part_of = split_patients([str(p.slide) for p in pictures], shares, config.seed)
        pictures = tuple(
            dataclasses.replace(p, split=part_of[patient_of(str(p.slide))]) for p in pictures
        )
    for picture in pictures:
        if not SPLIT_PATTERN.fullmatch(picture.split):
            raise InputError(f"{picture.source}: split {picture.split!r}; use [a-z0-9_] only")
    return dataclasses.replace(listing, pictures=pictures)


def detect(config: ConvertConfig) -> Source:
    """The first kind that the files look like."""
    root = config.source
    if is_table(root):
        return PictureTable(config)
    if is_job(root):
        return CoordinateJob(config)
    if root.is_dir() and is_sampath(root):
        return SamPathFolder(config)
    if is_tile_tree(root) and not config.name_pattern:
        return TileTree(config)
    if root.is_dir() and any(is_slide(root / p) for p in itertools.islice(walk(root), LOOK_AT)):
        return Slides(config)
    return PictureFiles(config)
