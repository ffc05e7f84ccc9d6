"""What folds of bags came to: a fold's figures, the run's record, the table that is printed."""
# n tested slides, C classes

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from latentds_trainers.abmil.bag_source import LabelledBags
from latentds_trainers.abmil.bag_training import Stopping
from latentds_trainers.abmil.config import AbmilConfig
from latentds_trainers.engine.checkpoints import package_versions
from latentds_trainers.engine.settings import jsonable

from latentds.core.display import say
from latentds.evaluation.features.features_record import flat
from latentds.evaluation.features.folder import FeatureFolder
from latentds.evaluation.features.live import LiveFeatures
from latentds.evaluation.folds import Fold
from latentds.evaluation.predictions import (
    Predictions,
    fold_predictions,
    join_predictions,
    write_predictions,
)
from latentds.evaluation.records import FoldResult, RunRecord, write_record
from latentds.evaluation.scores import classification_scores
from latentds.sources.slide_names import some

WEIGHTS = "model.safetensors"
OF_RANKS = ("auc",)  # by the order of probabilities, not by the class each gives
PRIMARY, SHOWN = "auc", ("auc", "balanced_accuracy", "accuracy", "macro_f1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldOutcome:
    """A finished fold.

    epochs     taken; `chosen_epoch` is the one whose weights were tested
    items      slides tested, with their groups, labels (n) and probabilities (n, C)
    notes      what the scores leave out
    seconds    spent training
    """

    fold: int
    seed: int
    train: int
    val: int
    epochs: int
    chosen_epoch: int
    validation_loss: float | None
    items: list[str]
    groups: list[str]
    labels: list[int]
    probabilities: list[list[float]]
    scores: dict[str, float | None]
    per_class: dict[str, dict[str, float | None]]
    notes: list[str]
    seconds: float

    def result(self) -> FoldResult:
        """The fold in the run's record."""
        return FoldResult(
            fold=self.fold,
            seed=self.seed,
            train=self.train,
            val=self.val,
            test=len(self.items),
            scores=self.scores,
            per_class=self.per_class,
        )

    def line(self) -> str:
        """The fold in a line."""
        shown = ", ".join(f"{name} {figure(self.scores.get(name))}" for name in SHOWN[:2])
        return (
            f"fold {self.fold}, seed {self.seed}: {shown}; weights of epoch {self.chosen_epoch} "
            f"of {self.epochs}, {self.seconds:.0f} s"
        )


def fold_outcome(
    labelled: LabelledBags,
    fold: Fold,
    *,
    number: int,
    seed: int,
    probabilities: np.ndarray,
    epochs: int,
    stopping: Stopping,
    select: str,
    seconds: float,
) -> FoldOutcome:
    """The scores of a fold's test bags."""
    slides = labelled.slides
    targets = slides.targets[fold.test]
    scores = classification_scores(targets, probabilities, slides.classes)
    return FoldOutcome(
        fold=number,
        seed=seed,
        train=len(fold.train),
        val=len(fold.val),
        epochs=epochs,
        chosen_epoch=stopping.epoch if select == "best" else epochs,
        validation_loss=stopping.lowest,
        items=[slides.slides[row] for row in fold.test.tolist()],
        groups=[slides.groups[row] for row in fold.test.tolist()],
        labels=targets.tolist(),
        probabilities=probabilities.tolist(),
        scores=scores.values,
        per_class=scores.per_class,
        notes=[
            *(f"fold {number}: {note}" for note in scores.notes),
            *best_is_last(number, epochs, stopping.epoch, select),
        ],
        seconds=round(seconds, 2),
    )


def best_is_last(number: int, epochs: int, best: int, select: str) -> list[str]:
    """A sentence where a fold's best epoch is the last one: it may not have come to its end."""
    if select != "best" or best < epochs:
        return []
    return [
        f"fold {number}: the best epoch is the last one ({epochs}); longer training (--epochs) "
        "might have found a better one"
    ]


def report(
    config: AbmilConfig, labelled: LabelledBags, split: str, outcomes: list[FoldOutcome]
) -> RunRecord:
    """Write result.json and predictions.csv, and print them."""
    predictions = pooled_predictions(outcomes, labelled.slides.classes)
    record = run_record(config, labelled, split, outcomes)
    write_predictions(config.out, predictions.sorted())
    write_record(config.out, record)
    together = classification_scores(
        predictions.labels, predictions.probabilities, predictions.classes
    )
    text = table(record, together.values, config.out)
    say(json.dumps(record.to_json(), indent=1) if config.json else text)
    return record


def pooled_predictions(outcomes: list[FoldOutcome], classes: list[str]) -> Predictions:
    """The predictions of all folds and seeds."""
    return join_predictions(
        [
            fold_predictions(
                outcome.fold,
                outcome.seed,
                items=outcome.items,
                groups=outcome.groups,
                labels=outcome.labels,
                probabilities=np.array(outcome.probabilities),
                classes=classes,
            )
            for outcome in outcomes
        ]
    )


def run_record(
    config: AbmilConfig,
    labelled: LabelledBags,
    split: str,
    outcomes: list[FoldOutcome],
) -> RunRecord:
    """The run's record."""
    folder, slides = labelled.bags.folder, labelled.slides
    place = config.data or config.bags
    rule = f"{len(set(slides.groups))} groups: {slides.group_rule}"
    made = f"splits of {config.splits.name}" if config.splits else f"{config.folds} folds by seed"
    facts = folder.source or {"name": "features", "kind": "features"}
    found = dict.fromkeys(note for outcome in outcomes for note in outcome.notes)
    return RunRecord(
        task="abmil",
        data=place.name if place else "",
        source=facts,
        embedder=str(folder.embedder.get("name") or "") or None,
        model="abmil",
        classes=slides.classes,
        seeds=[config.seed + repeat for repeat in range(config.repeats)],
        split_id=split,
        split_rule=f"{made}; {rule}",
        primary=PRIMARY,
        folds=[outcome.result() for outcome in outcomes],
        settings=shown_settings(config)
        | feature_settings(folder)
        | {"bags_a_step": bags_a_step(config)},
        notes=[*slides.notes, *codebook_notes(facts), *left_out_notes(folder), *found],
        versions=package_versions(),
        command=" ".join(["python", "-m", "latentds_trainers.abmil", *sys.argv[1:]]),
    )


def shown_settings(config: AbmilConfig) -> dict[str, Any]:
    """The settings as JSON, paths by their last part."""
    values = dataclasses.asdict(config) | dataclasses.asdict(config.settings)
    named = {n: v.name if isinstance(v, Path) else v for n, v in values.items()}
    plain: dict[str, Any] = jsonable(named)
    return plain


def bags_a_step(config: AbmilConfig) -> int:
    """Bags of an optimizer step, over all ranks."""
    return config.batch_size * config.accumulation * dist.get_world_size()


def feature_settings(folder: FeatureFolder | LiveFeatures) -> dict[str, Any]:
    """The embedder's weights, and the options that features.json records, by dotted names."""
    options = flat(folder.record.options, "features.") if folder.record else {}
    return {"embedder.weights_id": folder.embedder.get("weights_id", ""), **options}


def codebook_notes(source: Mapping[str, Any]) -> list[str]:
    """That the features' codebook saw tested patches, where it did."""
    from latentds.evaluation.patchsets.codec_fitting import codebook_note

    note = codebook_note(source.get("codebook") or {}, test_is_apart=False)
    return [note] if note else []


def left_out_notes(folder: FeatureFolder | LiveFeatures) -> list[str]:
    """A sentence on the slides that have no features, as making them failed."""
    lost = folder.left_out
    return [f"{len(lost):,} slides have no features: {some(list(lost))}."] if lost else []


def table(record: RunRecord, together: dict[str, float | None], out: Path) -> str:
    """The record as text, with the scores of all folds' predictions taken together.

    No AUC of those: the folds' networks are not on one scale, their ranks do not mix.
    """
    lines = [
        f"{record.data}: {len(record.classes)} classes ({', '.join(record.classes)}), features "
        f"{record.embedder or 'unknown'} of {record.source['name']}",
        f"{record.split_rule}",
        "",
        "fold  seed  train   val  test  " + "  ".join(f"{name:>17}" for name in SHOWN),
    ]
    for fold in record.folds:
        figures = "  ".join(f"{figure(fold['scores'].get(name)):>17}" for name in SHOWN)
        counts = "  ".join(f"{fold[part]:>4}" for part in ("train", "val", "test"))  # type: ignore[literal-required]
        lines.append(f"{fold['fold']:>4}  {fold['seed']:>4}   {counts}  {figures}")
    summary = record.summary
    means = "  ".join(
        f"{figure(summary[name][0]) + ' ± ' + figure(summary[name][1]):>17}" for name in SHOWN
    )
    counted = {name: None if name in OF_RANKS else together.get(name) for name in SHOWN}
    alone = "  ".join(f"{figure(counted[name]):>17}" for name in SHOWN)
    lines += [f"{'mean ± sd':<30} {means}", f"{'all folds together':<30} {alone}"]
    lines += [f"note: {note}" for note in record.notes]
    return "\n".join([*lines, "", f"{out / 'result.json'}"])


def figure(value: float | None) -> str:
    """Three decimals, a hyphen for what is undefined."""
    return "-" if value is None else f"{value:.3f}"
