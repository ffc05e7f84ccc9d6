"""What folds of bags came to: the record's notes and settings, and the table's last row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentds_trainers.abmil.bag_source import LabelledBags
from latentds_trainers.abmil.config import AbmilConfig
from latentds_trainers.crossval.cross_validation import CrossValidation, FoldOutcome
from latentds_trainers.crossval.run_report import (
    figure,
    pooled_predictions,
    run_record,
    run_table,
    told_settings,
    write_result,
)

from latentds.evaluation.features.features_record import flat
from latentds.evaluation.features.folder import FeatureFolder
from latentds.evaluation.features.live import LiveFeatures
from latentds.evaluation.patchsets.coded_patches import codebook_note
from latentds.evaluation.predictions import write_predictions
from latentds.evaluation.records import RunRecord
from latentds.evaluation.scores import classification_scores
from latentds.sources.slide_names import some

OF_RANKS = ("auc",)  # by the order of probabilities, not by the class each gives
SHOWN = ("auc", "balanced_accuracy", "accuracy", "macro_f1")


def best_is_last(number: int, epochs: int, best: int, select: str) -> list[str]:
    """A sentence where a fold's best epoch is the last one: it may not have come to its end."""
    if select != "best" or best < epochs:
        return []
    return [
        f"fold {number}: the best epoch is the last one ({epochs}); longer training (--epochs) "
        "might have found a better one"
    ]


def report(
    config: AbmilConfig,
    labelled: LabelledBags,
    run: CrossValidation,
    outcomes: Sequence[FoldOutcome],
    bags_a_step: int,
) -> None:
    folder, slides = labelled.bags.folder, labelled.slides
    predictions = pooled_predictions(run, outcomes, slides.targets, slides.classes)
    write_predictions(config.out, predictions)
    place = config.data or config.bags
    made = f"splits of {config.splits.name}" if config.splits else f"{config.folds} folds by seed"
    source = folder.source or {"name": "features", "kind": "features"}
    book = codebook_note(source.get("codebook") or {}, test_is_apart=False)
    lost, found = folder.left_out, dict.fromkeys(n for o in outcomes for n in o.notes)
    record = run_record(
        run,
        outcomes,
        data=place.name if place else "",
        source=source,
        embedder=str(folder.embedder.get("name") or "") or None,
        model="abmil",
        classes=slides.classes,
        split_rule=f"{made}; {len(set(slides.groups))} groups: {slides.group_rule}",
        primary=SHOWN[0],
        settings=told_settings(config) | feature_settings(folder) | {"bags_a_step": bags_a_step},
        notes=[
            *slides.notes,
            *([book] if book else []),
            *([f"{len(lost):,} slides have no features: {some(list(lost))}."] if lost else []),
            *found,
        ],
    )
    together = classification_scores(
        predictions.labels, predictions.probabilities, predictions.classes
    )
    write_result(config.out, record, table(record, together.values), is_json=config.json)


def feature_settings(folder: FeatureFolder | LiveFeatures) -> dict[str, Any]:
    """The embedder's weights, and the options that features.json records, by dotted names."""
    options = flat(folder.record.options, "features.") if folder.record else {}
    return {"embedder.weights_id": folder.embedder.get("weights_id", ""), **options}


def table(record: RunRecord, together: Mapping[str, float | None]) -> str:
    """The record as text, with the scores of all folds' predictions taken together.

    No AUC of those: the folds' networks are not on one scale, their ranks do not mix.
    """
    counted = {name: None if name in OF_RANKS else together.get(name) for name in SHOWN}
    return run_table(
        record,
        f"{record.data}: {len(record.classes)} classes ({', '.join(record.classes)}), features "
        f"{record.embedder or 'unknown'} of {record.source['name']}",
        shown=SHOWN,
        rows={"all folds together": {name: figure(value) for name, value in counted.items()}},
    )
