"""One fold of a network that is trained as a whole: an engine run in a folder of its own."""
# B images of a forward pass, K classes, H W pixels

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from latentds_trainers.classify_patches.patch_features import as_input, split_rows
from latentds_trainers.engine.ranks import gathered, on_all_ranks
from latentds_trainers.engine.settings import TrainConfig
from latentds_trainers.engine.training import Engine
from torch import Tensor, nn
from torch.nn import functional

from latentds.core.randomness import key_of, patch_seeds, permute, uniform
from latentds.models.backbones import build_classifier, build_latent_classifier
from latentds.views.colour import luminance

if TYPE_CHECKING:
    from latentds_trainers.classify_patches.config import ClassifyConfig
    from latentds_trainers.classify_patches.patch_inputs import LabelledPatches
    from latentds_trainers.crossval.cross_validation import Cell

    from latentds.embedders.latent_stem import LatentStemConfig

QUARTERS = 4


def fold_config(config: ClassifyConfig, cell: Cell) -> TrainConfig:
    """The engine's settings of a fold; that it is of the same run, the run's folder has told."""
    names = ("batch_size", "accumulation", "lr", "warmup_steps", "schedule", "clip", "zero_stage")
    more = ("precision", "seed", "save_every", "log_every", "tensorboard")
    images = config.batch_size * config.accumulation * dist.get_world_size()
    steps = config.epochs * math.ceil(len(cell.fold.train) / images)
    values = {name: getattr(config, name) for name in (*names, *more)}
    return TrainConfig(**values, out=cell.folder, steps=steps, keep=1)


def build_network(
    config: ClassifyConfig, classes: int, stem: LatentStemConfig | None, seed: int = 0
) -> nn.Module:
    """The classifier of the config: of latents where there is a stem, else of images."""
    arch = config.arch or ""
    if stem is None:
        return build_classifier(arch, classes, weights=config.weights, seed=seed)
    return build_latent_classifier(arch, classes, stem, weights=config.weights, seed=seed)


class FoldTraining:
    """A classifier trained on a fold's training patches; collective, the same on every rank.

    patches  whose images, or latents, the network reads
    stem     of latents, None for images

    Images of a step follow from seed, step and place in the global batch: every epoch is a
    permutation of the training patches.
    """

    def __init__(
        self,
        config: ClassifyConfig,
        cell: Cell,
        patches: LabelledPatches,
        stem: LatentStemConfig | None = None,
    ) -> None:
        self.config, self.patches, self.fold, self.stem = config, patches, cell.fold, stem
        model = on_all_ranks(self.build)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        settings = fold_config(config, cell)
        self.engine = Engine(settings, "classify_patches", {"classifier": (model, optimizer)})
        self.labels = torch.from_numpy(patches.labels).to(self.engine.device)

    def build(self) -> nn.Module:
        return build_network(self.config, len(self.patches.classes), self.stem, self.config.seed)

    def run(self) -> np.ndarray:
        """Train to the last step; probabilities (n, K) of the fold's test patches."""
        self.engine["classifier"].train()
        self.images = self.patches.stream(map(self.rows, self.engine.places_left()))
        self.engine.run(self.step)
        return self.test()

    def rows(self, drawn: np.ndarray) -> np.ndarray:
        """Training patches at places of the whole run."""
        train = self.fold.train
        keys = [key_of("epoch", self.config.seed, int(e)) for e in drawn // len(train)]
        places_of = permute(drawn % len(train), len(train), np.array(keys, np.uint64))
        rows: np.ndarray = train[places_of]
        return rows

    def step(self, step: int) -> dict[str, Tensor]:
        engine, places = self.engine, self.engine.rows
        images = as_input(next(self.images).to(engine.device))
        rows = self.rows(step * engine.global_batch + np.array(places, np.int64))
        labels = self.labels[torch.from_numpy(rows).to(engine.device)]
        if self.config.augment:
            zeros = np.zeros(len(places), np.int64)
            seeds = patch_seeds(self.config.seed, zeros + step, zeros, np.array(places))
            jitter = self.config.jitter if self.stem is None else 0.0
            images = augmented(images, torch.from_numpy(seeds).to(images.device), jitter)
        with engine.autocast():
            logits = engine["classifier"](images)
        loss = functional.cross_entropy(logits.float(), labels)
        engine.update("classifier", loss)
        return {"accuracy": (logits.argmax(1) == labels).float()}

    @torch.no_grad()
    def test(self) -> np.ndarray:
        """Probabilities (n, K) of the test patches by the last weights, ranks sharing the work."""
        engine, rows = self.engine, self.fold.test
        model = self.build()
        model.load_state_dict(engine.weights("classifier"))
        model.to(engine.device).eval()
        for tensor in model.state_dict().values():  # batch norm's figures differ between ranks
            dist.broadcast(tensor, 0)
        own = split_rows(rows[engine.rank :: engine.world_size], self.config.batch_size)
        found = [np.empty((0, len(self.patches.classes)), np.float32)]
        for images in self.patches.stream(own):
            with engine.autocast():
                logits = model(as_input(images.to(engine.device)))
            found.append(logits.float().softmax(1).cpu().numpy())
        probabilities = np.empty((len(rows), len(self.patches.classes)))
        for rank, part in enumerate(gathered(np.concatenate(found))):
            probabilities[rank :: engine.world_size] = part
        return probabilities


def augmented(images: Tensor, seeds: Tensor, jitter: float) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] flipped, turned by right angles, their colours changed.

    Of latents, which have no colours, flips and turns are nearly those of the images.

    seeds  int64 (B,), from which all draws follow; those that are not square turn by 180 degrees
    """
    turns = (uniform(seeds, "turn")[:, 0] * QUARTERS).long()
    flips = uniform(seeds, "flip")[:, 0] < 0.5
    if images.shape[-2] != images.shape[-1]:
        turns = turns // 2 * 2
    images = torch.where(flips.view(-1, 1, 1, 1), images.flip(-1), images)
    for turn in range(1, QUARTERS):
        chosen = (turns == turn).nonzero()[:, 0]
        if len(chosen):
            images = images.index_copy(0, chosen, images[chosen].rot90(turn, (2, 3)))
    return jittered(images, uniform(seeds, "colour", 3), jitter) if jitter else images


def jittered(images: Tensor, draws: Tensor, jitter: float) -> Tensor:
    """Images with brightness, contrast and saturation scaled by 1 - jitter to 1 + jitter.

    draws  float32 (B, 3) in [0, 1)
    """
    factors = 1 + jitter * (2 * draws - 1)
    brightness, contrast, saturation = (f.view(-1, 1, 1, 1) for f in factors.unbind(1))
    images = images * brightness
    grey = luminance(images)
    mean = grey.mean((2, 3), keepdim=True)
    images = mean + (images - mean) * contrast
    grey = luminance(images)
    return (grey + (images - grey) * saturation).clamp(0, 1)
