"""Predictions of all folds of a run: predictions.csv."""
# n predictions, C classes

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentds.errors import InputError
from latentds.sources.csv_tables import TextTable, read_table, write_table

FILE = "predictions.csv"
COLUMNS = ("fold", "seed", "item", "group", "label", "prediction")
PROBABILITY = "probability_"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """What was predicted of the test items of folds and seeds.

    folds, seeds   int64 (n,)
    items, groups  names (n)
    labels         int64 (n,), places in `classes`
    probabilities  float64 (n, C)
    """

    folds: np.ndarray
    seeds: np.ndarray
    items: list[str]
    groups: list[str]
    labels: np.ndarray
    probabilities: np.ndarray
    classes: list[str]

    def __len__(self) -> int:
        return len(self.items)

    def select(self, rows: np.ndarray) -> Predictions:
        return Predictions(
            folds=self.folds[rows],
            seeds=self.seeds[rows],
            items=[self.items[row] for row in rows],
            groups=[self.groups[row] for row in rows],
            labels=self.labels[rows],
            probabilities=self.probabilities[rows],
            classes=self.classes,
        )

    def sorted(self) -> Predictions:
        return self.select(np.lexsort((np.array(self.items), self.seeds, self.folds)))


def join_predictions(parts: Sequence[Predictions]) -> Predictions:
    """All of them, one after another; they have the same classes."""
    return Predictions(
        folds=np.concatenate([part.folds for part in parts]),
        seeds=np.concatenate([part.seeds for part in parts]),
        items=[item for part in parts for item in part.items],
        groups=[group for part in parts for group in part.groups],
        labels=np.concatenate([part.labels for part in parts]),
        probabilities=np.concatenate([part.probabilities for part in parts]),
        classes=parts[0].classes,
    )


def write_predictions(folder: Path, predictions: Predictions) -> Path:
    """predictions.csv: fold, seed, item, group, label, prediction, probability_<class>..."""
    found = predictions
    names, taken = found.classes, found.probabilities.argmax(axis=1)
    rows = (
        [
            *(found.folds[row], found.seeds[row], found.items[row], found.groups[row]),
            *(names[found.labels[row]], names[taken[row]]),
            *(f"{value:.9g}" for value in found.probabilities[row]),
        ]
        for row in range(len(found))
    )
    path = folder / FILE
    write_table(path, [*COLUMNS, *(PROBABILITY + name for name in names)], rows)
    return path


def read_predictions(folder: Path) -> Predictions:
    """predictions.csv of a run folder; InputError where it is damaged."""
    table = read_table(folder / FILE)
    classes = [
        name.removeprefix(PROBABILITY) for name in table.columns if name.startswith(PROBABILITY)
    ]
    for column in COLUMNS:
        table.need_column([column], "predictions")
    places = {name: number for number, name in enumerate(classes)}
    foreign = sorted(set(table.values("label")) - set(classes))
    if foreign or len(classes) < 2:
        raise InputError(f"{table.path}: labels {foreign[:5]} are not among its classes {classes}")
    return Predictions(
        folds=numbers(table, ["fold"])[:, 0].astype(np.int64),
        seeds=numbers(table, ["seed"])[:, 0].astype(np.int64),
        items=table.values("item"),
        groups=table.values("group"),
        labels=np.array([places[name] for name in table.values("label")], np.int64),
        probabilities=numbers(table, [PROBABILITY + name for name in classes]),
        classes=classes,
    )


def numbers(table: TextTable, columns: Sequence[str]) -> np.ndarray:
    """Float64 (n, columns); InputError with the line of what is no finite number."""
    values = np.empty((len(table.rows), len(columns)))
    for place, (line, row) in enumerate(zip(table.lines, table.rows, strict=True)):
        try:
            values[place] = [float(row[name]) for name in columns]
        except ValueError as error:
            raise InputError(f"{table.path}, line {line}: {error}") from error
    if not np.isfinite(values).all():
        line = table.lines[int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])]
        raise InputError(f"{table.path}, line {line}: a value that is not finite")
    return values
