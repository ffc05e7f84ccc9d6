"""labels.csv beside features, in the columns that CLAM reads; left_out.json: slides without any."""
# N patches of a slide

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from latentds.core.display import csv_text
from latentds.core.storage import passing_lock, read_json, write_atomically
from latentds.errors import FormatError, InputError
from latentds.evaluation.groups import LabelTable
from latentds.evaluation.patchsets.patch_set import PatchTable
from latentds.sources.csv_tables import read_table, write_table
from latentds.sources.names import patient_of

FILE, LEFT_OUT = "labels.csv", "left_out.json"
MAX_BYTES = 1 << 26
COLUMNS = ("slide_id", "case_id", "split", "label")
PATIENCE_S = 60.0  # ranks that end together take turns


@dataclasses.dataclass(frozen=True)
class SlideLabel:
    """A line: what all patches of a slide agree in; "" where they do not, or nothing tells.

    patient  as a table beside the patches tells, or the slide's name; else the slide itself
    """

    slide: str
    patient: str
    split: str
    label: str


def label_of(slide: str, table: PatchTable, classes: Sequence[str]) -> SlideLabel:
    """The line of a slide with these patches (N)."""
    labels = {classes[number] if number >= 0 else None for number in set(table.labels.tolist())}
    patient = agreed(set(table.patients)) or patient_of(slide)
    return SlideLabel(slide, patient, agreed(set(table.splits)), agreed(labels))


def agreed(found: set[str | None] | set[str]) -> str:
    """The one value that all have, "" where they differ or one has none."""
    return (next(iter(found)) or "") if len(found) == 1 else ""


def note_labels(folder: Path, tried: Sequence[str], found: Mapping[str, SlideLabel]) -> None:
    """Record the lines of slides `found` among those `tried` by a rank; others' are kept."""
    with passing_lock(folder / f".{FILE}.lock", PATIENCE_S):
        kept = {name: line for name, line in read_lines(folder).items() if name not in set(tried)}
        lines = sorted((kept | dict(found)).items())
        write_table(folder / FILE, COLUMNS, [dataclasses.astuple(line) for _, line in lines])


def read_lines(folder: Path) -> dict[str, SlideLabel]:
    """The lines by slide, none where there is no file; InputError where it is another table."""
    path = folder / FILE
    if not path.exists():
        return {}
    table = read_table(path)
    columns = [table.need_column((name,), f"labels that 'latentds features' wrote ({name})")
               for name in COLUMNS]  # fmt: skip
    rows = ([csv_text(row[column]) for column in columns] for row in table.rows)
    return {row[0]: SlideLabel(*row) for row in rows}


def labels_beside(folder: Path) -> tuple[LabelTable, dict[str, str | None]]:
    """Labels of the slides that have one, and every slide's patient, None where none is known.

    raises  InputError where the folder has no labels.csv, or no slide in it a label
    """
    lines, path = read_lines(folder), folder / FILE
    labels = {line.slide: line.label for line in lines.values() if line.label}
    if not labels:
        what = "no slide has a label there" if lines else "no such file"
        raise InputError(f"{path}: {what}; give --labels, a CSV of slide_id and label")
    patients = {
        line.slide: None if line.patient == line.slide else line.patient for line in lines.values()
    }
    return LabelTable(path, labels, {}), patients


def note_left_out(folder: Path, tried: Sequence[str], bad: Mapping[str, str]) -> None:
    """Record that of the slides `tried` by a rank, the `bad` ones failed; others' are kept."""
    with passing_lock(folder / f".{LEFT_OUT}.lock", PATIENCE_S):
        found = read_left_out(folder)
        kept = {slide: reason for slide, reason in found.items() if slide not in set(tried)}
        if now := dict(sorted((kept | dict(bad)).items())):
            write_atomically(folder / LEFT_OUT, json.dumps(now, indent=1).encode())
        else:
            (folder / LEFT_OUT).unlink(missing_ok=True)


def read_left_out(folder: Path) -> dict[str, str]:
    """The slides left out and why; FormatError where the file is damaged."""
    path = folder / LEFT_OUT
    if not path.exists():
        return {}
    values = read_json(path, MAX_BYTES, "delete it")
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise FormatError(f"{path}: not reasons by slide; delete it")
    return values
