"""Folds of a cross-validation: every group of patches on one side, drawn by a seed."""
# n items (patches, slides), g groups

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Sequence

import numpy as np

from latentds.errors import InputError, missing_extra
from latentds.sources.slide_names import some

PARTS = ("train", "val", "test")
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
    """Item numbers of a fold, int64, ascending; `val` may be empty."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray

    def parts(self) -> dict[str, np.ndarray]:
        return {"train": self.train, "val": self.val, "test": self.test}

    def sizes(self) -> dict[str, int]:
        """Numbers of items by the part's name."""
        return {name: len(rows) for name, rows in self.parts().items()}


def stratified_group_folds(
    labels: Sequence[int] | np.ndarray,
    groups: Sequence[str],
    *,
    folds: int,
    seed: int,
    val: bool = True,
    allow_missing: bool = False,
    classes: Sequence[str] | None = None,
) -> list[Fold]:
    """Folds that share no group between train, val and test, classes balanced over them.

    labels         int (n,)
    groups         patient, slide or core of every item
    val            take the next fold's test items for validation, else leave `val` empty
    allow_missing  accept a class with fewer groups than folds: some test sets lack it then
    classes        names of the labels, for messages
    raises         InputError for fewer groups than folds, or a class that has fewer, or one alone
    source         scikit-learn's StratifiedGroupKFold; StratifiedKFold where every item is its own
                   group, which is the same aim at a cost that does not grow with the groups
    """
    targets = np.asarray(labels, np.int64)
    check_counts(targets, groups, folds, least=3 if val else 2)
    check_classes(targets, groups, folds, classes, allow_missing=allow_missing)
    tests = draw_tests(targets, groups, folds, seed)
    made = []
    for number, test in enumerate(tests):
        held = tests[(number + 1) % folds] if val else np.empty(0, np.int64)
        train = np.setdiff1d(np.arange(len(targets)), np.concatenate([test, held]))
        made.append(Fold(train, held, test))
    check_disjoint(made, groups)
    return made


def fixed_test_folds(
    labels: Sequence[int] | np.ndarray,
    groups: Sequence[str],
    is_test: np.ndarray,
    *,
    folds: int,
    seed: int,
    classes: Sequence[str] | None = None,
) -> list[Fold]:
    """Folds that train on all but one part of the training items and share one test set.

    is_test  bool (n,): the items every fold is tested on, such as CRC-VAL-HE-7K
    returns  the part that a fold does not train on is its `val`
    raises   InputError as `stratified_group_folds` does, or where a part would be empty
    """
    targets, fixed = np.asarray(labels, np.int64), np.flatnonzero(is_test)
    rest = np.flatnonzero(~np.asarray(is_test, bool))
    if not len(fixed) or not len(rest):
        raise InputError(f"{len(rest)} items to train on and {len(fixed)} to test on; both needed")
    own = [groups[row] for row in rest.tolist()]
    check_counts(targets[rest], own, folds, least=2)
    check_classes(targets[rest], own, folds, classes)
    made = []
    for held in draw_tests(targets[rest], own, folds, seed):
        train = np.delete(rest, held)
        made.append(Fold(train, rest[held], fixed))
    check_disjoint(made, groups)
    return made


def predefined_fold(splits: Sequence[str]) -> Fold:
    """The one fold that split names say: train, val (valid, validation) and test.

    raises  InputError where an item has another split, or none is train or test
    """
    words = [SPLIT_WORDS.get(name.strip().lower(), "") for name in splits]
    foreign = sorted({name for name, word in zip(splits, words, strict=True) if not word})
    if foreign:
        raise InputError(f"splits {some(foreign)}; they have to be train, val and test")
    rows = {part: np.flatnonzero(np.array(words) == part) for part in PARTS}
    if not len(rows["train"]) or not len(rows["test"]):
        counts = {part: len(found) for part, found in rows.items()}
        raise InputError(f"splits have {counts} items; train and test need some")
    return Fold(**rows)


def draw_tests(
    targets: np.ndarray, groups: Sequence[str], folds: int, seed: int
) -> list[np.ndarray]:
    """Ascending item numbers of every fold's test set."""
    try:
        from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
    except ImportError as error:
        raise missing_extra("scikit-learn", "evaluate") from error
    numbers = np.unique(np.asarray(groups, str), return_inverse=True)[1]
    options = {"n_splits": folds, "shuffle": True, "random_state": seed}
    nothing = np.zeros(len(targets))
    if numbers.max() + 1 == len(numbers):
        parts = StratifiedKFold(**options).split(nothing, targets)
    else:
        parts = StratifiedGroupKFold(**options).split(nothing, targets, numbers)
    with warnings.catch_warnings():
        # A class with fewer groups than folds was refused, or asked for.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        return [np.sort(test).astype(np.int64) for _, test in parts]


def check_counts(targets: np.ndarray, groups: Sequence[str], folds: int, least: int) -> None:
    """InputError where items or groups are too few for so many folds, or labels are unknown."""
    if len(targets) != len(groups):
        raise InputError(f"{len(targets)} labels for {len(groups)} groups")
    if folds < least:
        raise InputError(f"{folds} folds; at least {least}, one of them to train on")
    if len(targets) and targets.min() < 0:
        raise InputError(f"{int((targets < 0).sum()):,} items have no label; leave them out")
    names = np.unique(np.asarray(groups, str)).tolist()
    if len(names) < folds:
        raise InputError(f"{len(names)} groups ({some(names)}) for {folds} folds; take fewer folds")


def check_classes(
    targets: np.ndarray,
    groups: Sequence[str],
    folds: int,
    classes: Sequence[str] | None,
    *,
    allow_missing: bool = False,
) -> None:
    """InputError where there is one class, or one with too few groups."""
    numbers, labelled = np.unique(targets).tolist(), np.asarray(groups, str)
    named = {number: repr(classes[number]) if classes else str(number) for number in numbers}
    if len(numbers) < 2:
        raise InputError(f"all items are of one class ({', '.join(named.values())}); two at least")
    for number, name in named.items():
        own = np.unique(labelled[targets == number]).tolist()
        if len(own) == 1:
            raise InputError(
                f"class {name} is in one group only ({own[0]!r}), so in one fold only: it is "
                "trained on or tested, never both. Leave it out or name finer groups"
            )
        if len(own) < folds and not allow_missing:
            raise InputError(
                f"class {name} is in {len(own)} groups ({some(own)}), fewer than {folds} folds: "
                f"some test sets would lack it. Take at most {len(own)} folds"
            )


def check_disjoint(folds: Sequence[Fold], groups: Sequence[str], where: str = "folds") -> None:
    """InputError that names the groups which stand in two parts of a fold."""
    numbers, inverse = np.unique(np.asarray(groups, str), return_inverse=True)
    for place, fold in enumerate(folds):
        for one, other in (("train", "test"), ("train", "val"), ("val", "test")):
            parts = fold.parts()
            shared = np.intersect1d(inverse[parts[one]], inverse[parts[other]])
            if len(shared):
                raise InputError(
                    f"{where}, fold {place}: {len(shared)} groups are in {one} and in {other}: "
                    f"{some(numbers[shared].tolist())}. A patient has to be on one side"
                )


def split_id(folds: Sequence[Fold], items: Sequence[str]) -> str:
    """Identity of folds, 16 hex digits: of which named item is where, whatever their order.

    Two runs with the same one were trained and tested on the same items in every fold.
    """
    places: dict[str, list[str]] = {}
    for fold in folds:
        for part, rows in fold.parts().items():
            for row in rows.tolist():
                places.setdefault(items[row], []).append(part)
        for row in unused(fold, len(items)).tolist():
            places.setdefault(items[row], []).append("")
    text = json.dumps(sorted(places.items()), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def unused(fold: Fold, items: int) -> np.ndarray:
    """Numbers of the items that are in no part of a fold."""
    rows = np.concatenate(list(fold.parts().values()))
    return np.setdiff1d(np.arange(items), rows)
