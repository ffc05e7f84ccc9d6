"""A segmentation run: its images and folds, every fold trained once, and what it leaves behind."""
# N images, K labels with 0

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from latentds_trainers.crossval.cross_validation import (
    Cell,
    CrossValidation,
    FoldOutcome,
    Tested,
    run_record,
    run_table,
    spread,
    told_settings,
    write_result,
)
from latentds_trainers.engine.ranks import from_first, join_ranks, on_all_ranks
from latentds_trainers.sampath.config import PRESETS, SIZES_PX, SampathConfig, SegmentationSettings
from latentds_trainers.sampath.segmentation_data import (
    NO_FOLDS,
    FoldPlan,
    LabelledImages,
    check_classes,
    group_plan,
    named_plan,
    table_plan,
    write_picture,
)
from latentds_trainers.sampath.segmentation_fold import SegmentationFold, build_network

from latentds.errors import InputError
from latentds.evaluation.features.layout import file_name
from latentds.evaluation.groups import count_alone, groups_of
from latentds.evaluation.patchsets.developing import codebook_note
from latentds.evaluation.patchsets.open_patch_sets import find_shards, open_patches
from latentds.evaluation.patchsets.patch_set import PatchTable
from latentds.evaluation.patchsets.patches import PatchSet
from latentds.evaluation.records import FILE as RESULT
from latentds.evaluation.records import RunRecord
from latentds.evaluation.segmentation import (
    COMPAT_REASON,
    SCORES,
    Confusion,
    correct_scores,
    sampath_compat_scores,
)
from latentds.sources.csv_tables import write_table

logger = logging.getLogger(__name__)
PRIMARY, COMPAT = "dice_macro", "sampath_"
SIDE_BY_SIDE = (  # correct scores, and what SAM-Path's code calls by their names
    ("dice_macro", "Dice_Bal"),
    ("dice_micro", "Dice"),
    ("f1_micro", "F1"),
    ("jaccard_macro", "IOU_Jaccard_Bal"),
    ("jaccard_micro", "IOU_Jaccard"),
    ("recall_micro", None),
    ("precision_micro", None),
    ("pixel_accuracy", None),
)
NOT_TELLING = ("images", "image", "img")  # folders that are named after what is in them
IMAGE_SCORES = ("dice_macro", "jaccard_macro", "pixel_accuracy")
ONE_SEED = (
    "one training a fold: SAM-Path's authors and the paper have one too, and differences below "
    "half a point are then no evidence; --seeds 0 1 2 trains three"
)


class SegmentationRun:
    def __init__(self, config: SampathConfig) -> None:
        self.config, self.device = config, join_ranks()
        on_all_ranks(self.check_network)
        patches = on_all_ranks(self.open)
        self.images = LabelledImages(config.settings, patches)
        self.table: PatchTable = patches.table
        names = (self.table.slides, self.table.sources, config.groups, self.table.patients)
        self.groups, rule = on_all_ranks(lambda: groups_of(*names))
        self.plan = on_all_ranks(lambda: self.make_plan(rule))
        counts, self.labels_id = from_first(self.images.count_pixels)
        absent = on_all_ranks(
            lambda: check_classes(self.plan, counts, config.settings.values.names)
        )
        self.source = from_first(lambda: patches.facts().to_json())
        self.content = from_first(patches.fingerprint)
        self.notes = [*absent, *self.find_notes()]
        seeds, folds = config.seeds or (config.seed,), range(len(self.plan.folds))
        self.crossval = CrossValidation(
            task="sampath",
            out=config.out,
            items=self.table.names,
            groups=self.groups,
            folds=self.plan.folds,
            cells=[(number, seed) for seed in seeds for number in folds],
        )
        identity = {
            "source": self.source["name"],
            "codebook": self.source.get("codebook"),
            "content": self.content,
            "labels": self.labels_id,
            "images_a_step": self.images_a_step,
        }
        self.crossval.claim(config.to_json(), identity)

    def check_network(self) -> None:
        """Raise for a network that cannot be had; a finished run needs none."""
        if not (self.config.out / RESULT).is_file():
            build_network(self.config, len(self.config.settings.values.names), self.config.seed)

    def open(self) -> PatchSet:
        """The images; InputError for those of another size than the preset's.

        With --odd-size resize, originals go to a codec in the size of the preset. A data set of
        latents keeps the size it was converted with.
        """
        config = self.config
        changed: dict[str, Any] = {}
        if config.device == "auto":
            changed["device"] = str(self.device)
        resizes = config.settings.odd_size == "resize" and config.patch_size is None
        if resizes and find_shards(config) is None:
            changed |= {"patch_size": config.settings.image_size, "resize": True}
        patches = open_patches(dataclasses.replace(config, **changed))
        check_size(config, patches.patch_px)
        return patches

    def make_plan(self, rule: str) -> FoldPlan:
        config, table = self.config, self.table
        shared = config.allow_shared_groups
        if config.fold_table is not None:
            return table_plan(config.fold_table, table.sources, self.groups, allow_shared=shared)
        if config.folds is not None:
            return group_plan(self.groups, config.folds, config.seed, rule)
        if len(set(table.splits)) < 2:
            raise InputError(f"{config.location}: has one split, {table.splits[0]!r}; {NO_FOLDS}")
        rule = "the data's own splits"
        return named_plan(table.splits, self.groups, rule, allow_shared=shared)

    def find_notes(self) -> list[str]:
        """What a reader should know of groups, schedule, sizes and codebook; logged too."""
        config, table = self.config, self.table
        names = (table.slides, table.sources, table.patients)
        alone = count_alone(*names) if config.groups is None else 0
        notes = []
        if alone:
            notes.append(
                f"{alone:,} of {len(table):,} images name neither slide nor patient, and each "
                "file is a group by itself: that no patient is trained on and tested could not be "
                "checked; --groups CSV says what belongs together"
            )
        sizes = [len(fold.train) for fold in self.plan.folds]
        ranks = dist.get_world_size()
        steps = [config.steps_of(size, ranks) for size in sizes]
        notes += schedule_notes(config.preset, config.settings, steps, ranks)
        notes += resize_notes(config, self.source)
        tested = {table.splits[row] for fold in self.plan.folds for row in fold.test.tolist()}
        notes += codebook_note(self.source.get("codebook"), test_is_apart="train" not in tested)
        if dist.get_rank() == 0:
            for note in notes:
                logger.warning("%s", note)
        return notes

    @property
    def images_a_step(self) -> int:
        return self.config.settings.images * dist.get_world_size()

    def run(self) -> None:
        outcomes = self.crossval.outcomes(self.test)
        from_first(
            lambda: report(
                self.config,
                self.crossval,
                self.plan,
                outcomes,
                source=self.source,
                images_a_step=self.images_a_step,
                notes=self.notes,
            )
        )

    def test(self, cell: Cell) -> Tested:
        config, fold = self.config, cell.fold
        steps = config.steps_of(len(fold.train), dist.get_world_size())
        train = config.of_fold(cell.folder, cell.seed, steps)
        training = SegmentationFold(config, train, self.images, fold)
        counts = training.run()
        if cell.seed == self.crossval.seeds[0]:
            from_first(lambda: self.draw(training, cell))
        return score_fold(config.settings, cell, counts, seconds=training.engine.seconds)

    def draw(self, training: SegmentationFold, cell: Cell) -> None:
        tested = cell.fold.test
        count = min(self.config.pictures, len(tested))
        rows = tested[np.linspace(0, len(tested) - 1, count).round().astype(int)]
        for row, image, truth, prediction in training.pictures(rows):
            name = f"fold-{cell.number}_{file_name(self.table.names[row])}.png"
            path = self.config.out / "predictions" / name
            write_picture(path, image, truth, prediction, self.config.settings)


def schedule_notes(
    preset: str, settings: SegmentationSettings, steps: Sequence[int], ranks: int
) -> list[str]:
    """Where the training departs from the schedule it is set to.

    steps  of every fold
    """
    notes, taken, meant = [], settings.images * ranks, PRESETS[preset].images
    if preset in SIZES_PX and taken != meant:
        notes.append(
            f"a step takes {taken} images (batch size x accumulation x {ranks} ranks), those of "
            f"preset {preset} {meant}: warm-up, milestones and learning rate are for the latter"
        )
    missed = [place for place in settings.milestones if place >= min(steps)]
    if settings.schedule == "multistep" and missed:
        notes.append(
            f"training ends after {min(steps)} steps, before the milestones {missed}: the learning "
            "rate does not fall there"
        )
    return notes


def resize_notes(config: SampathConfig, source: dict[str, Any]) -> list[str]:
    """A note on coded images that are resized after decoding.

    source  facts of the patch set
    """
    (height, width), edge = source["patch_px"], config.settings.image_size
    if (
        source["kind"] == "original"
        or config.settings.odd_size != "resize"
        or (height, width) == (edge,) * 2
    ):
        return []
    return [
        f"images are decoded at {width}x{height} px, then resized to {edge}x{edge}; originals "
        "through a codec are resized before it, unless --patch-size gives another size"
    ]


def check_size(config: SampathConfig, patch_px: tuple[int, int]) -> None:
    """InputError for images of another size than the preset is for, unless --image-size says so."""
    sizes = SIZES_PX.get(config.preset)
    is_own = config.settings.image_size != PRESETS[config.preset].image_size
    if sizes is None or is_own or patch_px in sizes:
        return
    wanted = " or ".join(f"{width}x{height}" for height, width in sizes)
    raise InputError(
        f"{config.location}: images of {patch_px[1]}x{patch_px[0]} px; --preset {config.preset} is "
        f"for {wanted}. Give the set the preset is for, or --image-size PX and what else differs"
    )


def score_fold(
    settings: SegmentationSettings, cell: Cell, counts: np.ndarray, *, seconds: float = 0.0
) -> Tested:
    """What a fold's test came to: correct scores, then SAM-Path's, named `sampath_...`.

    counts  int64 (n, K, K): pixels by true and predicted label, image by image
    """
    confusion = Confusion(settings.values.names, counts.sum(0))
    correct = correct_scores(confusion, settings.left_out)
    unscored = settings.left_out[1:]
    compat = sampath_compat_scores(confusion, unscored[0] if unscored else None)
    scores: dict[str, float | None] = dict.fromkeys(SCORES) | correct.scores
    undefined = (
        f"fold {cell.number}, seed {cell.seed}: no scored class has a pixel in truth or "
        "prediction; its scores are undefined and count in no mean (SAM-Path's code calls them 0)"
    )
    return Tested(
        found=counts.tolist(),
        scores=scores | {COMPAT + name: value for name, value in compat.items()},
        per_class={name: dict(values) for name, values in correct.per_class.items()},
        notes=[] if correct.per_class else [undefined],
        seconds=round(seconds, 2),
    )


def report(
    config: SampathConfig,
    run: CrossValidation,
    plan: FoldPlan,
    outcomes: Sequence[FoldOutcome],
    *,
    source: dict[str, Any],
    images_a_step: int,
    notes: Sequence[str] = (),
) -> None:
    undefined = [note for outcome in outcomes for note in outcome.notes]
    one_seed = [ONE_SEED] if len(run.seeds) == 1 else []
    own = config.settings
    record = run_record(
        run,
        outcomes,
        data=data_name(config.data),
        source=source,
        embedder=encoder_name(config),
        model="unet" if config.model == "unet" else "sam-path",
        classes=[name for name in own.classes if name not in own.unscored],
        split_rule=plan.rule,
        primary=PRIMARY,
        settings=told_settings(config) | {"images_a_step": images_a_step},
        notes=[*plan.notes, *notes, *undefined, COMPAT_REASON, *one_seed],
    )
    write_images(config.out, own, outcomes)
    write_result(config.out, record, table(record), is_json=config.json)


def encoder_name(config: SampathConfig) -> str | None:
    """The pathology encoder, without the place of its file: two runs of one are of one family."""
    if config.model != "sampath" or config.pathology_encoder is None:
        return None
    kind, colon, rest = config.pathology_encoder.partition("@")[0].partition(":")
    return f"{kind}:{Path(rest).name}" if colon and "/" in rest else f"{kind}{colon}{rest}"


def data_name(data: Path) -> str:
    """Name of the data set's folder; its parent's where it only says that images are in it."""
    path = data.resolve() if data.exists() else data
    return path.parent.name if path.name.lower() in NOT_TELLING else path.name


def write_images(
    out: Path, settings: SegmentationSettings, outcomes: Sequence[FoldOutcome]
) -> None:
    """images.csv: fold, seed, item, group and scores of every tested image."""
    rows: list[list[object]] = []
    for outcome in outcomes:
        for item, group, counts in zip(outcome.items, outcome.groups, outcome.found, strict=True):
            confusion = Confusion(settings.values.names, counts)
            scores = correct_scores(confusion, settings.left_out).scores
            figures = [f"{scores[name]:.6f}" if name in scores else "" for name in IMAGE_SCORES]
            rows.append([outcome.fold, outcome.seed, item, group, *figures])
    columns = ["fold", "seed", "item", "group", *IMAGE_SCORES]
    write_table(out / "images.csv", columns, rows)


def table(record: RunRecord) -> str:
    """The record as text, correct scores and SAM-Path's side by side."""
    means = [f"{'mean ± sd':<18}{'correct':>18}    {'sampath-compat':<16}"]
    for name, compat in SIDE_BY_SIDE:
        line = f"{name:<18}{spread(record.summarize(name)):>18}"
        if compat is not None:
            line += f"    {compat:<16}{spread(record.summarize(COMPAT + compat)):>18}"
        means.append(line)
    return run_table(
        record,
        f"{record.data}: {', '.join(record.classes)}; {record.model} on {record.source['name']}",
        shown=(PRIMARY, "dice_micro", "jaccard_macro", "jaccard_micro", "pixel_accuracy"),
        per_class=("dice", "jaccard", "recall", "precision"),
        more=means,
    )
