"""Folds one after another: those that are finished are read, the others trained and tested.

run = CrossValidation(task="abmil", out=out, items=slides, groups=patients, folds=folds,
                      cells=[(0, seed), (1, seed)])
run.claim(settings, {"labels_id": ...})    # the folder is of this run
outcomes = run.outcomes(test)              # test: a Cell to what its test items came to

    OUT/run.json           settings, data and folds that the folder belongs to
    OUT/fold-3/fold.json   what a fold came to; written last: the fold is finished
    OUT/splits/            the folds as CLAM reads them
    OUT/result.json        what all folds came to; beside it the recipe's own tables
"""
# n tested items of a fold, or of all folds; C classes

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from latentds_trainers.engine.checkpoints import package_versions
from latentds_trainers.engine.ranks import from_first
from latentds_trainers.engine.settings import jsonable

from latentds.core.display import say
from latentds.core.storage import write_atomically
from latentds.errors import ContractError, InputError
from latentds.evaluation.folds import Fold, split_id, write_clam_splits
from latentds.evaluation.predictions import Predictions
from latentds.evaluation.records import FoldResult, RunRecord, write_record
from latentds.evaluation.statistics import Summary, summary

logger = logging.getLogger(__name__)

RUN, FOLD, FORMAT = "run.json", "fold.json", "latentds-fold/2"
# Settings that may differ when a run goes on: where things lie, how they are read, what is shown.
# What lies there is compared by its content; of a batch, the images or bags of a step are.
MAY_CHANGE = frozenset(
    {
        *("out", "data", "test_data", "bags", "labels", "groups", "masks", "slides", "root"),
        *("only", "splits", "fold_table", "allow_shared_groups", "max_px"),
        *("device", "workers", "keep_mb", "cache_gb", "embed_batch", "batch_size", "accumulation"),
        *("seeds", "repeats", "save_every", "keep", "log_every", "sample_every", "tensorboard"),
        *("heat_maps", "heat_map_slides", "pictures", "json"),
    }
)
MEAN = "mean ± sd"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """A fold to be trained with a seed, and the folder of that training."""

    number: int
    seed: int
    fold: Fold
    folder: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tested:
    """What a recipe found on a fold's test items, in their order (n); JSON values.

    found      of every item: probabilities (n, C), or counts (n, K, K)
    scores     of all of them; one that is undefined is None
    notes      what the scores leave out, in sentences
    facts      what the recipe's own report says of the fold beside
    seconds    spent training
    """

    found: list[Any]
    scores: dict[str, float | None]
    per_class: dict[str, dict[str, float | None]]
    notes: list[str] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldOutcome(Tested):
    """A finished fold: sizes of its parts, names of what it tested (n)."""

    fold: int
    seed: int
    train: int
    val: int
    items: list[str]
    groups: list[str]

    def result(self) -> FoldResult:
        return FoldResult(
            fold=self.fold,
            seed=self.seed,
            train=self.train,
            val=self.val,
            test=len(self.items),
            scores=self.scores,
            per_class=self.per_class,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CrossValidation:
    """Folds of named items, trained with one or several seeds, in one folder.

    task    the recipe's name, as the record has it
    items   names, all that are in any part of a fold; `groups` what must stay together of them
    cells   number of the fold and seed, in the order they are trained and told
    """

    task: str
    out: Path
    items: Sequence[str]
    groups: Sequence[str]
    folds: Sequence[Fold]
    cells: Sequence[tuple[int, int]]

    @property
    def split_id(self) -> str:
        return split_id(self.folds, self.items)

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(seed for _, seed in self.cells))

    def cell(self, number: int, seed: int) -> Cell:
        """A fold of the run; the first seed's folder is named by the fold alone."""
        name = f"fold-{number}" if seed == self.seeds[0] else f"fold-{number}-seed-{seed}"
        return Cell(number=number, seed=seed, fold=self.folds[number], folder=self.out / name)

    def claim(self, settings: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        """Make the folder this run's, with its folds in CLAM's files. Collective.

        settings  of the config, JSON values; of those in MAY_CHANGE nothing is kept
        identity  of what lies where they say, JSON values
        raises    ContractError that names what differs from the run that is there
        """

        def write() -> None:
            kept = {name: value for name, value in settings.items() if name not in MAY_CHANGE}
            claim_folder(self.out, {**kept, **identity, "split_id": self.split_id})
            write_clam_splits(self.out / "splits", self.folds, self.items)

        from_first(write)

    def outcomes(
        self, test: Callable[[Cell], Tested], *, keeps_checkpoints: bool = True
    ) -> list[FoldOutcome]:
        """What every fold came to, in the order of the cells. Collective.

        test  trains a fold that is not finished and tests it; the same on every rank
        """
        return [self.outcome(self.cell(*cell), test, keeps_checkpoints) for cell in self.cells]

    def outcome(
        self, cell: Cell, test: Callable[[Cell], Tested], keeps_checkpoints: bool
    ) -> FoldOutcome:
        found: FoldOutcome | None = from_first(lambda: read_fold(cell.folder))
        if found is not None:
            logger.info("fold %d, seed %d: finished before", cell.number, cell.seed)
            return found
        rows, sizes = cell.fold.test.tolist(), cell.fold.sizes()
        outcome = FoldOutcome(
            fold=cell.number,
            seed=cell.seed,
            train=sizes["train"],
            val=sizes["val"],
            items=[self.items[row] for row in rows],
            groups=[self.groups[row] for row in rows],
            **vars(test(cell)),
        )

        def keep() -> None:
            text = json.dumps({"format": FORMAT} | dataclasses.asdict(outcome), allow_nan=False)
            write_atomically(cell.folder / FOLD, text.encode())
            if not keeps_checkpoints:
                shutil.rmtree(cell.folder / "checkpoints", ignore_errors=True)
            known = [f"{n} {v:.4f}" for n, v in outcome.scores.items() if v is not None]
            told = ", ".join(known[:4]) or "no score is defined"
            logger.info("fold %d, seed %d: %s", cell.number, cell.seed, told)

        from_first(keep)
        return outcome


def claim_folder(out: Path, wanted: Mapping[str, Any]) -> None:
    """Write what the run in `out` is of, or see that the folder is of the same one."""
    values, path = json.loads(json.dumps(wanted)), out / RUN
    if not path.exists():
        write_atomically(path, json.dumps(values, indent=1).encode())
        return
    try:
        found = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ContractError(f"{path} is damaged ({error}); give another --out") from error
    for name, value in values.items():
        if name not in found or found[name] != value:
            remedy = "give what it was started with"
            if name.endswith("_a_step"):
                remedy = "choose --batch-size and --accumulation for as many on these ranks"
            raise ContractError(
                f"{path}: the run there has {name} {found.get(name)!r}, this one {value!r}; "
                f"{remedy}, or give another --out"
            )


def read_fold(folder: Path) -> FoldOutcome | None:
    """What a finished fold came to; None for one that is not.

    raises  InputError for a file that is damaged
    """
    path = folder / FOLD
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_bytes())
        if values.pop("format") != FORMAT:
            raise ValueError("another format")
        outcome = FoldOutcome(**values)
        if len(outcome.found) != len(outcome.items):
            raise ValueError(f"{len(outcome.found)} rows for {len(outcome.items)} items")
        return outcome
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged ({error}); delete {folder} to train the fold again"
        ) from error


def run_record(run: CrossValidation, outcomes: Sequence[FoldOutcome], **values: Any) -> RunRecord:
    """The run's record.

    values  what the run itself does not know: data, source, embedder, model, classes, split_rule,
            primary, settings, notes, related
    """
    command = ["python", "-m", f"latentds_trainers.{run.task}", *sys.argv[1:]]
    return RunRecord(
        task=run.task,
        seeds=run.seeds,
        split_id=run.split_id,
        folds=[outcome.result() for outcome in outcomes],
        versions=package_versions(),
        command=shlex.join(command),
        **values,
    )


def told_settings(config: Any) -> dict[str, Any]:
    """A config's settings with those of its preset, paths by their last part, as JSON values."""
    settings = dataclasses.asdict(config) | dataclasses.asdict(config.settings)
    told = {n: v.name if isinstance(v, Path) else v for n, v in settings.items()}
    return {name: jsonable(value) for name, value in told.items()}


def pooled_predictions(
    run: CrossValidation,
    outcomes: Sequence[FoldOutcome],
    labels: np.ndarray,
    classes: Sequence[str],
) -> Predictions:
    """The predictions of all folds and seeds, in the order of fold, seed and item.

    labels  int64, of all items
    """
    tested, sizes = [run.folds[o.fold].test for o in outcomes], [len(o.items) for o in outcomes]
    return Predictions(
        folds=np.repeat([outcome.fold for outcome in outcomes], sizes),
        seeds=np.repeat([outcome.seed for outcome in outcomes], sizes),
        items=[item for outcome in outcomes for item in outcome.items],
        groups=[group for outcome in outcomes for group in outcome.groups],
        labels=labels[np.concatenate(tested)],
        probabilities=np.concatenate([np.array(outcome.found) for outcome in outcomes]),
        classes=list(classes),
    ).sorted()


def write_result(out: Path, record: RunRecord, table: str, *, is_json: bool) -> None:
    path = write_record(out, record)
    say(json.dumps(record.to_json(), indent=1) if is_json else f"{table}\n\n{path}")


def run_table(
    record: RunRecord,
    heading: str,
    *,
    shown: Sequence[str],
    rows: Mapping[str, Mapping[str, str]] | None = None,
    per_class: Sequence[str] = (),
    more: Sequence[str] = (),
) -> str:
    """The record as text: folds, their mean, other rows, classes, notes.

    shown      the metrics that are columns
    rows       further rows below the mean: cells by metric
    per_class  the scores of classes that are columns of a second table
    more       lines between the two
    """
    cells = {MEAN: {name: spread(record.summarize(name)) for name in shown}} | dict(rows or {})
    first = max(30, *(len(name) for name in cells))
    lines = [heading, record.split_rule, ""]
    lines.append(f"{'fold  seed  train   val  test':<{first}}" + line_of(shown))
    for fold in record.folds:
        counts = f"{fold['train']:>5}  {fold['val']:>4}  {fold['test']:>4}"
        head = f"{fold['fold']:>4}  {fold['seed']:>4}  {counts}"
        figures = [figure(fold["scores"].get(name)) for name in shown]
        lines.append(f"{head:<{first}}" + line_of(figures))
    lines += [
        f"{name:<{first}}" + line_of([c.get(m, "-") for m in shown]) for name, c in cells.items()
    ]
    lines += ["", *more] if more else []
    if per_class:
        lines += ["", f"{'class':<{first}}" + line_of(per_class)]
        lines += [
            f"{name:<{first}}" + class_line(record, name, per_class) for name in record.classes
        ]
    return "\n".join([*lines, *(f"note: {note}" for note in record.notes)])


def line_of(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>19}" for cell in cells)


def class_line(record: RunRecord, name: str, metrics: Sequence[str]) -> str:
    """Means and deviations of a class's scores over the folds that have them."""
    scores = [fold["per_class"].get(name, {}) for fold in record.folds]
    return line_of([spread(summary(row.get(metric) for row in scores)) for metric in metrics])


def spread(values: Summary) -> str:
    mean, sd = figure(values.mean), figure(values.sd)
    return mean if values.sd is None else f"{mean} ± {sd}"


def figure(value: float | None) -> str:
    """Four decimals, a hyphen for what is undefined."""
    return "-" if value is None else f"{value:.4f}"
