"""Losses of label maps as SAM-Path weighs them, and the labels that logits stand for.

The formulas of Dice and focal loss are those of MONAI 1.1 (Apache-2.0: DiceLoss and FocalLoss,
include_background=False), written anew; segmentation_models_pytorch has others (Dice over the
whole batch, no smoothing). Label 0 is everywhere "not labelled", never a class.
"""
# B batch, K labels with 0, H W pixels

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from latentds.errors import ShapeError

SMOOTH = 1e-5  # MONAI's smooth_nr and smooth_dr
GAMMA = 2.0  # MONAI's default for the focal loss
IOU_THRESHOLD = 0.5  # probability from which a pixel counts for a class in the true IoU
IOU_EPSILON = 1e-7

Unlabelled = Literal["zeroed", "left-out"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWeights:
    """How much each loss counts; 0 leaves it out. Defaults: SAM-Path's for BCSS."""

    dice: float = 0.75
    focal: float = 0.25
    iou: float = 0.0625
    ce: float = 0.0

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        if min(values.values()) < 0 or not any((self.dice, self.focal, self.ce)):
            raise ValueError(
                f"loss weights {values}: none may be below 0, one of dice, focal and ce above"
            )


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    weights: LossWeights,
    iou: Tensor | None = None,
    unlabelled: Unlabelled = "zeroed",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses, and each before weighing, detached.

    A loss of weight 0 is left out; that of the IoU only where the model makes no guess of it.

    logits      float (B, K, H, W); channel 0 is of no class and takes part in the softmax only
    labels      integers (B, H, W) in 0 .. K - 1, 0 for pixels that are not labelled
    iou         (B, K), the model's own guess of each class's IoU; None for models without one
    unlabelled  zeroed: logits of such pixels are set to 0, as SAM-Path does. They pull at
                nothing, but each adds 1/K of a pixel to every class's area in the Dice loss and a
                constant to the focal loss. left-out: they count nowhere
    """
    check_shapes(logits, labels, iou)
    labelled = (labels > 0)[:, None]
    logits = (logits * labelled).float()
    truth = one_hot(labels, logits.shape[1])
    chances = logits.softmax(1)[:, 1:]
    counted = labelled.float() if unlabelled == "left-out" else torch.ones_like(labelled.float())
    terms: dict[str, Tensor] = {}
    if weights.dice:
        terms["dice"] = dice_loss(chances * counted, truth)
    if weights.focal:
        terms["focal"] = focal_loss(logits[:, 1:], truth, counted)
    if iou is not None:  # at weight 0 too, so that its head has a gradient on every rank
        goal = true_iou(chances * counted, truth)
        terms["iou"] = functional.mse_loss(iou[:, 1:].float(), goal)
    if weights.ce:
        terms["ce"] = cross_entropy(logits, labels)
    parts = [getattr(weights, name) * term for name, term in terms.items()]
    return torch.stack(parts).sum(), {name: term.detach() for name, term in terms.items()}


def dice_loss(chances: Tensor, truth: Tensor) -> Tensor:
    """Mean of 1 - (2 sum(p t) + 1e-5) / (sum(p) + sum(t) + 1e-5) over images and classes.

    chances, truth  (B, classes, H, W), probabilities and 0 or 1
    """
    overlap = (chances * truth).sum((2, 3))
    areas = chances.sum((2, 3)) + truth.sum((2, 3))
    return (1 - (2 * overlap + SMOOTH) / (areas + SMOOTH)).mean()


def focal_loss(logits: Tensor, truth: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean of -(1 - p_t)^2 log(p_t) over pixels and classes, p the sigmoid of each class alone.

    logits, truth  (B, classes, H, W)
    counted        1 for pixels in the mean, 0 for others, (B, 1, H, W); None for all
    """
    entropy = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    # (1 - p_t)^gamma through the log-sigmoid, which neither overflows nor loses its gradient.
    miss = functional.logsigmoid(-logits * (2 * truth - 1))
    losses = (GAMMA * miss).exp() * entropy
    if counted is None:
        return losses.mean()
    return (losses * counted).sum() / (counted.sum() * losses.shape[1]).clamp(min=1)


def true_iou(chances: Tensor, truth: Tensor) -> Tensor:
    """IoU (B, classes) of pixels with a probability of at least 0.5 and those of the truth."""
    found = (chances >= IOU_THRESHOLD).float()
    overlap = (found * truth).sum((2, 3))
    union = found.sum((2, 3)) + truth.sum((2, 3)) - overlap
    return overlap / (union + IOU_EPSILON)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over labelled pixels; 0 where there are none, instead of torch's NaN."""
    losses = functional.cross_entropy(logits, labels.long(), ignore_index=0, reduction="sum")
    return losses / (labels > 0).sum().clamp(min=1)


def one_hot(labels: Tensor, size: int) -> Tensor:
    """Float (B, size - 1, H, W): which of the labels 1 .. size - 1 a pixel has."""
    classes = torch.arange(1, size, device=labels.device, dtype=labels.dtype)
    return (labels[:, None] == classes.view(1, -1, 1, 1)).float()


def predict_labels(logits: Tensor) -> Tensor:
    """Labels uint8 (B, H, W) in 1 .. K - 1 of logits (B, K, H, W): never 0, "not labelled"."""
    return (logits[:, 1:].argmax(1) + 1).to(torch.uint8)


def check_shapes(logits: Tensor, labels: Tensor, iou: Tensor | None) -> None:
    if logits.ndim != 4 or logits.shape[1] < 2:
        raise ShapeError(f"logits are {tuple(logits.shape)}; (B, K, H, W) with K > 1 are wanted")
    batch, size, *edges = logits.shape
    if tuple(labels.shape) != (batch, *edges):
        raise ShapeError(f"labels are {tuple(labels.shape)}, logits {tuple(logits.shape)}")
    if iou is not None and tuple(iou.shape) != (batch, size):
        raise ShapeError(f"IoU predictions are {tuple(iou.shape)}; {(batch, size)} are wanted")
