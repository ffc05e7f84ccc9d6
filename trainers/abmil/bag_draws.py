"""Which bags an epoch draws, and how much each counts: functions of a key, and checks of a fold."""
# n bags, C classes

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from latentds_trainers.abmil.config import AbmilConfig
from torch import Tensor

from latentds.core.randomness import key_of, mix, shuffled
from latentds.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Slides of a fold's part, and their classes int64."""

    slides: list[str]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.slides)


def check_parts(fold: int, train: Part, val: Part, test: Part, config: AbmilConfig) -> None:
    """InputError where a part that is needed is empty, or training knows one class only."""
    remedy = "give other splits, or fewer folds"
    if not len(train) or not len(test):
        raise InputError(
            f"fold {fold}: {len(train)} slides to train on and {len(test)} to test; {remedy}"
        )
    if not len(val) and config.settings.select == "best":
        raise InputError(
            f"fold {fold}: no slide to validate on, by which the best weights are chosen; "
            "give splits that have some, or --select last"
        )
    missing = set(test.targets.tolist()) - set(train.targets.tolist())
    if missing or len(set(train.targets.tolist())) < 2:
        raise InputError(f"fold {fold}: a class is not among the slides trained on; {remedy}")


def seed_draws(device: torch.device, seed: int) -> None:
    """Set torch's generator of the device: a tenth of what `torch.manual_seed` takes.

    That one also keeps a stack trace for a GPU that is not in use, at every call.
    """
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def draw_bags(targets: np.ndarray, count: int, key: int, *, is_balanced: bool) -> np.ndarray:
    """Places int64 (count,) of an epoch's bags: permutations, or each class equally often.

    Balanced, bags are drawn with replacement, as CLAM's weighted sampler does.
    """
    if not is_balanced:
        rounds = math.ceil(count / len(targets))
        orders = [shuffled(len(targets), key_of("round", key, number)) for number in range(rounds)]
        return np.concatenate(orders)[:count]
    shares = 1.0 / np.bincount(targets)[targets]
    numbers = mix(np.arange(count, dtype=np.uint64) + np.uint64(key)) / 2.0**64
    edges = np.cumsum(shares) / shares.sum()
    return np.minimum(np.searchsorted(edges, numbers, side="right"), len(targets) - 1)


def loss_weights(targets: np.ndarray, classes: int, *, is_weighted: bool) -> Tensor:
    """Weight of a bag's loss by class, float32 (C,): 1 on average over the bags."""
    counts = np.bincount(targets, minlength=classes)
    weights = len(targets) / (classes * np.maximum(counts, 1)) if is_weighted else np.ones(classes)
    return torch.from_numpy(np.asarray(weights, np.float32))
