"""The losses of decoder fine-tuning, term by term, in the reference's order of steps.

PatchGAN discriminator, hinge losses and the adaptive weight between them and the rest are after
taming-transformers (MIT: taming/modules/discriminator/model.py, losses/vqperceptual.py) and
latent-diffusion (MIT: ldm/modules/losses/contperceptual.py), whose settings the paper inherits.
"""
# B images of this rank, H W pixels, h w logits

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from latentds_trainers.engine.training import Engine
    from latentds_trainers.finetune_decoder.config import FinetuneConfig
    from latentds_trainers.finetune_decoder.pairs import Pair

    from latentds.embedders import Embedder

logger = logging.getLogger(__name__)
Terms = dict[str, Tensor]
RANGE = 2  # images are in [0, 1] here; the losses are weighed for [-1, 1], as in the reference
WEIGHT_EPSILON, WEIGHT_LIMIT = 1e-4, 1e4  # contperceptual.py, calculate_adaptive_weight
SLOPE = 0.2  # of LeakyReLU


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network in eval mode within the block: no statistics are taken, no ranks met."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def cropped(decoded: Tensor, images: Tensor) -> Tensor:
    """Decoded images without the rows and columns that fill up the last latent cells."""
    return decoded[..., : images.shape[-2], : images.shape[-1]]


class DecoderLosses:
    """One training step of a decoder and, from `disc_start` on, its discriminator.

    engine         trains `decoder` and, where there is one, `discriminator`
    embedder       of the embedding loss, None for none
    teacher        latents to images in [0, 1], None for none
    last_layer     weight of the decoder's last convolution
    """

    def __init__(
        self,
        config: FinetuneConfig,
        engine: Engine,
        last_layer: nn.Parameter,
        embedder: Embedder | None = None,
        teacher: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.config, self.engine = config, engine
        self.last_layer, self.embedder, self.teacher = last_layer, embedder, teacher
        self.has_discriminator = config.gan_weight > 0
        self.at_limit = torch.zeros((), device=last_layer.device)  # steps; read once, at the end

    def step(self, pair: Pair, step: int) -> Terms:
        """Train on a batch: the decoder, then the discriminator on the same one."""
        is_adversarial = self.has_discriminator and step >= self.config.disc_start
        terms = self.train_decoder(pair, is_adversarial)
        if is_adversarial:
            terms |= self.train_discriminator(pair)
        return terms

    def train_decoder(self, pair: Pair, is_adversarial: bool) -> Terms:
        """The decoder's step; terms are unweighted."""
        with self.engine.autocast():
            images = self.decode(pair)
        loss, terms = self.reconstruction(images, pair)
        if is_adversarial:
            with self.engine.frozen("discriminator"):
                adversarial = generator_loss(self.discriminate(images))
            weight = self.gan_weight(loss, adversarial, self.values(images))
            loss = loss + weight * adversarial
            terms |= {"gan": adversarial, "gan_weight": weight}
        self.engine.update("decoder", loss)
        return {name: term.detach() for name, term in terms.items()}

    def reconstruction(self, images: Tensor, pair: Pair) -> tuple[Tensor, Terms]:
        """L1, embedding and teacher terms, weighted and scaled as the reference does.

        There |x - y| + w p stands for every value of an image in [-1, 1], p broadcast, and is
        summed.
        """
        config = self.config
        terms = {"l1": RANGE * (images - pair.images).abs().mean()}
        total = config.l1_weight * terms["l1"]
        if self.embedder is not None:
            terms["embedding"] = self.embedding_distance(images, pair.images)
            total = total + (config.embedding_weight or 0.0) * terms["embedding"]
        if self.teacher is not None:
            with torch.no_grad(), self.engine.autocast():
                wanted = cropped(self.teacher(pair.latents).float(), pair.images)
            terms["teacher"] = RANGE * (images - wanted).abs().mean()
            total = total + config.teacher_weight * terms["teacher"]
        return total * self.values(images), terms

    def decode(self, pair: Pair) -> Tensor:
        """What the decoder makes of a batch's latents, as large as its images."""
        latents = pair.latents.to(self.last_layer.dtype)
        return cropped(self.engine["decoder"](latents).float(), pair.images)

    def values(self, images: Tensor) -> int:
        """What the reconstruction loss is multiplied by: an image's values, or 1."""
        return images[0].numel() if self.config.reduction == "sum" else 1

    def embedding_distance(self, images: Tensor, originals: Tensor) -> Tensor:
        """L1 between embeddings, gradients through those of `images` only."""
        assert self.embedder is not None
        with self.engine.autocast():
            with torch.no_grad():
                wanted = self.embedder.embed(originals)
            distances = (self.embedder.embed(images) - wanted).abs().float()
        if self.config.embedding_reduction == "sum":
            return distances.sum(1).mean()
        return distances.mean()

    def gan_weight(self, loss: Tensor, adversarial: Tensor, values: int) -> Tensor:
        """What the adversarial term is multiplied by, beside a loss multiplied by `values`."""
        if self.config.gan_weight_mode == "fixed":
            return torch.tensor(self.config.gan_weight * values, device=loss.device)
        ratio = adaptive_weight(loss, adversarial, self.last_layer)
        self.at_limit += ratio >= WEIGHT_LIMIT
        return self.config.gan_weight * ratio

    def told_limit(self) -> int:
        """Steps of this process at which the adaptive ratio was at its limit; said where any."""
        count = int(self.at_limit)
        if count:
            logger.warning(
                "gan_weight was at its limit of %s at %s steps: the discriminator's gradients are "
                "next to nothing there; see disc_start, disc_lr and logits_real in the log",
                f"{WEIGHT_LIMIT * self.config.gan_weight:,.0f}", f"{count:,}",
            )  # fmt: skip
        return count

    def discriminate(self, images: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        with self.engine.autocast():
            logits: Tensor = self.engine["discriminator"](images * 2 - 1)
        return logits.float()

    def train_discriminator(self, pair: Pair) -> Terms:
        """The discriminator's step, on what the decoder makes after its own."""
        with torch.no_grad(), evaluating(self.engine["decoder"]), self.engine.autocast():
            images = self.decode(pair)
        real, fake = self.discriminate(pair.images), self.discriminate(images)
        loss = hinge_loss(real, fake)
        self.engine.update("discriminator", loss)
        terms = {"disc": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return {name: term.detach() for name, term in terms.items()}


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
