"""Which columns and rows of the paper's Tables 2 and 3 ours correspond to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latentds_tools.comparison.run_reading import Family, RunRow, kind_of
from latentds_tools.reports.paper_tables import paper_tables

from latentds.errors import InputError
from latentds.evaluation.segmentation import derive_iou, derive_precision

FINE_TUNED = "-path"  # how the authors' decoders are called


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


def check_columns(families: Sequence[Family], table: str) -> None:
    """InputError where a table was asked for and no family has a column of it."""
    if table in ("table2", "table3") and not any(paper_column(f, table) for f in families):
        known_columns = paper_tables("evaluations")["columns"].values()
        columns = [c for c in known_columns if c["table"] == table]
        known = ", ".join(f"{c['title']} ({c['task']})" for c in columns)
        own = "; ".join(f"{family.task}, {family.title}" for family in families)
        raise InputError(
            f"--paper {table}: it is of {known}; the runs are of {own}. Name the data set's folder "
            "after it, or leave --paper out"
        )


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
