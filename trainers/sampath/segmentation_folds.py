"""Which images a segmentation run trains on and is tested on: a table of folds, splits, groups."""
# N images, K labels with 0

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentds.core.randomness import key_of
from latentds.errors import InputError
from latentds.evaluation.folds import Fold, check_disjoint, predefined_fold
from latentds.sources.csv_tables import read_table
from latentds.sources.image_folder import split_of_fold
from latentds.sources.slide_names import NameIndex, some

NO_FOLDS = (
    "say what is tested: --folds N for a cross-validation, --fold-table CSV, or data with splits "
    "train and test"
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FoldPlan:
    """The folds of a run.

    rule   how they were found, in words
    notes  what a reader of the scores should know
    """

    folds: list[Fold]
    rule: str
    notes: tuple[str, ...] = ()


def table_plan(
    path: Path, sources: Sequence[str], groups: Sequence[str], *, allow_shared: bool = False
) -> FoldPlan:
    """The one fold of a table img_id, fold: -1 is test, 0 val, others train (SAM-Path's).

    raises  InputError for images of the table that are not there, and the reverse; for what
            `named_plan` refuses
    """
    table = read_table(path)
    image, fold = (table.need_column([name], f"{name} of an image") for name in ("img_id", "fold"))
    known = list(dict.fromkeys(sources))
    matched = NameIndex(known).match(table.values(image), str(path))
    lost = [name for name, place in matched.items() if place is None]
    if lost:
        raise InputError(
            f"{path}: {len(lost):,} of its images are not in the data: {some(lost)}; take those "
            "lines out, or give the data it is for"
        )
    splits = {
        known[place]: split_of_fold(value, path)
        for name, value in zip(table.values(image), table.values(fold), strict=True)
        if (place := matched[name]) is not None
    }
    missing = [source for source in known if source not in splits]
    if missing:
        raise InputError(
            f"{path}: lacks {len(missing):,} images of the data: {some(missing)}; every image "
            "needs a line"
        )
    named, rule = [splits[source] for source in sources], f"fold table {path.name}"
    return named_plan(named, groups, rule, allow_shared=allow_shared)


def named_plan(
    splits: Sequence[str], groups: Sequence[str], rule: str, *, allow_shared: bool = False
) -> FoldPlan:
    """The one fold that split names say, with notes on groups in two of its parts.

    allow_shared  take groups that are tested and in another part as well
    raises        InputError for such groups otherwise, and as `predefined_fold` does. Train and val
                  may share groups: scores are those of test, with the weights of the last step
    """
    fold = predefined_fold(splits)
    notes = []
    for one, other in (("train", "test"), ("val", "test"), ("train", "val")):
        parts = [{groups[row] for row in fold.parts()[part].tolist()} for part in (one, other)]
        shared = sorted(parts[0] & parts[1])
        if not shared:
            continue
        told = f"{len(shared):,} groups are in both {one} and {other}"
        if other == "test" and not allow_shared:
            raise InputError(
                f"{rule}: {told}: {some(shared)}. A patient has to be on one side; mend the "
                "splits or --groups, or take them as they are with --allow-shared-groups"
            )
        notes.append(told)
    return FoldPlan(folds=[fold], rule=rule, notes=tuple(notes))


def group_plan(groups: Sequence[str], folds: int, seed: int, rule: str) -> FoldPlan:
    """Folds of about as many images each that keep groups whole; nothing is left for validation.

    raises  InputError for fewer groups than folds
    """
    counts = Counter(groups)
    if len(counts) < folds:
        raise InputError(
            f"{len(counts)} groups of images ({rule}) for {folds} folds; take fewer folds"
        )
    order = sorted(counts, key=lambda name: (-counts[name], key_of("fold", seed, name)))
    filled, place = [0] * folds, {}
    for name in order:
        place[name] = filled.index(min(filled))
        filled[place[name]] += counts[name]
    places = np.array([place[name] for name in groups])
    none = np.empty(0, np.int64)
    made = [
        Fold(np.flatnonzero(places != number), none, np.flatnonzero(places == number))
        for number in range(folds)
    ]
    check_disjoint(made, groups)
    return FoldPlan(folds=made, rule=f"{folds} folds, groups kept whole: {rule}")


def check_classes(plan: FoldPlan, counts: np.ndarray, names: Sequence[str]) -> tuple[str, ...]:
    """Notes on classes that a fold lacks.

    counts  int64 (N, K), pixels of every image by label
    raises  InputError for a class that is tested and not trained on, or that no image has
    """
    absent = [name for name, pixels in zip(names, counts.sum(0), strict=True) if not pixels]
    if lacking := [name for name in absent if name != names[0]]:
        raise InputError(f"no mask has a pixel of {some(lacking)}; see --classes and --mask-values")
    notes = []
    for number, fold in enumerate(plan.folds):
        has = {part: counts[rows].sum(0) > 0 for part, rows in fold.parts().items()}
        for label in range(1, len(names)):
            if has["test"][label] and not has["train"][label]:
                rows = fold.test[counts[fold.test, label] > 0]
                raise InputError(
                    f"fold {number}: class {names[label]!r} is in {len(rows)} images, all tested "
                    "and none trained on; take other folds, finer groups, or leave the class out"
                )
            if not has["test"][label]:
                notes.append(f"fold {number} tests no pixel of class {names[label]!r}")
    return tuple(notes)
