"""What a `train_codec` run leaves behind: networks, counts of integers, figures, a card."""
# B crops, C latent channels, h w latent cells, S steps, T symbols

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import torch
from latentds_trainers.codec_network import GAIN, CodecNetwork, rounded
from latentds_trainers.codec_tiles import SHARES, CropConfig, Tiles, random_crops
from latentds_trainers.settings import plain
from safetensors.torch import save
from torch import Tensor, nn

from latentds.storage import write_atomically

if TYPE_CHECKING:
    from latentds_trainers.train_codec import TrainCodecConfig

LARGEST = 15  # symbols -15 .. 15, and one for what lies beyond
ESCAPE_BITS = 8
STEPS = tuple(0.5 * 2 ** (k / 8) for k in range(33))  # 0.5 to 8; the ninth is 1
FLOOR = 0.005  # of a geometric law, mixed into counted shares
COUNTED_PX, COUNTED_CROPS, FINAL_CROPS = 192, 16, 432
BATCH = 8
JUDGED_BYTES = (4096, 2048)
PATCH_PIXELS = 256 * 256


@torch.no_grad()
def count_integers(
    encoder: nn.Module, tiles: Tiles, config: TrainCodecConfig, is_last: bool
) -> Tensor:
    """Counts int64 (S, C, 32) of symbols on training crops at each of STEPS; the last escapes."""
    crops = CropConfig(
        crop_px=COUNTED_PX,
        half_scale_share=config.half_scale_share,
        stain_share=config.stain_share,
        seed=config.seed + 1,
    )
    number = FINAL_CROPS if is_last else COUNTED_CROPS
    device = next(encoder.parameters()).device
    total = 0
    for start in range(0, number, BATCH):
        images = random_crops(tiles, crops, 0, range(start, start + BATCH)).to(device)
        total = total + torch.stack([symbol_counts(encoder(images), step) for step in STEPS])
    return total.cpu()


def symbol_counts(latents: Tensor, step: float) -> Tensor:
    """Counts int64 (C, 32) of the symbols of latents (B, C, h, w) at a step."""
    symbols = symbols_of(latents, step).transpose(0, 1).flatten(1)
    width = 2 * LARGEST + 2
    rows = torch.arange(len(symbols), device=symbols.device)[:, None] * width
    return torch.bincount((symbols + rows).flatten(), minlength=width * len(symbols)).view(
        -1, width
    )


def symbols_of(latents: Tensor, step: float) -> Tensor:
    """Symbols int64 0 .. 31: integers + 15, and 31 for an escape."""
    integers = (latents * (GAIN / step)).round().long()
    return torch.where(integers.abs() <= LARGEST, integers + LARGEST, 2 * LARGEST + 1)


def table_bits(counts: Tensor) -> Tensor:
    """Bits (..., C, 32) of each symbol by its share of the counts; escapes with their raw bits."""
    law = 0.5 ** (torch.arange(2 * LARGEST + 2) - LARGEST).abs().double()
    law[-1] = law[0]
    shares = counts.double() / counts.sum(-1, keepdim=True).clamp_min(1)
    bits = -((1 - FLOOR) * shares + FLOOR * law / law.sum()).log2()
    bits[..., -1] += ESCAPE_BITS
    return bits


def patch_bytes(latents: Tensor, counts: Tensor, step: float) -> float:
    """Mean bytes of a patch of latents at a step, with the nearest step's table."""
    nearest = int(np.argmin([abs(np.log(known / step)) for known in STEPS]))
    bits = (symbol_counts(latents, step).cpu() * table_bits(counts[nearest])).sum()
    return float(bits) / 8 / len(latents)


def step_for(latents: Tensor, counts: Tensor, size: float) -> float:
    """The step at which the patches' mean is so many bytes, by halving."""
    low, high = np.log(STEPS[0]), np.log(STEPS[-1])
    for _ in range(12):
        middle = (low + high) / 2
        is_too_large = patch_bytes(latents, counts, float(np.exp(middle))) > size
        low, high = (middle, high) if is_too_large else (low, middle)
    return float(np.exp(high))


@torch.no_grad()
def held_out_figures(
    network: CodecNetwork, student: nn.Module, counts: Tensor, images: Tensor
) -> dict[str, float]:
    """Bytes at step 1 by mixtures and by tables; PSNR in dB at 4,096 and 2,048 bytes.

    images  (B, 3, 256, 256) in [0, 1], of held-out patients
    """
    latents = torch.cat([network.encoder(part) for part in images.split(BATCH)])
    ones = torch.ones(len(latents)).to(latents)
    estimated = network.rate((GAIN * latents).round(), ones).sum() / 8 / len(latents)
    figures = {
        "bytes_at_step_1_estimated": float(estimated),
        "bytes_at_step_1": patch_bytes(latents, counts, 1.0),
    }
    for size in JUDGED_BYTES:
        step = step_for(latents, counts, size)
        coded = rounded(latents, ones * step)
        figures[f"step_at_{size}"] = step
        figures[f"psnr_db_at_{size}"] = psnr(network.decoder, coded, images)
        figures[f"fast_psnr_db_at_{size}"] = psnr(student, coded, images)
    return figures


def psnr(decoder: nn.Module, latents: Tensor, images: Tensor) -> float:
    """Mean PSNR in dB of decoded latents over images."""
    decoded = torch.cat([decoder(part) for part in latents.split(BATCH)]).clamp(0, 1)
    return float((-10 * (decoded - images).square().mean((1, 2, 3)).log10()).mean())


def save_product(
    config: TrainCodecConfig,
    networks: tuple[CodecNetwork, nn.Module],
    counts: Tensor,
    figures: dict[str, float],
) -> None:
    """Write OUT/codec, the card last."""
    network, student = networks
    folder = config.out / "codec"
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"encoder": network.encoder, "decoder": network.decoder}
    weights = {f"{part}.{k}": v for part, m in parts.items() for k, v in m.state_dict().items()}
    tables = {
        "counts": counts[STEPS.index(1.0)].clone(),
        "counts_by_step": counts,
        "steps": torch.tensor(STEPS, dtype=torch.float64),
        "gains": torch.full((config.channels,), GAIN),
    }
    write_atomically(folder / "weights.safetensors", save(halves(weights)))
    write_atomically(folder / "fast.safetensors", save(halves(student.state_dict())))
    write_atomically(folder / "tables.safetensors", save(tables))
    options = plain(config) | {"tiles": config.tiles.name, "out": config.out.name}
    card = {"channels": config.channels, "factor": 8, "gain": GAIN, "shares": SHARES}
    text = json.dumps(card | {"figures": figures, "options": options}, indent=1)
    write_atomically(folder / "codec.json", text.encode())


def halves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as fp16 on the CPU."""
    return {name: tensor.cpu().half().contiguous() for name, tensor in tensors.items()}
