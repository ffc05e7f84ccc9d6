"""Run folders of evaluations, written by the real writers from drawn predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from latentds.evaluation.folds import Fold, split_id, stratified_group_folds
from latentds.evaluation.predictions import Predictions, join_predictions, write_predictions
from latentds.evaluation.records import RunRecord, write_record
from latentds.evaluation.scores import classification_scores
from latentds.evaluation.segmentation import (
    COMPAT_REASON,
    Confusion,
    correct_scores,
    sampath_compat_scores,
)
from latentds.sources.csv_tables import write_table

SLIDES, PATIENTS = 120, 60
ORIGINAL = {"name": "original", "kind": "original", "bytes_per_patch": 100 * 1024.0}


def network(name: str = "dcae-f32+kmeans", kilobytes: float = 2.0, **facts: Any) -> dict[str, Any]:
    """Facts of latents."""
    base = {
        "name": name, "kind": "latents", "codec": name, "autoencoder": name.partition("+")[0],
        "decoder": None, "fine_tuned": False, "quantized": "+" in name,
        "bytes_per_patch": kilobytes * 1024, "patch_px": [256, 256],
    }  # fmt: skip
    return base | facts


def picture(name: str, kilobytes: float) -> dict[str, Any]:
    """Facts of a picture format."""
    return {
        "name": name, "kind": "codec", "codec": name, "autoencoder": None, "quantized": False,
        "bytes_per_patch": kilobytes * 1024,
    }  # fmt: skip


def cohort(folds: int, fold_seed: int) -> tuple[np.ndarray, list[str], list[str], list[Fold]]:
    """Labels, patients, slides and folds; every patient has two slides of one class."""
    patients = [f"p{number % PATIENTS:02d}" for number in range(SLIDES)]
    slides = [f"s{number:03d}" for number in range(SLIDES)]
    labels = np.arange(SLIDES) % PATIENTS % 3 // 2  # a third is of class 1
    made = stratified_group_folds(labels, patients, folds=folds, seed=fold_seed)
    return labels, patients, slides, made


def fold_predictions(
    number: int,
    seed: int,
    fold: Fold,
    *,
    items: list[str],
    groups: list[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    classes: list[str],
) -> Predictions:
    """The predictions of one fold's test items, of values of all items."""
    rows = fold.test
    return Predictions(
        folds=np.full(len(rows), number, np.int64),
        seeds=np.full(len(rows), seed, np.int64),
        items=[items[row] for row in rows],
        groups=[groups[row] for row in rows],
        labels=labels[rows],
        probabilities=probabilities[rows].astype(np.float64),
        classes=classes,
    )


def classify(
    folder: Path,
    source: dict[str, Any],
    strength: float = 1.0,
    *,
    folds: int = 5,
    fold_seed: int = 0,
    seeds: tuple[int, ...] = (0,),
    bias: float = 0.0,
    other_labels: int = 0,
    **changes: Any,
) -> Path:
    """A run of abmil whose predictions are the better the higher `strength` is.

    bias  added to the logits of the second class
    other_labels  how many of the first class are said to be of the second, in the same folds
    """
    labels, patients, slides, made = cohort(folds, fold_seed)
    labels[np.flatnonzero(labels == 0)[:other_labels]] = 1
    classes = ["IDC", "ILC"]
    parts, results = [], []
    for seed in seeds:
        logits = (
            np.random.default_rng(seed).normal(size=SLIDES) + strength * (2 * labels - 1) + bias
        )
        values = np.stack([1 / (1 + np.exp(logits)), 1 / (1 + np.exp(-logits))], axis=1)
        for number, fold in enumerate(made):
            scores = classification_scores(labels[fold.test], values[fold.test], classes)
            results.append(
                {"fold": number, "seed": seed, **fold.sizes(), "scores": scores.values}
                | {"per_class": scores.per_class}
            )
            parts.append(
                fold_predictions(
                    number, seed, fold, items=slides, groups=patients, labels=labels,
                    probabilities=values, classes=classes,
                )
            )  # fmt: skip
    values_of = {
        "task": "abmil", "data": "brca", "source": source, "embedder": "uni", "model": "abmil",
        "classes": classes, "seeds": list(seeds), "split_id": split_id(made, slides),
        "split_rule": "StratifiedGroupKFold", "primary": "auc", "folds": results,
        "settings": {"lr": 1e-4, "out": str(folder), "counts": [[0]]},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder, join_predictions(parts))
    write_record(folder, RunRecord(**(values_of | changes)))
    return folder


def segment(
    folder: Path,
    source: dict[str, Any],
    errors: int = 10,
    *,
    seeds: tuple[int, ...] = (0, 1),
    **changes: Any,
) -> Path:
    """A run of sampath on glands with about that many wrong pixels of 100 a kind."""
    results = []
    for seed in seeds:
        wrong = errors + seed
        counts = [[0, 0, 0], [0, 1000 - wrong, wrong], [0, 2 * wrong, 400 - 2 * wrong]]
        confusion = Confusion(["unlabelled", "background", "gland"], counts)
        correct = correct_scores(confusion, left_out=[0, 1])
        compat = {
            f"sampath_{name}": value
            for name, value in sampath_compat_scores(confusion, ignored_metric=1).items()
        }
        results.append(
            {"fold": 0, "seed": seed, "train": 173, "val": 0, "test": 40}
            | {"scores": correct.scores | compat, "per_class": correct.per_class}
        )
    values = {
        "task": "sampath", "data": "crag", "source": source, "embedder": "hipt",
        "model": "sam-path", "classes": ["unlabelled", "background", "gland"],
        "seeds": list(seeds), "split_id": "c0ffee", "split_rule": "the csv's folds",
        "primary": "dice_macro", "folds": results, "notes": [COMPAT_REASON],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        [0, seed, f"i{image:02d}", f"p{image // 2}", 0.9 - (errors + seed + image % 3) / 100]
        for seed in seeds
        for image in range(10)
    ]
    write_table(folder / "images.csv", ["fold", "seed", "item", "group", "dice_macro"], rows)
    write_record(folder, RunRecord(**(values | changes)))
    return folder
