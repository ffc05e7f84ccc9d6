"""Bags of features by slide: opened or made of patches, labelled, read in part, some kept."""
# N patches of a bag, n of a part, D dimensions

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from latentds_trainers.abmil.config import AbmilConfig
from latentds_trainers.engine.ranks import on_all_ranks
from torch import Tensor

from latentds.errors import FormatError, InputError
from latentds.evaluation.features.extraction import extract_features, named_slides
from latentds.evaluation.features.extraction_options import FeatureOptions
from latentds.evaluation.features.folder import FeatureFolder
from latentds.evaluation.features.folder_records import SlideLabel, labels_beside, read_lines
from latentds.evaluation.features.live import LiveFeatures
from latentds.evaluation.folds import note_splits
from latentds.evaluation.groups import LabelledSlides, groups_of, match_labels, read_labels
from latentds.evaluation.patchsets.patch_set import PatchInput, recorded_settings
from latentds.evaluation.patchsets.patches import PatchSet
from latentds.sources.slide_names import some
from latentds.store.format import sorted_names

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
        """D."""
        return self.folder.dim

    def count(self, slide: str) -> int:
        """N."""
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


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LabelledBags:
    """What a cross-validation is over: bags, their labels and patients, where they are from.

    patches   the pixels behind them; None where only features were given
    """

    bags: FeatureBags
    slides: LabelledSlides
    patches: PatchSet | None


def open_labelled(
    config: AbmilConfig, device: torch.device, plan: Callable[[LabelledSlides], None]
) -> LabelledBags:
    """Bags and labels as the settings say, features made where there are none. Collective.

    plan  is told the slides before features are made, which may take hours
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
        names = on_all_ranks(lambda: named_slides(patches))
        slides = on_all_ranks(lambda: label_slides(config, names, None, patches))
        plan(slides)
        folder = make_features(config, patches, device)
    else:
        folder = given = on_all_ranks(lambda: FeatureFolder(place, embedder=name))
        slides = on_all_ranks(lambda: label_slides(config, given.slides, given, patches))
        plan(slides)
    if config.splits is None:
        own = on_all_ranks(lambda: own_splits(slides.slides, folder))
        slides.notes.extend(note_splits(own, "--splits takes files of CLAM's or Patho-Bench's"))
    return LabelledBags(bags=FeatureBags(folder, config.cache_gb), slides=slides, patches=patches)


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
        live = on_all_ranks(lambda: LiveFeatures(patches, embedder, options, device=device))
        tell_memory(live, config.cache_gb)
        return live
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


def tell_memory(live: LiveFeatures, cache_gb: float) -> None:
    """Say what is embedded again and again, before hours are spent on it."""
    size_gb = sum(live.sizes.values()) * live.dim * np.dtype(np.float32).itemsize / GB
    told = "every bag is embedded once" if size_gb <= cache_gb else (
        "what does not fit is embedded anew in every epoch; a larger --cache-gb, or features kept "
        "on the disk (without --on-the-fly), avoid that"
    )  # fmt: skip
    logger.info("on the fly: features of %.3g GB, --cache-gb is %g: %s", size_gb, cache_gb, told)


def label_slides(
    config: AbmilConfig, slides: list[str], folder: FeatureFolder | None, patches: PatchSet | None
) -> LabelledSlides:
    """The slides' labels and patients.

    folder  of features that were given, None where patches are
    """
    patients: list[str | None] = []
    if config.labels is not None:
        table = read_labels(config.labels)
        if config.bags is None:
            patients = patients_of(patches, slides)
    elif folder is not None:
        assert config.bags is not None
        table, known = labels_beside(folder.folder.parent if folder.record else config.bags)
        patients = [known.get(slide) for slide in slides]
    else:
        assert patches is not None
        return recorded_labels(patches, slides, config.groups)
    return match_labels(
        table,
        slides,
        allow_subset=config.allow_subset,
        groups=config.groups,
        patients=patients,
    )


def own_splits(slides: list[str], folder: FeatureFolder | LiveFeatures) -> list[str]:
    """The split that is recorded with every slide, of all its patches; "" where none is."""
    if isinstance(folder, LiveFeatures):
        patches = folder.patches
        return [patches.table.splits[patches.rows_of(slide)[0]] for slide in slides]
    lines = dict[str, SlideLabel]()
    with contextlib.suppress(InputError):  # --labels may lie there, a table without splits
        lines = read_lines(folder.folder.parent) if folder.record else lines
    return [lines[slide].split if slide in lines else "" for slide in slides]


def patients_of(patches: PatchSet | None, slides: list[str]) -> list[str | None]:
    """The patient that is recorded with every slide's patches, where there is one and no other."""
    known = [] if patches is None else patches.table.patients
    if patches is None or not any(known):
        return []
    named = [{known[row] for row in patches.rows_of(slide).tolist()} for slide in slides]
    return [next(iter(found)) if len(found) == 1 else None for found in named]


def recorded_labels(patches: PatchSet, slides: list[str], groups: Path | None) -> LabelledSlides:
    """Labels that the patches record, one a slide.

    raises  InputError for slides without one, or with several
    """
    found = {slide: np.unique(patches.table.labels[patches.rows_of(slide)]) for slide in slides}
    bare = [slide for slide, labels in found.items() if labels[0] < 0]
    torn = [slide for slide, labels in found.items() if len(labels) > 1 and slide not in bare]
    for left, what in ((bare, "have patches without a label"), (torn, "have patches of several")):
        if left:
            raise InputError(f"{len(left):,} slides {what}: {some(left)}; give --labels, a CSV")
    names = {slide: patches.classes[int(labels[0])] for slide, labels in found.items()}
    classes = sorted_names(names.values())
    targets = np.array([classes.index(names[slide]) for slide in slides], np.int64)
    own, rule = groups_of(slides, slides, groups, patients_of(patches, slides))
    return LabelledSlides(
        slides=slides, classes=classes, targets=targets, groups=own, group_rule=rule, notes=[]
    )
