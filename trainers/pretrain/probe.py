"""What a backbone knows while it is trained: nearest neighbours and a linear probe.

The patches are chosen once, by a fixed seed: every probe of a run, and of runs to compare, is
fitted to the same patches and scored on the same. No patient and no slide that is known is on both
sides.
"""
# N patches of the probe's set, n chosen ones, B batch, D features, C h w latents

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from latentds_trainers.engine.ranks import from_first, gathered, on_all_ranks
from latentds_trainers.pretrain.config import PretrainOptions
from torch import Tensor, nn

from latentds.embedders.latent_stem import LatentStemConfig, check_cells, timm_arguments
from latentds.errors import InputError
from latentds.evaluation.folds import SPLIT_WORDS, Fold, check_disjoint, stratified_group_folds
from latentds.evaluation.groups import groups_of, own_groups
from latentds.evaluation.patchsets.open_patch_sets import open_patches, open_undecoded
from latentds.evaluation.patchsets.patch_set import PatchInput, PatchTable
from latentds.evaluation.patchsets.patches import PatchSet
from latentds.evaluation.probes import linear_probe, load_scikit_learn, nearest_neighbours
from latentds.evaluation.scores import classification_scores
from latentds.sources.slide_names import some

logger = logging.getLogger(__name__)

BATCH = 64  # patches embedded at once
SCORES = ("accuracy", "balanced_accuracy")
FOLDS = 5  # parts of the groups, one held out without a test split; fewer where a class has fewer
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


class Probe:
    """Scores of a backbone on labelled patches; made before training, called while it goes on.

    config  the run's settings, with a `probe`
    stem    of a backbone that reads latents: the probe's latents are normalized as it has them
    facts   for the run's record: data, classes, numbers of patches, rules
    raises  InputError for a set without labels, a test split with a class that is never fitted to,
            a patient or slide in both splits, too few patches or groups, originals where latents
            are wanted; ContractError for other latents than the stem's; ShapeError for latents that
            are no whole tokens; MissingExtraError. Making one meets no other rank.
    """

    def __init__(
        self,
        config: PretrainOptions,
        device: torch.device,
        stem: LatentStemConfig | None = None,
    ) -> None:
        load_scikit_learn()
        assert config.probe is not None
        self.device, self.neighbours, self.has_stem = device, config.probe_neighbours, bool(stem)
        self.where = config.probe
        settings = PatchInput(data=Path(config.probe), device=str(device))
        self.patches: PatchSet
        if stem is None:
            self.patches = open_patches(settings)
        else:
            opened = open_undecoded(settings, stem=stem)
            self.patches = opened.patches
            arguments = timm_arguments(config.arch, stem)
            if arguments is not None:  # else a cell is a token, or several
                check_cells(config.arch, arguments["patch_size"], opened.cells)
        self.rows = choose_rows(self.patches, config)
        self.facts = {
            "data": Path(config.probe).name,
            "classes": self.rows.classes,
            "fitted_to": len(self.rows.fit),
            "scored_on": len(self.rows.score),
            "rule": self.rows.rule,
            "neighbours": self.neighbours,
        }

    @torch.no_grad()
    def __call__(
        self, backbone: nn.Module, prepare: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Accuracy and balanced accuracy of both probes, the same on every rank. Collective.

        backbone  on the device, in eval mode; embeddings (B, D) of its input
        prepare   pictures float (B, 3, H, W) in [0, 1] to the backbone's input; latents go in as
                  they are, normalized by the stem
        returns   knn_accuracy, knn_balanced_accuracy, linear_accuracy, linear_balanced_accuracy
        raises    InputError for features that are not finite, what reading a patch raises; on every
                  rank
        """
        rows = np.sort(np.concatenate([self.rows.fit, self.rows.score]))
        rank, ranks = dist.get_rank(), dist.get_world_size()
        own = on_all_ranks(lambda: self.embed(rows[rank::ranks], backbone, prepare))
        parts = gathered(own)
        return dict(from_first(lambda: self.score(rows, parts)))

    def embed(
        self, rows: np.ndarray, backbone: nn.Module, prepare: Callable[[Tensor], Tensor]
    ) -> np.ndarray:
        """Features float32 (n, D) of rows."""
        found = []
        batches = (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))
        for part in self.patches.stream(batches):
            values = part.to(self.device)
            features = backbone(values if self.has_stem else prepare(values.float() / 255))
            found.append(features.float().cpu().numpy())
        return np.concatenate(found) if found else np.empty((0, 0), np.float32)

    def score(self, rows: np.ndarray, parts: Sequence[np.ndarray]) -> dict[str, float]:
        width = max(part.shape[1] for part in parts)
        features = np.empty((len(rows), width), np.float32)
        for rank, part in enumerate(parts):
            if len(part):
                features[rank :: len(parts)] = part
        if not np.isfinite(features).all():
            raise InputError(
                f"--probe {self.where}: the backbone's features are not finite; the training has "
                "diverged, go on from an earlier checkpoint with a lower --lr"
            )
        chosen, classes = self.rows, self.rows.classes
        fit, scored = (features[np.searchsorted(rows, part)] for part in (chosen.fit, chosen.score))
        labels = chosen.labels[chosen.fit]
        # Features of a network that has just begun are small: UNI's penalty would hold all at 0.
        options: dict[str, Any] = {"penalty": "squared", "standardize": True}
        fits = {
            "knn": nearest_neighbours(
                fit, labels, scored, len(classes), neighbours=self.neighbours
            ),
            "linear": linear_probe(fit, labels, scored, len(classes), **options),
        }
        figures = {}
        for name, fitted in fits.items():
            if fitted.remark:
                logger.warning("%s probe: %s", name, fitted.remark)
            wanted = chosen.labels[chosen.score]
            values = classification_scores(wanted, fitted.probabilities, classes).values
            for score in SCORES:
                if (value := values[score]) is not None:
                    figures[f"{name}_{score}"] = float(value)
        return figures


def choose_rows(patches: PatchSet, config: PretrainOptions) -> ProbeRows:
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
    table: PatchTable, names: list[str], groups: list[str], config: PretrainOptions
) -> tuple[Fold, str]:
    """What to fit to and what to score, and the rule in words."""
    where = f"--probe {config.probe}"
    words = np.array([SPLIT_WORDS.get(name.strip().lower(), "") for name in table.splits])
    train, test = (np.flatnonzero(words == part) for part in ("train", "test"))
    if len(test) and not len(train):
        raise InputError(f"{where}: a test split and no train split; one to fit to is wanted")
    if len(test):
        return Fold(train, np.empty(0, np.int64), test), "its train and test splits"
    labels, own = np.unique(names, return_inverse=True)[1], np.asarray(groups, str)
    least = min(len(np.unique(own[labels == number])) for number in np.unique(labels))
    try:
        folds = stratified_group_folds(
            labels,
            groups,
            folds=max(2, min(FOLDS, least)),
            seed=SEED,
            val=False,
            classes=sorted(set(names)),
        )
    except InputError as error:
        raise InputError(f"{where}: no test split, and no groups to hold out: {error}") from error
    return folds[0], f"a held-out part in {len(folds)} of its groups, no test split"


def check_apart(fold: Fold, table: PatchTable, groups: list[str], config: PretrainOptions) -> None:
    """Refuse patients or slides, or groups of the user's table, that are on both sides."""
    own = groups
    if config.probe_groups is None:  # items are told apart by their rows: names may come twice
        kinds = own_groups(table.slides, table.sources, table.patients)
        own = [f"item {row}" if kind == "item" else name for row, (kind, name) in enumerate(kinds)]
    check_disjoint([fold], own, f"--probe {config.probe}, whose splits have to keep groups apart")


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
