"""Which source an input is: detected from what lies there, and said aloud."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

from latentds.conversion.anonymity import hider
from latentds.conversion.config import ConvertConfig
from latentds.errors import InputError
from latentds.format import SPLIT_PATTERN
from latentds.sources.coordinates import CoordinateJob, is_job
from latentds.sources.hugging_face import HubDataset, SavedDataset, hub_id, is_saved
from latentds.sources.image_folder import walk
from latentds.sources.names import parse_shares, patient_of, split_patients
from latentds.sources.parquet_files import has_pictures
from latentds.sources.picture_files import PictureFiles
from latentds.sources.picture_parquet import PictureParquet
from latentds.sources.picture_tables import (
    PictureTable,
    SamPathFolder,
    apply_splits,
    is_sampath,
    is_table,
)
from latentds.sources.picture_tars import PictureTars, holds_pictures
from latentds.sources.pictures import picture_suffixes
from latentds.sources.slides import SUFFIXES as SLIDE_SUFFIXES
from latentds.sources.slides import Slides, is_slide
from latentds.sources.source import Listing, Picture, Source
from latentds.sources.tile_tars import SUFFIX, TileTars
from latentds.sources.tile_trees import TileTree, is_tile_tree

logger = logging.getLogger(__name__)
ARCHIVES = {".tar": holds_pictures, ".parquet": has_pictures}  # and whether one is of pictures
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
    if config.only is not None:
        pictures = choose(pictures, config)
    if config.splits is not None:
        pictures = apply_splits(pictures, config.splits)
    if config.split_patients is not None:
        bare = next((p.source for p in pictures if not (p.patient or p.slide)), None)
        if bare is not None:
            raise InputError(f"--split-patients, but {bare} has no slide to tell its patient")
        shares = parse_shares(config.split_patients)
        part_of = split_patients(
            map(named_patient, pictures), shares, config.seed, hider(config.anonymize)
        )
        pictures = tuple(
            dataclasses.replace(p, split=part_of[patient_of(named_patient(p))]) for p in pictures
        )
    for picture in pictures:
        if not SPLIT_PATTERN.fullmatch(picture.split):
            raise InputError(f"{picture.source}: split {picture.split!r}; use [a-z0-9_] only")
    return dataclasses.replace(listing, pictures=pictures)


def choose(pictures: Sequence[Picture], config: ConvertConfig) -> tuple[Picture, ...]:
    """The pictures that --only names."""
    assert config.only is not None
    names = {line.strip() for line in config.only.read_text().splitlines() if line.strip()}
    hide = hider(config.anonymize)
    chosen = tuple(p for p in pictures if p.source in names or hide(p.source) in names)
    if not chosen:
        raise InputError(f"{config.only}: names none of the {len(pictures)} sources")
    return chosen


def named_patient(picture: Picture) -> str:
    """The patient that a record names, else the slide, whose name may tell."""
    return picture.patient or str(picture.slide)


def detect(config: ConvertConfig) -> Source:
    """The first kind that the files look like."""
    root = config.source
    if hub_id(root) and not root.exists():
        return HubDataset(config)
    if is_saved(root):
        return SavedDataset(config)
    if root.is_file():
        table = PictureTable if is_table(root) else PictureFiles
        return open_files(config, [root.name]) or table(config)
    if is_job(root):
        return CoordinateJob(config)
    if root.is_dir() and is_sampath(root):
        return SamPathFolder(config)
    if is_tile_tree(root) and not config.name_pattern:
        return TileTree(config)
    if not root.is_dir():
        return PictureFiles(config)
    first = list(itertools.islice(walk(root), LOOK_AT))
    archives = open_files(config, list(walk(root))) if are_archives(root, first) else None
    if archives is not None:
        return archives
    return Slides(config) if any(is_slide(root / path) for path in first) else PictureFiles(config)


def are_archives(root: Path, paths: Sequence[str]) -> bool:
    """Whether a folder's first files are archives of pictures; InputError for them among pictures.

    What else lies in a folder of slides is left alone.
    """
    if any(path.endswith(SUFFIX) for path in paths):
        return True  # hs2p puts previews and masks beside its tars
    kinds = {Path(path).suffix.lower(): path for path in reversed(paths)}
    found = [kinds[kind] for kind in sorted(kinds.keys() & ARCHIVES.keys())]
    if not found or kinds.keys() & SLIDE_SUFFIXES:
        return False
    pictures = sorted(kinds.keys() & picture_suffixes())
    mixed = [path for path in found if ARCHIVES[Path(path).suffix.lower()](root / path)]
    if pictures and mixed:
        raise InputError(
            f"{root}: holds pictures ({kinds[pictures[0]]}) and archives of pictures ({mixed[0]}); "
            "name the one that is meant, or move the other"
        )
    return not pictures


def open_files(config: ConvertConfig, paths: Sequence[str]) -> Source | None:
    """The source of the archives among paths: tile tars, else tars, else Parquet of pictures."""
    root = config.source if config.source.is_dir() else config.source.parent
    tars = [path for path in paths if path.lower().endswith(".tar")]
    tiles = [path for path in tars if path.endswith(SUFFIX)]
    if tars:
        return TileTars(config, tiles) if tiles else PictureTars(config, tars)
    tables = [path for path in paths if path.lower().endswith(".parquet")]
    if tables and (config.source.is_dir() or has_pictures(root / tables[0])):
        return PictureParquet(config, tables)
    return None
