"""The linear probe of the eva benchmark: one layer, trained by AdamW, stopped by validation.

source  kaiko-ai/eva, configs/vision/pathology/offline/classification/crc.yaml: AdamW 3e-4, batches
        of 256, at most 12,500 steps, the weights of the best validation accuracy, which is the
        mean over the classes there (torchmetrics' macro), patience 7 epochs. Smaller sets have
        longer patience there, mhist.yaml 70 epochs: a twentieth of the steps, as here
"""
# N training patches, D features, K classes, n validation patches

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from latentds.core.randomness import key_of, shuffled
from latentds.errors import InputError
from latentds.evaluation.probes import FittedProbe, standardized

if TYPE_CHECKING:
    from torch import Tensor, nn

LEARNING_RATE = 3e-4
BATCH = 256
STEPS = 12_500
PATIENCE, PATIENCE_SHARE = 7, 0.05  # epochs at least, and share of the steps
SEEDS = 2**63  # torch takes seeds below
STILL_RISING = (
    f"eva's probe was ended after {STEPS:,} steps, before its patience with a validation accuracy "
    "that did not rise"
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Features float32 (N, D) and labels int64 (N,)."""

    features: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def eva_probe(
    train: Examples,
    val: Examples,
    test: np.ndarray,
    classes: int,
    *,
    seed: int,
    standardize: bool = False,
) -> FittedProbe:
    """Class probabilities of test features (n, D) by a linear layer on features as they are.

    val          which epoch's weights are tested, and when training ends; eva takes the test set
                 itself (CRC-VAL-HE-7K) for it, which flatters: here they are other patches
    seed         of the first weights and the order of patches
    standardize  mean 0 and deviation 1 of every feature over the training patches first
    raises       InputError where there is nothing to validate on
    """
    import torch

    if not len(val):
        raise InputError("no patch to validate on, by which eva's probe chooses its weights")
    features = [train.features, val.features, test]
    if standardize:
        wide = [part.astype(np.float64) for part in features]  # sums over 90,000 patches
        features = [*standardized(wide[0], wide[1]), standardized(wide[0], wide[2])[1]]
    fitted, held, tested = (torch.from_numpy(np.asarray(f, np.float32)) for f in features)
    head = new_head(fitted.shape[1], classes, seed)
    epochs = trained(head, fitted, torch.from_numpy(train.labels.astype(np.int64)), seed)
    patience = patience_of(len(train))
    remark = kept_best(head, epochs, patience, lambda: balanced_accuracy(head, held, val.labels))
    with torch.no_grad():
        return FittedProbe(head(tested).double().softmax(1).numpy(), remark)


def new_head(dim: int, classes: int, seed: int) -> nn.Linear:
    """A linear layer with torch's own first weights; the process's generator is left alone."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key_of("eva", seed) % SEEDS)
        return torch.nn.Linear(dim, classes)


def trained(head: nn.Linear, features: Tensor, labels: Tensor, seed: int) -> Iterator[int]:
    """Train epoch by epoch, handing back after each, until the steps are used up."""
    import torch

    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE)
    left = STEPS
    for epoch in itertools.count():
        order = torch.from_numpy(shuffled(len(labels), key_of("eva", seed, epoch)))
        for rows in torch.split(order, BATCH)[:left]:
            loss = torch.nn.functional.cross_entropy(head(features[rows]), labels[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            left -= 1
        yield epoch
        if not left:
            return


def patience_of(patches: int) -> int:
    """Epochs without a better validation accuracy after which training ends."""
    return max(PATIENCE, math.ceil(PATIENCE_SHARE * STEPS / math.ceil(patches / BATCH)))


def kept_best(
    head: nn.Linear, epochs: Iterator[int], patience: int, accuracy: Callable[[], float]
) -> str:
    """Put the weights of the best epoch back into the layer; a remark if the steps ran out."""
    best, waited, kept = -1.0, 0, head.state_dict()
    for _ in epochs:
        reached = accuracy()
        if reached > best:
            best, waited = reached, 0
            kept = {name: tensor.clone() for name, tensor in head.state_dict().items()}
            continue
        waited += 1
        if waited >= patience:
            break
    head.load_state_dict(kept)
    return "" if waited >= patience else STILL_RISING


def balanced_accuracy(head: nn.Linear, features: Tensor, labels: np.ndarray) -> float:
    """Recall of each class that is there, averaged."""
    import torch

    with torch.no_grad():
        found = head(features).argmax(1).numpy()
    return float(np.mean([(found[labels == label] == label).mean() for label in np.unique(labels)]))
