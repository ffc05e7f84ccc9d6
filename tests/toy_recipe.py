"""A recipe of a few hundred parameters in two networks, to run the engine with.

deepspeed --num_gpus 2 --module tests.toy_recipe --out runs/toy
"""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import time

import torch
from latentds_trainers.engine.training import Engine, TrainConfig, launch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(TrainConfig):
    """Settings of the toy."""

    steps: int = 6
    batch_size: int = 2
    lr: float = 1e-2
    warmup_steps: int = 2
    save_every: int = 2
    log_every: int = 1
    width: int = 8
    adaptive: bool = True
    """Weigh the critic's loss by two gradients of the last layer, as they are on each rank."""
    nan_gradient_at: int | None = None
    """Step whose loss is finite and its gradient is not."""
    nan_at: int | None = None
    """Step whose loss is NaN on the last rank."""
    die_at: int | None = None
    """Step at which the last rank kills itself."""
    terminate_at: int | None = None
    """Step at which the last rank gets a signal."""
    terminate_by: tuple[str, ...] = ("SIGTERM",)
    """The signals it gets."""
    full_disk_at: int | None = None
    """Step from which the last rank's disk is full."""
    end_at: int | None = None
    """Step that is the run's last."""
    sleep_s: float = 0.0
    """Added to every step."""


def images_of(seed: int, step: int, rows: range) -> Tensor:
    """Images (B, 3, 8, 8) in [0, 1] by place in the global batch."""
    drawn = []
    for row in rows:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_000 + row)
        drawn.append(torch.rand(3, 8, 8, generator=generator))
    return torch.stack(drawn)


class Counting(nn.Sequential):
    """Layers, and a buffer that counts the batches they were trained on."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.seen += torch.is_grad_enabled()
        decoded: Tensor = super().forward(images)
        return decoded


def toy_engine(config: ToyConfig, recipe: str = "toy", loader: object = None) -> Engine:
    """A decoder and a critic, whose first weights follow from the seed."""
    torch.manual_seed(config.seed)
    width = config.width
    decoder = Counting(
        nn.Conv2d(3, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, 3, 3, padding=1)
    )
    critic = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.GELU(), nn.Conv2d(width, 1, 3))
    networks = {
        "decoder": (decoder, torch.optim.Adam(decoder.parameters(), lr=config.lr)),
        "critic": (critic, torch.optim.Adam(critic.parameters(), lr=config.lr / 2)),
    }
    may_change = ("nan_at", "nan_gradient_at", "die_at", "full_disk_at", "sleep_s")
    may_change += ("terminate_at", "terminate_by")
    return Engine(config, recipe, networks, loader, may_change=may_change)


class Toy:
    """The toy's step, with a weight from two gradients of the last layer."""

    def __init__(self, engine: Engine, config: ToyConfig) -> None:
        self.engine, self.config = engine, config
        self.last_layer = list(engine["decoder"].parameters())[-2]

    def __call__(self, step: int) -> dict[str, Tensor]:
        engine = self.engine
        self.misbehave(step)
        images = images_of(self.config.seed, step, engine.rows).to(engine.device)
        with engine.autocast():
            decoded = engine["decoder"](images)
            error = (decoded - images).abs().mean()
            with engine.frozen("critic") as critic:
                fooled = -critic(decoded).mean()
            ratio = self.norm_of(error) / (self.norm_of(fooled) + 1e-4)
            loss = error + 0.1 * ratio.clamp(max=10) * fooled
        if self.is_it(self.config.nan_at, step):
            error = error * float("nan")
        if self.is_it(self.config.nan_gradient_at, step):
            loss = loss + (decoded * 0).square().sum().sqrt()  # the root's slope at 0
        engine.update("decoder", loss)
        with engine.autocast():
            critic = engine["critic"]
            judged = (1 - critic(images)).relu().mean() + (
                1 + critic(decoded.detach())
            ).relu().mean()
        engine.update("critic", judged)
        if step == self.config.end_at:
            engine.end()
        return {"l1": error, "seen": engine["decoder"].seen}

    def norm_of(self, loss: Tensor) -> Tensor:
        if not self.config.adaptive or self.config.zero_stage == 3:
            return torch.ones(())  # with ZeRO 3 the layer is spread over the ranks
        (gradient,) = torch.autograd.grad(loss, self.last_layer, retain_graph=True)
        return gradient.norm()

    def is_it(self, at: int | None, step: int) -> bool:
        return step == at and self.engine.rank == self.engine.world_size - 1

    def misbehave(self, step: int) -> None:
        time.sleep(self.config.sleep_s)
        if self.is_it(self.config.die_at, step):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.is_it(self.config.full_disk_at, step):
            torch.save = write_to_full_disk
        if self.is_it(self.config.terminate_at, step):
            for name in self.config.terminate_by:
                os.kill(os.getpid(), signal.Signals[name])


def write_to_full_disk(*arguments: object, **options: object) -> None:
    """What torch.save does where there is no room."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def train(config: ToyConfig) -> None:
    """Train the toy."""
    engine = toy_engine(config)
    images = images_of(config.seed, 0, range(4))

    @torch.no_grad()
    def samples() -> Tensor:
        with engine.autocast():
            decoded: Tensor = engine["decoder"](images.to(engine.device))
        return decoded.float()

    def validate() -> dict[str, float]:
        return {"l1": float((samples().cpu() - images).abs().mean())}

    engine.run(Toy(engine, config), samples, validate)


if __name__ == "__main__":
    launch(train, ToyConfig, __doc__)
