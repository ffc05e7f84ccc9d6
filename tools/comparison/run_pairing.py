"""Run folders read and put together, and a row's difference to the reference, or why none.

A family is one task, data set, model and embedder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentds.errors import InputError
from latentds.evaluation.patchsets.patch_set import PatchInput
from latentds.evaluation.predictions import join_predictions, read_predictions
from latentds.evaluation.records import FoldResult, RunRecord, read_record
from latentds.evaluation.scores import METRICS
from latentds.evaluation.statistics import (
    FOLD_DRAWS,
    GROUP_DRAWS,
    Difference,
    Summary,
    paired_bootstrap_groups,
    paired_difference,
    paired_images,
    summary,
)
from latentds.sources.csv_tables import read_table

IMAGES = "images.csv"  # of a segmentation's run folder: scores of single images
# Settings that say where pixels come from, not what is learned.
FREE_SETTINGS = {field.name for field in dataclasses.fields(PatchInput)} | {
    *("out", "bags", "json", "seed", "seeds", "repeats", "pictures", "heat_maps"),
}
Cell = tuple[str, int, int]  # split_id, fold, seed


@dataclasses.dataclass(frozen=True)
class Run:
    folder: Path
    record: RunRecord

    @property
    def source(self) -> str:
        """What its pixels are from; the folder's name where the record does not say."""
        return str(self.record.source.get("name") or self.folder.name)


@dataclasses.dataclass(frozen=True)
class RunRow:
    """Runs of one source: of other seeds where they are several."""

    name: str
    runs: tuple[Run, ...]

    @property
    def record(self) -> RunRecord:
        return self.runs[0].record

    @property
    def cells(self) -> dict[Cell, FoldResult]:
        """Results by folds' identity, fold and seed."""
        return {
            (run.record.split_id, fold["fold"], fold["seed"]): fold
            for run in self.runs
            for fold in run.record.folds
        }

    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for run in self.runs for name in run.record.metrics()))

    def summarize(self, metric: str) -> Summary:
        """Mean and sd over all folds and seeds."""
        return summary(fold["scores"].get(metric) for fold in self.cells.values())

    def per_class(self, metric: str) -> dict[str, float | None]:
        """Mean over folds and seeds of a class's score, by class."""
        tables = [fold["per_class"] for fold in self.cells.values()]
        names = dict.fromkeys(name for table in tables for name in table)
        return {
            name: summary(table.get(name, {}).get(metric) for table in tables).mean
            for name in names
        }


@dataclasses.dataclass(frozen=True)
class Family:
    """Sources to be compared: rows of one task, model and embedder on one data set."""

    task: str
    data: str
    model: str
    embedder: str | None
    rows: tuple[RunRow, ...]

    @property
    def title(self) -> str:
        """Data set, model and embedder in words."""
        return ", ".join(part for part in (self.data, self.model, self.embedder) if part)

    def find(self, name: str) -> RunRow | None:
        """The row of that source or run folder, None where there is none."""
        for row in self.rows:
            folders = {str(run.folder) for run in row.runs} | {run.folder.name for run in row.runs}
            if name == row.name or name.rstrip("/") in folders:
                return row
        return None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a run folder is given twice; a run is compared with others")
    return [Run(folder, read_record(folder)) for folder in folders]


def make_families(runs: Sequence[Run]) -> list[Family]:
    """Runs of one task, model and embedder whose data have the same name or the same folds."""
    sets: list[list[Run]] = []
    for run in runs:
        related = [members for members in sets if any(belongs(run, other) for other in members)]
        merged = [other for members in related for other in members] + [run]
        sets = [members for members in sets if members not in related] + [merged]
    order = {id(run): place for place, run in enumerate(runs)}
    families = [make_family(sorted(m, key=lambda run: order[id(run)])) for m in sets]
    return sorted(families, key=lambda family: order[id(family.rows[0].runs[0])])


def belongs(one: Run, other: Run) -> bool:
    ours, theirs = one.record, other.record
    if any(getattr(ours, n) != getattr(theirs, n) for n in ("task", "model", "embedder")):
        return False
    return ours.split_id == theirs.split_id or (ours.data == theirs.data != "")


def make_family(runs: Sequence[Run]) -> Family:
    """Rows in the runs' order, originals first; runs of a source that only differ in seeds join."""
    rows: list[RunRow] = []
    for run in runs:
        place = next((i for i, row in enumerate(rows) if can_join(row, run)), None)
        if place is None:
            rows.append(RunRow(run.source, (run,)))
        else:
            rows[place] = RunRow(rows[place].name, (*rows[place].runs, run))
    names = [row.name for row in rows]
    told = [
        dataclasses.replace(row, name=f"{row.name} ({row.runs[0].folder.name})")
        if names.count(row.name) > 1
        else row
        for row in rows
    ]
    told.sort(key=lambda row: kind_of(row.record.source) != "original")
    first = told[0].record
    data = next((row.record.data for row in told if row.record.data), "")
    return Family(first.task, data, first.model, first.embedder, tuple(told))


def can_join(row: RunRow, run: Run) -> bool:
    """Whether a run is another seed's of the row's source."""
    seeds = {fold["seed"] for other in row.runs for fold in other.record.folds}
    if row.name != run.source or seeds & {fold["seed"] for fold in run.record.folds}:
        return False
    facts = ("autoencoder", "decoder", "codec", "patch_px")
    ours, theirs = row.record.source, run.record.source
    return all(ours.get(name) == theirs.get(name) for name in facts)


def kind_of(facts: dict[str, Any]) -> str:
    """original, codec or latents; original where only the name says so."""
    return str(facts.get("kind") or ("original" if facts.get("name") == "original" else ""))


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """What is drawn (folds or groups), how often, from which seed."""

    over: Literal["folds", "groups"] = "folds"
    draws: int | None = None
    seed: int = 0


def pair(row: RunRow, reference: RunRow, metric: str, bootstrap: Bootstrap) -> Difference | str:
    """The row above the reference, or in words why the two are not paired."""
    reason = why_not(row, reference, metric)
    if reason:
        return reason
    if bootstrap.over == "folds":
        return pair_folds(row, reference, metric, bootstrap)
    draws = GROUP_DRAWS if bootstrap.draws is None else bootstrap.draws
    if row.record.task == "sampath":
        return pair_images(row, reference, metric, seed=bootstrap.seed, draws=draws)
    if metric not in METRICS:
        return f"{metric} cannot be drawn over groups; {', '.join(METRICS)} can"
    try:
        ours, theirs = (
            join_predictions([read_predictions(run.folder) for run in one.runs])
            for one in (row, reference)
        )
        return paired_bootstrap_groups(ours, theirs, metric, seed=bootstrap.seed, draws=draws)
    except InputError as error:
        return str(error)


def pair_images(
    row: RunRow, reference: RunRow, metric: str, *, seed: int, draws: int
) -> Difference | str:
    """Over the groups of the tested images: means of a score of single images."""
    ours, theirs = read_images(row, metric), read_images(reference, metric)
    if ours is None or theirs is None:
        return f"{IMAGES} has no {metric} of single images"
    if set(ours) != set(theirs):
        return f"{IMAGES} of the two runs list other images"
    keys = sorted(ours)
    first, second = (np.array([scores[key] for key in keys]) for scores in (ours, theirs))
    return paired_images(first, second, [key[1] for key in keys], seed=seed, draws=draws)


def read_images(row: RunRow, metric: str) -> dict[tuple[int, str, str], float] | None:
    """A score of every tested image by fold, group and name, NaN where undefined.

    Seeds are averaged. None where the score is not there.
    """
    values: dict[tuple[int, str, str], list[float]] = {}
    for run in row.runs:
        table = read_table(run.folder / IMAGES)
        if metric not in table.columns:
            return None
        columns = (table.values(name) for name in ("fold", "group", "item", metric))
        for fold, group, item, text in zip(*columns, strict=True):
            values.setdefault((int(fold), group, item), []).append(float(text or "nan"))
    return {key: float(np.mean(found)) for key, found in values.items()}


def pair_folds(row: RunRow, reference: RunRow, metric: str, bootstrap: Bootstrap) -> Difference:
    """Over folds, a fold's seeds averaged first; over seeds where there is one fold."""
    units: dict[tuple[Any, ...], list[Cell]] = {}
    ours, theirs = row.cells, reference.cells
    is_single = len({cell[:2] for cell in ours}) == 1
    for cell in ours:
        units.setdefault(cell if is_single else cell[:2], []).append(cell)
    means: list[tuple[float | None, float | None]] = []
    for cells in units.values():
        scores = [(ours[c]["scores"].get(metric), theirs[c]["scores"].get(metric)) for c in cells]
        kept = [(a, b) for a, b in scores if a is not None and b is not None]
        pair_of_means = [sum(one) / len(kept) for one in zip(*kept, strict=True)]
        means.append((pair_of_means[0], pair_of_means[1]) if kept else (None, None))
    draws = FOLD_DRAWS if bootstrap.draws is None else bootstrap.draws
    first, second = [a for a, _ in means], [b for _, b in means]
    found = paired_difference(first, second, seed=bootstrap.seed, draws=draws)
    return (
        dataclasses.replace(found, unit="seeds", counted="seeds")
        if is_single and len(units) > 1
        else found
    )


def why_not(row: RunRow, reference: RunRow, metric: str) -> str:
    """Why two rows cannot be paired, empty where they can."""
    ours, theirs = row.cells, reference.cells
    if row.record.classes != reference.record.classes:
        return f"other classes: {words(row.record.classes)} / {words(reference.record.classes)}"
    splits = [{cell[0] for cell in cells} for cells in (ours, theirs)]
    if splits[0] != splits[1]:
        return f"folds differ: {differing_folds(row, reference)}"
    if set(ours) != set(theirs):
        seeds = [sorted({cell[2] for cell in cells}) for cells in (ours, theirs)]
        if seeds[0] != seeds[1]:
            return f"other seeds: {words(seeds[0])} against {words(seeds[1])}"
        return f"{len(ours)} results against {len(theirs)}: some folds lack"
    for cell in ours:
        counts = [class_counts(one.cells[cell]) for one in (row, reference)]
        if all(counts) and counts[0] != counts[1]:
            told = " / ".join(words([f"{n} {c}" for n, c in each.items()]) for each in counts)
            return f"labels differ: fold {cell[1]} tests {told}"
    if metric not in row.metrics() or metric not in reference.metrics():
        return f"{metric} is not among the scores of both"
    return ""


def class_counts(fold: FoldResult) -> dict[str, Any]:
    counted = {name: values.get("support") for name, values in fold["per_class"].items()}
    return {name: count for name, count in counted.items() if count is not None}


def differing_folds(row: RunRow, reference: RunRow) -> str:
    """What of two rows' folds is other: their number, the rule, the items, else only the draw."""
    rules = [dict.fromkeys(run.record.split_rule for run in one.runs) for one in (row, reference)]
    counts = [len({cell[:2] for cell in one.cells}) for one in (row, reference)]
    tested = [sum({cell[:2]: fold["test"] for cell, fold in one.cells.items()}.values())
              for one in (row, reference)]  # fmt: skip
    if counts[0] != counts[1]:
        return f"{counts[0]} here, {counts[1]} there"
    if list(rules[0]) != list(rules[1]):
        ours, theirs = ("; ".join(found) or "no rule recorded" for found in rules)
        return f"{ours!r} here, {theirs!r} there"
    if tested[0] != tested[1]:
        return f"{tested[0]:,} items tested here, {tested[1]:,} there"
    return "one rule, other items or another --seed (their split_id is not the same)"


def words(values: list[Any]) -> str:
    return ", ".join(str(value) for value in values)


def is_nested(value: Any) -> bool:
    """Whether a recorded value is a table: a result that a recipe keeps there, no setting."""
    return isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(part, (list, dict)) for part in value)
    )


def setting_notes(row: RunRow, reference: RunRow) -> list[str]:
    """Patch sizes, settings and versions in which the two differ, in sentences."""
    found = []
    edges = [one.record.source.get("patch_px") or () for one in (row, reference)]
    if all(edges) and edges[0] != edges[1]:
        sizes = " px against ".join("x".join(map(str, reversed(px))) for px in edges)
        found.append(
            f"{row.name}: patches of {sizes} px of {reference.name}: a difference is of size too."
        )
    for what in ("settings", "versions"):
        ours, theirs = getattr(row.record, what), getattr(reference.record, what)
        names = sorted(name for name in ours.keys() & theirs.keys() - FREE_SETTINGS)
        changed = [n for n in names if ours[n] != theirs[n] and not is_nested(ours[n])]
        other = [f"{name} {ours[name]} against {theirs[name]}" for name in changed]
        if other:
            found.append(f"{row.name}: other {what} than {reference.name}: {'; '.join(other)}.")
    return found
