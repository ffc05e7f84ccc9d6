"""One fold of a bag classifier: draws, steps, validation, early stopping, the weights kept."""
# N patches of a bag, D dimensions, n bags, C classes

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from latentds_trainers.abmil.config import AbmilConfig
from latentds_trainers.engine.ranks import gathered
from latentds_trainers.engine.training import Engine, TrainConfig
from torch import Tensor, nn
from torch.nn import functional

from latentds.core.randomness import key_of, mix, shuffled
from latentds.models.attention_mil import GatedABMIL

if TYPE_CHECKING:
    from latentds_trainers.abmil.bag_source import FeatureBags

NETWORK = "abmil"
SEEDS = 2**63  # torch takes seeds below


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Slides of a fold's part, and their classes int64."""

    slides: list[str]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.slides)


class KeepingBest(nn.Module):
    """A network and, as buffers, the weights of its best moment: a checkpoint carries both."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        for name, tensor in network.state_dict().items():
            self.register_buffer(best_name(name), tensor.detach().clone())

    def forward(self, features: Tensor) -> Any:
        return self.network(features)

    @torch.no_grad()
    def keep(self) -> None:
        for name, tensor in self.network.state_dict().items():
            self.get_buffer(best_name(name)).copy_(tensor)

    def best(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(best_name(name)) for name in self.network.state_dict()}


def best_name(name: str) -> str:
    """Name of the buffer that keeps a tensor; torch allows no dots in one."""
    return "best_" + name.replace(".", "__")


@dataclasses.dataclass
class Stopping:
    """Early stopping's memory: the lowest validation loss, its epoch, epochs since then.

    Goes into checkpoints as the engine's `loader`.
    """

    lowest: float | None = None
    epoch: int = 0
    waited: int = 0

    def is_better(self, loss: float, epoch: int) -> bool:
        """Take in an epoch's loss; whether it is the lowest so far."""
        if self.lowest is None or loss < self.lowest:
            self.lowest, self.epoch, self.waited = loss, epoch, 0
            return True
        self.waited += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def build_network(config: AbmilConfig, dim: int, classes: int) -> GatedABMIL:
    """The network, its first weights following from torch's seed."""
    return GatedABMIL(dim, classes, **config.settings.layers)


def fold_settings(config: AbmilConfig, out: Path, seed: int, epoch_steps: int) -> TrainConfig:
    """The engine's settings of a fold, counted in steps."""
    settings = config.settings
    same = ("batch_size", "accumulation", "clip", "precision", "tensorboard")
    return TrainConfig(
        **{name: getattr(config, name) for name in same},
        out=out,
        steps=settings.epochs * epoch_steps,
        lr=settings.lr,
        schedule=settings.schedule,
        seed=seed,
        save_every=config.save_every * epoch_steps,
        keep=1,
        log_every=epoch_steps,
    )


class BagFoldTraining:
    """A fold's training, resumed where it was interrupted.

    reader   features by slide
    train, val   bags; `val` may be empty where the last weights are taken
    out      folder of the fold
    """

    def __init__(
        self,
        config: AbmilConfig,
        reader: FeatureBags,
        *,
        train: Part,
        val: Part,
        classes: int,
        seed: int,
        out: Path,
    ) -> None:
        self.config, self.reader, self.train, self.val = config, reader, train, val
        self.seed, self.stopping = seed, Stopping()
        bags_a_step = config.batch_size * config.accumulation * dist.get_world_size()
        self.epoch_steps = math.ceil(len(train) / bags_a_step)
        torch.manual_seed(seed)
        network = KeepingBest(build_network(config, reader.dim, classes))
        self.engine = Engine(
            fold_settings(config, out, seed, self.epoch_steps),
            NETWORK,
            {NETWORK: (network, build_optimizer(config, network))},
            loader=self.stopping,
        )
        is_weighted = config.settings.balance == "loss"
        self.weights = loss_weights(train.targets, classes, is_weighted=is_weighted)
        self.weights = self.weights.to(self.engine.device)

    @property
    def network(self) -> KeepingBest:
        network = self.engine[NETWORK]
        assert isinstance(network, KeepingBest)
        return network

    @property
    def epochs(self) -> int:
        return math.ceil(self.engine.step / self.epoch_steps)

    def run(self) -> dict[str, Tensor]:
        """Train; the chosen weights, on the device."""
        self.engine.run(self.step)
        is_last = self.config.settings.select == "last"
        chosen = self.network.network.state_dict() if is_last else self.network.best()
        return {name: tensor.detach() for name, tensor in chosen.items()}

    def step(self, number: int) -> dict[str, Tensor | float]:
        """One forward pass's bags; after an epoch's last, validation."""
        engine = self.engine
        self.network.train()
        losses = [self.loss(number, place) for place in engine.rows]
        engine.update(NETWORK, torch.stack(losses).mean())
        is_step_end = engine.micro == self.config.accumulation - 1
        if is_step_end and (number + 1) % self.epoch_steps == 0 and len(self.val):
            return {"validation/loss": self.validate((number + 1) // self.epoch_steps)}
        return {}

    def loss(self, step: int, place: int) -> Tensor:
        """Cross entropy of the bag at a place of the step's global batch."""
        epoch, within = divmod(step, self.epoch_steps)
        draw = within * self.engine.global_batch + place
        bag = int(self.draws(epoch)[draw])
        slide, target = self.train.slides[bag], int(self.train.targets[bag])
        rows = self.choose(slide, epoch, draw)
        features = self.reader.read(slide, rows).to(self.engine.device)
        seed_draws(self.engine.device, key_of("dropout", self.seed, step, place) % SEEDS)
        with self.engine.autocast():
            logits, _ = self.network(features)
        wanted = torch.tensor([target], device=logits.device)
        return functional.cross_entropy(logits[None], wanted) * self.weights[target]

    def draws(self, epoch: int) -> np.ndarray:
        """Places of the epoch's bags among those trained on."""
        count = self.epoch_steps * self.engine.global_batch
        key = key_of("bags", self.seed, epoch)
        is_balanced = self.config.settings.balance == "draws"
        return draw_bags(self.train.targets, count, key, is_balanced=is_balanced)

    def choose(self, slide: str, epoch: int, draw: int) -> np.ndarray | None:
        """Rows of a bag's patches that this draw takes, ascending; None for all."""
        limit, count = self.config.settings.max_patches, self.reader.count(slide)
        if limit is None or count <= limit:
            return None
        key = key_of("patches", self.seed, epoch, draw, slide)
        return np.sort(shuffled(count, key)[:limit])

    def validate(self, epoch: int) -> float:
        """Validation loss after an epoch, from 1; keeps the best weights, may end the fold."""
        _, loss = predict(self.network.network, self.reader, self.val, self.engine.device)
        settings, stopping = self.config.settings, self.stopping
        if not math.isfinite(loss):
            return loss  # the engine stops the run and says so
        if stopping.is_better(loss, epoch):
            self.network.keep()
        is_over = stopping.waited >= settings.patience and epoch >= settings.min_epochs
        if settings.select == "best" and is_over:
            self.engine.end()
        return loss


def build_optimizer(config: AbmilConfig, network: KeepingBest) -> torch.optim.Optimizer:
    settings = config.settings
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(
        network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
    )  # fused: 1 ms less of a step of 6 on a CPU


def predict(
    network: nn.Module, reader: FeatureBags, bags: Part, device: torch.device
) -> tuple[np.ndarray, float]:
    """Probabilities (n, C) of bags and the mean cross entropy, the work shared. Collective."""
    assert isinstance(network, GatedABMIL)
    network.eval()
    own = bags.slides[dist.get_rank() :: dist.get_world_size()]
    rows = {slide: logits_of(network, reader, slide, device)[0].tolist() for slide in own}
    found = {slide: row for part in gathered(rows) for slide, row in part.items()}
    logits = torch.tensor([found[slide] for slide in bags.slides], dtype=torch.float64)
    loss = functional.cross_entropy(logits, torch.from_numpy(bags.targets))
    return logits.softmax(1).numpy(), float(loss)


def logits_of(
    network: GatedABMIL, reader: FeatureBags, slide: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Logits (C,) and attention (N,) of a slide's whole bag, on the CPU."""
    logits, attention = network.in_parts(part.to(device) for part in reader.parts(slide))
    return logits.cpu(), attention.cpu()


def seed_draws(device: torch.device, seed: int) -> None:
    """Set torch's generator of the device: a tenth of what `torch.manual_seed` takes.

    That one also keeps a stack trace for a GPU that is not in use, at every call.
    """
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def draw_bags(targets: np.ndarray, count: int, key: int, *, is_balanced: bool) -> np.ndarray:
    """Places int64 (count,) of an epoch's bags: permutations, or each class equally often.

    Balanced, bags are drawn with replacement, as CLAM's weighted sampler does.
    """
    if not is_balanced:
        rounds = math.ceil(count / len(targets))
        orders = [shuffled(len(targets), key_of("round", key, number)) for number in range(rounds)]
        return np.concatenate(orders)[:count]
    shares = 1.0 / np.bincount(targets)[targets]
    numbers = mix(np.arange(count, dtype=np.uint64) + np.uint64(key)) / 2.0**64
    edges = np.cumsum(shares) / shares.sum()
    return np.minimum(np.searchsorted(edges, numbers, side="right"), len(targets) - 1)


def loss_weights(targets: np.ndarray, classes: int, *, is_weighted: bool) -> Tensor:
    """Weight of a bag's loss by class, float32 (C,): 1 on average over the bags."""
    counts = np.bincount(targets, minlength=classes)
    weights = len(targets) / (classes * np.maximum(counts, 1)) if is_weighted else np.ones(classes)
    return torch.from_numpy(np.asarray(weights, np.float32))
