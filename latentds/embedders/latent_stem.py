"""ViTs of timm that read pixels, or latents without decoding: only the patch embedding differs."""
# B batch, C latent channels, D width of the network, h w latent cells, p edge of a token in cells

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from latentds.embedders.timm_models import create, outline
from latentds.errors import FormatError, InputError, ShapeError
from latentds.quantizers.codebooks import ChannelStatistics
from latentds.store.format import Contract


@dataclasses.dataclass(frozen=True)
class LatentStemConfig:
    """What a network that reads latents must know of them; `asdict` and `from_json` are inverse.

    channels   C
    factor     pixels a latent cell, each way
    mean, std  of every channel: what latents are normalized by before the network sees them
    latent_id  what the latents mean, as the manifest has it; empty where it is not known
    raises     ValueError for numbers that cannot be
    """

    channels: int
    factor: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    latent_id: str = ""

    def __post_init__(self) -> None:
        if self.channels < 1 or self.factor < 1:
            raise ValueError(f"channels={self.channels}, factor={self.factor}; at least 1")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels or not all(map(math.isfinite, values)):
                raise ValueError(f"{name}={values}; {self.channels} finite numbers are wanted")
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std}; every channel's must be positive")

    @staticmethod
    def of(contract: Contract, statistics: ChannelStatistics) -> LatentStemConfig:
        """The configuration for a data set's latents, normalized by these statistics."""
        channels, rows, _ = contract.latents_shape
        recorded: Any = contract.autoencoder.get("factor")
        is_told = type(recorded) is int and recorded > 0
        return LatentStemConfig(
            channels=channels,
            factor=recorded if is_told else -(-contract.patch_px[0] // rows),
            mean=statistics.mean,
            std=statistics.divisors,
            latent_id=contract.latent_id,
        )

    @property
    def statistics(self) -> ChannelStatistics:
        """Mean and deviation as LatentLoader's `normalize` takes them; of how many is not kept."""
        return ChannelStatistics(self.mean, self.std, 0)

    @staticmethod
    def from_json(record: Any, where: str) -> LatentStemConfig:
        """The configuration that `dataclasses.asdict` wrote; FormatError says what is wrong."""
        try:
            return LatentStemConfig(
                channels=int(record["channels"]),
                factor=int(record["factor"]),
                mean=tuple(float(value) for value in record["mean"]),
                std=tuple(float(value) for value in record["std"]),
                latent_id=str(record.get("latent_id", "")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(
                f"{where}: latent stem is damaged ({error!r}); export anew"
            ) from error

    def normalize(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w), each channel less its mean and over its standard deviation."""
        mean, std = (per_channel(v, latents.device, latents.dtype) for v in (self.mean, self.std))
        return (latents - mean) / std


@functools.lru_cache(maxsize=64)
def per_channel(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """One number a channel, (C, 1, 1), kept: bringing it to a GPU waits for what runs there."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1)


class SplitCells(nn.Module):
    """Tokens (B, h*n, w*n, D) of latents (B, C, h, w) whose cells are larger than a token, n times.

    Has what timm's ViT asks of its patch embedding.
    """

    def __init__(self, channels: int, width: int, tokens: int, grid: int, norm: nn.Module) -> None:
        super().__init__()
        self.tokens, self.grid_size, self.num_patches = tokens, (grid, grid), grid * grid
        self.patch_size = (1, 1)
        self.proj = nn.ConvTranspose2d(channels, width, kernel_size=tokens, stride=tokens)
        self.norm = norm

    def dynamic_feat_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Tokens each way of (h, w) cells."""
        return size[0] * self.tokens, size[1] * self.tokens

    def forward(self, latents: Tensor) -> Tensor:
        tokens: Tensor = self.norm(self.proj(latents).permute(0, 2, 3, 1))
        return tokens


def build_vit(
    arch: str,
    *,
    stem: LatentStemConfig | None = None,
    img_px: int = 224,
    drop_path: float = 0.0,
    seed: int = 0,
    **timm_arguments: Any,
) -> nn.Module:
    """A ViT of timm without a classifier, for pixels or for latents; weights drawn from the seed.

    stem            latents (B, C, h, w), normalized, are the input instead of pixels: cells are
                    joined or split to tokens of as many pixels as the arch's. All weights behind
                    the patch embedding are those of the same seed without a stem.
    img_px          edge of the images that the position embedding is laid out for, which other
                    sizes interpolate; all edges must be multiples of the arch's patch
    timm_arguments  to override any other of timm's, `num_classes` among them
    raises          UnknownNameError, InputError for what is no plain ViT, ShapeError for cells that
                    do not make up tokens, MissingExtraError
    """
    check_arch(arch)
    arguments = {"num_classes": 0, "drop_path_rate": drop_path} | timm_arguments
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = create(arch, img_size=img_px, dynamic_img_size=True, **arguments)
        if stem is not None:  # drawn behind the body, which so has the weights it has without
            network.patch_embed = make_stem(arch, network.patch_embed, stem, img_px)
    return network


@functools.cache
def check_arch(arch: str) -> None:
    """Refuse networks that are not timm's plain ViT: no patch embedding there to replace."""
    network = outline(arch)
    embedding = type(getattr(network, "patch_embed", None)).__name__
    if (type(network).__name__, embedding) != ("VisionTransformer", "PatchEmbed"):
        raise InputError(
            f"timm model {arch!r} is {type(network).__name__}, not a plain ViT; choose one of "
            "vit_tiny, vit_small, vit_base or vit_large, as vit_small_patch16_224"
        )


def make_stem(arch: str, pixels: Any, stem: LatentStemConfig, img_px: int) -> nn.Module:
    """The patch embedding for latents that takes the place of the one for pixels."""
    patch_px, factor = pixels.patch_size[0], stem.factor
    width, grid = pixels.proj.out_channels, img_px // patch_px
    if patch_px % factor == 0:
        cells = patch_px // factor
        joined: nn.Module = type(pixels)(  # timm's own, so that timm alone can build this network
            img_size=grid * cells, patch_size=cells, in_chans=stem.channels, embed_dim=width,
            bias=pixels.proj.bias is not None, output_fmt="NHWC", strict_img_size=False,
        )  # fmt: skip
        joined.norm = pixels.norm
        return joined
    if factor % patch_px == 0:
        return SplitCells(stem.channels, width, factor // patch_px, grid, pixels.norm)
    raise ShapeError(
        f"timm model {arch!r}: tokens of {patch_px} px, latent cells of {factor} px, and neither "
        f"is a multiple of the other; choose an arch of patch16, as vit_small_patch16_224"
    )


def check_cells(arch: str, edge: int, cells: tuple[int, int]) -> None:
    """ShapeError where (h, w) cells are no whole number of tokens of `edge` cells each way."""
    if cells[0] % edge or cells[1] % edge:
        raise ShapeError(
            f"latents of {cells[1]}x{cells[0]} cells, but {arch} takes {edge}x{edge} cells a "
            "token; choose patches whose edges are multiples of its token"
        )


def image_px(arch: str) -> int:
    """Edge of the images that an arch's own position embedding is laid out for."""
    check_arch(arch)
    return int(outline(arch).patch_embed.img_size[0])


def timm_arguments(arch: str, stem: LatentStemConfig, img_px: int = 224) -> dict[str, int] | None:
    """timm's arguments that build the same network for latents; None where timm alone cannot.

    What an exported backbone's config.json takes as `model_args`, beside dynamic_img_size.
    """
    patch_px = outline(arch).patch_embed.patch_size[0]
    if patch_px % stem.factor:
        return None
    cells = patch_px // stem.factor
    return {
        "in_chans": stem.channels,
        "patch_size": cells,
        "img_size": img_px // patch_px * cells,
    }
