"""Which patches a probe is fitted to and which it is scored on: chosen once, by a fixed seed."""
# N patches of the probe's set

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from latentds_trainers.pretrain.probe_config import ProbeConfig

from latentds.errors import InputError
from latentds.evaluation.folds import SPLIT_WORDS, Fold, check_disjoint, stratified_group_folds
from latentds.evaluation.groups import groups_of, own_groups
from latentds.evaluation.patchsets.patch_set import PatchTable
from latentds.evaluation.patchsets.patches import PatchSet
from latentds.sources.slide_names import some

FOLDS = 5  # a fifth of the groups is held out where there is no test split
SEED = 0  # not the run's: runs with other seeds are probed on the same patches


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ProbeRows:
    """The chosen patches.

    fit, score  rows of the set, int64, ascending
    labels      int64 (N,), places in `classes`, -1 for patches of no part
    classes     names of the classes that are fitted to
    rule        how the two parts were made, in words
    """

    fit: np.ndarray
    score: np.ndarray
    labels: np.ndarray
    classes: list[str]
    rule: str


def choose_rows(patches: PatchSet, config: ProbeConfig) -> ProbeRows:
    """The patches that are fitted to and scored, at most so many of each."""
    table, where = patches.table, f"--probe {config.probe}"
    remedy = "give a set that was converted with labels, or class folders"
    names = table.class_names(patches.classes, where, remedy)
    groups, group_rule = groups_of(table.slides, table.sources, config.probe_groups, table.patients)
    fold, rule = find_fold(table, names, groups, config)
    check_apart(fold, table, groups, config)
    classes = sorted({names[row] for row in fold.train.tolist()})
    check_classes(names, fold, classes, where)
    places = {name: number for number, name in enumerate(classes)}
    labels = np.array([places.get(name, -1) for name in names], np.int64)
    half = config.probe_patches // 2
    fit = sample(fold.train, labels, half, SEED)
    if len(fit) < config.probe_neighbours:
        raise InputError(
            f"{where}: {len(fit):,} patches to fit to, fewer than --probe-neighbours "
            f"{config.probe_neighbours}; a lower number, or more patches"
        )
    return ProbeRows(
        fit=fit,
        score=sample(fold.test, labels, half, SEED + 1),
        labels=labels,
        classes=classes,
        rule=f"{rule}; groups: {group_rule}",
    )


def find_fold(
    table: PatchTable, names: list[str], groups: list[str], config: ProbeConfig
) -> tuple[Fold, str]:
    """What to fit to and what to score, and the rule in words."""
    where = f"--probe {config.probe}"
    words = np.array([SPLIT_WORDS.get(name.strip().lower(), "") for name in table.splits])
    test = np.flatnonzero(words == "test")
    if len(test):
        train = np.flatnonzero(words == "train")
        if not len(train):
            raise InputError(f"{where}: a test split and no train split; one to fit to is wanted")
        return Fold(train, np.empty(0, np.int64), test), "its train and test splits"
    labels = np.unique(names, return_inverse=True)[1]
    try:
        folds = stratified_group_folds(
            labels,
            groups,
            folds=hold_out_folds(labels, groups),
            seed=SEED,
            val=False,
            classes=sorted(set(names)),
        )
    except InputError as error:
        raise InputError(f"{where}: no test split, and no groups to hold out: {error}") from error
    return folds[0], f"a held-out part in {len(folds)} of its groups, no test split"


def check_apart(fold: Fold, table: PatchTable, groups: list[str], config: ProbeConfig) -> None:
    """Refuse patients or slides, or groups of the user's table, that are on both sides."""
    where, own = f"--probe {config.probe}", groups
    if config.probe_groups is None:  # items are told apart by their rows: names may come twice
        kinds = own_groups(table.slides, table.sources, table.patients)
        own = [f"item {row}" if kind == "item" else name for row, (kind, name) in enumerate(kinds)]
    try:
        check_disjoint([fold], own, where)
    except InputError as error:
        raise InputError(
            f"{error}; convert it with splits that keep them apart, or say in --probe-groups what "
            "belongs together"
        ) from error


def hold_out_folds(labels: np.ndarray, groups: Sequence[str]) -> int:
    """In how many parts the groups are cut: five, fewer where a class has fewer groups."""
    own = np.asarray(groups, str)
    least = min(len(np.unique(own[labels == number])) for number in np.unique(labels))
    return max(2, min(FOLDS, least))


def check_classes(names: list[str], fold: Fold, classes: list[str], where: str) -> None:
    """Refuse a part that is scored with classes that are never fitted to, or a single class."""
    foreign = sorted({names[row] for row in fold.test.tolist()} - set(classes))
    if foreign:
        raise InputError(
            f"{where}: classes {some(foreign)} are in the part that is scored and not in the one "
            f"that is fitted to ({some(classes)}); both need the same classes"
        )
    if len(classes) < 2:
        raise InputError(f"{where}: all patches to fit to are {classes[0]!r}; two classes at least")


def sample(rows: np.ndarray, labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most about `count` rows, ascending, classes in their proportions, one of each at least."""
    if len(rows) <= count:
        return rows
    order = np.random.default_rng(seed).permutation(len(rows))
    chosen = []
    for number in np.unique(labels[rows]).tolist():
        own = rows[order][labels[rows[order]] == number]
        chosen.append(own[: max(1, len(own) * count // len(rows))])
    return np.sort(np.concatenate(chosen))
