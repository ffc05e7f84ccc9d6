"""One fold of a network that is trained as a whole: an engine run in a folder of its own."""
# B images of a forward pass, K classes, H W pixels

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from latentds.embedders.embedder import resize
from latentds.embedders.latent_stem import LatentStemConfig, build_vit, image_px
from latentds.embedders.timm_models import configured_card, create
from latentds.embedders.weights import fill, find_weights, read_weights
from latentds.errors import WeightsError
from latentds.views.colour import luminance

if TYPE_CHECKING:
    from latentds_trainers.classify_patches.config import ClassifyConfig
    from latentds_trainers.classify_patches.patch_inputs import LabelledPatches
    from latentds_trainers.crossval.cross_validation import Cell

QUARTERS = 4
RANDOM, PUBLISHED = "random", "timm"  # weights to start from, beside a file


def fold_config(config: ClassifyConfig, cell: Cell) -> TrainConfig:
    """The engine's settings of a fold; that it is of the same run, the run's folder has told."""
    names = ("batch_size", "accumulation", "lr", "warmup_steps", "schedule", "clip", "zero_stage")
    more = ("precision", "seed", "save_every", "log_every", "tensorboard")
    images = config.batch_size * config.accumulation * dist.get_world_size()
    steps = config.epochs * math.ceil(len(cell.fold.train) / images)
    values = {name: getattr(config, name) for name in (*names, *more)}
    return TrainConfig(**values, out=cell.folder, steps=steps, keep=1)


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
        config, classes = self.config, len(self.patches.classes)
        weights, seed = config.weights, config.seed
        return build_classifier(config.arch or "", classes, self.stem, weights=weights, seed=seed)

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


class PatchClassifier(nn.Module):
    """Logits (B, K) of images (B, 3, H, W) in [0, 1], normalized as timm's configuration says.

    network  timm's, with a head of K classes
    size_px  (H, W) that images are resized to; None for a network that takes any size
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any, size_px: tuple[int, int] | None) -> None:
        super().__init__()
        self.network, self.size_px = network, size_px
        config = network.pretrained_cfg
        self.interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.size_px is not None and images.shape[-2:] != self.size_px:
            images = resize(images, self.size_px, self.interpolation)
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


def build_classifier(
    arch: str,
    classes: int,
    stem: LatentStemConfig | None = None,
    *,
    weights: str = RANDOM,
    seed: int = 0,
) -> nn.Module:
    """A classifier whose head, and whatever else `weights` leaves out, is drawn from the seed.

    arch     timm's name of the network, a tag included where weights are timm's
    stem     of normalized latents (B, C, h, w), which a ViT of timm then takes instead of images
    weights  random, timm (its pretrained ones, from the Hub), or a file of tensors of this network;
             a classifier among them is left out, and a patch embedding for pixels where latents
             are read
    raises   UnknownNameError, WeightsError, MissingExtraError, and as `build_vit`
    """
    if stem is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = create(arch, num_classes=classes)
    else:
        network = build_vit(arch, stem=stem, img_px=image_px(arch), seed=seed, num_classes=classes)
    if weights != RANDOM:
        path = weights_path(arch, network, weights)
        load_body(network, arch, path, stem=None if stem is None else "patch_embed.")
    if stem is not None:
        classifier: nn.Module = network
        return classifier
    config = network.pretrained_cfg
    size_px = tuple(config["input_size"][1:]) if config.get("fixed_input_size") else None
    return PatchClassifier(network, size_px)


def weights_path(arch: str, network: Any, weights: str) -> Path:
    """The file of the weights to start from, fetched where they are timm's own."""
    if weights != PUBLISHED:
        return Path(weights)
    if not network.pretrained_cfg.get("hf_hub_id"):
        raise WeightsError(f"timm model {arch!r}: no weights on the Hub; give a file of them")
    card = configured_card(arch, network)
    return find_weights(card, None)[0]


def load_body(network: Any, arch: str, path: Path, stem: str | None = None) -> None:
    """Load all weights but the head's.

    stem  prefix of weights that stay as they are where the file has them in other shapes
    """
    heads = network.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    state = network.state_dict()
    found = read_weights(path)
    if stem is not None and any(
        name.startswith(stem) and (name not in found or found[name].shape != tensor.shape)
        for name, tensor in state.items()
    ):
        prefixes = (*prefixes, stem)
    head = {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}
    body = {n: t for n, t in found.items() if not n.startswith(prefixes)}
    fill(network, body | head, path, arch)
