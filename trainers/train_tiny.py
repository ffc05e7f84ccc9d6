"""Train `tiny`, the autoencoder that ships with latentds, in one process.

    python -m latentds_trainers.train_tiny --tiles ../shared/assets --out runs/tiny

Learns from openly licensed tiles only: `segmentation/dsb2018_he` (CC0),
`classification/oral_cc0_jpeg` (CC0), `tiles/tcga_gbm` (TCGA open access) and the slide in `wsi/`
(CC0). UCSB and MoNuSeg stay test sets and are never opened here. Writes `checkpoint.pt` (resumed
from when it is there) and, at the end, the fp16 weights as safetensors with the figures of the run,
and the codebook fitted to their latents.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from latentds.autoencoders.cards import TINY
from latentds.autoencoders.tiny import BOUND, ResidualBlock, TinyDecoder, TinyEncoder, build_tiny
from latentds.codebooks import StoredCodebook, save_codebook
from latentds.fit import fit_codebook

logger = logging.getLogger(__name__)

QUANTIZATION_STEP = 2 * BOUND / 256  # of an even 8-bit grid over the latents' range
SWAP_SHARE = 0.3  # of the colour-mixed crops whose channels change places
RESIDUAL_SCALE = 0.2  # of the second convolution of a block, at the start
SPIKE = 10  # steps whose gradient norm is beyond this many clips are left out
CODEBOOK_CROP_PX, CODEBOOK_BATCHES = 192, 36  # 432 crops, a million latent values
HELD_OUT = "TCGA-FG-A4MU"  # one patient of tiles/tcga_gbm, for the validation figure
# Share of the crops of a batch. Lossless tiles lead: JPEG sources teach the network their block
# noise.
SHARES = {"tcga_gbm": 0.40, "dsb2018_he": 0.25, "slide": 0.20, "oral_cc0_jpeg": 0.15}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTinyConfig:
    """Settings of the run; the defaults made the weights that ship."""

    tiles: Path
    """Folder with segmentation/, classification/, tiles/ and wsi/ as described above."""
    out: Path
    """Where the checkpoint and the weights go."""
    steps: int = 20_000
    batch_size: int = 12
    crop_px: int = 96
    lr: float = 3e-4
    """Peak learning rate; at 4e-4 with plain initialization the latents saturated at step 4,500."""
    warmup_steps: int = 500
    clip: float = 0.3
    half_scale_share: float = 0.25
    """Share of the crops that are taken at half resolution (area filter)."""
    stain_share: float = 0.5
    """Share of the crops whose colours are mixed, so that stains other than H&E are not foreign."""
    seed: int = 0
    save_every: int = 1000


def read_tiles(root: Path) -> dict[str, list[np.ndarray]]:
    """The training pictures by source, as uint8 (H, W, 3) arrays in memory (about 130 MB)."""
    import openslide

    folders = {
        "tcga_gbm": "tiles/tcga_gbm",
        "dsb2018_he": "segmentation/dsb2018_he/images",
        "oral_cc0_jpeg": "classification/oral_cc0_jpeg",
    }
    tiles = {
        name: [
            np.asarray(Image.open(path).convert("RGB"))
            for path in sorted((root / folder).rglob("*.[pj][np]g"))
            if not path.name.startswith(HELD_OUT)
        ]
        for name, folder in folders.items()
    }
    slide = openslide.OpenSlide(root / "wsi" / "CMU-1-Small-Region.svs")
    tiles["slide"] = [np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))]
    return tiles


def read_held_out(root: Path) -> Tensor:
    """Centre crops (n, 3, 256, 256) in [0, 1] of the held-out patient."""
    paths = sorted((root / "tiles" / "tcga_gbm").glob(f"{HELD_OUT}*.png"))
    crops = [np.asarray(Image.open(path).convert("RGB"))[128:384, 128:384] for path in paths]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


def random_crops(
    tiles: dict[str, list[np.ndarray]], config: TrainTinyConfig, first_step: int
) -> Iterator[Tensor]:
    """Endless batches (B, 3, crop, crop) in [0, 1]; batch `i` depends on (seed, i) alone."""
    names = list(SHARES)
    shares = np.array([SHARES[name] for name in names])
    step = first_step
    while True:
        rng = np.random.default_rng([config.seed, step])
        sources = rng.choice(len(names), size=config.batch_size, p=shares)
        yield torch.stack([one_crop(tiles[names[source]], config, rng) for source in sources])
        step += 1


def one_crop(
    pictures: list[np.ndarray], config: TrainTinyConfig, rng: np.random.Generator
) -> Tensor:
    """A crop (3, crop, crop).

    Flips, right-angle turns, gain jitter, at times half scale or mixed colours.
    """
    picture = pictures[rng.integers(len(pictures))]
    fits_half = min(picture.shape[:2]) >= 2 * config.crop_px
    scale = 2 if fits_half and rng.random() < config.half_scale_share else 1
    side = scale * config.crop_px
    top = rng.integers(picture.shape[0] - side + 1)
    left = rng.integers(picture.shape[1] - side + 1)
    crop = np.rot90(picture[top : top + side, left : left + side], rng.integers(4))
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    image = torch.from_numpy(crop.copy()).permute(2, 0, 1).float() / 255
    if scale == 2:
        image = functional.avg_pool2d(image, 2)
    if rng.random() < config.stain_share:
        image = mix_colours(image, rng)
    gain = torch.from_numpy(rng.uniform(0.9, 1.1, (3, 1, 1))).float()
    return (image * gain).clamp_(0, 1)


def mix_colours(image: Tensor, rng: np.random.Generator) -> Tensor:
    """The image (3, H, W) with channels swapped at times, mixed a little, and another gamma."""
    channels = rng.permutation(3) if rng.random() < SWAP_SHARE else np.arange(3)
    mixing = np.eye(3)[channels] + rng.normal(0, 0.12, (3, 3))
    mixed = torch.einsum("ij,jhw->ihw", torch.from_numpy(mixing).float(), image)
    return mixed.clamp(0, 1) ** float(rng.uniform(0.7, 1.4))


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

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Reconstructions with uniform noise of one 8-bit step on the latents, as codes have it."""
        latents = self.encoder(images)
        noise = torch.rand(latents.shape, generator=generator, device=latents.device) - 0.5
        noise = noise * QUANTIZATION_STEP
        reconstructions: Tensor = self.decoder(latents + noise)
        return reconstructions


@torch.no_grad()
def psnr_after_rounding(model: TinyAutoencoder, images: Tensor) -> float:
    """Mean PSNR in dB over (B, 3, H, W) images, latents rounded to the even 8-bit grid."""
    latents = model.encoder(images)
    latents = (latents / QUANTIZATION_STEP).round() * QUANTIZATION_STEP
    error = model.decoder(latents).clamp(0, 1) - images
    return float((-10 * error.square().mean((1, 2, 3)).log10()).mean())


def learning_rate(step: int, config: TrainTinyConfig) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    return float(config.lr * warm * 0.5 * (1 + np.cos(np.pi * step / config.steps)))


def train(config: TrainTinyConfig) -> Path:
    """Run to the last step, from the checkpoint when there is one; returns the weights' path."""
    torch.manual_seed(config.seed)
    tiles, held_out = read_tiles(config.tiles), read_held_out(config.tiles)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = TinyAutoencoder().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=1e-4
    )
    step, seconds = load_checkpoint(config, model, optimizer)
    crops = random_crops(tiles, config, step)
    started = time.perf_counter() - seconds
    while step < config.steps:
        generator = torch.Generator(device).manual_seed((config.seed << 32) + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        loss = train_step(model, optimizer, next(crops).to(device), generator, config.clip)
        step += 1
        if step % config.save_every == 0 or step == config.steps:
            seconds = time.perf_counter() - started
            save_checkpoint(config, model, optimizer, step, seconds)
            psnr = psnr_after_rounding(model, held_out.to(device))
            logger.info(
                "step %d loss %.5f held-out %.2f dB, %.0f s", step, float(loss), psnr, seconds
            )
    weights = save_weights(config, model, psnr_after_rounding(model, held_out.to(device)), seconds)
    fit_tiny_codebook(config, tiles, weights)
    return weights


def train_step(
    model: TinyAutoencoder,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    generator: torch.Generator,
    clip: float,
) -> Tensor:
    """One step of mean squared error in bf16; returns the loss."""
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, dtype=torch.bfloat16):
        reconstructions = model(images, generator)
    loss = functional.mse_loss(reconstructions.float(), images)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    if norm < SPIKE * clip:  # a bad batch may not push the latents into tanh's flat ends
        optimizer.step()
    return loss.detach()


def load_checkpoint(
    config: TrainTinyConfig, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Restore model and optimizer where a checkpoint lies; returns (steps done, seconds spent)."""
    path = config.out / "checkpoint.pt"
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def save_checkpoint(
    config: TrainTinyConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
) -> None:
    config.out.mkdir(parents=True, exist_ok=True)
    temporary = config.out / "checkpoint.pt.tmp"
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"step": step, "seconds": seconds}, temporary)
    temporary.replace(config.out / "checkpoint.pt")


def save_weights(config: TrainTinyConfig, model: nn.Module, psnr: float, seconds: float) -> Path:
    """Write fp16 safetensors whose metadata tell how the weights were made."""
    options = dataclasses.asdict(config) | {"tiles": config.tiles.name, "out": config.out.name}
    figures = {"held_out_psnr_db": round(psnr, 2), "seconds": round(seconds)}
    path = config.out / "tiny-v1.safetensors"
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, {"options": json.dumps(options), "figures": json.dumps(figures)})
    return path


def fit_tiny_codebook(
    config: TrainTinyConfig, tiles: dict[str, list[np.ndarray]], weights: Path
) -> None:
    """Fit the codebook that ships to the latents of augmented training crops."""
    autoencoder = build_tiny({n: t.float() for n, t in load_file(weights).items()}, TINY)
    crops = dataclasses.replace(config, crop_px=CODEBOOK_CROP_PX, seed=config.seed + 1)
    batches = itertools.islice(random_crops(tiles, crops, 0), CODEBOOK_BATCHES)
    latents = torch.cat([autoencoder.encode(images) for images in batches])
    codebook, report = fit_codebook(latents.transpose(0, 1).flatten(1).numpy(), seed=config.seed)
    made = {"origin": "ships with tiny-v1", "crops": len(latents), "seed": crops.seed}
    stored = StoredCodebook(
        codebook=codebook, latent_id=autoencoder.card.latent_id, made=made | report.to_json()
    )
    save_codebook(stored, config.out / "tiny-v1-codebook.safetensors")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(train(tyro.cli(TrainTinyConfig, description=__doc__)))
