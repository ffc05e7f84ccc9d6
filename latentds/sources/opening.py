"""Which source an input is: detected from what lies there, and said aloud."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from latentds.core.display import number_of
from latentds.errors import InputError, no_folder
from latentds.sources.coordinates import CoordinateJob
from latentds.sources.csv_tables import read_lines
from latentds.sources.cut_options import SourceOptions
from latentds.sources.image_folder import check_class_names, known_patient
from latentds.sources.names import parse_shares, pattern_patient, split_patients
from latentds.sources.patch_arrays import PatchArrays
from latentds.sources.picture import Listing, Picture
from latentds.sources.picture_files import PictureFiles
from latentds.sources.picture_layouts import SamPathFolder, TileTree
from latentds.sources.picture_rows import HubDataset, PictureParquet, SavedDataset
from latentds.sources.picture_tables import (
    ListedSlides,
    PictureTable,
    apply_slide_table,
    read_slide_table,
)
from latentds.sources.picture_tars import PictureTars, TileTars
from latentds.sources.slide_names import some
from latentds.sources.slides import Slides
from latentds.sources.source import Inspection, Source
from latentds.store.format import SPLIT_PATTERN, patch_key

logger = logging.getLogger(__name__)
# The first that takes an input for its own is its source. A data set's own files tell, a job's and
# SAM-Path's folders too, whatever else lies there; tiles, archives and tables are told from plain
# pictures by their names; slides by a look into files; what is left is pictures. A source of your
# own with a `detect` goes before those that would take its input.
SOURCES: tuple[type[Source], ...] = (
    *(HubDataset, SavedDataset, PatchArrays, CoordinateJob, SamPathFolder, TileTree, TileTars),
    *(PictureTars, PictureParquet, ListedSlides, PictureTable, Slides, PictureFiles),
)


def open_source(options: SourceOptions) -> Source:
    """The source of an input, by SOURCES; FileNotFoundError where there is nothing."""
    inspection = Inspection(options)
    exists = options.source.exists()
    found = (
        kind.detect(inspection)
        for kind in SOURCES
        if exists != kind.is_remote
        and (not kind.marks or kind.marks & inspection.marks)
        and not (kind is Slides and inspection.is_plain)
    )
    source = next((source for source in found if source is not None), None)
    if source is None:
        raise no_folder(options.source, "file or folder")
    if options.regions is not None and not source.has_looks:
        raise InputError(
            f"--regions {options.regions} is of slides, {options.source} is {source.kind}; leave it"
        )
    logger.info("%s: %s", options.source, source.kind)
    return source


def list_source(source: Source, options: SourceOptions) -> Listing:
    """A source's pictures, in the splits that the options ask for."""
    listing = source.listing()
    pictures = listing.pictures
    if options.only is not None:
        pictures = choose(pictures, options)
    path, notes = options.splits or options.slide_table, source.notes + listing.notes
    if path is not None:
        table = read_slide_table(path)
        pictures, told = apply_slide_table(
            pictures, table, options.splits is not None, may_miss=options.only is not None
        )
        notes += told
    if options.split_patients is not None:
        pictures, told = deal_patients(pictures, options)
        notes += told
    notes += unlabelled(pictures)
    notes += check_class_names((p.label for p in pictures), options.source)
    notes += patients_apart(pictures)
    for picture in pictures:
        if not SPLIT_PATTERN.fullmatch(picture.split):
            raise InputError(f"{picture.source}: split {picture.split!r}; use [a-z0-9_] only")
    check_keys(options.source, [picture.source for picture in pictures])
    for note in notes:
        logger.info("%s", note)
    return dataclasses.replace(listing, pictures=tuple(pictures), notes=notes)


def choose(pictures: Sequence[Picture], options: SourceOptions) -> tuple[Picture, ...]:
    """The pictures that --only names; InputError for a name that is no picture's."""
    assert options.only is not None
    names, known = dict.fromkeys(read_lines(options.only)), names_of(pictures, options)
    # A source may begin with #; other lines that do are remarks.
    lost = [name for name in names if name not in known and not name.startswith("#")]
    chosen = {known[name].source for name in names if name in known}
    if lost or not chosen:
        raise InputError(
            f"{options.only}: {some(lost) or 'nothing'} is no source of {options.source}, which "
            f"has {some([p.source for p in pictures])}; name sources as a manifest does"
        )
    return tuple(p for p in pictures if p.source in chosen)


def names_of(pictures: Sequence[Picture], options: SourceOptions) -> dict[str, Picture]:
    """Pictures by what a manifest may call them: the source's name, or what hides it."""
    hide = options.hide
    return {name: p for p in pictures for name in (hide(p.source), p.source)}


def unlabelled(pictures: Sequence[Picture]) -> tuple[str, ...]:
    """The splits without labels beside splits with some, for people."""
    labelled = {p.split for p in pictures if p.label is not None}
    bare = Counter(p.split for p in pictures if labelled and p.split not in labelled)
    return tuple(f"split {split} has no labels ({count:,})" for split, count in bare.items())


def patients_apart(pictures: Sequence[Picture]) -> tuple[str, ...]:
    """That patients are in several splits, for people; by slides, as no set names a patient."""
    places = dict.fromkeys((p.patient, p.slide or p.source, p.split) for p in pictures
                           if p.patient or p.slide)  # fmt: skip
    first: dict[str, tuple[str, str]] = {}  # slide and split by patient
    apart: dict[str, str] = {}
    for told, name, split in places:
        known = known_patient(name)
        patient = told or (known[1] if known else None)
        if patient and first.setdefault(patient, (name, split))[1] != split:
            other, its = first[patient]
            apart.setdefault(patient, f"{other!r} in {its} and {name!r} in {split}")
    if not apart:
        return ()
    example = next(iter(apart.values()))
    count = number_of(len(apart), "patient is", "patients are")
    return (f"{count} in more than one split (one has {example}); "
            "--split-patients, in place of these splits, keeps patients whole",)  # fmt: skip


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
            f"--split-patients, but no patient is known of {number_of(len(bare), 'source')}: "
            f"{some(list(bare))}. Pass --patient-pattern, a regular expression that finds it in "
            "the name ('.*' where every slide is a patient), or a --slide-table with a column "
            "patient"
        )
    known = [found for found in told if found is not None]
    shares = parse_shares(options.split_patients)
    names = (patient for patient, _ in known)
    part_of = split_patients(names, shares, options.seed, options.hide)
    kinds = Counter(kind for _, kind in set(known))
    dealt = tuple(
        dataclasses.replace(picture, split=part_of[patient])
        for picture, (patient, _) in zip(pictures, known, strict=True)
    )
    counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    empty = dict.fromkeys(split for split in shares if split not in part_of.values())
    lost = (f"no patient came into {some(list(empty))}: {len(part_of):,} are few for such a share; "
            "another --seed deals anew",) if empty else ()  # fmt: skip
    return dealt, (f"split by patient: {counts}", *lost)


def patient_and_kind(picture: Picture, pattern: str | None) -> tuple[str, str] | None:
    """A picture's patient and how it is known, None where it is not."""
    if picture.patient:
        return picture.patient, "patients of a table or record"
    if pattern is not None:
        return pattern_patient(pattern, picture.slide or picture.source), "by --patient-pattern"
    found = known_patient(picture.slide) if picture.slide else None
    return None if found is None else (found[1], f"{found[0]} patients")


def check_keys(root: Path, sources: Sequence[str]) -> None:
    """Refuse two files that would be one patch."""
    first: dict[str, str] = {}
    for source in sources:
        key = patch_key(source)
        other = first.get(key)
        first[key] = source
        if other == source:
            raise InputError(f"{root}: {source} is named twice; keep one of the two")
        if other is not None:
            raise InputError(
                f"{root}: {other} and {source} have one key, {key!r}; rename or remove one"
            )
