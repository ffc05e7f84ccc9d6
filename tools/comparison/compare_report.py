"""The comparison as JSON values: families with their rows, differences and the paper's figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latentds_tools.comparison.paper_columns import paper_key, paper_part
from latentds_tools.comparison.run_pairing import Bootstrap, pair, setting_notes
from latentds_tools.comparison.run_reading import Family, RunRow, kind_of
from latentds_tools.reports.commands import check_known

from latentds.errors import unknown_name
from latentds.evaluation.statistics import Difference
from latentds.version import __version__

FORMAT = "latentds-comparison/1"
PER_CLASS = {"sampath": "dice"}  # else f1


def make_report(
    families: Sequence[Family],
    *,
    reference: str | None,
    metric: str | None,
    paper: str,
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """All of it.

    reference  a source's or run folder's name; None for the originals, or the first row
    metric     that tables lead with; None for what the runs lead with
    raises     UnknownNameError for a reference or metric that no family has
    """
    check_names(families, reference, metric)
    return {
        "format": FORMAT,
        "bootstrap": {"over": bootstrap.over, "draws": bootstrap.draws, "seed": bootstrap.seed},
        "families": [describe_family(f, reference, metric, paper, bootstrap) for f in families],
        "version": __version__,
    }


def check_names(families: Sequence[Family], reference: str | None, metric: str | None) -> None:
    if reference is not None and not any(family.find(reference) for family in families):
        names = {row.name for family in families for row in family.rows}
        raise unknown_name("reference", reference, names)
    metrics = {name for family in families for row in family.rows for name in row.metrics()}
    check_known("metric", [metric] if metric is not None else [], metrics)


def find_reference(family: Family, name: str | None) -> RunRow | None:
    if name is not None:
        return family.find(name)
    originals = (row for row in family.rows if kind_of(row.record.source) == "original")
    return next(originals, family.rows[0])


def describe_family(
    family: Family, reference: str | None, metric: str | None, paper: str, bootstrap: Bootstrap
) -> dict[str, Any]:
    against = find_reference(family, reference)
    leading = (against or family.rows[0]).record
    has_metric = any(metric in row.metrics() for row in family.rows)
    primary = metric if metric and has_metric else leading.primary
    return {
        "task": family.task,
        "data": family.data,
        "model": family.model,
        "embedder": family.embedder,
        "title": family.title,
        "metric": primary,
        "classes": leading.classes,
        "reference": against.name if against else None,
        "rows": [
            describe_row(row, against, primary, family.task, bootstrap) for row in family.rows
        ],
        "related": describe_related(against or family.rows[0]),
        "notes": [*reference_notes(family, against, reference), *family_notes(family, against)],
        "paper": paper_part(family, paper),
    }


def describe_row(
    row: RunRow, against: RunRow | None, metric: str, task: str, bootstrap: Bootstrap
) -> dict[str, Any]:
    facts, cells = row.record.source, row.cells
    stored = facts.get("bytes_per_patch")
    found: Difference | str = "no reference" if against is None else ""
    if against is not None and row is not against:
        found = pair(row, against, metric, bootstrap)
    return {
        "source": row.name,
        "kind": kind_of(facts),
        "fine_tuned": paper_key(row)[1],
        "quantized": bool(facts.get("quantized")),
        "is_network": bool(facts.get("autoencoder")),
        "kilobytes": stored / 1024 if stored else None,
        "patch_px": facts.get("patch_px"),
        "runs": [str(run.folder) for run in row.runs],
        "split_ids": sorted({cell[0] for cell in cells}),
        "folds": len({cell[:2] for cell in cells}),
        "seeds": sorted({cell[2] for cell in cells}),
        "scores": {name: row.summarize(name).to_json() for name in row.metrics()},
        "per_class": row.per_class(PER_CLASS.get(task, "f1")),
        "difference": found.to_json() if isinstance(found, Difference) else None,
        "not_paired": found if isinstance(found, str) and found else None,
    }


def describe_related(row: RunRow) -> list[dict[str, Any]]:
    """Other rows that a run brings along, such as the baseline of colour histograms.

    is_row  whether they are of the same folds: a row of the table
    """
    return [
        {
            "name": name,
            "of": row.name,
            "scores": scores,
            "is_row": all(value.get("n") == len(run.record.folds) for value in scores.values()),
        }
        for run in row.runs[:1]
        for name, scores in run.record.related.items()
    ]


def reference_notes(family: Family, against: RunRow | None, asked: str | None) -> list[str]:
    """That the first row is the reference for want of originals, and classes never predicted."""
    notes = []
    is_original = against is None or kind_of(against.record.source) == "original"
    if asked is None and against is not None and not is_original and len(family.rows) > 1:
        notes.append(
            f"No run is of the originals: differences are to the first, {against.name}; "
            "--reference names another."
        )
    for row in family.rows:
        lost = never_predicted(row)
        if lost:
            few = f"class {lost[0]!r} is" if len(lost) == 1 else f"classes {', '.join(lost)} are"
            notes.append(f"{row.name}: {few} never predicted, in no fold.")
    return notes


def never_predicted(row: RunRow) -> list[str]:
    """Classes that have test items and no prediction in any fold: their precision is undefined."""
    folds = [fold["per_class"] for fold in row.cells.values()]
    return [
        name
        for name in dict.fromkeys(name for fold in folds for name in fold)
        if all("precision" in fold.get(name, {}) for fold in folds)
        and all(fold[name]["precision"] is None for fold in folds)
        and any(fold[name].get("recall") is not None for fold in folds)
    ]


def family_notes(family: Family, against: RunRow | None) -> list[str]:
    """What a reader has to know of the rows, each thing once, in sentences."""
    notes = [note for row in family.rows for run in row.runs for note in run.record.notes]
    if against is not None:
        for row in family.rows:
            notes += setting_notes(row, against) if row is not against else []
    rules = dict.fromkeys(run.record.split_rule for row in family.rows for run in row.runs)
    notes += [f"Folds: {rule}" for rule in rules if rule]
    return [f"{note.rstrip('.')}." for note in dict.fromkeys(notes)]
