"""What an evaluation's run folder says: result.json."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, TypedDict

from latentds.core.storage import write_atomically
from latentds.errors import InputError
from latentds.evaluation.statistics import Summary, summary

FORMAT = "latentds-run/1"
FILE = "result.json"
TASKS = ("abmil", "classify_patches", "sampath")
TEXTS = ("task", "data", "model", "split_id", "split_rule", "primary", "command")
KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(TEXTS, str),
    **dict.fromkeys(("source", "settings", "related", "versions"), dict),
    **dict.fromkeys(("classes", "seeds", "folds", "notes"), list),
    "embedder": (str, type(None)),
}


class FoldResult(TypedDict):
    """A fold's sizes and scores; a score that is undefined is None."""

    fold: int
    seed: int
    train: int
    val: int
    test: int
    scores: dict[str, float | None]
    per_class: dict[str, dict[str, float | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run: a model on one source of one data set, over folds and seeds.

    task        abmil, classify_patches or sampath
    data        name of the data set's folder, the same for all its sources
    source      facts of the patch set: name, kind, codec, fine_tuned, quantized, bytes_per_patch
    embedder    None where the model needs none
    model       abmil, linear, finetune:resnet18, sam-path, unet, ...
    split_id    identity of the folds; `split_rule` how they were made, in words
    primary     the metric that tables lead with
    folds       scores of every fold and seed
    notes       what a reader has to know, such as the bias of a data set, in sentences
    related     other rows of the same folds, by name: {metric: {"mean", "sd", "n"}}
    """

    task: str
    data: str
    source: dict[str, Any]
    embedder: str | None
    model: str
    classes: list[str]
    seeds: list[int]
    split_id: str
    split_rule: str
    primary: str
    folds: list[FoldResult]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    related: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    command: str = ""

    def metrics(self) -> list[str]:
        """Names of the scores, in the order of the first fold that has them."""
        return list(dict.fromkeys(name for fold in self.folds for name in fold["scores"]))

    def values(self, metric: str) -> list[float | None]:
        """The metric of every fold and seed, in their order; None where it is undefined."""
        return [fold["scores"].get(metric) for fold in self.folds]

    def summarize(self, metric: str) -> Summary:
        """Mean and sd over folds and seeds."""
        return summary(self.values(metric))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with the format's name and the summary."""
        found = {name: self.summarize(name).to_json() for name in self.metrics()}
        return {"format": FORMAT, **dataclasses.asdict(self), "summary": found}


def write_record(folder: Path, record: RunRecord) -> Path:
    """Write result.json atomically; InputError where a figure is NaN or infinite."""
    check_record(record, str(folder / FILE))
    path = folder / FILE
    text = json.dumps(record.to_json(), indent=1, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())
    return path


def read_record(folder: Path) -> RunRecord:
    """The record of a run folder.

    raises  InputError where the run is not finished or the folder is none, and with file and key
            for what is damaged or of another format
    """
    path = folder / FILE
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"no finished run in {folder}: it has no {FILE}; run the evaluation or name its folder"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); run the evaluation again") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise InputError(f"{path}: format is {found!r}, expected {FORMAT!r}")
    names = {field.name for field in dataclasses.fields(RunRecord)}
    try:
        record = RunRecord(**{name: value for name, value in values.items() if name in names})
    except TypeError as error:
        raise InputError(f"{path}: a key is missing ({error}); run the evaluation again") from error
    check_record(record, str(path))
    return record


def check_record(record: RunRecord, where: str) -> None:
    """InputError with the key of what is not as `RunRecord` and `FoldResult` say."""

    def check(is_good: bool, key: str, value: object) -> None:
        if not is_good:
            raise InputError(f"{where}: {key} is {value!r:.80}; run the evaluation again")

    def check_table(key: str, values: Any) -> None:
        check(isinstance(values, dict), key, values)
        for name, value in values.items():
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            check(value is None or is_number, f"{key}, {name}", value)

    for name, kind in KINDS.items():
        check(isinstance(getattr(record, name), kind), name, getattr(record, name))
    check(record.task in TASKS, "task", record.task)
    check_table("source", {"bytes_per_patch": record.source.get("bytes_per_patch")})
    for name, scores in record.related.items():
        check(isinstance(scores, dict), f"related, {name}", scores)
        for metric, values in scores.items():
            check_table(f"related, {name}, {metric}", values)
    for place, fold in enumerate(record.folds):
        check(isinstance(fold, dict), f"folds[{place}]", fold)
        for name in ("fold", "seed", "train", "val", "test"):
            check(isinstance(fold.get(name), int), f"folds[{place}], {name}", fold.get(name))
        check_table(f"folds[{place}], scores", fold.get("scores"))
        check(isinstance(fold.get("per_class"), dict), f"folds[{place}], per_class", fold)
        for name, values in fold["per_class"].items():
            check_table(f"folds[{place}], per_class, {name}", values)
    check(record.primary in record.metrics(), "primary", record.primary)
    cells = Counter((fold["fold"], fold["seed"]) for fold in record.folds)
    (number, seed), count = cells.most_common(1)[0]
    if count > 1:
        raise InputError(f"{where}: fold {number} with seed {seed} is there {count} times")
