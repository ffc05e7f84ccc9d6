"""What the tasks of `train_codec` share: tiles, crops, fast decoders, the way of a run."""
# B crops, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from latentds_trainers.engine.ranks import join_ranks, on_all_ranks
from latentds_trainers.engine.training import Engine
from latentds_trainers.train_codec.codec_network import mse
from latentds_trainers.train_codec.codec_product import PRODUCT, STUDENTS
from latentds_trainers.train_codec.tile_crops import CropConfig, Crops
from latentds_trainers.train_codec.tiles import read_tiles
from torch import Tensor, nn

from latentds.autoencoders.students import build_student, fit_shortcut

if TYPE_CHECKING:
    from latentds_trainers.train_codec.config import CodecSettings

FACTOR = 8
SHORTCUT_CROPS = 64
SHORTCUT_STEP = 2**32 - 1  # whose crops no training step draws
SAMPLES = 4
MAY_CHANGE = ("tiles", "pack", "name", "licence")
BETAS, DECAY = (0.9, 0.98), 1e-4


class TileTask:
    """What trains on tiles: their crops, fast decoders, the way of a run.

    engine  set by the task, with its fast decoders by their folder in the product
    """

    engine: Engine

    def __init__(self, config: CodecSettings) -> None:
        self.config = config
        self.device = join_ranks()
        self.tiles = on_all_ranks(lambda: read_tiles(config.tiles))
        self.held_out = self.tiles.held_out.to(self.device)
        crops = CropConfig(
            crop_px=config.crop_px,
            half_scale_share=config.half_scale_share,
            stain_share=config.stain_share,
            seed=config.seed,
        )
        self.crops = Crops(self.tiles.pictures, self.tiles.shares, crops, self.device)

    @torch.no_grad()
    def new_students(self, encoder: nn.Module, channels: int) -> dict[str, nn.Module]:
        """Fast decoders, each from the linear decoder of the encoder's latents."""
        students = {}
        for place, name in STUDENTS.items():
            students[place] = build_student(name, channels, FACTOR, self.config.seed)
            batches = (self.crops.batch(SHORTCUT_STEP, [row]) for row in range(SHORTCUT_CROPS))
            fit_shortcut(students[place], ((encoder(images), images) for images in batches))
        return students

    def with_optimizers(
        self, students: Mapping[str, nn.Module]
    ) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
        """What the engine takes of fast decoders."""
        return {n: (s, adamw(s.parameters(), self.config.lr)) for n, s in students.items()}

    def batch(self, step: int) -> Tensor:
        """Crops (B, 3, s, s) of a step."""
        crops = self.crops.batch(step, self.engine.rows)
        return crops.contiguous(memory_format=torch.channels_last)

    def update_students(self, coded: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        """A step of every fast decoder from latents to what they are to become; their errors."""
        errors = {}
        for name in STUDENTS:
            with self.engine.autocast():
                error = mse(self.engine[name](coded), wanted)
            self.engine.update(name, error)
            errors[f"{name}_mse"] = error
        return errors

    def copied(self, network: nn.Module, name: str) -> nn.Module:
        """The network with the engine's weights, in float32 on the device, in eval mode."""
        network.load_state_dict({k: v.float() for k, v in self.engine.weights(name).items()})
        return network.to(self.device).eval().requires_grad_(False)

    def copied_students(self, channels: int) -> dict[str, nn.Module]:
        """Copies of the fast decoders."""
        fresh = {place: build_student(name, channels, FACTOR) for place, name in STUDENTS.items()}
        return {place: self.copied(network, place) for place, network in fresh.items()}

    def shown(self) -> Tensor:
        """Some of the held-out pictures."""
        return self.held_out[:: max(1, len(self.held_out) // SAMPLES)][:SAMPLES]

    def run(self) -> Path | None:
        """Train to the last step; rank 0 returns the product's folder."""
        self.engine.run(self.step, samples=self.samples, validate=self.validate)
        self.validate()
        return self.config.out / PRODUCT if self.engine.is_first else None

    def step(self, step: int) -> dict[str, Tensor]:
        """Train a step; what to log."""
        raise NotImplementedError

    def samples(self) -> Tensor:
        """Held-out pictures above what becomes of them."""
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        """Write the product; figures of held-out patients."""
        raise NotImplementedError


def adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """The optimizer of a network all of whose parameters are alike."""
    return torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=DECAY)


def draws(
    config: CodecSettings, step: int, places: Iterable[int], latents: Tensor
) -> tuple[Tensor, Tensor]:
    """Quantization steps (B,) and noise like the latents, each crop's from its seed alone."""
    low, high = (math.log(bound) for bound in config.step_range)
    steps, noise = [], []
    for place in places:
        generator = torch.Generator().manual_seed((config.seed << 48) + (step << 16) + place)
        share = float(torch.rand((), generator=generator))
        steps.append(math.exp(low + share * (high - low)))
        noise.append(torch.rand(latents.shape[1:], generator=generator) - 0.5)
    return torch.tensor(steps).to(latents), torch.stack(noise).to(latents)
