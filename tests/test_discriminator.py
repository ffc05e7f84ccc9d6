"""The adversarial formulas: what the reference computes, by hand."""

import math

import pytest
import torch
from latentds_trainers.finetune_decoder.decoder_losses import (
    PatchDiscriminator,
    adaptive_weight,
    generator_loss,
    hinge_loss,
)
from torch import nn


def test_256_px_give_30_by_30_logits():
    assert PatchDiscriminator()(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_a_logit_sees_70_px():
    network = PatchDiscriminator(width=4).eval()
    images = torch.rand(1, 3, 256, 256, requires_grad=True)
    network(images)[0, 0, 15, 15].backward()
    seen = images.grad[0].abs().sum(0) > 0
    assert seen.any(0).sum() == seen.any(1).sum() == 70


def test_convolutions_before_a_norm_have_no_bias_and_start_as_the_reference():
    network = PatchDiscriminator().initialize(torch.Generator().manual_seed(0))
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [layer.out_channels for layer in layers] == [64, 128, 256, 512, 1]
    assert [layer.stride[0] for layer in layers] == [2, 2, 2, 1, 1]
    assert [layer.bias is not None for layer in layers] == [True, False, False, False, True]
    assert layers[3].weight.std().item() == pytest.approx(0.02, abs=2e-4)  # 2 M values
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms[2].weight.mean().item() == pytest.approx(1, abs=0.005) and not norms[2].bias.any()


@pytest.mark.parametrize(
    ("real", "fake", "expected"),
    [
        ([2.0], [-2.0], 0.0),  # both right and sure
        ([0.0], [-2.0], 0.5),  # half of 1 - 0
        ([2.0], [0.0], 0.5),  # half of 1 + 0
        ([-1.0, 3.0], [0.5, -3.0], (1.0 + 0.75) / 2),  # means of (2, 0) and (1.5, 0), halved
    ],
)
def test_hinge_is_half_of_either_side(real, fake, expected):
    assert hinge_loss(torch.tensor(real), torch.tensor(fake)).item() == pytest.approx(expected)


def test_generator_wants_high_logits():
    assert generator_loss(torch.tensor([1.0, 3.0])).item() == -2.0


def two_layers() -> tuple[nn.Linear, torch.Tensor]:
    """y = v (w x) with x = 2, w = 3, v = (1, 2): the last layer's input is 6."""
    first, last = nn.Linear(1, 1, bias=False), nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        first.weight.fill_(3.0)
        last.weight.copy_(torch.tensor([[1.0], [2.0]]))
    return last, last(first(torch.tensor([[2.0]])))


def test_adaptive_weight_is_the_ratio_of_gradient_norms_at_the_last_layer():
    last, outputs = two_layers()
    reconstruction = (outputs - torch.tensor([[0.0, 0.0]])).abs().sum()  # gradient 6 and 6
    adversarial = -0.5 * outputs.mean()  # gradient -1.5 and -1.5
    weight = adaptive_weight(reconstruction, adversarial, last.weight)
    expected = 6 * math.sqrt(2) / (1.5 * math.sqrt(2) + 1e-4)
    assert weight.item() == pytest.approx(expected, rel=1e-6) and not weight.requires_grad


def test_adaptive_weight_is_limited_and_leaves_both_graphs_and_gradients():
    last, outputs = two_layers()
    reconstruction, adversarial = 1e6 * outputs.sum(), 0.0 * outputs.sum()
    assert adaptive_weight(reconstruction, adversarial, last.weight).item() == 1e4
    assert last.weight.grad is None
    (reconstruction + adversarial).backward()
    assert last.weight.grad is not None
