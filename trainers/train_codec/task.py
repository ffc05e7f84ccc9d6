"""What `train_codec` does in a step and with a checkpoint."""
# B crops, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from latentds_trainers.engine.ranks import join_ranks, on_all_ranks
from latentds_trainers.engine.training import Engine
from latentds_trainers.train_codec.codec_network import CodecNetwork, mse, rounded, warm_start
from latentds_trainers.train_codec.codec_product import (
    PRODUCT,
    STUDENT,
    count_integers,
    held_out_figures,
    save_product,
)
from latentds_trainers.train_codec.tile_crops import CropConfig, Crops
from latentds_trainers.train_codec.tiles import read_tiles
from torch import Tensor, nn

from latentds.autoencoders.students import build_student, fit_shortcut

if TYPE_CHECKING:
    from latentds_trainers.train_codec.config import CodecSettings

SHORTCUT_CROPS = 64
SHORTCUT_STEP = 2**32 - 1  # whose crops no training step draws
SAMPLES = 4
MAY_CHANGE = ("tiles", "pack", "name", "licence")
EARLY_SHARE = 8  # one part in so many of the steps has the early rate weight
BETAS, DECAY = (0.9, 0.98), 1e-4


class CodecTask:
    """The tiles, the networks and their step."""

    def __init__(self, config: CodecSettings) -> None:
        self.config = config
        device = join_ranks()
        self.tiles = on_all_ranks(lambda: read_tiles(config.tiles))
        self.held_out = self.tiles.held_out.to(device)
        crops = CropConfig(
            crop_px=config.crop_px,
            half_scale_share=config.half_scale_share,
            stain_share=config.stain_share,
            seed=config.seed,
        )
        self.crops = Crops(self.tiles.pictures, self.tiles.shares, crops, device)
        torch.manual_seed(config.seed)
        network = CodecNetwork(config.channels, config.encoder_widths)
        if config.init == "tiny-v1":
            warm_start(network)
        student = build_student(STUDENT, config.channels, 8, config.seed)
        self.fit_student(network, student)
        networks = {
            "codec": (network, optimizer_of(network, config)),
            "student": (student, adamw(student.parameters(), config.lr)),
        }
        self.engine = Engine(config, "train_codec", networks, may_change=MAY_CHANGE)

    @torch.no_grad()
    def fit_student(self, network: CodecNetwork, student: nn.Module) -> None:
        """Start the student from the linear decoder of the encoder's first latents."""
        network.to(self.held_out.device)
        batches = (self.crops.batch(SHORTCUT_STEP, [place]) for place in range(SHORTCUT_CROPS))
        fit_shortcut(student, ((network.encoder(images), images) for images in batches))

    def run(self) -> Path | None:
        """Train to the last step; rank 0 returns the product's folder."""
        self.engine.run(self.step, samples=self.samples, validate=self.validate)
        self.validate(is_last=True)
        return self.config.out / PRODUCT if self.engine.is_first else None

    def step(self, step: int) -> dict[str, Tensor]:
        """Distortion and rate of the network, distortion of the student."""
        engine, config = self.engine, self.config
        images = self.crops.batch(step, engine.rows).contiguous(memory_format=torch.channels_last)
        network, student = engine["codec"], engine["student"]
        assert isinstance(network, CodecNetwork)
        with engine.autocast():
            latents = network.encoder(images)
        latents = latents.float()
        steps, noise = draws(config, step, engine.rows, latents)
        coded = rounded(latents, steps)
        with engine.autocast():
            distortion = mse(network.decoder(coded), images)
            student_distortion = mse(student(coded.detach()), images)
        bits = network.bits(latents, steps, noise).sum() / (images[:, 0].numel())
        engine.update("codec", distortion + self.rate_weight(step) * bits)
        engine.update("student", student_distortion)
        return {"mse": distortion, "bits_per_pixel": bits, "student_mse": student_distortion}

    def rate_weight(self, step: int) -> float:
        """Of bits a pixel at this step."""
        config = self.config
        is_early = step * EARLY_SHARE < config.steps
        return config.early_rate_weight if is_early else config.rate_weight

    def networks(self) -> tuple[CodecNetwork, nn.Module]:
        """Copies of both networks in float32 on the device, in eval mode."""
        config = self.config
        network = CodecNetwork(config.channels, config.encoder_widths)
        student = build_student(STUDENT, config.channels, 8)
        for copy, name in ((network, "codec"), (student, "student")):
            copy.load_state_dict({k: v.float() for k, v in self.engine.weights(name).items()})
            copy.to(self.engine.device).eval().requires_grad_(False)
        return network, student

    def samples(self) -> Tensor:
        """Held-out pictures above their reconstructions at step 1."""
        network, _ = self.networks()
        images = self.held_out[:: max(1, len(self.held_out) // SAMPLES)][:SAMPLES]
        with torch.no_grad():
            coded = rounded(network.encoder(images), torch.ones(len(images)).to(images))
            return torch.cat([images, network.decoder(coded).clamp(0, 1)])

    def validate(self, is_last: bool = False) -> dict[str, float]:
        """Rate and distortion on the held-out patients; writes the product."""
        network, student = self.networks()
        if not self.engine.is_first:
            return {}
        counts = count_integers(network.encoder, self.crops, self.config, is_last)
        figures = held_out_figures(network, student, counts, self.held_out)
        rounded_figures = {name: round(value, 3) for name, value in figures.items()}
        made = {"steps": self.engine.step, "seconds": round(self.engine.state().seconds)}
        trained = {"shares": self.tiles.shares, "figures": rounded_figures} | made
        save_product(self.config, network, student, counts, trained)
        return figures


def optimizer_of(network: CodecNetwork, config: CodecSettings) -> torch.optim.AdamW:
    """AdamW with the mixtures in a group of their own."""
    rate = list(network.rate.parameters())
    others = [*network.encoder.parameters(), *network.decoder.parameters()]
    groups = [
        {"params": others, "lr": config.lr, "weight_decay": DECAY},
        {"params": rate, "lr": config.rate_lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=BETAS)


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
