"""The folder of a cross-validation: what it is of, and its finished folds.

OUT/run.json           settings, data and folds that the folder belongs to
OUT/fold-3/fold.json   what a fold came to; written last: the fold is finished
OUT/splits/            the folds as CLAM reads them
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentds.core.storage import write_atomically
from latentds.errors import ContractError, InputError
from latentds.evaluation.records import FoldResult

RUN, FOLD, FORMAT = "run.json", "fold.json", "latentds-fold/2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldOutcome:
    """A finished fold, JSON values.

    items, groups  tested, n of each
    found          of every one of them: probabilities (n, C), or counts (n, K, K)
    scores         of all of them; one that is undefined is None
    notes          what the scores leave out, in sentences
    facts          what the recipe's own report says of the fold beside
    seconds        spent training
    """

    fold: int
    seed: int
    train: int
    val: int
    items: list[str]
    groups: list[str]
    found: list[Any]
    scores: dict[str, float | None]
    per_class: dict[str, dict[str, float | None]]
    notes: list[str]
    facts: dict[str, Any]
    seconds: float

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


def claim_folder(
    out: Path, wanted: Mapping[str, Any], remedies: Mapping[str, str] | None = None
) -> None:
    """Write what the run in `out` is of, or see that the folder is of the same one.

    wanted    settings, data and folds, as JSON values
    remedies  by name, what to do where it differs, if not to set it back
    raises    ContractError that names what differs
    """
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
            remedy = (remedies or {}).get(name, "set it back")
            raise ContractError(
                f"{path}: the run there has {name} {found.get(name)!r}, this one {value!r}; "
                f"{remedy}, or give another --out"
            )


def write_fold(folder: Path, outcome: FoldOutcome) -> None:
    """Write what a fold came to: it is finished."""
    text = json.dumps({"format": FORMAT} | dataclasses.asdict(outcome), allow_nan=False)
    write_atomically(folder / FOLD, text.encode())


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
