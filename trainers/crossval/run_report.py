"""What all folds came to: result.json, predictions.csv and the table that is printed."""
# n predictions of all folds, C classes

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from latentds_trainers.crossval.cross_validation import CrossValidation, FoldOutcome
from latentds_trainers.engine.checkpoints import package_versions
from latentds_trainers.engine.settings import jsonable

from latentds.core.display import say
from latentds.evaluation.predictions import Predictions, fold_predictions, join_predictions
from latentds.evaluation.records import RunRecord, write_record
from latentds.evaluation.statistics import Summary, summary

MEAN = "mean ± sd"


def run_record(run: CrossValidation, outcomes: Sequence[FoldOutcome], **values: Any) -> RunRecord:
    """The run's record.

    values  what the run itself does not know: data, source, embedder, model, classes, split_rule,
            primary, settings, notes, related
    """
    command = ["python", "-m", f"latentds_trainers.{run.task}", *sys.argv[1:]]
    return RunRecord(
        task=run.task,
        seeds=run.seeds,
        split_id=run.split_id,
        folds=[outcome.result() for outcome in outcomes],
        versions=package_versions(),
        command=shlex.join(command),
        **values,
    )


def told_settings(config: Any) -> dict[str, Any]:
    """A config's settings with those of its preset, paths by their last part, as JSON values."""
    settings = dataclasses.asdict(config) | dataclasses.asdict(config.settings)
    told = {n: v.name if isinstance(v, Path) else v for n, v in settings.items()}
    return {name: jsonable(value) for name, value in told.items()}


def pooled_predictions(
    run: CrossValidation,
    outcomes: Sequence[FoldOutcome],
    labels: np.ndarray,
    classes: Sequence[str],
) -> Predictions:
    """The predictions of all folds and seeds, in the order of fold, seed and item.

    labels  int64, of all items
    """
    parts = [
        fold_predictions(
            outcome.fold,
            outcome.seed,
            items=outcome.items,
            groups=outcome.groups,
            labels=labels[run.folds[outcome.fold].test],
            probabilities=np.array(outcome.found),
            classes=classes,
        )
        for outcome in outcomes
    ]
    return join_predictions(parts).sorted()


def write_result(out: Path, record: RunRecord, table: str, *, is_json: bool) -> None:
    path = write_record(out, record)
    say(json.dumps(record.to_json(), indent=1) if is_json else f"{table}\n\n{path}")


def run_table(
    record: RunRecord,
    heading: str,
    *,
    shown: Sequence[str],
    rows: Mapping[str, Mapping[str, str]] | None = None,
    per_class: Sequence[str] = (),
    more: Sequence[str] = (),
) -> str:
    """The record as text: folds, their mean, other rows, classes, notes.

    shown      the metrics that are columns
    rows       further rows below the mean: cells by metric
    per_class  the scores of classes that are columns of a second table
    more       lines between the two
    """
    cells = {MEAN: {name: spread(record.summarize(name)) for name in shown}} | dict(rows or {})
    first = max(30, *(len(name) for name in cells))
    lines = [heading, record.split_rule, ""]
    lines.append(f"{'fold  seed  train   val  test':<{first}}" + line_of(shown))
    for fold in record.folds:
        counts = f"{fold['train']:>5}  {fold['val']:>4}  {fold['test']:>4}"
        head = f"{fold['fold']:>4}  {fold['seed']:>4}  {counts}"
        figures = [figure(fold["scores"].get(name)) for name in shown]
        lines.append(f"{head:<{first}}" + line_of(figures))
    lines += [
        f"{name:<{first}}" + line_of([c.get(m, "-") for m in shown]) for name, c in cells.items()
    ]
    lines += ["", *more] if more else []
    if per_class:
        lines += ["", f"{'class':<{first}}" + line_of(per_class)]
        lines += [
            f"{name:<{first}}" + class_line(record, name, per_class) for name in record.classes
        ]
    return "\n".join([*lines, *(f"note: {note}" for note in record.notes)])


def line_of(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>19}" for cell in cells)


def class_line(record: RunRecord, name: str, metrics: Sequence[str]) -> str:
    """Means and deviations of a class's scores over the folds that have them."""
    scores = [fold["per_class"].get(name, {}) for fold in record.folds]
    return line_of([spread(summary(row.get(metric) for row in scores)) for metric in metrics])


def spread(values: Summary) -> str:
    mean, sd = figure(values.mean), figure(values.sd)
    return mean if values.sd is None else f"{mean} ± {sd}"


def figure(value: float | None) -> str:
    """Four decimals, a hyphen for what is undefined."""
    return "-" if value is None else f"{value:.4f}"
