"""The paper's figures beside ours, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latentds_tools.comparison.cells import flags, score, size, title
from latentds_tools.reports.markdown import ABSENT, bullets, table

NAMES = {"dice": "Dice", "f1": "F1", "iou": "IoU"}
DERIVED = {  # what follows from the paper's figures, and our correct score of it
    "iou_of_dice": ("IoU of the Dice", "jaccard_macro"),
    "precision": ("precision", "precision_macro"),
}


def paper_parts(families: Sequence[dict[str, Any]]) -> list[str]:
    """The paper's rows with ours beside them: a section a column, a table a family."""
    columns: dict[str, list[dict[str, Any]]] = {}
    for family in families:
        if family["paper"] is not None:
            columns.setdefault(family["paper"]["column"], []).append(family)
    parts = []
    for members in columns.values():
        paper = members[0]["paper"]
        parts.append(f"## Beside the paper's {paper['title']} (Table {paper['table'][-1]})")
        parts.append(f"The paper's figure / ours. {paper['source']}.")
        for family in members:
            parts += [f"Ours: {family['title']}.", paper_table(family, family["paper"])]
        remarks = dict.fromkeys(paper["notes"])
        lines = [line for family in members for line in family["paper"]["rows"]]
        remarks |= dict.fromkeys(
            f"`{own['row']}`: {'; '.join(own['notes'])}."
            for line in lines
            for own in line["ours"]
            if own["notes"]
        )
        parts.append(bullets(remarks))
    return parts


def paper_table(family: dict[str, Any], paper: dict[str, Any]) -> str:
    """Figures side by side, and how far each is from its own originals."""
    names = list(paper["metrics"])
    derived = [name for name in DERIVED if name in paper["rows"][0]["derived"]]
    has_size = "kilobytes" in paper["rows"][0]["values"]
    rows = []
    for line in paper["rows"]:
        ours = [
            next(row for row in family["rows"] if row["source"] == own["row"])
            for own in line["ours"]
        ] or [None]
        rows += [paper_line(family, paper, line, row) for row in ours]
    header = ["in the paper", "FT", "Quant", "ours", *(["Size, KB"] if has_size else [])]
    titles = [NAMES.get(name) or metric_title(paper["metrics"][name]) for name in names]
    header += [*titles, f"{titles[0]} above originals"]
    return table(header + [DERIVED[name][0] for name in derived], rows)


def metric_title(metric: str | None) -> str:
    """What a score is called that the paper does not name."""
    return f"score ({title(metric)} here)" if metric else "score"


def paper_line(
    family: dict[str, Any], paper: dict[str, Any], line: dict[str, Any], row: dict[str, Any] | None
) -> list[str]:
    values, first = line["values"], paper["rows"][0]["values"]
    own = next((r for r in family["rows"] if r["kind"] == "original"), None)
    is_network = line["source"] != "original" and ":" not in line["source"]
    cells = [line["label"], *flags(line | {"is_network": is_network})]
    cells.append(f"`{row['source']}`" if row else ABSENT)
    if "kilobytes" in values:
        right = line["derived"].get("kilobytes")
        note = f" ({right:,})" if right else ""
        cells.append(f"{values['kilobytes']:,}{note} / {size(row)}")
    for name, metric in paper["metrics"].items():
        spread = f" ± {values[f'{name}_sd']:.2f}" if f"{name}_sd" in values else ""
        cells.append(f"{values[name]:.2f}{spread} / {score(row, metric)}")
    leading, metric = next(iter(paper["metrics"].items()))
    ours, origin = mean_of(row, metric), mean_of(own, metric)
    moved = ABSENT if ours is None or origin is None else f"{100 * (ours - origin):+.2f}"
    cells.append(f"{values[leading] - first[leading]:+.2f} / {moved}")
    for name, (_, correct) in DERIVED.items():
        if name in line["derived"]:
            cells.append(f"{line['derived'][name]:.2f} / {score(row, correct)}")
    return cells


def mean_of(row: dict[str, Any] | None, metric: str | None) -> float | None:
    found = None if row is None or metric is None else row["scores"].get(metric)
    return found["mean"] if found else None
