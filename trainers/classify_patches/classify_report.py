"""What folds of patches came to: result.json, predictions.csv, confusion.csv, the table."""
# n test patches of a fold, K classes

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from latentds_trainers.classify_patches.config import ClassifyConfig
from latentds_trainers.classify_patches.patch_inputs import LabelledPatches
from latentds_trainers.crossval.cross_validation import (
    CrossValidation,
    FoldOutcome,
    Tested,
    pooled_predictions,
    run_record,
    run_table,
    spread,
    write_result,
)
from latentds_trainers.engine.settings import plain

from latentds.embedders import EmbedderCard
from latentds.evaluation.folds import Fold
from latentds.evaluation.patchsets.coded_patches import codebook_note
from latentds.evaluation.patchsets.patch_set import SourceFacts
from latentds.evaluation.predictions import write_predictions
from latentds.evaluation.probes import FittedProbe
from latentds.evaluation.records import RunRecord
from latentds.evaluation.scores import classification_scores
from latentds.evaluation.statistics import summary
from latentds.sources.csv_tables import write_table
from latentds.sources.slide_names import some

CONFUSION = "confusion.csv"
PRIMARY = "accuracy"
COLOUR = "colour-histogram"
NCT_CRC = {"ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"}
NCT_BIAS = (
    "NCT-CRC-HE is biased: its classes differ in JPEG artefacts and colour, and a colour histogram "
    "alone reaches over 82 % accuracy (arXiv 2409.11546); see the colour-histogram row"
)
LEAK = (
    "folds are drawn patch by patch, as no patient or slide is known: patches of one patient are "
    "in training and test sets at once, and figures are higher than on new patients"
)
SHARED_TEST = (
    "all folds are tested on one test set: deviation and interval over folds do not contain the "
    "sampling error of that set"
)
MEASURED = ("data", "bytes_per_patch", "codebook")  # do not say which source it is, or say more


def score_fold(
    patches: LabelledPatches,
    fold: Fold,
    fitted: FittedProbe,
    colour: FittedProbe,
    colours: np.ndarray,
) -> Tested:
    """The scores of what was fitted; beside them, those of colour histograms (N, 96)."""
    labels, classes = patches.labels[fold.test], patches.classes
    own = classification_scores(labels, fitted.probabilities, classes)
    histogram = classification_scores(labels, colour.probabilities, classes)
    remarks = [f"{COLOUR}: {colour.remark}" if colour.remark else "", fitted.remark]
    return Tested(
        found=np.asarray(fitted.probabilities, np.float64),
        scores=own.values,
        per_class=own.per_class,
        notes=[*own.notes, *filter(None, remarks)],
        facts={
            "confusion": own.confusion,
            "colour": histogram.values,
            "copies": [patches.items[row] for row in find_copies(fold, colours)],
        },
    )


def find_copies(fold: Fold, colours: np.ndarray) -> list[int]:
    """Tested rows that have the very colour histogram of a patch trained on, as copies have.

    Copies that are turned or mirrored are found too; patches of one colour level are left out.
    """
    trained = {colours[row].tobytes() for row in fold.train.tolist()}
    return [
        row
        for row in fold.test.tolist()
        if np.count_nonzero(colours[row]) > len("RGB") and colours[row].tobytes() in trained
    ]


def source_identity(facts: SourceFacts) -> dict[str, Any]:
    """The facts that say which pixels they are."""
    kept = {name: value for name, value in facts.to_json().items() if name not in MEASURED}
    return kept | {"codebook_id": facts.codebook.get("codebook_id")}


def report(
    config: ClassifyConfig,
    run: CrossValidation,
    patches: LabelledPatches,
    outcomes: Sequence[FoldOutcome],
    *,
    source: dict[str, Any],
    embedder: EmbedderCard | None,
    images_a_step: int | None,
) -> None:
    """Write result.json, predictions.csv and confusion.csv, and print the result.

    images_a_step  of a training, over all ranks; None for a probe
    """
    colours = [outcome.facts["colour"] for outcome in outcomes]
    colour = {name: summary(row[name] for row in colours) for name in colours[0]}
    record = run_record(
        run,
        outcomes,
        data=Path(config.location).name or config.data.resolve().name,
        source=source,
        embedder=embedder.name if embedder else None,
        model=config.model,
        classes=list(patches.classes),
        split_rule=f"{config.protocol}, {config.folds} folds; groups: {patches.group_rule}",
        primary=PRIMARY,
        settings=plain(config)
        | {
            "embedder_weights": embedder.weights_id if embedder else None,
            "images_a_step": images_a_step,
        },
        notes=notes_of(config, patches, outcomes),
        related={COLOUR: {name: found.to_json() for name, found in colour.items()}},
    )
    write_confusion(config.out, patches.classes, outcomes)
    predictions = pooled_predictions(run, outcomes, patches.labels, patches.classes)
    write_predictions(config.out, predictions)
    text = run_table(
        record,
        heading(record, len(patches)),
        shown=record.metrics(),
        rows={COLOUR: {name: spread(found) for name, found in colour.items()}},
        per_class=("recall", "precision", "f1"),
    )
    write_result(config.out, record, text, is_json=config.json)


def heading(record: RunRecord, patches: int) -> str:
    with_what = f"{record.model} of {record.embedder}" if record.embedder else record.model
    height, width = record.source["patch_px"]
    return (
        f"{record.data}: {patches:,} patches of {width}x{height} px, {len(record.classes)} "
        f"classes; {with_what}"
    )


def write_confusion(out: Path, classes: Sequence[str], outcomes: Sequence[FoldOutcome]) -> None:
    """Write confusion.csv: how often a class (row) was taken for another (column).

    Folds are added up: of a test set that they share, every patch counts once a fold.
    """
    counts = np.sum([outcome.facts["confusion"] for outcome in outcomes], axis=0).tolist()
    rows = [[name, *row] for name, row in zip(classes, counts, strict=True)]
    write_table(out / CONFUSION, ["label", *classes], rows)


def notes_of(
    config: ClassifyConfig, patches: LabelledPatches, outcomes: Sequence[FoldOutcome]
) -> list[str]:
    """What a reader of the figures has to know."""
    notes = list(patches.notes)
    if {name.upper() for name in patches.classes} == NCT_CRC:
        notes.append(NCT_BIAS)
    if config.protocol != "val7k" and len(set(patches.groups)) == len(patches.groups):
        notes.append(LEAK)
    if config.protocol == "val7k":
        notes.append(SHARED_TEST)
    copies = list(dict.fromkeys(n for outcome in outcomes for n in outcome.facts.get("copies", ())))
    if copies:
        notes.append(
            f"{len(copies):,} tested patches are in training too, it seems, as copies that may be "
            f"turned or mirrored (every colour is as frequent in both): {some(copies)}. Take them "
            "out, or name in --groups what belongs together"
        )
    if config.test_data is None:  # else the codebook is fitted to the training set alone
        codebook = patches.sets[0].facts().codebook
        notes += filter(None, [codebook_note(codebook, test_is_apart=config.protocol == "val7k")])
    for text in dict.fromkeys(note for outcome in outcomes for note in outcome.notes):
        folds = [str(outcome.fold) for outcome in outcomes if text in outcome.notes]
        notes.append(f"fold {', '.join(folds)}: {text}")
    return notes
