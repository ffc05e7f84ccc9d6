"""The linear probe of the eva benchmark: one layer, trained by AdamW, stopped by validation.

source  kaiko-ai/eva, configs/vision/pathology/offline/classification/crc.yaml: AdamW 3e-4, batches
        of 256, at most 12,500 steps, the weights of the best validation accuracy, which is the
        mean over the classes there (torchmetrics' macro), patience 7 epochs
"""
# N training patches, D features, K classes, n validation patches

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from latentds.errors import InputError
from latentds.evaluation.probes import Fitted
from latentds.randomness import key_of, shuffled

if TYPE_CHECKING:
    from torch import Tensor, nn

LEARNING_RATE = 3e-4
BATCH = 256
STEPS = 12_500
PATIENCE = 7
SEEDS = 2**63  # torch takes seeds below
STILL_RISING = (
    f"eva's probe was ended after {STEPS:,} steps, before {PATIENCE} epochs without a better "
    "validation accuracy"
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
) -> Fitted:
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
        moments = train.features.mean(0), train.features.std(0)
        features = [scaled(part, *moments) for part in features]
    fitted, held, tested = (torch.from_numpy(np.asarray(f, np.float32)) for f in features)
    head = new_head(fitted.shape[1], classes, seed)
    epochs = trained(head, fitted, torch.from_numpy(train.labels.astype(np.int64)), seed)
    remark = kept_best(head, epochs, lambda: balanced_accuracy(head, held, val.labels))
    with torch.no_grad():
        return Fitted(head(tested).double().softmax(1).numpy(), remark)


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
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            left -= 1
        yield epoch
        if not left:
            return


def kept_best(head: nn.Linear, epochs: Iterator[int], accuracy: Callable[[], float]) -> str:
    """Put the weights of the best epoch back into the layer; a remark if the steps ran out."""
    best, waited, kept = -1.0, 0, head.state_dict()
    for _ in epochs:
        reached = accuracy()
        if reached > best:
            best, waited = reached, 0
            kept = {name: tensor.clone() for name, tensor in head.state_dict().items()}
            continue
        waited += 1
        if waited >= PATIENCE:
            break
    head.load_state_dict(kept)
    return "" if waited >= PATIENCE else STILL_RISING


def balanced_accuracy(head: nn.Linear, features: Tensor, labels: np.ndarray) -> float:
    """Recall of each class that is there, averaged."""
    import torch

    with torch.no_grad():
        found = head(features).argmax(1).numpy()
    return float(np.mean([(found[labels == label] == label).mean() for label in np.unique(labels)]))


def scaled(features: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Features by mean and deviation; constant ones become 0."""
    result: np.ndarray = (features - mean) / np.where(deviation == 0, 1, deviation)
    return result
