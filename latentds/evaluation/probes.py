"""Probes of frozen features: logistic regression as UNI's authors fit it, eva's, neighbours.

And what colour alone tells: logistic regression on colour histograms.
"""
# N training patches, D features, K classes, n validation patches, B batch

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from latentds.core.randomness import key_of, shuffled
from latentds.errors import InputError, missing_extra

if TYPE_CHECKING:
    from torch import Tensor, nn

Penalty = Literal["norm", "squared"]
MAX_ITERATIONS = 1000  # UNI's downstream code and CLIP's
TOLERANCE = 1e-9  # relative change of the loss that ends a fit, as torch's L-BFGS has it
GRADIENT = 1e-7  # largest slope that ends a fit, as torch's L-BFGS has it
SQUARED_GRADIENT = 1e-6  # the same of scikit-learn; its own 1e-4 moves probabilities by 1e-4
CORRECTIONS = 20
COLOUR_BINS = 32  # a channel
NOT_CONVERGED = f"the logistic regression had not converged after {MAX_ITERATIONS} iterations"
ALL_ZERO = (
    "every weight of the logistic regression is 0, as UNI's penalty has it for few or small "
    "features; take --standardize or --penalty squared"
)
LEARNING_RATE = 3e-4
BATCH = 256
STEPS = 12_500
PATIENCE, PATIENCE_SHARE = 7, 0.05  # epochs at least, and share of the steps
SEEDS = 2**63  # torch takes seeds below
STILL_RISING = (
    f"eva's probe was ended after {STEPS:,} steps, before its patience with a validation accuracy "
    "that did not rise"
)


@dataclasses.dataclass(frozen=True, eq=False)
class FittedProbe:
    """Class probabilities of the test patches, and what is to be told of the fit.

    probabilities  float64 (N, K), rows sum to 1
    remark         what went wrong with the fit, empty if nothing did
    """

    probabilities: np.ndarray
    remark: str = ""


def linear_probe(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    classes: int,
    *,
    penalty: Penalty = "norm",
    standardize: bool = False,
) -> FittedProbe:
    """Logistic regression of features (N, D), with cost D * K / 100.

    penalty      norm: mean cross-entropy + |W| / (2 cost), what UNI's code minimizes (the norm is
                 not squared there); squared: mean cross-entropy + |W|^2 / (2 cost), what its paper
                 and others' pages state
    standardize  mean 0 and deviation 1 of every feature over the training patches first; UNI's
                 features go in as they are
    source       Chen et al. 2024, linear probing; mahmoodlab/UNI,
                 uni/downstream/eval_patch_features (formulas only)
    """
    train, test = train.astype(np.float64), test.astype(np.float64)
    if standardize:
        train, test = standardized(train, test)
    cost = train.shape[1] * classes / 100
    if penalty == "squared":
        return fit_squared(train, labels, test, classes, cost)
    return fit_norm(train, labels, test, classes, cost)


def fit_squared(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, cost: float
) -> FittedProbe:
    """The minimum of mean cross-entropy + |W|^2 / (2 cost), by scikit-learn's L-BFGS.

    scikit-learn minimizes C * summed cross-entropy + |W|^2 / 2, hence C = cost / N. For two classes
    it has one weight vector w, of which softmax weights are the halves w/2 and -w/2: their squared
    norm is |w|^2 / 2, hence C = 2 cost / N.
    """
    LogisticRegression, ConvergenceWarning = load_scikit_learn()
    scale = 2 if classes == 2 else 1
    model = LogisticRegression(
        C=scale * cost / len(train), tol=SQUARED_GRADIENT, max_iter=MAX_ITERATIONS
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(train, labels)
    has_stopped = any(issubclass(w.category, ConvergenceWarning) for w in caught)
    return FittedProbe(model.predict_proba(test), NOT_CONVERGED if has_stopped else "")


def fit_norm(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, cost: float
) -> FittedProbe:
    """The minimum of mean cross-entropy + |W| / (2 cost), by SciPy's L-BFGS from zero weights."""
    load_scikit_learn()  # it brings SciPy
    from scipy.optimize import minimize

    count, dim = train.shape
    wanted = np.eye(classes)[labels]
    shares = wanted.mean(0)
    if np.linalg.norm((shares - wanted).T @ train / count) <= 1 / (2 * cost):
        return FittedProbe(
            np.tile(shares, (len(test), 1)), ALL_ZERO
        )  # no step from 0 lowers the loss

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = flat[: classes * dim].reshape(classes, dim), flat[classes * dim :]
        logits = train @ weight.T + bias
        logs = log_softmax(logits)
        norm = float(np.linalg.norm(weight))
        value = -float((wanted * logs).sum()) / count + norm / (2 * cost)
        slope = (np.exp(logs) - wanted) / count
        pull = weight / (2 * cost * norm) if norm else 0.0  # at 0, the slope that torch takes too
        return value, np.concatenate([(slope.T @ train + pull).ravel(), slope.sum(0)])

    options = {
        "maxiter": MAX_ITERATIONS,
        "maxfun": 2 * MAX_ITERATIONS,
        "maxcor": CORRECTIONS,
        "ftol": TOLERANCE,
        "gtol": GRADIENT,
    }
    start = np.zeros(classes * (dim + 1))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    weight, bias = found.x[: classes * dim].reshape(classes, dim), found.x[classes * dim :]
    remark = NOT_CONVERGED if found.status == 1 else ""
    return FittedProbe(np.exp(log_softmax(test @ weight.T + bias)), remark)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms (N, K) of class probabilities."""
    shifted = logits - logits.max(1, keepdims=True)
    logs: np.ndarray = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return logs


def nearest_neighbours(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, *, neighbours: int
) -> FittedProbe:
    """Shares of the classes among the nearest training patches.

    Features are centred on the training patches' mean and brought to length 1, as UNI's code does.
    raises  InputError for fewer training patches than neighbours
    """
    if len(train) < neighbours:
        raise InputError(
            f"a fold trains on {len(train)} patches, fewer than --neighbours {neighbours}"
        )
    load_scikit_learn()
    from sklearn.neighbors import KNeighborsClassifier

    mean = train.mean(0, dtype=np.float64)
    model = KNeighborsClassifier(n_neighbors=neighbours, algorithm="brute")
    model.fit(unit(train - mean), labels)
    shares = np.zeros((len(test), classes))
    shares[:, model.classes_] = model.predict_proba(unit(test - mean))
    return FittedProbe(shares)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (N, D) of length 1; of length 0 where they are 0."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: np.ndarray = vectors / np.maximum(lengths, np.finfo(vectors.dtype).tiny)
    return scaled


def standardized(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with mean 0 and deviation 1 of the training patches; constant features become 0."""
    mean, deviation = train.mean(0), train.std(0)
    deviation[deviation == 0] = 1.0
    return (train - mean) / deviation, (test - mean) / deviation


def colour_probe(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int
) -> FittedProbe:
    """Logistic regression of standardized colour histograms, scikit-learn's C at 1."""
    train, test = standardized(train.astype(np.float64), test.astype(np.float64))
    scale = 2 if classes == 2 else 1  # undone by `fit_squared`
    return fit_squared(train, labels, test, classes, len(train) / scale)


def colour_histograms(images: Tensor) -> np.ndarray:
    """Shares float32 (B, 96) of 32 levels of red, green and blue, of images uint8 (B, 3, H, W)."""
    import torch

    levels = (images.flatten(2).long() * COLOUR_BINS) >> 8  # (B, 3, HW)
    counts = torch.zeros((*levels.shape[:2], COLOUR_BINS), dtype=torch.long, device=images.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    shares: np.ndarray = (counts.flatten(1).double() / levels.shape[2]).float().cpu().numpy()
    return shares


def load_scikit_learn() -> tuple[Any, Any]:
    """Its logistic regression and the warning of one that has not converged."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise missing_extra("scikit-learn", "evaluate") from error
    return LogisticRegression, ConvergenceWarning


def eva_probe(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    classes: int,
    *,
    val: tuple[np.ndarray, np.ndarray],
    seed: int,
    standardize: bool = False,
) -> FittedProbe:
    """Class probabilities of test features (n, D) by a linear layer on features as they are.

    val          features and labels, by which the weights are chosen and training ends; eva takes
                 the test set itself (CRC-VAL-HE-7K), which flatters: here they are other patches
    seed         of the first weights and the order of patches
    standardize  mean 0 and deviation 1 of every feature over the training patches first
    raises       InputError where there is nothing to validate on
    source       kaiko-ai/eva, configs/vision/pathology/offline/classification/crc.yaml: AdamW 3e-4,
                 batches of 256, at most 12,500 steps, the weights of the best validation accuracy,
                 which is the mean over the classes there (torchmetrics' macro), patience 7 epochs.
                 Smaller sets have longer patience there, mhist.yaml 70 epochs: a twentieth of the
                 steps, as here
    """
    import torch

    val_features, val_labels = val
    if not len(val_labels):
        raise InputError("no patch to validate on, by which eva's probe chooses its weights")
    features = [train, val_features, test]
    if standardize:
        wide = [part.astype(np.float64) for part in features]  # sums over 90,000 patches
        features = [*standardized(wide[0], wide[1]), standardized(wide[0], wide[2])[1]]
    fitted, held, tested = (torch.from_numpy(np.asarray(f, np.float32)) for f in features)
    head = new_head(fitted.shape[1], classes, seed)
    epochs = trained(head, fitted, torch.from_numpy(labels.astype(np.int64)), seed)
    patience = patience_of(len(labels))
    remark = kept_best(head, epochs, patience, lambda: balanced_accuracy(head, held, val_labels))
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
