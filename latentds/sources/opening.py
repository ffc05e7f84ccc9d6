"""Which source an input is: detected from what lies there, and said aloud."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from latentds.errors import InputError
from latentds.sources.anonymity import hider
from latentds.sources.coordinates import CoordinateJob, is_job
from latentds.sources.cut_options import SourceOptions
from latentds.sources.hugging_face import HubDataset, SavedDataset, hub_id, is_saved
from latentds.sources.image_folder import check_keys, walk
from latentds.sources.kinds import Kinds, sort_files
from latentds.sources.kinds import choose as choose_kind
from latentds.sources.names import known_patient, parse_shares, pattern_patient, split_patients
from latentds.sources.parquet_files import has_pictures
from latentds.sources.picture_files import PictureFiles
from latentds.sources.picture_parquet import PictureParquet
from latentds.sources.picture_tables import (
    PictureTable,
    SamPathFolder,
    is_sampath,
    is_table,
)
from latentds.sources.picture_tars import PictureTars, holds_pictures
from latentds.sources.slide_names import some
from latentds.sources.slide_tables import ListedSlides, apply_slide_table, lists_slides
from latentds.sources.slides import Slides
from latentds.sources.source import Listing, Picture, Source
from latentds.sources.tile_tars import SUFFIX, TileTars
from latentds.sources.tile_trees import TileTree, is_tile_tree
from latentds.store.format import SPLIT_PATTERN

logger = logging.getLogger(__name__)
ARCHIVES = {".tar": holds_pictures, ".parquet": has_pictures}  # and whether one is of pictures


def open_source(options: SourceOptions) -> Source:
    """The source of a conversion's input."""
    source = detect(options)
    logger.info("%s: %s", options.source, source.kind)
    return source


def list_source(source: Source, options: SourceOptions) -> Listing:
    """A source's pictures, in the splits that the options ask for."""
    listing = source.listing()
    pictures = listing.pictures
    if options.only is not None:
        pictures = choose(pictures, options)
    table, notes = options.splits or options.slide_table, source.notes + listing.notes
    if table is not None:
        pictures, told = apply_slide_table(
            pictures, table, use_labels=options.labels, is_split_file=options.splits is not None
        )
        notes += told
    if options.split_patients is not None:
        pictures, told = deal_patients(pictures, options)
        notes += told
    notes += unlabelled(pictures) if options.labels else ()
    for picture in pictures:
        if not SPLIT_PATTERN.fullmatch(picture.split):
            raise InputError(f"{picture.source}: split {picture.split!r}; use [a-z0-9_] only")
    check_keys(options.source, [picture.source for picture in pictures])
    for note in notes:
        logger.info("%s", note)
    return dataclasses.replace(listing, pictures=tuple(pictures), notes=notes)


def choose(pictures: Sequence[Picture], options: SourceOptions) -> tuple[Picture, ...]:
    """The pictures that --only names."""
    assert options.only is not None
    names = {line.strip() for line in options.only.read_text().splitlines() if line.strip()}
    hide = hider(options.anonymize)
    chosen = tuple(p for p in pictures if p.source in names or hide(p.source) in names)
    if not chosen:
        raise InputError(f"{options.only}: names none of the {len(pictures)} sources")
    return chosen


def unlabelled(pictures: Sequence[Picture]) -> tuple[str, ...]:
    """The splits without labels beside splits with some, for people."""
    bare = Counter(p.split for p in pictures if p.label is None)
    if sum(bare.values()) == len(pictures):
        return ()
    return tuple(f"split {split} has no labels ({count:,})" for split, count in bare.items())


def deal_patients(
    pictures: Sequence[Picture], options: SourceOptions
) -> tuple[tuple[Picture, ...], tuple[str, ...]]:
    """The pictures in splits that no patient is in two of, and how patients were known.

    raises  InputError where the patient of one is not known
    """
    assert options.split_patients is not None
    told = [patient_and_kind(picture, options.patient_pattern) for picture in pictures]
    bare = dict.fromkeys(
        p.slide or p.source for p, found in zip(pictures, told, strict=True) if found is None
    )
    if bare:
        raise InputError(
            f"--split-patients, but no patient is known of {len(bare):,} slides or pictures: "
            f"{some(list(bare))}. Pass --patient-pattern, a regular expression that finds it in "
            "the name ('.*' where every slide is a patient), or a --slide-table with a column "
            "patient"
        )
    known = [found for found in told if found is not None]
    shares = parse_shares(options.split_patients)
    names = (patient for patient, _ in known)
    part_of = split_patients(names, shares, options.seed, hider(options.anonymize))
    kinds = Counter(kind for _, kind in set(known))
    dealt = tuple(
        dataclasses.replace(picture, split=part_of[patient])
        for picture, (patient, _) in zip(pictures, known, strict=True)
    )
    counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    return dealt, (f"split by patient: {counts}",)


def patient_and_kind(picture: Picture, pattern: str | None) -> tuple[str, str] | None:
    """A picture's patient and how it is known, None where it is not."""
    if picture.patient:
        return picture.patient, "patients of a table or record"
    if pattern is not None:
        return pattern_patient(pattern, picture.slide or picture.source), "by --patient-pattern"
    found = known_patient(picture.slide) if picture.slide else None
    return None if found is None else (found[1], f"{found[0]} patients")


def detect(options: SourceOptions) -> Source:
    """The first kind that the files look like."""
    root = options.source
    if hub_id(root) and not root.exists():
        return HubDataset(options)
    if is_saved(root):
        return SavedDataset(options)
    if root.is_file():
        archives = open_files(options, [root.name])
        if archives is not None or not is_table(root):
            return archives or PictureFiles(options)
        return ListedSlides(options) if lists_slides(options) else PictureTable(options)
    if is_job(root):
        return CoordinateJob(options)
    if root.is_dir() and is_sampath(root):
        return SamPathFolder(options)
    if not root.exists():  # before its kind is told
        raise FileNotFoundError(f"{root}: no such folder")
    if not root.is_dir() or options.kind == "pictures":
        return PictureFiles(options)
    if options.kind is not None:
        return Slides(options) if options.kind == "slides" else TileTree(options)
    return of_folder(options)


def of_folder(options: SourceOptions) -> Source:
    """What a folder holds, all of its files looked at; InputError where that is two things."""
    root = options.source
    paths = list(walk(root))
    found = sort_files(root, paths)
    pictures = sorted([*found.pictures, *found.unsure])
    if not found.slides and not options.name_pattern and is_tile_tree(options, pictures):
        return TileTree(options)
    if are_archives(root, paths, found):
        archives = open_files(options, paths)
        assert archives is not None
        return archives
    is_slides, note = choose_kind(root, found)
    source: Source = Slides(options) if is_slides else PictureFiles(options)
    if note:
        source.notes += (note,)
    return source


def are_archives(root: Path, paths: Sequence[str], kinds: Kinds) -> bool:
    """Whether a folder's files are archives of pictures; InputError for them among pictures.

    What else lies in a folder of slides is left alone.
    """
    if any(path.endswith(SUFFIX) for path in paths):
        return True  # hs2p puts previews and masks beside its tars
    found = [path for path in paths if Path(path).suffix.lower() in ARCHIVES]
    if not found or kinds.slides:
        return False
    pictures = [*kinds.pictures, *kinds.unsure]
    if not pictures:
        return True
    held = (p for p in found if ARCHIVES[Path(p).suffix.lower()](root / p))
    mixed = next(held, None)
    if mixed is not None:
        raise InputError(
            f"{root}: holds pictures ({pictures[0]}) and archives of pictures ({mixed}); "
            "name the one that is meant, or move the other"
        )
    return False


def open_files(options: SourceOptions, paths: Sequence[str]) -> Source | None:
    """The source of the archives among paths: tile tars, else tars, else Parquet of pictures."""
    root = options.source if options.source.is_dir() else options.source.parent
    tars = [path for path in paths if path.lower().endswith(".tar")]
    tiles = [path for path in tars if path.endswith(SUFFIX)]
    if tars:
        return TileTars(options, tiles) if tiles else PictureTars(options, tars)
    tables = [path for path in paths if path.lower().endswith(".parquet")]
    if tables and (options.source.is_dir() or has_pictures(root / tables[0])):
        return PictureParquet(options, tables)
    return None
