"""Split files of others: CLAM's splits_0.csv, splits_1.csv, ... and Patho-Bench's one table."""
# n slides

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from latentds.errors import InputError
from latentds.evaluation.folds import PARTS, SPLIT_WORDS, Fold, check_disjoint
from latentds.sources.csv_tables import TextTable, read_table, write_table
from latentds.sources.field_names import ALIASES
from latentds.sources.slide_names import NameIndex, some

CLAM_FILE = re.compile(r"splits_(\d+)\.csv")
FOLD_COLUMN = re.compile(r"fold_(\d+)")
PATHO_BENCH = "k=all.tsv"  # the name that Patho-Bench gives it


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


def write_patho_bench(
    path: Path,
    folds: Sequence[Fold],
    slides: Sequence[str],
    *,
    cases: Sequence[str],
    labels: Sequence[str],
) -> None:
    """A table with tabs: case_id, slide_id, label, and fold_<i>: train, val, test or nothing."""
    places = np.full((len(slides), len(folds)), "", dtype="<U5")
    for number, fold in enumerate(folds):
        for part, own in fold.parts().items():
            places[own, number] = part
    columns = ["case_id", "slide_id", "label", *(f"fold_{i}" for i in range(len(folds)))]
    rows = zip(cases, slides, labels, places.tolist(), strict=True)
    write_table(path, columns, [[*row[:3], *row[3]] for row in rows], "\t")


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
    for left, what in ((lost, "are not there"), (bare, "are in no fold")):
        if left and not allow_subset:
            raise InputError(
                f"{path}: {len(left):,} slides {what}: {some(left)}. Mend the names, or pass "
                "--allow-subset"
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
