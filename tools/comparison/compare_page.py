"""The comparison as Markdown, in the shape of the paper's Tables 2 and 3; its plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latentds_tools.reports.markdown import ABSENT, bracketed, bullets, number, table
from latentds_tools.reports.plots import add_legend, make_panels, saved

SEGMENTATION = (  # titles and scores: correct ones, then what SAM-Path's code would report
    ("Dice macro", "dice_macro"),
    ("IoU macro", "jaccard_macro"),
    ("Dice micro = F1", "dice_micro"),
    ("IoU micro", "jaccard_micro"),
    ("compat Dice", "sampath_Dice"),
    ("compat Dice_Bal", "sampath_Dice_Bal"),
    ("compat F1", "sampath_F1"),
    ("compat IoU", "sampath_IOU_Jaccard"),
)
NAMES = {"dice": "Dice", "f1": "F1", "iou": "IoU"}
DERIVED = {  # what follows from the paper's figures, and our correct score of it
    "iou_of_dice": ("IoU of the Dice", "jaccard_macro"),
    "precision": ("precision", "precision_macro"),
}
METRIC_NAMES = {
    "auc": "AUC",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "dice_macro": "Dice macro",
}


PANEL_IN = (6.0, 4.8)  # width and height in inches
COLUMNS, DPI = 2, 130
COLOURS = {
    "original": "C7",
    "picture format": "C1",
    "latents": "C0",
    "latents, decoder fine-tuned": "C2",
}


def write_page(report: dict[str, Any]) -> str:
    families = report["families"]
    segmentations = [family for family in families if family["task"] == "sampath"]
    others = [family for family in families if family["task"] != "sampath"]
    parts = ["# Evaluations compared", lead(report)]
    parts += ["## Classification", *classification_tables(others)] if others else []
    for family in segmentations:
        parts += [f"## Segmentation: {family['title']}", segmentation_table(family)]
    for family in families:
        parts += reasons(family)
    parts += ["## All scores", *(scores_table(f) for f in others)] if others else []
    parts += [*paper_parts(families), *notes(families)]
    return "\n\n".join(part for part in parts if part) + "\n"


def lead(report: dict[str, Any]) -> str:
    drawn = report["bootstrap"]
    if drawn["over"] == "folds":
        what = (
            "over folds, seeds of a fold averaged first (over seeds where there is one fold). "
            "Folds of a cross-validation share training data: the interval is of these folds, and "
            "narrower than one of new patients would be"
        )
    else:
        what = (
            "over groups (patients), whose predictions count as often as they are drawn; of "
            "segmentations, it is the mean of single images' scores that is drawn and shown"
        )
    return (
        "Scores in per cent: mean ± standard deviation over folds and seeds. Difference: to the "
        "reference over the same folds, in points, in brackets the 95 % interval of a paired "
        f"bootstrap {what}. Behind it, in how many folds (seeds, images) the row is above. Size: "
        "of a patch, in KB of 1,024 bytes. FT: a decoder trained anew for latents that were there "
        f"before. Seed of the bootstrap: {drawn['seed']}."
    )


def classification_tables(families: Sequence[dict[str, Any]]) -> list[str]:
    """Table 2, one of each task and data set."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for family in families:
        groups.setdefault((family["task"], family["data"]), []).append(family)
    return [classification_table(members) for members in groups.values()]


def classification_table(families: Sequence[dict[str, Any]]) -> str:
    """A row a source, a pair of columns a family."""
    found: dict[str, list[dict[str, Any] | None]] = {}
    for place, family in enumerate(families):
        for row in family["rows"]:
            found.setdefault(row["source"], [None] * len(families))[place] = row
    originals: list[list[str]] = []
    others: list[list[str]] = []
    for name, rows in found.items():
        there = [row for row in rows if row is not None]
        sizes = dict.fromkeys(size(row) for row in there)
        line = [f"`{name}`", *flags(there[0]), " / ".join(sizes)]
        for family, row_of in zip(families, rows, strict=True):
            line += [score(row_of, family["metric"]), difference(row_of)]
        (originals if there[0]["kind"] == "original" else others).append(line)
    header = ["compression", "FT", "Quant", "Size, KB"]
    for family in families:
        header += [f"{family['title']}: {title(family['metric'])}", "difference"]
    return table(header, originals + others + related_rows(families))


def notes(families: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader has to know, each thing once; unless it is of all families, with theirs."""
    owners: dict[str, list[str]] = {}
    for family in families:
        for note in family["notes"]:
            owners.setdefault(note, []).append(family["title"])
    lines = [
        note if len(titles) == len(families) else f"{'; '.join(titles)}: {note}"
        for note, titles in owners.items()
    ]
    return ["## Notes", bullets(lines)] if lines else []


def related_rows(families: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows that runs bring along, such as a baseline, under the sources."""
    found: dict[str, dict[str, str]] = {}  # by the row's name, scores by the family's title
    for family in families:
        for other in (other for other in family["related"] if other["is_row"]):
            own = mean_sd(other["scores"].get(family["metric"]))
            name = f"{other['name']} of `{other['of']}`"
            found.setdefault(name, {})[family["title"]] = own
    rows = []
    for name, scores in found.items():
        line = [name, *[ABSENT] * 3]
        for family in families:
            line += [scores.get(family["title"], ABSENT), ABSENT]
        rows.append(line)
    return rows


def segmentation_table(family: dict[str, Any]) -> str:
    """Table 3: correct scores, then what SAM-Path's code would report of the same predictions."""
    metrics = {name for row in family["rows"] for name in row["scores"]}
    columns = [(heading, metric) for heading, metric in SEGMENTATION if metric in metrics]
    header = ["compression", "FT", "Quant", "Size, KB", *(heading for heading, _ in columns)]
    rows = [
        [
            *(f"`{row['source']}`", *flags(row), size(row)),
            *(score(row, metric) for _, metric in columns),
            difference(row),
        ]
        for row in family["rows"]
    ]
    return table([*header, f"difference in {title(family['metric'])}"], rows)


def reasons(family: dict[str, Any]) -> list[str]:
    lines = [
        f"`{row['source']}`: not paired, {row['not_paired']}."
        for row in family["rows"]
        if row["not_paired"] and family["reference"]
    ]
    if not family["reference"] and len(family["rows"]) > 1:
        lines = ["No differences: no run here is the one that --reference names."]
    return [f"{family['title']}:\n\n" + bullets(lines)] if lines else []


def scores_table(family: dict[str, Any]) -> str:
    metrics = list(dict.fromkeys(name for row in family["rows"] for name in row["scores"]))
    rows = [
        [
            *(f"`{row['source']}`", str(row["folds"]), str(len(row["seeds"]))),
            *(score(row, metric) for metric in metrics),
        ]
        for row in family["rows"]
    ]
    rows += [
        [f"{other['name']} of `{other['of']}`", ABSENT, ABSENT]
        + [mean_sd(other["scores"].get(metric)) for metric in metrics]
        for other in family["related"]
    ]
    header = [family["title"], "folds", "seeds", *map(title, metrics)]
    return table(header, rows)


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


def title(metric: str | None) -> str:
    """What tables and plots call a score."""
    return METRIC_NAMES.get(str(metric), str(metric))


def flags(row: dict[str, Any]) -> list[str]:
    """FT and Quant; a dash for what is no network."""
    if not row["is_network"]:
        return [ABSENT, ABSENT]
    return ["yes" if row[name] else "no" for name in ("fine_tuned", "quantized")]


def size(row: dict[str, Any] | None) -> str:
    value = None if row is None else row["kilobytes"]
    if value is None:
        return ABSENT
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def score(row: dict[str, Any] | None, metric: str | None) -> str:
    """A row's mean and sd in per cent."""
    return ABSENT if row is None or metric is None else mean_sd(row["scores"].get(metric))


def mean_sd(values: dict[str, Any] | None) -> str:
    """A mean in per cent, with its sd where there is one."""
    if not values or values.get("mean") is None:
        return ABSENT
    if values.get("sd") is None:
        return percent(values["mean"])
    return f"{percent(values['mean'])} ± {percent(values['sd'])}"


def percent(value: float | None) -> str:
    return number(None if value is None else 100 * value, ".2f")


def difference(row: dict[str, Any] | None) -> str:
    """The difference to the reference in points, its interval, wins."""
    if row is None:
        return ABSENT
    found = row["difference"]
    if found is None or found["mean"] is None:
        return "not paired" if row["not_paired"] not in (None, "no reference") else ABSENT
    mean, low, high = (found[name] and 100 * found[name] for name in ("mean", "low", "high"))
    text = bracketed(mean, low, high, "+.2f")
    ties = f", {found['ties']} equal" if found["ties"] else ""
    return f"{text}, {found['wins']} of {found['n']}{ties}"


def draw_differences(report: dict[str, Any]) -> bytes | None:
    """PNG: a panel a family, differences with their intervals; None where nothing is paired."""
    paired = []
    for family in report["families"]:
        rows = [row for row in family["rows"] if row["difference"] is not None]
        rows = [row for row in rows if row["difference"]["mean"] is not None]
        paired += [(family, rows)] if rows else []
    if not paired:
        return None
    figure, axes = make_panels(len(paired), PANEL_IN, COLUMNS)
    for axis, (family, rows) in zip(axes, paired, strict=True):
        for place, row in enumerate(reversed(rows), 1):
            found = row["difference"]
            mean = 100 * found["mean"]
            ends = [mean if found[n] is None else 100 * found[n] for n in ("low", "high")]
            axis.plot(ends, [place, place], color=colour(row), linewidth=2)
            axis.plot([mean], [place], "o", color=colour(row))
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(rows), 0, -1), [row["source"] for row in rows])
        axis.set_ylim(0.4, len(rows) + 0.6)
        low, high = axis.get_xlim()
        axis.set_xlim(min(low, -0.5), max(high, 0.5))
        axis.set_xlabel(
            f"{title(family['metric'])}: points above {family['reference']}, 95 % interval"
        )
        axis.set_title(family["title"], fontsize=10)
        axis.grid(alpha=0.3, axis="x", linewidth=0.5)
    colours = {colour(row) for _, rows in paired for row in rows}
    add_legend(figure, {kind: shade for kind, shade in COLOURS.items() if shade in colours})
    return saved(figure, DPI)


def colour(row: dict[str, Any]) -> str:
    """Of what a source is."""
    if row["kind"] == "original":
        return COLOURS["original"]
    if not row["is_network"]:
        return COLOURS["picture format"]
    return COLOURS["latents, decoder fine-tuned" if row["fine_tuned"] else "latents"]
