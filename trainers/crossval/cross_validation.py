"""Folds one after another: those that are finished are read, the others trained and tested.

run = CrossValidation(task="abmil", out=out, items=slides, groups=patients, folds=folds,
                      cells=[(0, seed), (1, seed)])
run.claim(settings | {"labels_id": ...})   # the folder is of this run
outcomes = run.outcomes(test)              # test: a Cell to what its test items came to
"""
# n tested items of a fold

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from latentds_trainers.crossval.run_folders import (
    FoldOutcome,
    claim_folder,
    read_fold,
    write_fold,
)
from latentds_trainers.engine.ranks import from_first

from latentds.evaluation.folds import Fold, split_id
from latentds.evaluation.splits import write_clam_splits

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """A fold to be trained with a seed, and the folder of that training."""

    number: int
    seed: int
    fold: Fold
    folder: Path


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tested:
    """What a recipe found on a fold's test items, in their order; see `FoldOutcome`."""

    found: np.ndarray
    scores: dict[str, float | None]
    per_class: dict[str, dict[str, float | None]]
    notes: list[str] = dataclasses.field(default_factory=list)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


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
        """Each once."""
        return list(dict.fromkeys(seed for _, seed in self.cells))

    def cell(self, number: int, seed: int) -> Cell:
        """A fold of the run; the first seed's folder is named by the fold alone."""
        name = f"fold-{number}" if seed == self.seeds[0] else f"fold-{number}-seed-{seed}"
        return Cell(number=number, seed=seed, fold=self.folds[number], folder=self.out / name)

    def claim(self, values: Mapping[str, Any], remedies: Mapping[str, str] | None = None) -> None:
        """Make the folder this run's, with its folds in CLAM's files. Collective.

        values    settings and identities of data, as JSON values
        remedies  by name, what to do where it differs
        raises    ContractError that names what differs from the run that is there
        """

        def write() -> None:
            claim_folder(self.out, {**values, "split_id": self.split_id}, remedies)
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
        """What a fold came to: as it was found finished, or trained and tested now."""
        found: FoldOutcome | None = from_first(lambda: read_fold(cell.folder))
        if found is not None:
            logger.info("fold %d, seed %d: finished before", cell.number, cell.seed)
            return found
        outcome = self.outcome_of(cell, test(cell))

        def keep() -> None:
            write_fold(cell.folder, outcome)
            if not keeps_checkpoints:
                shutil.rmtree(cell.folder / "checkpoints", ignore_errors=True)
            known = [f"{n} {v:.4f}" for n, v in outcome.scores.items() if v is not None]
            told = ", ".join(known[:4]) or "no score is defined"
            logger.info("fold %d, seed %d: %s", cell.number, cell.seed, told)

        from_first(keep)
        return outcome

    def outcome_of(self, cell: Cell, tested: Tested) -> FoldOutcome:
        rows, sizes = cell.fold.test.tolist(), cell.fold.sizes()
        return FoldOutcome(
            fold=cell.number,
            seed=cell.seed,
            train=sizes["train"],
            val=sizes["val"],
            items=[self.items[row] for row in rows],
            groups=[self.groups[row] for row in rows],
            found=tested.found.tolist(),
            scores=tested.scores,
            per_class=tested.per_class,
            notes=tested.notes,
            facts=tested.facts,
            seconds=round(tested.seconds, 2),
        )
