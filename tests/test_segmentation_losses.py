"""Losses of label maps, against figures worked out by hand and against torch's own."""

import math

import pytest
import torch
from latentds_trainers.sampath.segmentation_fold import predict_labels, segmentation_loss
from torch import Tensor

ALL = {"dice": 1, "focal": 1, "iou": 1, "ce": 1}
HALF = math.log(2) / 4  # focal loss of a logit of 0: (1 / 2) ** 2 * log 2


def two_pixels() -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities (1, 3, 1) / 5 where the label is 1, (1, 1, 1) / 3 where it is 2."""
    logits = torch.tensor([[0.0, math.log(3), 0.0], [0.0, 0.0, 0.0]]).T.reshape(1, 3, 1, 2)
    return logits, torch.tensor([[[1, 2]]]), torch.tensor([[0.9, 0.5, 0.25]])


def with_an_unlabelled_pixel() -> tuple[Tensor, Tensor, Tensor]:
    logits, labels, iou = two_pixels()
    logits = torch.cat([logits, torch.full((1, 3, 1, 1), 5.0)], 3)
    return logits, torch.cat([labels, torch.zeros(1, 1, 1, dtype=torch.long)], 2), iou


def random_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 9, 7, generator=generator).requires_grad_()
    return logits, torch.randint(0, 4, (2, 9, 7), generator=generator)


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        # 1 - 2 overlap / areas: class 1 has 0.6 and 1.6 + 1/3, class 2 has 1/3 and 1.2 + 1/3
        ("dice", 1 - (1.2 / (1.6 + 1 / 3) + (2 / 3) / (1.2 + 1 / 3)) / 2),
        # the sigmoid of log 3 is 3/4, three other logits are 0
        ("focal", (-math.log(0.75) / 16 + 3 * HALF) / 4),
        # pixel 1 is found (0.6), pixel 2 is not (1/3): IoUs 1 and 0 against 0.5 and 0.25
        ("iou", (0.5**2 + 0.25**2) / 2),
        ("ce", (-math.log(0.6) + math.log(3)) / 2),
    ],
)
def test_losses_are_those_worked_out_by_hand(name, by_hand):
    logits, labels, iou = two_pixels()
    _, terms = segmentation_loss(logits, labels, ALL, iou)
    assert float(terms[name]) == pytest.approx(by_hand, abs=1e-5)  # Dice's smoothing


def test_the_total_is_the_weighted_sum():
    logits, labels, iou = two_pixels()
    weights = {"dice": 0.75, "focal": 0.25, "iou": 0.0625, "ce": 2}
    total, terms = segmentation_loss(logits, labels, weights, iou)
    expected = sum(weights[name] * float(term) for name, term in terms.items())
    assert len(terms) == 4 and float(total) == pytest.approx(expected, abs=1e-6)


def test_unlabelled_pixels_zeroed_add_area_and_a_constant():
    logits, labels, iou = with_an_unlabelled_pixel()
    _, terms = segmentation_loss(logits, labels, ALL, iou)
    dice = 1 - (1.2 / (1.6 + 2 / 3) + (2 / 3) / (1.2 + 2 / 3)) / 2
    focal = (-math.log(0.75) / 16 + 3 * HALF + 2 * HALF) / 6
    assert float(terms["dice"]) == pytest.approx(dice, abs=1e-5)
    assert float(terms["focal"]) == pytest.approx(focal, abs=1e-6)


def test_unlabelled_pixels_pull_at_nothing():
    logits, labels = random_batch()
    total, _ = segmentation_loss(logits, labels, ALL)
    total.backward()
    pulled = logits.grad.abs().sum(1) > 0
    assert torch.equal(pulled, labels > 0)


def test_cross_entropy_is_torchs_over_labelled_pixels():
    logits, labels = random_batch()
    _, terms = segmentation_loss(logits, labels, ALL | {"dice": 0, "focal": 0})
    expected = torch.nn.functional.cross_entropy(logits.detach(), labels, ignore_index=0)
    assert float(terms["ce"]) == pytest.approx(float(expected), abs=1e-6)


def test_a_batch_without_labels_gives_a_finite_loss():
    logits, labels = random_batch()
    total, _ = segmentation_loss(logits, labels * 0, ALL)
    assert torch.isfinite(total)


def test_extreme_logits_give_finite_gradients():
    logits, labels = random_batch()
    scaled = (logits.detach() * 1e4).requires_grad_()
    segmentation_loss(scaled, labels, ALL)[0].backward()
    assert torch.isfinite(scaled.grad).all()


def test_the_head_of_the_iou_has_a_gradient_at_weight_0():
    logits, labels, iou = two_pixels()
    iou.requires_grad_()
    segmentation_loss(logits, labels, ALL | {"iou": 0}, iou)[0].backward()
    assert iou.grad is not None and not iou.grad.any()


def test_logits_in_bfloat16_are_summed_in_float32():
    logits, labels = random_batch()
    total, _ = segmentation_loss(logits.bfloat16(), labels, ALL)
    assert total.dtype == torch.float32


def test_predicted_labels_are_never_0():
    logits, _ = random_batch()
    logits = logits.detach().clone()
    logits[:, 0] = 100
    labels = predict_labels(logits)
    assert labels.dtype == torch.uint8 and labels.min() == 1 and labels.max() == 3
