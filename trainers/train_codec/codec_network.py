"""The network that `train_codec` trains: encoder, rounding, decoder, and the rate of the integers.

Integers are `round(GAIN * latent / step)`. While training, the decoder sees the rounded values with
the encoder's gradient passed straight through, and the rate sees uniform noise instead of rounding
(Balle et al. 2017), under a mixture of three Gaussians a channel: one static table a channel, as
the entropy coder has, in a form that has gradients.
"""
# B crops, C latent channels, h w latent cells, K components of a mixture

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentds.autoencoders.tiny import CHANNELS, ResidualBlock, TinyDecoder, TinyEncoder, load_tiny

GAIN = 8.0  # integers at step 1 are round(8 * latent)
LOG_SCALES = (-1.0, 0.5, 1.5)  # of a mixture's components at the start, in such integers
LEAST_CHANCE = 1e-6  # of an integer: 20 bits, about what an escape costs
RESIDUAL_SCALE = 0.2  # of the second convolution of a block, at a cold start
# Of a warm start: new channels begin nearly silent, so that the trunk's picture stands.
NEW_ROWS, NEW_COLUMNS = 0.7, 0.15


class Rate(nn.Module):
    """Bits of latents, a mixture of Gaussians a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        shape = (channels, len(LOG_SCALES))
        self.log_scales = nn.Parameter(torch.tensor(LOG_SCALES).expand(shape).clone())
        self.means = nn.Parameter(torch.zeros(shape))
        self.logits = nn.Parameter(torch.zeros(shape))

    def forward(self, values: Tensor, steps: Tensor) -> Tensor:
        """Bits (B, C, h, w) of integers `values / steps`.

        values  (B, C, h, w), GAIN times the latents, with noise of one step or rounded to steps
        steps   (B,)
        """
        half = steps.view(-1, 1, 1, 1) / 2
        weights = self.logits.softmax(1)
        chance = torch.zeros_like(values)
        for k in range(weights.shape[1]):
            mean, weight = (p[:, k, None, None] for p in (self.means, weights))
            width = math.sqrt(2) * self.log_scales[:, k, None, None].exp()
            # Of the tail that the value lies in, where erf would round to 1 and lose all digits.
            distance = -(values - mean).abs()
            upper, lower = (distance + half) / width, (distance - half) / width
            chance = chance + 0.5 * weight * (torch.erf(upper) - torch.erf(lower))
        return -chance.clamp_min(LEAST_CHANCE).log2()


class CodecNetwork(nn.Module):
    """Encoder, rounding at a step of each crop's own, decoder; the rate."""

    def __init__(self, channels: int, widths: tuple[int, int]) -> None:
        super().__init__()
        self.encoder = TinyEncoder(channels, widths, is_bounded=False)
        self.decoder = TinyDecoder(channels)
        self.channels = channels
        self.rate = Rate(channels)
        for block in self.modules():
            if isinstance(block, ResidualBlock):
                # Blocks start near the identity: without normalization seven plain ones blow up.
                block.conv2.weight.data.mul_(RESIDUAL_SCALE)

    def bits(self, latents: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        """Bits of every value (B, C, h, w); `noise` is uniform in (-0.5, 0.5)."""
        bits: Tensor = self.rate(GAIN * latents + noise * steps.view(-1, 1, 1, 1), steps)
        return bits


def rounded(latents: Tensor, steps: Tensor) -> Tensor:
    """Latents (B, C, h, w) as the decoder gets them at steps (B,); their gradient is passed on."""
    size = steps.view(-1, 1, 1, 1) / GAIN
    return latents + ((latents / size).round() * size - latents).detach()


@torch.no_grad()
def warm_start(network: CodecNetwork) -> None:
    """Take the layers of `tiny-v1`; its latent channels are spread over the network's."""
    tiny: Any = load_tiny()
    places = [index * network.channels // CHANNELS for index in range(CHANNELS)]
    wanted: Any = network.encoder.layers
    given = tiny.encoder.layers
    wanted[:-1].load_state_dict(given[:-1].state_dict())
    wanted[-1].weight.mul_(NEW_ROWS)
    wanted[-1].weight[places] = given[-1].weight
    wanted[-1].bias[places] = given[-1].bias
    wanted, given = network.decoder.layers, tiny.decoder.layers
    wanted[1:].load_state_dict(given[1:].state_dict())
    wanted[0].weight.mul_(NEW_COLUMNS)
    wanted[0].weight[:, places] = given[0].weight
    wanted[0].bias.copy_(given[0].bias)


def mse(images: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error in float32."""
    return functional.mse_loss(images.float(), wanted)
