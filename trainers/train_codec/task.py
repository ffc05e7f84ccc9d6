"""What `train_codec` does in a step and with a checkpoint."""
# B crops, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from latentds_trainers.engine.training import Engine
from latentds_trainers.train_codec.codec_network import CodecNetwork, mse, rounded, warm_start
from latentds_trainers.train_codec.codec_product import (
    count_integers,
    encoded,
    estimated_bytes,
    held_out_figures,
    save_product,
)
from latentds_trainers.train_codec.tile_task import (
    BETAS,
    DECAY,
    MAY_CHANGE,
    TileTask,
    draws,
)
from torch import Tensor

if TYPE_CHECKING:
    from latentds_trainers.train_codec.config import CodecSettings

EARLY_SHARE = 8  # one part in so many of the steps has the early rate weight


class CodecTask(TileTask):
    """The network, its fast decoders and their step."""

    def __init__(self, config: CodecSettings) -> None:
        super().__init__(config)
        torch.manual_seed(config.seed)
        network = CodecNetwork(config.channels, config.encoder_widths)
        if config.init == "tiny-v1":
            warm_start(network)
        students = self.new_students(network.to(self.device).encoder, config.channels)
        networks = {"codec": (network, optimizer_of(network, config))}
        self.engine = Engine(
            config, "train_codec", networks | self.with_optimizers(students), may_change=MAY_CHANGE
        )

    def step(self, step: int) -> dict[str, Tensor]:
        """Distortion and rate of the network, distortion of the students."""
        engine, config = self.engine, self.config
        images = self.batch(step)
        network = engine["codec"]
        assert isinstance(network, CodecNetwork)
        with engine.autocast():
            latents = network.encoder(images)
        latents = latents.float()
        steps, noise = draws(config, step, engine.rows, latents)
        coded = rounded(latents, steps)
        with engine.autocast():
            distortion = mse(network.decoder(coded), images)
        bits = network.bits(latents, steps, noise).sum() / (images[:, 0].numel())
        engine.update("codec", distortion + self.rate_weight(step) * bits)
        students = self.update_students(coded.detach(), images)
        return {"mse": distortion, "bits_per_pixel": bits} | students

    def rate_weight(self, step: int) -> float:
        """Of bits a pixel at this step."""
        config = self.config
        is_early = step * EARLY_SHARE < config.steps
        return config.early_rate_weight if is_early else config.rate_weight

    def network(self) -> CodecNetwork:
        """A copy of the network."""
        network = CodecNetwork(self.config.channels, self.config.encoder_widths)
        self.copied(network, "codec")
        return network

    def samples(self) -> Tensor:
        """Held-out pictures above their reconstructions at step 1."""
        network, images = self.network(), self.shown()
        with torch.no_grad():
            coded = rounded(network.encoder(images), torch.ones(len(images)).to(images))
            return torch.cat([images, network.decoder(coded).clamp(0, 1)])

    def validate(self) -> dict[str, float]:
        """Rate and distortion on the held-out patients; writes the product."""
        network, students = self.network(), self.copied_students(self.config.channels)
        if not self.engine.is_first:
            return {}
        counts = count_integers(network.encoder, self.crops, self.config, self.engine.is_done)
        latents = encoded(network.encoder, self.held_out)
        decoders = {"": network.decoder} | {f"{name}_": s for name, s in students.items()}
        figures = {"bytes_at_step_1_estimated": estimated_bytes(network, latents)}
        figures |= held_out_figures(latents, decoders, counts, self.held_out)
        rounded_figures = {name: round(value, 3) for name, value in figures.items()}
        made = {"steps": self.engine.step, "seconds": round(self.engine.state().seconds)}
        trained = {"shares": self.tiles.shares, "figures": rounded_figures} | made
        save_product(self.config, network, students, counts, trained)
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
