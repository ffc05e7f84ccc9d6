"""The comparison as JSON values: families with their rows, differences and the paper's figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latentds_tools.comparison.run_pairing import (
    Bootstrap,
    Family,
    RunRow,
    kind_of,
    pair,
    setting_notes,
)
from latentds_tools.reports.commands import check_known
from latentds_tools.reports.paper_tables import paper_tables

from latentds.errors import unknown_name
from latentds.evaluation.segmentation import derive_iou, derive_precision
from latentds.evaluation.statistics import Difference
from latentds.version import __version__

FORMAT = "latentds-comparison/1"
PER_CLASS = {"sampath": "dice"}  # else f1
FINE_TUNED = "-path"  # how the authors' decoders are called


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
            "is_row": all(value.get("n") == len(row.record.folds) for value in scores.values()),
        }
        for name, scores in row.record.related.items()
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


def paper_column(family: Family, table: str) -> str | None:
    """The column (brca, nct, bcss, crag) of the family's data and task, None for none.

    table  auto, table2, table3 or none. Data sets are told by their classes or names; table2, asked
           for by name, has one column a task, whatever the data set is called.
    """
    columns = paper_tables("evaluations")["columns"]
    own = {
        name: column
        for name, column in columns.items()
        if column["task"] == family.task and table in ("auto", column["table"])
    }
    for name, column in own.items():
        if is_of(family, column):
            return str(name)
    return next(iter(own)) if table != "auto" and len(own) == 1 else None


def is_of(family: Family, column: dict[str, Any]) -> bool:
    if column["classes"] and set(family.rows[0].record.classes) == set(column["classes"]):
        return True
    names = [family.data, *(row.record.data for row in family.rows)]
    names += [str(row.record.settings.get("preset") or "") for row in family.rows]
    return any(word in name.lower() for name in names for word in column["words"])


def paper_key(row: RunRow) -> tuple[str, bool, bool]:
    """A row's source as the paper tells them apart: codec or autoencoder, fine-tuned, quantized."""
    facts = row.record.source
    if kind_of(facts) == "original":
        return "original", False, False
    network = str(facts.get("autoencoder") or "")
    if not network:
        return str(facts.get("codec") or row.name), False, False
    is_tuned = bool(facts.get("fine_tuned")) or has_authors_decoder(facts)
    return network.removesuffix(FINE_TUNED), is_tuned, bool(facts.get("quantized"))


def has_authors_decoder(facts: dict[str, Any]) -> bool:
    """Whether the decoder is one that the paper's authors fine-tuned."""
    return any(str(facts.get(key) or "").endswith(FINE_TUNED) for key in ("autoencoder", "decoder"))


def find_own(rows: Sequence[RunRow], key: tuple[str, bool, bool], keys: set[Any]) -> list[Any]:
    """Our rows, with notes, that correspond to one of the paper's with these keys."""
    found = []
    for row in rows:
        own, notes = paper_key(row), []
        if own not in keys and own[2]:
            own = (own[0], own[1], False)
            notes.append("quantized here, not in the paper")
        if own != key:
            continue
        if own[1] and not has_authors_decoder(row.record.source):
            notes.append("a decoder of one's own")
        found.append({"row": row.name, "notes": notes})
    return found


def paper_part(family: Family, table: str) -> dict[str, Any] | None:
    """The paper's rows with ours beside them; None where it has none of this data and task.

    rows  source, label, fine_tuned, quantized, values in per cent, derived (see `derive`), and
          `ours`: names of our rows with notes
    """
    name = paper_column(family, table)
    if name is None:
        return None
    tables = paper_tables("evaluations")
    column, rows = tables["columns"][name], tables["rows"][name]
    keys = {(source, tuned, quantized) for source, tuned, quantized, _ in rows}
    metrics = {metric for row in family.rows for metric in row.metrics()}
    return {
        "column": name,
        "table": column["table"],
        "title": column["title"],
        "source": tables["source"],
        "metrics": {key: m if m in metrics else None for key, m in column["metrics"].items()},
        "notes": column["notes"],
        "rows": [
            {
                "source": source,
                "label": tables["labels"][source],
                "fine_tuned": tuned,
                "quantized": quantized,
                "values": values,
                "derived": derive(name, source, values),
                "ours": find_own(family.rows, (source, tuned, quantized), keys),
            }
            for source, tuned, quantized, values in rows
        ],
    }


def derive(column: str, source: str, values: dict[str, float]) -> dict[str, float]:
    """What follows from a row's figures: SD-3's sizes as Table 1 counts, CRAG's IoU, precision."""
    found: dict[str, float] = {}
    if source == "sd3" and "kilobytes" in values:
        found["kilobytes"] = 2 * values["kilobytes"]
    if column == "crag":
        dice, recall = values["dice"] / 100, values["iou"] / 100
        found["iou_of_dice"] = round(100 * derive_iou(dice), 2)
        found["precision"] = round(100 * derive_precision(dice, recall), 2)
    return found
