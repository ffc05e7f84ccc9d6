"""What folds of label maps came to: a fold's counts, the run's record, the tables printed."""
# n images tested, K labels with 0

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from latentds_trainers.engine.checkpoints import package_versions
from latentds_trainers.engine.settings import TrainConfig, jsonable
from latentds_trainers.sampath.segmentation_folds import FoldPlan

from latentds.core.display import say
from latentds.evaluation.folds import Fold, split_id
from latentds.evaluation.records import FoldResult, RunRecord, write_record
from latentds.evaluation.segmentation import (
    COMPAT_REASON,
    SCORES,
    Confusion,
    correct_scores,
    sampath_compat_scores,
)
from latentds.sources.csv_tables import write_table

if TYPE_CHECKING:
    from latentds_trainers.sampath.config import SampathConfig

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldOutcome:
    """A finished fold.

    items, groups  tested images
    counts         (n, K, K): pixels by true and predicted label, image by image
    seconds        spent training
    """

    fold: int
    seed: int
    train: int
    val: int
    steps: int
    items: list[str]
    groups: list[str]
    counts: list[list[list[int]]]
    seconds: float

    def confusion(self, names: Sequence[str]) -> Confusion:
        """Counts over all its images."""
        return Confusion(names, np.array(self.counts, np.int64).sum(0))

    def result(self, config: SampathConfig) -> FoldResult:
        """The fold in the run's record: correct scores, then SAM-Path's, named `sampath_...`.

        A score that is undefined is None.
        """
        confusion = self.confusion(config.settings.values.names)
        correct = correct_scores(confusion, config.settings.left_out)
        compat = sampath_compat_scores(confusion, ignored_metric(config))
        scores: dict[str, float | None] = dict.fromkeys(SCORES) | correct.scores
        return FoldResult(
            fold=self.fold,
            seed=self.seed,
            train=self.train,
            val=self.val,
            test=len(self.items),
            scores=scores | {COMPAT + name: value for name, value in compat.items()},
            per_class={name: dict(values) for name, values in correct.per_class.items()},
        )

    def undefined(self, config: SampathConfig) -> list[str]:
        """A note where no scored class has a pixel; empty otherwise."""
        correct = correct_scores(
            self.confusion(config.settings.values.names), config.settings.left_out
        )
        if correct.per_class:
            return []
        return [
            f"fold {self.fold}, seed {self.seed}: no scored class has a pixel in truth or "
            "prediction; its scores are undefined and count in no mean (SAM-Path's code calls "
            "them 0)"
        ]


def ignored_metric(config: SampathConfig) -> int | None:
    """The label that SAM-Path's own scores leave out: the first that is not scored here."""
    left_out = config.settings.left_out
    return left_out[1] if len(left_out) > 1 else None


def fold_outcome(
    number: int,
    fold: Fold,
    train: TrainConfig,
    *,
    items: Sequence[str],
    groups: Sequence[str],
    counts: np.ndarray,
    seconds: float,
) -> FoldOutcome:
    """What a fold's test came to."""
    rows = fold.test.tolist()
    return FoldOutcome(
        fold=number,
        seed=train.seed,
        train=len(fold.train),
        val=len(fold.val),
        steps=train.steps,
        items=[items[row] for row in rows],
        groups=[groups[row] for row in rows],
        counts=counts.tolist(),
        seconds=round(seconds, 2),
    )


def run_record(
    config: SampathConfig,
    plan: FoldPlan,
    outcomes: Sequence[FoldOutcome],
    *,
    source: dict[str, Any],
    items: Sequence[str],
    notes: Sequence[str] = (),
) -> RunRecord:
    """The run's record."""
    seeds = list(dict.fromkeys(outcome.seed for outcome in outcomes))
    undefined = [note for outcome in outcomes for note in outcome.undefined(config)]
    one_seed = [ONE_SEED] if len(seeds) == 1 else []
    told = [*plan.notes, *notes, *undefined, COMPAT_REASON, *one_seed]
    classes = [
        name for name in config.settings.values.classes if name not in config.settings.unscored
    ]
    return RunRecord(
        task="sampath",
        data=data_name(config.data),
        source=source,
        embedder=encoder_name(config),
        model="unet" if config.model == "unet" else "sam-path",
        classes=classes,
        seeds=seeds,
        split_id=split_id(plan.folds, items),
        split_rule=plan.rule,
        primary=PRIMARY,
        folds=[outcome.result(config) for outcome in outcomes],
        settings=shown_settings(config) | {"images_a_step": images_a_step(config)},
        notes=told,
        versions=package_versions(),
        command=shlex.join(["python", "-m", "latentds_trainers.sampath", *sys.argv[1:]]),
    )


def encoder_name(config: SampathConfig) -> str | None:
    """The pathology encoder, without the place of its file: two runs of one are of one family."""
    if config.model != "sampath" or config.pathology_encoder is None:
        return None
    kind, colon, rest = config.pathology_encoder.partition("@")[0].partition(":")
    return f"{kind}:{Path(rest).name}" if colon and "/" in rest else f"{kind}{colon}{rest}"


def images_a_step(config: SampathConfig) -> int:
    """Images of an optimizer step, over all ranks."""
    return config.settings.images * dist.get_world_size()


def data_name(data: Path) -> str:
    """Name of the data set's folder; its parent's where it only says that images are in it."""
    path = data.resolve() if data.exists() else data
    return path.parent.name if path.name.lower() in NOT_TELLING else path.name


def shown_settings(config: SampathConfig) -> dict[str, Any]:
    """The settings as JSON, paths by their last part."""
    values = dataclasses.asdict(config) | dataclasses.asdict(config.settings)
    named = {n: v.name if isinstance(v, Path) else v for n, v in values.items()}
    plain: dict[str, Any] = jsonable(named)
    return plain


def report(config: SampathConfig, record: RunRecord, outcomes: Sequence[FoldOutcome]) -> None:
    """Write result.json and images.csv, and print the result."""
    write_images(config, outcomes)
    write_record(config.out, record)
    say(json.dumps(record.to_json(), indent=1) if config.json else table(record, config.out))


def write_images(config: SampathConfig, outcomes: Sequence[FoldOutcome]) -> None:
    """images.csv: fold, seed, item, group and scores of every tested image."""
    rows: list[list[object]] = []
    for outcome in outcomes:
        for item, group, counts in zip(outcome.items, outcome.groups, outcome.counts, strict=True):
            confusion = Confusion(config.settings.values.names, counts)
            scores = correct_scores(confusion, config.settings.left_out).scores
            figures = [f"{scores[name]:.6f}" if name in scores else "" for name in IMAGE_SCORES]
            rows.append([outcome.fold, outcome.seed, item, group, *figures])
    columns = ["fold", "seed", "item", "group", *IMAGE_SCORES]
    write_table(config.out / "images.csv", columns, rows)


def table(record: RunRecord, out: Path) -> str:
    """The record as text: folds, means, correct scores and SAM-Path's, classes."""
    shown = (PRIMARY, "dice_micro", "jaccard_macro", "jaccard_micro", "pixel_accuracy")
    lines = [
        f"{record.data}: {', '.join(record.classes)}; {record.model} on {record.source['name']}",
        record.split_rule,
        "",
        "fold  seed  train   val  test  " + "  ".join(f"{name:>15}" for name in shown),
    ]
    for fold in record.folds:
        counts = "  ".join(f"{n:>4}" for n in (fold["train"], fold["val"], fold["test"]))
        figures = "  ".join(f"{figure(fold['scores'].get(name)):>15}" for name in shown)
        lines.append(f"{fold['fold']:>4}  {fold['seed']:>4}   {counts}  {figures}")
    lines += ["", f"{'mean ± sd':<18}{'correct':>18}    {'sampath-compat':<16}"]
    lines += [score_line(record, *row) for row in SIDE_BY_SIDE]
    lines += ["", f"{'class':<24}{'dice':>8}{'jaccard':>9}{'recall':>8}{'precision':>11}"]
    lines += [class_line(record, name) for name in record.classes]
    lines += ["", *(f"note: {note}" for note in record.notes), "", str(out / "result.json")]
    return "\n".join(lines)


def score_line(record: RunRecord, name: str, compat: str | None) -> str:
    """A correct score, and what SAM-Path's code has in its place."""
    line = f"{name:<18}{spread(record, name):>18}"
    if compat is None:
        return line
    return f"{line}    {compat:<16}{spread(record, COMPAT + compat):>18}"


def spread(record: RunRecord, metric: str) -> str:
    """Mean and sd of a metric."""
    mean, sd = record.summary.get(metric, (None, None))
    return figure(mean) if sd is None else f"{figure(mean)} ± {figure(sd)}"


def class_line(record: RunRecord, name: str) -> str:
    """Means of a class's scores over the folds that have them."""
    cells = []
    for metric, width in (("dice", 8), ("jaccard", 9), ("recall", 8), ("precision", 11)):
        rows = [fold["per_class"].get(name, {}).get(metric) for fold in record.folds]
        values = [value for value in rows if value is not None]
        cells.append(f"{figure(float(np.mean(values)) if values else None):>{width}}")
    return f"{name:<24}{''.join(cells)}"


def figure(value: float | None) -> str:
    """Four decimals, a hyphen for what is undefined."""
    return "-" if value is None else f"{value:.4f}"
