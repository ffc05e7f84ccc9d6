"""Folds of a cross-validation, every group on one side: drawn by a seed, or read from files."""
# n items (patches, slides), g groups

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from latentds.core.display import number_of
from latentds.errors import InputError, missing_extra
from latentds.sources.csv_tables import TextTable, read_table, write_table
from latentds.sources.names import ALIASES
from latentds.sources.slide_names import NameIndex, some

PARTS = ("train", "val", "test")
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
CLAM_FILE = re.compile(r"splits_(\d+)\.csv")
FOLD_COLUMN = re.compile(r"fold_(\d+)")


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
    inner = stratified_group_folds(
        targets[rest], own, folds=folds, seed=seed, val=False, classes=classes
    )
    made = [Fold(rest[fold.train], rest[fold.test], fixed) for fold in inner]
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
        bare = number_of(int((targets < 0).sum()), "item has", "items have")
        raise InputError(f"{bare} no label; leave out what has none")
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


def check_trained(folds: Sequence[Fold], targets: np.ndarray, classes: Sequence[str]) -> None:
    """InputError for a fold that tests a class it does not train on, or trains on one alone."""
    for number, fold in enumerate(folds):
        trained = set(targets[fold.train].tolist())
        lost = sorted(set(targets[fold.test].tolist()) - trained)
        if lost or len(trained) < 2:
            names = [classes[label] for label in (lost or trained)]
            told = f"tests {some(names)} and does not train on it" if lost else f"trains on {names}"
            raise InputError(
                f"fold {number} {told}: the other groups are in the tested or validating part, or "
                "no training item has the class. Give other splits, fewer folds or finer groups"
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


def note_splits(own: Iterable[str], remedy: str) -> list[str]:
    """That folds are drawn across a set's own splits, where it has several."""
    counts = Counter(name for name in own if name)
    if len(counts) < 2:
        return []
    told = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    return [f"the set's own splits ({told}) play no part, folds are drawn from all; {remedy}"]


def write_clam_splits(folder: Path, folds: Sequence[Fold], slides: Sequence[str]) -> list[Path]:
    """`splits_<i>.csv` for every fold: columns train, val and test of slide names, as CLAM's.

    The first column numbers the lines and has no name; shorter columns end in empty cells.
    """
    paths = []
    for number, fold in enumerate(folds):
        names = [[slides[row] for row in rows] for rows in fold.parts().values()]
        rows = enumerate(itertools.zip_longest(*names, fillvalue=""))
        paths.append(folder / f"splits_{number}.csv")
        write_table(paths[-1], ["", *PARTS], [[line, *cells] for line, cells in rows])
    return paths


def read_splits(
    path: Path,
    slides: Sequence[str],
    groups: Sequence[str],
    *,
    allow_subset: bool = False,
) -> list[Fold]:
    """Folds of a CLAM splits folder or file, or of a Patho-Bench table.

    slides        names of the bags, each once; groups are their patients
    allow_subset  pass over slides of the file that are not there, and slides that it lacks
    raises        InputError for a file of neither kind, a slide in two parts, slides that are not
                  there or that no fold names, names that can mean several, a patient in two parts
    """
    is_clam = path.is_dir() or "train" in read_table(path).columns
    folds, lost = read_clam(path, slides) if is_clam else read_patho_bench(path, slides)
    used = np.unique(np.concatenate([rows for fold in folds for rows in fold.parts().values()]))
    bare = [slides[row] for row in np.setdiff1d(np.arange(len(slides)), used)]
    for left, what in ((lost, "not there"), (bare, "in no fold")):
        if left and not allow_subset:
            are = number_of(len(left), "slide is", "slides are")
            raise InputError(
                f"{path}: {are} {what}: {some(left)}. Mend the names, or pass --allow-subset"
            )
    for number, fold in enumerate(folds):
        if not len(fold.train) or not len(fold.test):
            raise InputError(
                f"{path}, fold {number}: {fold.sizes()} slides; train and test need some"
            )
    check_disjoint(folds, groups, str(path))
    return folds


def read_clam(path: Path, slides: Sequence[str]) -> tuple[list[Fold], list[str]]:
    """Folds in the order of the files' numbers, and the slides that are not there."""
    files = [path]
    if path.is_dir():
        named = [(CLAM_FILE.fullmatch(file.name), file) for file in path.iterdir()]
        files = [file for _, file in sorted((int(m[1]), file) for m, file in named if m)]
        if not files:
            raise InputError(f"{path}: no splits_0.csv, splits_1.csv, ... in it")
    folds, lost = [], dict[str, None]()
    for file in files:
        table = read_table(file)
        for part in ("train", "test"):
            table.need_column([part], f"the {part} slides")
        own = [part for part in PARTS if part in table.columns]
        pairs = [(name, part) for part in own for name in table.values(part) if name]
        folds.append(assign(pairs, slides, str(file), lost))
    return folds, list(lost)


def read_patho_bench(path: Path, slides: Sequence[str]) -> tuple[list[Fold], list[str]]:
    """Folds in the order of the columns' numbers, and the slides that are not there."""
    table = read_table(path)
    key = table.need_column(ALIASES["slide"], "slides")
    numbered = {int(f[1]): name for name in table.columns if (f := FOLD_COLUMN.fullmatch(name))}
    if not numbered:
        raise InputError(f"{path}: neither train, val, test nor fold_0, fold_1, ... are columns")
    lost: dict[str, None] = {}
    folds = []
    for _, column in sorted(numbered.items()):
        pairs = fold_pairs(table, key, column)
        folds.append(assign(pairs, slides, f"{path}, {column}", lost))
    return folds, list(lost)


def fold_pairs(table: TextTable, key: str, column: str) -> list[tuple[str, str]]:
    """Slides with their part in one fold; those without one are left out."""
    pairs = []
    for line, row in zip(table.lines, table.rows, strict=True):
        name, word = row[key].strip(), row[column].strip().lower()
        if word and word not in SPLIT_WORDS:
            raise InputError(
                f"{table.path}, line {line}: {column} is {word!r}; train, val, test or nothing"
            )
        if word:
            pairs.append((name, SPLIT_WORDS[word]))
    return pairs


def assign(
    pairs: Sequence[tuple[str, str]], slides: Sequence[str], where: str, lost: dict[str, None]
) -> Fold:
    """A fold of names with their parts; names that are not there are added to `lost`."""
    part_of: dict[str, str] = {}
    for name, part in pairs:
        if part_of.setdefault(name, part) != part:
            raise InputError(f"{where}: slide {name!r} is in {part_of[name]} and in {part}")
    matched = NameIndex(slides).match(part_of, where)
    rows: dict[str, list[int]] = {part: [] for part in PARTS}
    for name, place in matched.items():
        if place is None:
            lost[name] = None
        else:
            rows[part_of[name]].append(place)
    return Fold(**{part: np.sort(np.array(found, np.int64)) for part, found in rows.items()})
