"""Run folders read, and put together: one family a task, data set, model and embedder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentds.errors import InputError
from latentds.evaluation.records import FoldResult, RunRecord, read_record
from latentds.evaluation.statistics import Summary, summary

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
    """The runs in the folders; InputError where one is given twice."""
    seen: dict[Path, Path] = {}
    for folder in folders:
        other = seen.setdefault(folder.resolve(), folder)
        if other is not folder:
            raise InputError(f"{folder}: given twice; a run is compared with others")
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
