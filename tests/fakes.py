"""Small honest stand-ins: an autoencoder that averages 8x8 px, exact and fast."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from latentds.autoencoders.autoencoder import AutoencoderCard, pad_to_factor
from latentds.core.compiling import Graphed
from latentds.views.view_batch import Views

CARD = AutoencoderCard(
    name="mean8",
    class_name="Mean",
    channels=3,
    factor=8,
    licence="Apache-2.0",
    latent_id="sha256:" + "a" * 64,
    decoder_id="sha256:" + "b" * 64,
)


class MeanAutoencoder:
    """f8, 3 channels: latents are 6 times a cell's mean colour minus 3; decoding repeats it."""

    def __init__(self, **changes: object) -> None:
        self.card = dataclasses.replace(CARD, **changes)
        self.device = torch.device("cpu")

    def encode(self, images: Tensor) -> Tensor:
        return functional.avg_pool2d(pad_to_factor(images, 8), 8) * 6 - 3

    def decode(self, latents: Tensor) -> Tensor:
        return functional.interpolate((latents + 3) / 6, scale_factor=8.0).clamp(0, 1)

    def to(self, device: object = None, dtype: object = None) -> MeanAutoencoder:
        return self


class HostGraph:
    """A CUDA graph's stand-in: a replay computes anew, into the memory of the first result."""

    def __init__(self, compute: Callable[[], object], result: object) -> None:
        self.compute, self.result = compute, result

    def replay(self) -> None:
        for own, new in zip(tensors(self.result), tensors(self.compute()), strict=True):
            own.copy_(new)


def tensors(result: object) -> list[Tensor]:
    """Those of a tensor, or of Views."""
    return [result.globals, result.locals] if isinstance(result, Views) else [result]


class HostGraphed(Graphed):
    """`Graphed` on a CPU: its memory and its copies are real."""

    def capture(self, values: tuple[Tensor, ...]) -> tuple[HostGraph, list[Tensor], object]:
        sources = [value.clone() for value in values]
        result = self.function(*sources)
        return HostGraph(lambda: self.function(*sources), result), sources, result


class FakeLane:
    """Work, events and waits of one lane, kept until `FakeLanes.work` lets them happen."""

    def __init__(self, is_deaf: bool) -> None:
        self.queue: list[tuple[str, object]] = []
        self.is_deaf = is_deaf

    def run(self, work: object) -> None:
        self.queue.append(("run", work))

    def record(self) -> dict[str, bool]:
        event = {"occurred": False}
        self.queue.append(("event", event))
        return event

    def wait(self, event: object) -> None:
        if not self.is_deaf:
            self.queue.append(("wait", event))


class FakeLanes:
    """Three lanes that run in any interleaving their events allow.

    deaf  name of a lane that ignores waits, to show that a test would notice
    """

    def __init__(self, deaf: str = "") -> None:
        self.copy, self.decode, self.main = (
            FakeLane(name == deaf) for name in ("copy", "decode", "main")
        )

    def consumer(self) -> FakeLane:
        return self.main

    def work(self, chance: random.Random, steps: int | None) -> None:
        """Let random lanes do one thing each, `steps` times or until nothing is left."""
        while steps is None or steps > 0:
            ready = [lane for lane in (self.copy, self.decode, self.main) if can_go_on(lane)]
            if not ready:
                assert steps is not None or not any(
                    lane.queue for lane in (self.copy, self.decode, self.main)
                ), "lanes wait for each other for ever"
                return
            kind, what = chance.choice(ready).queue.pop(0)
            if kind == "run":
                what()
            elif kind == "event":
                what["occurred"] = True
            steps = None if steps is None else steps - 1


def can_go_on(lane: FakeLane) -> bool:
    """Whether a lane has something to do that waits for nothing."""
    if not lane.queue:
        return False
    kind, what = lane.queue[0]
    return kind != "wait" or what["occurred"]


class HeldAutoencoder(MeanAutoencoder):
    """The mean, slow until the file `gate` is there; after `images` a process waits for it."""

    PATIENCE_S = 400.0  # another worker may need minutes to import torch on a loaded machine
    PACE_S = 0.4  # a batch: a block of 16 takes longer than a journal waits for its next line

    def __init__(self, gate: Path, images: int) -> None:
        super().__init__()
        self.gate, self.images, self.seen = gate, images, 0

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state | {"seen": 0})  # another process counts for itself

    def encode(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        deadline = time.monotonic() + self.PATIENCE_S
        if not self.gate.exists():
            time.sleep(self.PACE_S)
        while self.seen > self.images and not self.gate.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return super().encode(images)


class DeadlyAutoencoder(MeanAutoencoder):
    """Ends every process but the one it was made in, at once and without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.home = os.getpid()

    def encode(self, images: Tensor) -> Tensor:
        if os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(images)
