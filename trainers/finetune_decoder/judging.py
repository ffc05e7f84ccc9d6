"""Held-out pictures, decoded and judged while a decoder is trained: PSNR, embedding similarity."""
# V validation crops, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from latentds_trainers.finetune_decoder.decoder_losses import cropped
from latentds_trainers.finetune_decoder.pairs import (
    find_pictures,
    list_pictures,
    open_picture,
    size_of,
)
from torch import Tensor

from latentds.errors import InputError

if TYPE_CHECKING:
    from latentds_trainers.finetune_decoder.config import FinetuneConfig

    from latentds.embedders import Embedder

JUDGED_AT_ONCE = 4


def read_held_out(config: FinetuneConfig) -> Tensor | None:
    """Centre crops (V, 3, H, W) in [0, 1] of held-out pictures, spread evenly; None for none."""
    edge, paths = config.validate_px, []
    if config.held_out is not None:
        pattern = re.compile(config.held_out)
        for folder in config.pictures:
            matching = find_pictures(folder, lambda name: bool(pattern.search(name)))
            paths += [path for path in matching if min(size_of(path)) >= edge]
        if not paths:
            raise InputError(f"--held-out {config.held_out!r} matches no picture of {edge} px")
    for folder in config.validate_on:
        paths += list_pictures(folder, edge)
    if not paths:
        return None
    chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, config.validate_crops).astype(int)]
    crops = [centre_crop(open_picture(path), edge) for path in dict.fromkeys(chosen)]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


def centre_crop(picture: np.ndarray, edge: int) -> np.ndarray:
    """The middle uint8 (edge, edge, 3) of a picture."""
    y, x = ((side - edge) // 2 for side in picture.shape[:2])
    return picture[y : y + edge, x : x + edge]


class Judge:
    """Judges a decoder on held-out crops, shared out among ranks; some may have none.

    images     (V, 3, H, W) in [0, 1]
    latents    (V, C, h, w) of them, as stored
    embedders  by name
    """

    def __init__(
        self,
        images: Tensor,
        latents: Tensor,
        embedders: Mapping[str, Embedder],
        rank: int,
        ranks: int,
    ) -> None:
        self.images, self.latents = images[rank::ranks], latents[rank::ranks]
        self.embedders, self.count = embedders, len(images)
        with torch.no_grad():
            self.wanted = {
                name: [embedder.embed(images) for images, _ in self.parts()]
                for name, embedder in embedders.items()
            }

    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """This rank's images and latents, a few at a time."""
        starts = range(0, len(self.images), JUDGED_AT_ONCE)
        ends = [slice(start, start + JUDGED_AT_ONCE) for start in starts]
        return [(self.images[part], self.latents[part]) for part in ends]

    @torch.no_grad()
    def __call__(self, decode: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Mean PSNR in dB and 1 - cosine similarity by embedder, over all ranks.

        Pictures are rounded to 8 bits first, as a user gets them. Every rank has to call it.
        """
        names = ["psnr_db", *(f"one_minus_cos/{name}" for name in self.embedders)]
        totals = torch.zeros(len(names), dtype=torch.float64)
        for number, (images, latents) in enumerate(self.parts()):
            decoded = cropped(decode(latents).float(), images)
            decoded = decoded.clamp(0, 1).mul(255).round().div(255)
            error = (decoded - images).square().mean((1, 2, 3)).clamp_min(1e-10)
            sums = [(-10 * error.log10()).sum()]
            for name, embedder in self.embedders.items():
                wanted = self.wanted[name][number]
                similar = torch.cosine_similarity(embedder.embed(decoded), wanted)
                sums.append((1 - similar).sum())
            totals += torch.stack(sums).double().cpu()
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            device = self.images.device
            shared = totals.to(device)
            torch.distributed.all_reduce(shared)
            totals = shared.cpu()
        return dict(zip(names, (totals / self.count).tolist(), strict=True))
