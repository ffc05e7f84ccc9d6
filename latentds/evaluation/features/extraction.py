"""Extraction: one feature file a slide and embedder, resumable, slides shared among ranks."""
# N patches of a slide, n of a batch, D embedding dimensions

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentds.core.display import number_of, shortest
from latentds.core.processes import choose_device, find_rank
from latentds.core.randomness import key_of, shuffled
from latentds.core.storage import passing_lock
from latentds.embedders.embedder import Embedder
from latentds.errors import ContractError, InputError, LatentdsError, TooManyBadSamplesError
from latentds.evaluation.features.embedding_pipeline import Piece, embed_pieces
from latentds.evaluation.features.feature_files import (
    FeatureFile,
    write_coordinates,
    write_features,
)
from latentds.evaluation.features.folder_records import (
    FILE,
    Extraction,
    FeatureOptions,
    FeaturesRecord,
    SlideLabel,
    claim,
    label_of,
    note_labels,
    note_left_out,
    read_lines,
    versions_of,
)
from latentds.evaluation.features.layout import FeaturePlaces, add_clam, coords_attributes
from latentds.evaluation.patchsets.patches import PatchSet, in_background

logger = logging.getLogger(__name__)
Progress = Callable[["SlideBag", int], None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class UnreadableSlideError(LatentdsError):
    """A slide whose patches cannot be read, or give no sound features."""


@dataclasses.dataclass(frozen=True, eq=False)
class SlideBag:
    """A slide on its way.

    slide       its name
    number      its place among those of this run, from 1
    slides      how many those are
    coords      int64 (N, 2) of the patches chosen
    attributes  of the coordinates
    label       its line of labels.csv; None before it was opened
    """

    slide: str
    number: int
    slides: int
    coords: np.ndarray = dataclasses.field(default_factory=lambda: np.empty((0, 2), np.int64))
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    label: SlideLabel | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """Where an embedder's features go, and of which slides of this rank they are there already."""

    embedder: Embedder
    places: FeaturePlaces
    done: frozenset[str]


def extract_features(
    patches: PatchSet,
    embedders: Mapping[Path, Embedder],
    options: FeatureOptions,
    *,
    device: torch.device | str = "auto",
    rank: int | None = None,
    world_size: int | None = None,
    progress: Progress | None = None,
) -> list[Extraction]:
    """Write the features of this rank's slides, every `world_size`-th of all, for every embedder.

    patches    whose images come on `device`; they are read and decoded once for all embedders
    embedders  by the folder that its features go to
    device     where images are embedded
    progress   called after every batch that was written: its slide's bag, how many patches

    A slide's file appears whole; those that are there are left alone, so a killed run goes on by
    the same call. The features depend neither on ranks, nor on where a run was cut off, nor on
    the other embedders; a slide that fails for one of them is left out for all. Slides that failed
    are listed in left_out.json, from which those made later go; of the others labels.csv tells
    split, patient and label.

    raises    InputError for no slides, or another run at the same slide; ContractError where
              a folder holds features of another embedder, source or options, or a file of another
              dimension; TooManyBadSamplesError past `max_bad`, naming the slides; OSError for a
              full disk, with nothing half written
    """
    device = choose_device(device)
    names = named_slides(patches)
    rank, world_size = find_rank(rank, world_size)
    if rank == 0:
        tell_nameless(patches)
    mine = names[rank::world_size]
    targets = []
    for out, embedder in embedders.items():
        embedder.to(device, DTYPES[options.precision])
        claim(out, record_of(patches, embedder, options, device))
        places, dim = FeaturePlaces(out, embedder.card.name), embedder.card.dim
        done = frozenset(slide for slide in mine if is_done(places, slide, dim))
        targets.append(Target(embedder, places, done))
    wanted = sorted(slide for slide in mine if any(slide not in t.done for t in targets))
    open_targets = [target for target in targets if len(target.done) < len(mine)]
    opened = [target.embedder for target in open_targets]
    count, bad, labels = 0, dict[str, str](), dict[str, SlideLabel]()
    pieces = embed_pieces(read_slides(patches, wanted, options), opened, device)
    with contextlib.closing(pieces):
        for bag, group in itertools.groupby(pieces, key=lambda piece: piece.bag):
            try:
                count += write_slide(open_targets, bag, group, options, progress)
                labels[bag.slide] = bag.label
            except UnreadableSlideError as error:
                bad[bag.slide] = str(error)
                note_bad(bad, options.max_bad)
    return [finish(t, patches, mine, labels, bad, count, options.clam) for t in targets]


def finish(
    target: Target,
    patches: PatchSet,
    mine: list[str],
    labels: Mapping[str, SlideLabel],
    bad: Mapping[str, str],
    count: int,
    with_clam: bool,
) -> Extraction:
    """Record what was left out and the labels of the rest; what this rank did for an embedder."""
    out, own = target.places.out, {s: text for s, text in bad.items() if s not in target.done}
    known = read_lines(out) | dict(labels)
    found = [slide for slide in mine if slide not in own]
    note_left_out(out, mine, own)
    lines = {
        s: known.get(s) or label_of(s, patches.of_slide(s).table, patches.classes) for s in found
    }
    note_labels(out, mine, lines)
    bare = [slide for slide, line in lines.items() if patches.classes and not line.label]
    if bare:
        logger.warning(
            "%s: %d of %d slides have no label, as their patches differ in it or lack one, among "
            "them %r", out / FILE, len(bare), len(lines), bare[0],
        )  # fmt: skip
    for slide in found if with_clam else ():
        add_clam(target.places, slide, patches.patch_px[1])
    return Extraction(
        slides=found,
        skipped=len(target.done),
        patches=count if len(target.done) < len(mine) else 0,
        bad=own,
        dim=target.embedder.card.dim,
    )


def named_slides(patches: PatchSet) -> list[str]:
    """The slides of patches, sorted; InputError where there are none."""
    names = sorted(patches.slides())
    if not names:
        raise InputError(
            f"{patches.facts().data}: no patch names a slide, and a bag is the patches of a slide; "
            "give originals a --name-pattern with a group 'slide'"
        )
    return names


def tell_nameless(patches: PatchSet) -> None:
    """Warn of patches that are of no slide, and so of no bag."""
    if lost := patches.nameless():
        logger.warning(
            "%s: %d of its patches or pictures name no slide and are left out; give originals a "
            "--name-pattern with a group 'slide'", patches.facts().data, lost,
        )  # fmt: skip


def record_of(
    patches: PatchSet, embedder: Embedder, options: FeatureOptions, device: torch.device
) -> FeaturesRecord:
    return FeaturesRecord(
        embedder=embedder.card.to_json(),
        source=patches.facts().to_json(),
        options=options.decisive(),
        versions=versions_of(device.type),
    )


def is_done(places: FeaturePlaces, slide: str, dim: int) -> bool:
    """Whether a slide's features are there; ContractError where they have another dimension."""
    path = places.features_file(slide)
    if not (path.exists() and places.coords_file(slide).exists()):
        return False
    with FeatureFile(path) as file:
        if file.dim != dim:
            raise ContractError(
                f"{path}: has features of {file.dim} dimensions, the embedder gives {dim}; take "
                "it away, or give another --out"
            )
    return True


def read_slides(
    patches: PatchSet, slides: Sequence[str], options: FeatureOptions
) -> Iterator[Piece]:
    """Batches of one slide after the other, the next slide opened meanwhile.

    A piece with an error ends a slide that fails.
    """
    with contextlib.closing(in_background(open_slides(patches, slides, options), 1)) as opened:
        for bag, own, rows, error in opened:
            if own is None:
                yield Piece(bag, bag.coords, error=error)
                continue
            parts = [
                slice(start, start + options.batch_size)
                for start in range(0, len(rows), options.batch_size)
            ]
            try:
                images = own.stream([rows[part] for part in parts])
                for part, batch in zip(parts, images, strict=True):
                    yield Piece(bag, bag.coords[part], images=batch)
            except LatentdsError as reason:
                yield Piece(bag, bag.coords[:0], error=reason)


def open_slides(
    patches: PatchSet, slides: Sequence[str], options: FeatureOptions
) -> Iterator[tuple[SlideBag, PatchSet | None, np.ndarray, Exception | None]]:
    """Every slide's bag, its patches as a set and the rows that are wanted; or why there are none.

    Of slides as originals this finds the tissue.
    """
    for number, slide in enumerate(slides, 1):
        bag, none = SlideBag(slide, number, len(slides)), np.empty(0, np.int64)
        try:
            own = patches.of_slide(slide)
            rows, bag = open_bag(own, bag, options)
            yield bag, own, rows, None
        except LatentdsError as error:
            yield bag, None, none, error


def open_bag(own: PatchSet, bag: SlideBag, options: FeatureOptions) -> tuple[np.ndarray, SlideBag]:
    """The rows of a slide's own set that are wanted, and its bag with their coordinates."""
    table, edge_px = own.table, own.patch_px[1]
    if not len(table):
        raise InputError("no patch, an empty bag")
    rows = choose(len(table), bag.slide, options)
    coords = np.stack([table.x, table.y], 1).astype(np.int64)
    size_px, mpp = int(table.size_px[0]), shortest(table.mpp[0])
    attributes = coords_attributes(bag.slide, coords, size_px, edge_px, mpp)
    label = label_of(bag.slide, table, own.classes)
    return rows, dataclasses.replace(bag, coords=coords[rows], attributes=attributes, label=label)


def choose(count: int, slide: str, options: FeatureOptions) -> np.ndarray:
    """Rows of a slide that are wanted, ascending."""
    if options.max_patches is None or count <= options.max_patches:
        return np.arange(count)
    order = shuffled(count, key_of("bag", options.seed, 0, slide))
    return np.sort(order[: options.max_patches])


def write_slide(
    targets: Sequence[Target],
    bag: SlideBag,
    pieces: Iterator[Piece],
    options: FeatureOptions,
    progress: Progress | None,
) -> int:
    """Write a slide's files and return N; UnreadableSlideError where its patches fail."""
    files: dict[Path, tuple[slice, dict[str, dict[str, Any]]]] = {}
    first = 0
    for target in targets:
        dimensions = slice(first, first + target.embedder.card.dim)
        first = dimensions.stop
        if bag.slide not in target.done:
            # TRIDENT's; the folder's name alone is told, no path of a machine.
            own: dict[str, Any] = {"name": bag.slide, "savetodir": target.places.features.name}
            own["encoder"] = target.places.embedder
            named = {"features": own, "coords": bag.attributes}
            files[target.places.features_file(bag.slide)] = (dimensions, named)

    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for piece in pieces:
            features = checked(piece, options.saved)
            yield features, piece.coords
            if progress is not None:
                progress(bag, len(features))

    with contextlib.ExitStack() as locks:
        for path in files:
            locks.enter_context(passing_lock(path.with_name(f".{path.name}.lock")))
        count = write_features(files, chunks())
        for target in targets:
            if bag.slide not in target.done:
                place = target.places.coords_file(bag.slide)
                write_coordinates(place, bag.coords, bag.attributes)
    return count


def checked(piece: Piece, saved: str) -> np.ndarray:
    """A piece's features as they are saved; UnreadableSlideError where there are no sound ones."""
    if piece.error is not None or piece.features is None:
        raise UnreadableSlideError(f"{piece.error}") from piece.error
    with np.errstate(over="ignore"):
        features = piece.features.astype(saved)
    if not np.isfinite(features).all():
        raise UnreadableSlideError(
            f"features that are not finite as {saved}; try --precision float32 --saved float32"
        )
    return features


def note_bad(bad: dict[str, str], max_bad: int) -> None:
    """Tell of a slide that failed; raise past the budget."""
    slide, reason = next(reversed(bad.items()))
    if len(bad) > max_bad:
        told = "; ".join(f"{name}: {text}" for name, text in list(bad.items())[-3:])
        raise TooManyBadSamplesError(
            f"{number_of(len(bad), 'slide')} failed, --max-bad is {max_bad}: {told}. What is "
            "finished stays; the same command goes on"
        )
    logger.warning("slide %s left out: %s", slide, reason)
