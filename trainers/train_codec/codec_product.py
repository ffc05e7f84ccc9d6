"""The network `train_codec` trains, what a run leaves of it in OUT/codec, how that is judged."""
# B crops, C latent channels, h w latent cells, S steps, T symbols, K components of a mixture

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from latentds_trainers.engine.settings import plain
from latentds_trainers.train_codec.tiles import Crops, attribution_of
from torch import Tensor, nn
from torch.nn import functional

from latentds.autoencoders.autoencoder import AutoencoderCard
from latentds.autoencoders.codec_folder import CPU, FACTOR, FAST, LARGEST, SymbolCounts, save_codec
from latentds.autoencoders.decoders import default_name, save_decoder
from latentds.autoencoders.tiny import ResidualBlock, TinyDecoder, TinyEncoder

if TYPE_CHECKING:
    from latentds_trainers.train_codec.config import CodecSettings

logger = logging.getLogger(__name__)
ESCAPE_BITS = 8
PRODUCT = "codec"  # folder of a run
STUDENTS = {FAST: "turbo-s32", CPU: "turbo-xs"}  # fast decoders, by their folder in the product
STEPS = tuple(0.5 * 2 ** (k / 8) for k in range(33))  # 0.5 to 8; the ninth is 1
FLOOR = 0.005  # of a geometric law, mixed into counted shares
COUNTED_PX, COUNTED_CROPS, FINAL_CROPS = 192, 16, 432
BATCH = 8
RIDGE = 1e-3  # of the features' mean square
JUDGED_BYTES = (8192, 4096, 2048)
GAIN = 8.0  # integers at step 1 are round(8 * latent)
LOG_SCALES = (-1.0, 0.5, 1.5)  # of a mixture's components at the start, in such integers
LEAST_CHANCE = 1e-6  # of an integer: 20 bits, about what an escape costs
RESIDUAL_SCALE = 0.2  # of the second convolution of a block, at a cold start
# Of a channel that is woken: what of an orthonormal component of a block, of pixels in [0, 1], an
# integer at step 1 stands for, about as in other channels; how much the decoder hears at first.
MISSED, NEW_COLUMNS = 0.17, 0.15


@torch.no_grad()
def count_integers(
    encoder: nn.Module, crops: Crops, config: CodecSettings, is_last: bool
) -> Tensor:
    """Counts int64 (S, C, 32) of symbols on training crops at each of STEPS; the last escapes."""
    drawn = dataclasses.replace(crops.config, crop_px=COUNTED_PX, seed=config.seed + 1)
    counts = torch.zeros(len(STEPS), config.channels, 2 * LARGEST + 2, dtype=torch.int64)
    for start in range(0, FINAL_CROPS if is_last else COUNTED_CROPS, BATCH):
        latents = encoder(crops.batch(0, range(start, start + BATCH), drawn))
        counts += torch.stack([symbol_counts(latents, step) for step in STEPS]).cpu()
    return counts


def symbol_counts(latents: Tensor, step: float) -> Tensor:
    """Counts int64 (C, 32) of the symbols of latents (B, C, h, w) at a step."""
    symbols = symbols_of(latents, step).transpose(0, 1).flatten(1)
    width = 2 * LARGEST + 2
    rows = torch.arange(len(symbols), device=symbols.device)[:, None] * width
    return torch.bincount((symbols + rows).flatten(), minlength=width * len(symbols)).view(
        -1, width
    )


def symbols_of(latents: Tensor, step: float) -> Tensor:
    """Symbols int64 0 .. 31: integers + 15, and 31 for an escape."""
    integers = (latents * (GAIN / step)).round().long()
    return torch.where(integers.abs() <= LARGEST, integers + LARGEST, 2 * LARGEST + 1)


def table_bits(counts: Tensor) -> Tensor:
    """Bits (..., C, 32) of each symbol by its share of the counts; escapes with their raw bits."""
    law = 0.5 ** (torch.arange(2 * LARGEST + 2) - LARGEST).abs().double()
    law[-1] = law[0]
    shares = counts.double() / counts.sum(-1, keepdim=True).clamp_min(1)
    bits = -((1 - FLOOR) * shares + FLOOR * law / law.sum()).log2()
    bits[..., -1] += ESCAPE_BITS
    return bits


def patch_bytes(latents: Tensor, counts: Tensor, step: float) -> float:
    """Mean bytes of a patch of latents at a step, with the nearest step's table."""
    nearest = int(np.argmin([abs(np.log(known / step)) for known in STEPS]))
    bits = (symbol_counts(latents, step).cpu() * table_bits(counts[nearest])).sum()
    return float(bits) / 8 / len(latents)


def step_for(latents: Tensor, counts: Tensor, size: float) -> float:
    """The step at which the patches' mean is so many bytes, by halving."""
    low, high = np.log(STEPS[0]), np.log(STEPS[-1])
    for _ in range(12):
        middle = (low + high) / 2
        is_too_large = patch_bytes(latents, counts, float(np.exp(middle))) > size
        low, high = (middle, high) if is_too_large else (low, middle)
    return float(np.exp(high))


@torch.no_grad()
def held_out_figures(
    latents: Tensor,
    decoder: nn.Module,
    students: Mapping[str, nn.Module],
    counts: Tensor,
    images: Tensor,
) -> dict[str, float]:
    """Channels that are zero, bytes at step 1 by tables; PSNR in dB at sizes, of every decoder.

    latents  (B, C, 32, 32) of the images
    images   (B, 3, 256, 256) in [0, 1], of held-out patients
    """
    decoders = {"": decoder} | {f"{name}_": student for name, student in students.items()}
    largest = rounded(latents, torch.ones(len(latents)).to(latents)).abs().amax((0, 2, 3))
    figures = {
        "silent_channels": float((largest == 0).sum()),
        "bytes_at_step_1": patch_bytes(latents, counts, 1.0),
    }
    for size in JUDGED_BYTES:
        step = step_for(latents, counts, size)
        coded = rounded(latents, torch.full((len(latents),), step).to(latents))
        figures[f"step_at_{size}"] = step
        for name, judged in decoders.items():
            figures[f"{name}psnr_db_at_{size}"] = psnr(judged, coded, images)
    return figures


@torch.no_grad()
def encoded(encoder: nn.Module, images: Tensor) -> Tensor:
    """Latents of images, a few at a time."""
    return torch.cat([encoder(part) for part in torch.split(images, BATCH)])


def psnr(decoder: nn.Module, latents: Tensor, images: Tensor) -> float:
    """Mean PSNR in dB of decoded latents over images."""
    decoded = torch.cat([decoder(part) for part in torch.split(latents, BATCH)]).clamp(0, 1)
    return float((-10 * (decoded - images).square().mean((1, 2, 3)).log10()).mean())


def save_product(
    config: CodecSettings,
    network: CodecNetwork,
    students: Mapping[str, nn.Module],
    counts: Tensor,
    trained: dict[str, Any],
) -> None:
    """Write OUT/codec with its fast decoders.

    counts   of `count_integers`
    trained  how: shares of the tiles and figures
    """
    folder = config.out / PRODUCT
    gains = torch.full((config.channels,), GAIN)
    options = plain(config) | {"tiles": config.tiles.name, "out": config.out.name}
    card = save_codec(
        folder,
        nn.ModuleDict({"encoder": network.encoder, "decoder": network.decoder}),
        SymbolCounts(counts, torch.tensor(STEPS, dtype=torch.float64), gains),
        name=config.name or default_name(config.out),
        licence=config.licence,
        attribution=attribution_of(trained["shares"]),
        trained=trained | {"options": options},
    )
    save_students(folder, students, card, trained["figures"])


def save_students(
    folder: Path,
    students: Mapping[str, nn.Module],
    card: AutoencoderCard,
    figures: Mapping[str, float],
) -> None:
    by = {"recipe": "train_codec", "figures": dict(figures)}
    for place, student in students.items():
        architecture = {"class": "student", "name": STUDENTS[place]}
        name = f"{card.name}-{place}"
        save_decoder(
            folder / place, student, card, architecture, by, name=name, dtype=torch.float16
        )


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
    """Encoder, rounding at a step of each crop's own, decoder; the rate.

    Integers are `round(GAIN * latent / step)`. While training, the decoder sees the rounded values
    with the encoder's gradient passed straight through, and the rate sees uniform noise instead of
    rounding (Balle et al. 2017), under a mixture of three Gaussians a channel: one static table a
    channel, as the entropy coder has, in a form that has gradients.
    """

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
def wake(network: CodecNetwork, batches: Iterable[Tensor]) -> None:
    """Give channels that are always zero what the decoder misses most in these crops.

    Their rows of the encoder's last convolution predict, by least squares from the features before
    it, the first principal components of what a decoded picture lacks. The decoder hears little of
    them, so that its picture stands, and learns to use them.
    """
    layers = network.encoder.layers
    last: Any = layers[-1]
    first: Any = network.decoder.layers[0]
    features, lacks, largest = [], [], torch.zeros(network.channels).to(last.bias)
    for images in batches:
        seen = layers[:-1](images * 2 - 1)
        coded = rounded(last(seen), torch.ones(len(images)).to(images))
        largest = largest.maximum(coded.abs().amax((0, 2, 3)))
        lack = functional.pixel_unshuffle(images - network.decoder(coded), FACTOR)
        features.append(functional.unfold(seen, 3, padding=1).transpose(1, 2).flatten(0, 1))
        lacks.append(lack.flatten(2).transpose(1, 2).flatten(0, 1))
    silent = (largest == 0).nonzero()[:, 0]
    if not len(silent):
        return
    known, wanted = torch.cat(features).double(), torch.cat(lacks).double()
    known = torch.cat([known, torch.ones_like(known[:, :1])], 1)
    gram = known.T @ known / len(known)
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    told = torch.linalg.solve(gram, known.T @ wanted / len(known))
    axes = torch.linalg.eigh(told.T @ gram @ told).eigenvectors.flip(1)[:, : len(silent)]
    rows = (told @ axes).T.to(last.weight) / (MISSED * GAIN)
    last.weight[silent] = rows[:, :-1].unflatten(1, last.weight.shape[1:])
    last.bias[silent] = rows[:, -1]
    fresh = nn.Conv2d(network.channels, first.weight.shape[0], 3).to(last.weight)
    first.weight[:, silent] = NEW_COLUMNS * fresh.weight[:, silent]
    logger.info("%d of %d channels begin anew", len(silent), network.channels)


def mse(images: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error in float32."""
    return functional.mse_loss(images.float(), wanted)
