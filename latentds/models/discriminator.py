"""PatchGAN discriminator, hinge losses and the adaptive weight between them and the rest.

After taming-transformers (MIT: taming/modules/discriminator/model.py, losses/vqperceptual.py) and
latent-diffusion (MIT: ldm/modules/losses/contperceptual.py), whose settings the paper inherits.
"""
# B batch, H W pixels, h w logits

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WEIGHT_EPSILON, WEIGHT_LIMIT = 1e-4, 1e4  # contperceptual.py, calculate_adaptive_weight
SLOPE = 0.2  # of LeakyReLU


class PatchDiscriminator(nn.Module):
    """Logits (B, 1, h, w) of images (B, 3, H, W) in [-1, 1]: 30x30 for 256 px, each of 70 px.

    layers  stride-2 convolutions
    width   channels of the first; doubled by each that follows, at most eightfold

    BatchNorm sees the rank's own batch, as in the reference (no SyncBN).
    """

    def __init__(self, layers: int = 3, width: int = 64) -> None:
        super().__init__()
        channels = [3, *(width * min(2**n, 8) for n in range(layers + 1))]
        parts: list[nn.Module] = [conv(3, width, 2, bias=True), nn.LeakyReLU(SLOPE, inplace=True)]
        for number in range(1, layers + 1):
            stride = 2 if number < layers else 1
            parts += [
                conv(channels[number], channels[number + 1], stride, bias=False),
                nn.BatchNorm2d(channels[number + 1]),
                nn.LeakyReLU(SLOPE, inplace=True),
            ]
        self.layers = nn.Sequential(*parts, conv(channels[-1], 1, 1, bias=True))

    def initialize(self, generator: torch.Generator) -> PatchDiscriminator:
        """Self, with convolutions N(0, 0.02) and BatchNorm weights N(1, 0.02), as the reference."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02, generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02, generator=generator)
                nn.init.zeros_(module.bias)
        return self

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def conv(inputs: int, outputs: int, stride: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 4, stride=stride, padding=1, bias=bias)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: half of mean relu(1 - real) and mean relu(1 + fake)."""
    return (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()) / 2


def generator_loss(fake: Tensor) -> Tensor:
    """What the decoder minimizes: minus the mean logit of what it made."""
    return -fake.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Ratio of the two losses' gradients at the decoder's last layer, at most 10,000, detached.

    reconstruction, adversarial  scalars whose graphs reach `last_layer`; both graphs are kept

    Gradients are this rank's own, as in the reference.
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (of_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    norms = [gradient.norm() for gradient in (of_reconstruction, of_adversarial)]
    ratio: Tensor = norms[0] / (norms[1] + WEIGHT_EPSILON)
    return ratio.clamp(0.0, WEIGHT_LIMIT).detach()
