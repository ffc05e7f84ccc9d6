"""What `train_tiny` trains: the autoencoder with quantization noise, its weights, its codebook."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from latentds_trainers.engine import Engine
from latentds_trainers.settings import plain
from latentds_trainers.tiles import CropConfig, Tiles, random_crops, read_held_out, read_tiles
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from latentds.autoencoders.cards import TINY
from latentds.autoencoders.tiny import BOUND, ResidualBlock, TinyDecoder, TinyEncoder, build_tiny
from latentds.codebooks import StoredCodebook, save_codebook
from latentds.fit import fit_codebook

if TYPE_CHECKING:
    from latentds_trainers.train_tiny import TrainTinyConfig

QUANTIZATION_STEP = 2 * BOUND / 256  # of an even 8-bit grid over the latents' range
RESIDUAL_SCALE = 0.2  # of the second convolution of a block, at the start
CODEBOOK_CROP_PX, CODEBOOK_BATCHES = 192, 36  # 432 crops, a million latent values
CODEBOOK_BATCH = 12


class TinyAutoencoder(nn.Module):
    """Encoder, quantization noise, decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = TinyEncoder()
        self.decoder = TinyDecoder()
        for block in self.modules():
            if isinstance(block, ResidualBlock):
                # Blocks start near the identity: without normalization seven plain ones blow up.
                block.conv2.weight.data.mul_(RESIDUAL_SCALE)

    def forward(self, images: Tensor, seeds: Iterable[int]) -> Tensor:
        """Reconstructions with uniform noise of one 8-bit step on the latents, as codes have it.

        seeds  of the noise, one an image
        """
        latents = self.encoder(images)
        shape = latents.shape[1:]
        drawn = [torch.rand(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        noise = (torch.stack(drawn).to(latents) - 0.5) * QUANTIZATION_STEP
        reconstructions: Tensor = self.decoder(latents + noise)
        return reconstructions


@torch.no_grad()
def psnr_after_rounding(model: TinyAutoencoder, images: Tensor) -> float:
    """Mean PSNR in dB over (B, 3, H, W) images, latents rounded to the even 8-bit grid."""
    latents = model.encoder(images)
    latents = (latents / QUANTIZATION_STEP).round() * QUANTIZATION_STEP
    error = model.decoder(latents).clamp(0, 1) - images
    return float((-10 * error.square().mean((1, 2, 3)).log10()).mean())


class TinyTask:
    """The tiles, the network and its step."""

    def __init__(self, config: TrainTinyConfig) -> None:
        self.config = config
        self.tiles, self.held_out = read_tiles(config.tiles), read_held_out(config.tiles)
        torch.manual_seed(config.seed)
        model = TinyAutoencoder()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=1e-4
        )
        self.engine = Engine(
            config, "train_tiny", {"tiny": (model, optimizer)}, may_change=["tiles"]
        )

    def run(self) -> Path | None:
        """Train to the last step; rank 0 writes weights and codebook and returns their path."""
        self.engine.run(self.step, validate=self.validate)
        psnr, weights = self.validate(), self.engine.weights("tiny")
        if not self.engine.is_first:
            return None
        path = save_weights(self.config, weights, psnr, self.engine.seconds)
        fit_tiny_codebook(self.config, self.tiles, path)
        return path

    def step(self, step: int) -> dict[str, Tensor]:
        """One forward pass of mean squared error."""
        engine, config = self.engine, self.config
        images = random_crops(self.tiles, crop_config(config), step, engine.rows)
        images = images.to(engine.device, memory_format=torch.channels_last)
        seeds = [(config.seed << 48) + (step << 16) + place for place in engine.rows]
        with engine.autocast():
            reconstructions = engine["tiny"](images, seeds)
        loss = functional.mse_loss(reconstructions.float(), images)
        engine.update("tiny", loss)
        return {"mse": loss}

    def validate(self) -> dict[str, float]:
        """The held-out patient's figure, in float32 whatever the training's precision."""
        weights = self.engine.weights("tiny")
        if not self.engine.is_first:
            return {}
        model = TinyAutoencoder()
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        model.to(self.engine.device)
        psnr = psnr_after_rounding(model, self.held_out.to(self.engine.device))
        return {"held_out_psnr_db": psnr}


def crop_config(config: TrainTinyConfig) -> CropConfig:
    """How the run draws its crops."""
    return CropConfig(
        crop_px=config.crop_px,
        half_scale_share=config.half_scale_share,
        stain_share=config.stain_share,
        seed=config.seed,
    )


def save_weights(
    config: TrainTinyConfig, weights: dict[str, Tensor], psnr: dict[str, float], seconds: float
) -> Path:
    """Write fp16 safetensors whose metadata tell how the weights were made."""
    options = plain(config) | {"tiles": config.tiles.name, "out": config.out.name}
    figures = {name: round(value, 2) for name, value in psnr.items()} | {"seconds": round(seconds)}
    path = config.out / "tiny-v1.safetensors"
    tensors = {name: tensor.half().contiguous() for name, tensor in weights.items()}
    save_file(tensors, path, {"options": json.dumps(options), "figures": json.dumps(figures)})
    return path


def fit_tiny_codebook(config: TrainTinyConfig, tiles: Tiles, weights: Path) -> None:
    """Fit the codebook that ships to the latents of augmented training crops."""
    autoencoder = build_tiny({n: t.float() for n, t in load_file(weights).items()}, TINY)
    crops = CropConfig(
        crop_px=CODEBOOK_CROP_PX,
        half_scale_share=config.half_scale_share,
        stain_share=config.stain_share,
        seed=config.seed + 1,
    )
    batches = (
        random_crops(tiles, crops, number, range(CODEBOOK_BATCH))
        for number in range(CODEBOOK_BATCHES)
    )
    latents = torch.cat([autoencoder.encode(images) for images in batches])
    codebook, report = fit_codebook(latents.transpose(0, 1).flatten(1).numpy(), seed=config.seed)
    made = {"origin": "ships with tiny-v1", "crops": len(latents), "seed": crops.seed}
    stored = StoredCodebook(
        codebook=codebook, latent_id=autoencoder.card.latent_id, made=made | report.to_json()
    )
    save_codebook(stored, config.out / "tiny-v1-codebook.safetensors")
