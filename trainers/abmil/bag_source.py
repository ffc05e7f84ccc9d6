"""Bags of features by slide: opened or made of patches, labelled, read in part, some kept."""
# N patches of a bag, n of a part, D dimensions

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from latentds_trainers.abmil.config import AbmilConfig
from latentds_trainers.engine.ranks import on_all_ranks
from torch import Tensor

from latentds.core.display import number_of
from latentds.errors import FormatError, InputError
from latentds.evaluation.features.extraction import extract_features, named_slides
from latentds.evaluation.features.folder import FeatureFolder, LiveFeatures
from latentds.evaluation.features.folder_records import FILE as LABELS
from latentds.evaluation.features.folder_records import (
    FeatureOptions,
    SlideLabel,
    label_of,
    read_lines,
)
from latentds.evaluation.folds import note_splits
from latentds.evaluation.groups import LabelledSlides, LabelTable, match_labels, read_labels
from latentds.evaluation.patchsets.patch_set import PatchInput, recorded_settings
from latentds.evaluation.patchsets.patches import PatchSet
from latentds.sources.slide_names import some

logger = logging.getLogger(__name__)

FEW = 8  # a choice of so small a part of a bag is read alone, not for the rest to stay in memory
PART = 16_384  # patches of a bag that validation has in memory at once
GB = 1 << 30


class FeatureBags:
    """Features of slides, read where they are needed; the first that fit stay in memory.

    folder      the files, or what makes features of patches
    cache_gb    memory for whole bags, which go there unless few rows are asked for. What does not
                fit is read from its file each time, no more of it than is asked for: with draws at
                random, throwing bags out would help none
    """

    def __init__(self, folder: FeatureFolder | LiveFeatures, cache_gb: float) -> None:
        self.folder, self.room = folder, int(cache_gb * GB)
        self.kept: dict[str, np.ndarray] = {}

    @property
    def dim(self) -> int:
        return self.folder.dim

    def count(self, slide: str) -> int:
        return self.folder.sizes[slide]

    def read(self, slide: str, rows: np.ndarray | None = None) -> Tensor:
        """Features float32 (N, D), of chosen patches where `rows` are given.

        raises  FormatError for a damaged file, or features that are not finite
        """
        is_few = rows is not None and FEW * len(rows) <= self.count(slide)
        whole = self.kept.get(slide) if is_few else self.keep(slide)
        if whole is not None:
            return torch.from_numpy(whole if rows is None else whole[rows])
        with self.folder.file(slide) as file:
            found = file.features(slice(None) if rows is None else rows)
        return torch.from_numpy(self.checked(slide, found))

    def parts(self, slide: str) -> Iterator[Tensor]:
        """All features, float32 (n, D) at a time."""
        whole = self.keep(slide)
        if whole is not None:
            yield from torch.split(torch.from_numpy(whole), PART)
            return
        with self.folder.file(slide) as file:
            for start in range(0, len(file), PART):
                part = file.features(slice(start, start + PART))
                yield torch.from_numpy(self.checked(slide, part))

    def keep(self, slide: str) -> np.ndarray | None:
        """The whole bag from memory, where it goes now if there is room; None if there is none."""
        if slide not in self.kept:
            size = self.count(slide) * self.dim * np.dtype(np.float32).itemsize
            if size > self.room:
                return None
            with self.folder.file(slide) as file:
                self.kept[slide] = self.checked(slide, file.features())
            self.room -= size
        return self.kept[slide]

    def checked(self, slide: str, features: np.ndarray) -> np.ndarray:
        """The features; FormatError where one is NaN or infinite."""
        if not np.isfinite(features.sum(dtype=np.float64)):  # no second array as large
            raise FormatError(
                f"{self.folder.where(slide)}: features that are not finite; make them again"
            )
        return features

    def coords(self, slide: str) -> tuple[np.ndarray, int | None]:
        """Coordinates int64 (N, 2) at level 0, and a patch's edge there where it is recorded."""
        with self.folder.file(slide) as file:
            found = file.attributes.get("coords", {}).get("patch_size_level0")
            return file.coords(), int(found) if found else None


def open_bags(
    config: AbmilConfig, device: torch.device, plan: Callable[[LabelledSlides], None]
) -> tuple[FeatureBags, PatchSet | None]:
    """Bags as the settings say, features made where there are none, and the pixels behind them.

    Pixels are None where only features were given. Collective.

    plan  is told the slides and labels before features are made, which may take hours
    """
    from latentds.embedders import embedder_loader

    name, patches, place = config.embedder, None, config.bags
    if place is None:
        assert name is not None
        on_all_ranks(lambda: embedder_loader(name))
    if config.data is not None:
        patches = on_all_ranks(lambda: open_data(config, device))
    folder: FeatureFolder | LiveFeatures
    if place is None:
        assert patches is not None
        lines = on_all_ranks(lambda: recorded_lines(patches))
        slides = on_all_ranks(lambda: label_slides(config, list(lines), lines, config.location))
        plan(slides)
        folder = make_features(config, patches, device)
    else:
        folder = given = on_all_ranks(lambda: FeatureFolder(place, embedder=name))
        beside = given.folder.parent if given.record else place
        lines = on_all_ranks(lambda: lines_beside(config, beside))
        where = str(beside / LABELS)
        slides = on_all_ranks(lambda: label_slides(config, given.slides, lines, where))
        plan(slides)
    if config.splits is None:
        own = [lines[slide].split for slide in slides.slides if slide in lines]
        slides.notes.extend(note_splits(own, "--splits takes files of CLAM's or Patho-Bench's"))
    return FeatureBags(folder, config.cache_gb), patches


def open_data(config: AbmilConfig, device: torch.device) -> PatchSet:
    """The patches that --data and its options name; recorded splits play no part."""
    from latentds.evaluation.patchsets.open_patch_sets import open_patches

    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(PatchInput)}
    # A pass to embed them, and one for a heat map: no pixels are worth keeping. On the fly they are
    # read again and again, but features are smaller: memory is theirs (--cache-gb).
    fixed = {"splits": None, "device": str(device), "keep_mb": 0}
    return open_patches(PatchInput(**(values | fixed)))


def make_features(
    config: AbmilConfig, patches: PatchSet, device: torch.device
) -> FeatureFolder | LiveFeatures:
    """What has the features of patches: OUT/features, where they are made now, slides shared by
    the ranks; or, on the fly, what makes them when they are asked for. Collective.
    """
    from latentds.embedders import load_embedder

    assert config.embedder is not None
    name, kept = config.embedder, config.out / "features"
    embedder = on_all_ranks(lambda: load_embedder(name))
    options = FeatureOptions(batch_size=config.embed_batch, patches=recorded_settings(config))
    if config.on_the_fly:
        return on_all_ranks(lambda: LiveFeatures(patches, embedder, options, device=device))
    on_all_ranks(
        lambda: extract_features(
            patches,
            {kept: embedder},
            options,
            device=device,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
        )
    )
    return on_all_ranks(lambda: FeatureFolder(kept))


def recorded_lines(patches: PatchSet) -> dict[str, SlideLabel]:
    """What is recorded of every slide with its patches; the slide itself for no patient."""
    table = patches.table
    rows: dict[str | None, list[int]] = {}
    for row, slide in enumerate(table.slides):
        rows.setdefault(slide, []).append(row)
    lines = {
        slide: label_of(slide, table, patches.classes, np.array(rows[slide]))
        for slide in named_slides(patches)
    }
    if not any(table.patients):  # names tell the rest, and the rule says that they do
        lines = {s: dataclasses.replace(line, patient=s) for s, line in lines.items()}
    return lines


def lines_beside(config: AbmilConfig, folder: Path) -> dict[str, SlideLabel]:
    """What labels.csv beside features says of every slide; with --labels not of its patient."""
    try:
        lines = read_lines(folder)
    except InputError:
        if config.labels is None:
            raise
        return {}  # --labels may lie there, a table without splits
    if config.labels is not None:
        lines = {s: dataclasses.replace(line, patient=s) for s, line in lines.items()}
    return lines


def label_slides(
    config: AbmilConfig, slides: list[str], lines: Mapping[str, SlideLabel], where: str
) -> LabelledSlides:
    """The slides' labels and patients: of --labels, else as recorded in `where`."""
    if config.labels is not None:
        table = read_labels(config.labels)
    else:
        labels = {slide: line.label for slide, line in lines.items() if line.label}
        bare = [slide for slide in slides if slide not in labels]
        if bare and not config.allow_subset:
            have = number_of(len(bare), "slide has", "slides have")
            raise InputError(
                f"{where}: {have} no label that all patches share: "
                f"{some(bare)}; give --labels, a CSV of slide_id and label, or --allow-subset"
            )
        table = LabelTable(Path(where), labels, {})
    known = {slide: line.patient for slide, line in lines.items() if line.patient != slide}
    return match_labels(
        table,
        slides,
        allow_subset=config.allow_subset,
        groups=config.groups,
        patients=[known.get(slide) for slide in slides],
    )
