"""The folder of an evaluation's run: what it is of, and its finished folds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from latentds.core.storage import write_atomically
from latentds.errors import ContractError, InputError

RUN, FOLD, FORMAT = "run.json", "fold.json", "latentds-fold/1"

Outcome = TypeVar("Outcome")  # a dataclass of JSON values


def claim_folder(
    out: Path,
    wanted: Mapping[str, Any],
    remedies: Mapping[str, str] | None = None,
    newer: Collection[str] = (),
) -> None:
    """Write what the run in `out` is of, or see that the folder is of the same one.

    wanted    settings, data and folds, as JSON values
    remedies  by name, what to do where it differs, if not to set it back
    newer     names that runs of older versions do not have
    raises    ContractError that names what differs
    """
    values, path = json.loads(json.dumps(wanted)), out / RUN
    if not path.exists():
        write_atomically(path, json.dumps(values, indent=1).encode())
        return
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ContractError(f"{path} is damaged ({error}); give another --out") from error
    for name, value in values.items():
        if name not in found and name in newer:
            continue
        if name not in found or found[name] != value:
            remedy = (remedies or {}).get(name, "set it back")
            raise ContractError(
                f"{path}: the run there has {name} {found.get(name)!r}, this one {value!r}; "
                f"{remedy}, or give another --out"
            )


def fold_folder(out: Path, number: int, seed: int, first_seed: int) -> Path:
    """Where a fold's run lies."""
    return out / (f"fold-{number}" if seed == first_seed else f"fold-{number}-seed-{seed}")


def write_fold(folder: Path, outcome: Any) -> None:
    """Write what a fold came to, a dataclass of JSON values: the fold is finished."""
    text = json.dumps({"format": FORMAT} | dataclasses.asdict(outcome))
    write_atomically(folder / FOLD, text.encode())


def read_fold(folder: Path, kind: type[Outcome]) -> Outcome | None:
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
        return kind(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged ({error}); delete the fold's folder to train it again"
        ) from error
