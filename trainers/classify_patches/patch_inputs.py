"""Labelled patches of a classification: one set, or a training and a test set, and their folds."""
# N patches of both, K classes, n of a request

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from latentds.errors import InputError
from latentds.evaluation.folds import (
    Fold,
    check_trained,
    fixed_test_folds,
    note_splits,
    stratified_group_folds,
)
from latentds.evaluation.groups import groups_of
from latentds.evaluation.patchsets.open_patch_sets import open_patches
from latentds.loading.fields_of_view import TOLERANCE

if TYPE_CHECKING:
    from latentds_trainers.classify_patches.config import ClassifyConfig

    from latentds.embedders.latent_stem import LatentStemConfig
    from latentds.evaluation.patchsets.open_patch_sets import UndecodedPatches
    from latentds.evaluation.patchsets.patches import PatchSet

TEST = "test"
LABEL_THEM = "put patches into class folders, or name --name-pattern or --splits that label them"
NOT_COMPARED = (
    "--groups does not cover --test-data: whether patients are in both could not be compared"
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LabelledPatches:
    """Patches of one or two sets, rows counted through.

    sets        the set, or the training set and the test set
    classes     names of the classes that have patches
    labels      int64 (N,), places in `classes`
    items       name of every patch, unique
    groups      what must stay together, one a patch
    group_rule  how groups were found, in words
    is_test     bool (N,): patches of the test split or test set
    notes       what could not be made sure of
    """

    sets: list[PatchSet]
    classes: list[str]
    labels: np.ndarray
    items: list[str]
    groups: list[str]
    group_rule: str
    is_test: np.ndarray
    notes: list[str] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def starts(self) -> np.ndarray:
        """First row of every set, and N."""
        return np.cumsum([0, *(len(patches) for patches in self.sets)])

    def stream(self, requests: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """Images uint8 (n, 3, H, W), or latents, of one request after the other, read ahead.

        requests  rows, those of one all of the same set
        """
        placed = ((self.set_of(rows), rows) for rows in requests)
        for number, run in itertools.groupby(placed, key=lambda pair: pair[0]):
            start = self.starts[number]
            yield from self.sets[number].stream(rows - start for _, rows in run)

    def set_of(self, rows: np.ndarray) -> int:
        first, last = np.searchsorted(self.starts, [rows.min(), rows.max()], "right") - 1
        assert first == last
        return int(first)


def open_labelled(config: ClassifyConfig) -> LabelledPatches:
    """The patches of the config's protocol.

    raises  InputError for patches without a label, a test set with other classes or patches of
            another size, and what `groups_of` refuses
    """
    train = open_patches(config)
    sets, table = [train], train.table
    groups, rule = groups_of(table.slides, table.sources, config.groups, table.patients)
    notes: list[str] = []
    items, is_test = list(table.names), [name == TEST for name in table.splits]
    if config.test_data is not None:
        test = open_test_set(config, train, config.test_data)
        prefix = config.test_data.name
        own, notes = groups_of_test_set(test, prefix, config.groups)
        notes += note_scale(table.mpp, test.table.mpp)
        sets.append(test)
        items += [f"{prefix}/{name}" for name in test.table.names]
        groups += own
        is_test = [False] * len(train) + [True] * len(test)
    named = [
        name
        for patches, where in zip(sets, (config.data, config.test_data), strict=False)
        for name in patches.table.class_names(patches.classes, str(where), LABEL_THEM)
    ]
    classes, labels = np.unique(named, return_inverse=True)
    found = LabelledPatches(
        sets=sets,
        classes=classes.tolist(),
        labels=labels.astype(np.int64),
        items=items,
        groups=groups,
        group_rule=rule,
        is_test=np.array(is_test, bool),
        notes=notes,
    )
    drawn = [name for name in table.splits if config.protocol == "kfold" or name != TEST]
    remedy = "--protocol val7k tests on the split test, --split NAME takes one"
    found.notes.extend(note_splits(drawn, remedy))
    return found


def note_scale(train_mpp: np.ndarray, test_mpp: np.ndarray) -> list[str]:
    """That tissue is seen at another scale in the test set, where both sets tell theirs (N,)."""
    known = [mpp[np.isfinite(mpp)] for mpp in (train_mpp, test_mpp)]
    if not all(map(len, known)):
        return []
    train, test = (float(np.median(mpp)) for mpp in known)
    if max(train, test) <= min(train, test) * (1 + TOLERANCE):
        return []
    told = f"patches of --data have {train:.4g} um a pixel, those of --test-data {test:.4g}"
    return [f"{told}: tissue is tested at another scale than it is trained at"]


def groups_of_test_set(
    test: PatchSet, prefix: str, groups: Path | None
) -> tuple[list[str], list[str]]:
    """Groups of a test set of its own, and a note where they cannot be those of the training set.

    prefix  name of its folder, with which the table of groups may name its files
    """
    slides, sources, patients = test.table.slides, test.table.sources, test.table.patients
    prefixed = [f"{prefix}/{name}" for name in sources]
    if groups is None:
        own, _ = groups_of(slides, sources if test.slides() else prefixed, None, patients)
        return own, []
    for names in (prefixed, sources):
        try:
            return groups_of(slides, names, groups)[0], []
        except InputError:  # the table itself is sound: the training set's groups are in it
            continue
    own, _ = groups_of(slides, sources, None, patients)
    return [f"{prefix}/{name}" for name in own], [NOT_COMPARED]


def as_read(config: ClassifyConfig, device: torch.device) -> ClassifyConfig:
    """The config with this rank's device, unless another is named; a probe keeps no pixels."""
    own = str(device) if config.device == "auto" else config.device
    kept = config.keep_mb if config.probe == "finetune" else 0  # a probe sees each patch once
    return dataclasses.replace(config, device=own, keep_mb=kept)


def open_latents(
    config: ClassifyConfig, patches: LabelledPatches, stem: LatentStemConfig | None = None
) -> tuple[LabelledPatches, UndecodedPatches]:
    """The same patches by their latents, and the training set's own, stem included.

    stem    of a network that is there already, None for one of the training set's statistics
    raises  InputError for originals; ContractError for latents of another autoencoder, than the
            stem's or in the test set
    """
    from latentds.evaluation.patchsets.open_patch_sets import open_undecoded

    train = open_undecoded(config, stem=stem)
    sets = [train.patches]
    if len(patches.sets) > 1:
        sets.append(open_undecoded(of_test_set(config), stem=train.stem).patches)
    return dataclasses.replace(patches, sets=sets), train


def of_test_set(config: ClassifyConfig) -> ClassifyConfig:
    """The config that opens --test-data as the training set was opened."""
    assert config.test_data is not None
    return dataclasses.replace(config, data=config.test_data, split=None, groups=None)


def open_test_set(config: ClassifyConfig, train: PatchSet, folder: Path) -> PatchSet:
    """The test set: all patches of the folder, from the same source of pixels, codebook included.

    raises  InputError where patches differ in size
    """
    test = open_patches(of_test_set(config), like=train)
    if train.patch_px != test.patch_px:
        raise InputError(
            f"{folder}: patches of {test.patch_px[1]}x{test.patch_px[0]} px, --data has "
            f"{train.patch_px[1]}x{train.patch_px[0]}; give --patch-size with --resize"
        )
    return test


def protocol_folds(config: ClassifyConfig, patches: LabelledPatches) -> list[Fold]:
    """The folds of the protocol, as row numbers.

    raises  InputError for what `stratified_group_folds` and `fixed_test_folds` refuse, where the
            protocol's train or test split is missing, and for a fold that tests a class it does
            not train on
    """
    folds = drawn_folds(config, patches)
    check_trained(folds, patches.labels, patches.classes)
    return folds


def drawn_folds(config: ClassifyConfig, patches: LabelledPatches) -> list[Fold]:
    """The folds of the protocol, not checked for classes."""
    labels, groups, is_test = patches.labels, patches.groups, patches.is_test
    options: dict[str, Any] = {"folds": config.folds, "seed": config.seed}
    options["classes"] = patches.classes
    if config.protocol != "kfold" and (not is_test.any() or is_test.all()):
        raise InputError(
            f"{config.location}: {int((~is_test).sum()):,} patches to train on and "
            f"{int(is_test.sum()):,} in a test split; --protocol {config.protocol} needs "
            "folders train and test, or --test-data"
        )
    if config.protocol == "val7k":
        return fixed_test_folds(labels, groups, is_test, **options)
    rows = np.arange(len(labels)) if config.protocol == "kfold" else np.flatnonzero(~is_test)
    own = [groups[row] for row in rows.tolist()]
    validates = config.probe == "eva"  # the other probes have nothing to choose
    inner = stratified_group_folds(labels[rows], own, val=validates, **options)
    return [Fold(rows[fold.train], rows[fold.val], rows[fold.test]) for fold in inner]
