"""What is extracted, and what lies beside features: features.json, labels.csv, left_out.json.

features.json says what made them: another run's features are not mixed in. labels.csv has the
columns that CLAM reads, left_out.json the slides without features.
"""
# N patches of a slide

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentds.autoencoders.foreign_networks import checked_fields, is_object
from latentds.core.display import csv_text
from latentds.core.storage import passing_lock, read_json, write_atomically
from latentds.errors import ContractError, FormatError
from latentds.evaluation.features.layout import RECORD
from latentds.evaluation.patchsets.patch_set import PatchTable
from latentds.sources.csv_tables import read_table, write_table
from latentds.sources.names import patient_of
from latentds.version import __version__

FORMAT = "latentds-features/1"
FILE, LEFT_OUT = "labels.csv", "left_out.json"
MAX_BYTES, MAX_LEFT_OUT_BYTES = 1 << 22, 1 << 26
PATIENCE_S = 60.0  # ranks that start or end together take turns
MOST_TOLD = 4
CHECKS = dict.fromkeys(("embedder", "source", "options", "versions"), is_object)
# Of the source: it may be measured on a sample, or lie elsewhere today.
NOT_COMPARED = ("source.bytes_per_patch", "source.data")
COLUMNS = ("slide_id", "case_id", "split", "label")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """What is extracted, and how.

    batch_size   patches embedded at once; fixed within a slide, for its last bits depend on it
    precision    of the embedder: float32, or bfloat16 for speed
    saved        numbers of the files: float32, or float16 for half the room
    max_patches  at most so many patches a slide, drawn by `seed`; None takes all
    seed         of that choice, which is a function of seed and slide
    clam         CLAM's layout too: pt_files, h5_files and coordinates
    max_bad      slides that may fail, each reported; one more ends the run
    patches      settings that decide which patches there are and how they are decoded, to be
                 recorded: JSON values
    """

    batch_size: int = 64
    precision: Literal["float32", "bfloat16"] = "float32"
    saved: Literal["float32", "float16"] = "float32"
    max_patches: int | None = None
    seed: int = 0
    clam: bool = False
    max_bad: int = 0
    patches: dict[str, Any] = dataclasses.field(default_factory=dict)

    def decisive(self) -> dict[str, Any]:
        """What decides about the numbers, as JSON: a resumed run must have the same."""
        names = ("batch_size", "precision", "saved", "max_patches", "patches")
        found = {name: getattr(self, name) for name in names}
        return found | {"seed": None if self.max_patches is None else self.seed}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extraction:
    """What a rank did.

    slides   names of its slides with features now, sorted
    skipped  how many of them were there before
    patches  embedded in this run
    bad      slides that failed, with the reason
    dim      D
    """

    slides: list[str]
    skipped: int
    patches: int
    bad: dict[str, str]
    dim: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeaturesRecord:
    """What a features.json says.

    embedder  its card: name, weights_id, rule, dim, ...
    source    SourceFacts of the patches, as JSON
    options   what decides about the numbers: batch size, precision, chosen patches, ...
    versions  of the packages that made the first of them, and the kind of device
    """

    embedder: dict[str, Any]
    source: dict[str, Any]
    options: dict[str, Any]
    versions: dict[str, str]

    def to_json(self) -> str:
        values = {"format": FORMAT} | dataclasses.asdict(self)
        return json.dumps(values, indent=1, sort_keys=True) + "\n"


def versions_of(device: str) -> dict[str, str]:
    """Versions that may move the last bits of a feature."""
    import torch

    return {
        "latentds": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
    }


def claim(folder: Path, record: FeaturesRecord) -> None:
    """Write the record, or see that the one there is of the same features.

    raises  ContractError that names what differs
    """
    with passing_lock(folder / f".{RECORD}.lock", PATIENCE_S):
        if not (folder / RECORD).exists():
            write_atomically(folder / RECORD, record.to_json().encode())
            return
    old, new = comparable(read_record(folder)), comparable(record)
    found = [
        f"{key} is {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted({*old, *new}, key=lambda key: (not key.endswith((".name", ".data")), key))
        if old.get(key) != new.get(key)
    ]
    if found:
        raise ContractError(
            f"{folder / RECORD}: these features are of another run: "
            f"{'; '.join(found[:MOST_TOLD])}. Give another --out, or the same options"
        )


def comparable(record: FeaturesRecord) -> dict[str, Any]:
    """A record's values by dotted name; of paths the last part, for data may be moved."""
    parts = {"embedder": record.embedder, "source": record.source, "options": record.options}
    values = flat(json.loads(json.dumps(parts)), "")
    found = {name: value for name, value in values.items() if name not in NOT_COMPARED}
    return found | {"source.data": Path(str(record.source.get("data", ""))).name}


def flat(values: dict[str, Any], before: str) -> dict[str, Any]:
    """Values of nested dictionaries by dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{before}{name}"
        found |= flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return found


def read_record(folder: Path) -> FeaturesRecord:
    """What the features.json of a folder says; FormatError where it is none."""
    path = folder / RECORD
    fields = checked_fields(read_json(path, MAX_BYTES), path, FORMAT, CHECKS)
    if not isinstance(name := fields["embedder"].get("name"), str):
        raise FormatError(f"{path}: embedder.name is {name!r:.60}; refused")
    return FeaturesRecord(**fields)


@dataclasses.dataclass(frozen=True)
class SlideLabel:
    """A line: what all patches of a slide agree in; "" where they do not, or nothing tells.

    patient  as a table beside the patches tells, or the slide's name; else the slide itself
    """

    slide: str
    patient: str
    split: str
    label: str


def label_of(
    slide: str, table: PatchTable, classes: Sequence[str], rows: np.ndarray | None = None
) -> SlideLabel:
    """The line of a slide with these patches of a table, all where no rows are given."""
    chosen = np.arange(len(table)) if rows is None else rows
    labels = {classes[n] if n >= 0 else None for n in set(table.labels[chosen].tolist())}
    patients = {table.patients[row] for row in chosen.tolist()} if table.patients else set()
    splits = {table.splits[row] for row in chosen.tolist()}
    return SlideLabel(slide, agreed(patients) or patient_of(slide), agreed(splits), agreed(labels))


def agreed(found: Set[str | None]) -> str:
    """The one value that all have, "" where they differ or one has none."""
    return (next(iter(found)) or "") if len(found) == 1 else ""


def note_labels(folder: Path, tried: Sequence[str], found: Mapping[str, SlideLabel]) -> None:
    """Record the lines of slides `found` among those `tried` by a rank; others' are kept."""
    with passing_lock(folder / f".{FILE}.lock", PATIENCE_S):
        own = set(tried)
        kept = {name: line for name, line in read_lines(folder).items() if name not in own}
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


def note_left_out(folder: Path, tried: Sequence[str], bad: Mapping[str, str]) -> None:
    """Record that of the slides `tried` by a rank, the `bad` ones failed; others' are kept."""
    with passing_lock(folder / f".{LEFT_OUT}.lock", PATIENCE_S):
        own = set(tried)
        kept = {s: reason for s, reason in read_left_out(folder).items() if s not in own}
        if now := dict(sorted((kept | dict(bad)).items())):
            write_atomically(folder / LEFT_OUT, json.dumps(now, indent=1).encode())
        else:
            (folder / LEFT_OUT).unlink(missing_ok=True)


def read_left_out(folder: Path) -> dict[str, str]:
    """The slides left out and why; FormatError where the file is damaged."""
    path = folder / LEFT_OUT
    if not path.exists():
        return {}
    values = read_json(path, MAX_LEFT_OUT_BYTES, "delete it")
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise FormatError(f"{path}: not reasons by slide; delete it")
    return values
