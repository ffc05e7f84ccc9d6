"""Cross-entropies of self-distillation: DINO's of class tokens, iBOT's of hidden patch tokens.

Their formulas are those of lightly's DINOLoss and IBOTPatchLoss, which move a centre in every
forward pass and wait for the device.
"""
# B batch of a rank, G global views, S views of the student, globals first, N = G B images,
# T patch tokens of an image, n hidden tokens of all, K prototypes

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

STUDENT_TEMP = 0.1  # DINO main_dino.py, DINOLoss; DINOv2 loss/dino_clstoken_loss.py


@dataclasses.dataclass(frozen=True)
class Hidden:
    """The tokens that the student does not see.

    masks    bool (N, T), True for hidden
    places   int64 (n,), where they are in N * T tokens
    weights  float32 (n,), each one's share of the loss: an image's sum to 1 / N
    """

    masks: Tensor
    places: Tensor
    weights: Tensor

    @staticmethod
    def of(masks: Tensor) -> Hidden:
        """Those of masks; counting them waits for the device, so once a forward pass."""
        images, tokens = masks.shape
        places = masks.flatten().nonzero()[:, 0]
        counts = masks.sum(1).index_select(0, places // tokens)
        return Hidden(masks, places, 1 / (counts * images))

    def among(self, tokens: Tensor) -> Tensor:
        """The hidden ones (n, D) of patch tokens (N, T, D)."""
        return tokens.flatten(0, 1).index_select(0, self.places)


def class_loss(teacher: Tensor, student: Tensor, center: Tensor, teacher_temp: float) -> Tensor:
    """Mean over patches, and over pairs of different views.

    teacher, student  logits (G, B, K) and (S, B, K)
    center            of the teacher's, (1, K)
    """
    targets = ((teacher - center) / teacher_temp).softmax(-1)
    logs = (student / STUDENT_TEMP).log_softmax(-1)
    pairs = -torch.einsum("gbk,sbk->gs", targets, logs)
    pairs.fill_diagonal_(0)  # a view with itself
    return pairs.sum() / ((pairs.numel() - len(teacher)) * teacher.shape[1])


def patch_loss(
    teacher: Tensor, student: Tensor, center: Tensor, teacher_temp: float, weights: Tensor
) -> Tensor:
    """Mean over the hidden tokens of an image, then over all images; 0 of one that hides none.

    teacher, student  logits (n, K)
    center            of the teacher's, (1, K)
    weights           (n,), of `Hidden`
    """
    targets = ((teacher - center) / teacher_temp).softmax(-1)
    losses = -(targets * (student / STUDENT_TEMP).log_softmax(-1)).sum(-1)
    return (losses * weights).sum()
