"""Pathology encoders that give a map of features of an image, for SAM-Path to put beside SAM's.

HIPT's ViT-S/16 (Chen et al., CVPR 2022) from its published file, github.com/mahmoodlab/HIPT's
`vit256_small_dino.pth`, a checkpoint of DINO: timm's network carries the same tensor names, and its
table of positions is of 14x14 cells where HIPT's patches have 16x16. Or any embedder whose network
has such a map: timm's vision transformers and CNNs, Phikon-v2's Dinov2.
"""
# B batch, C channels, H W pixels, h w cells

from __future__ import annotations

import argparse
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentds.autoencoders.autoencoder import hash_tensors
from latentds.embedders import NetworkEmbedder, load_embedder
from latentds.embedders.timm_models import outline
from latentds.embedders.weights import fill, resample_positions
from latentds.errors import ShapeError, WeightsError

Mapper = Callable[[Any, Tensor], Tensor]  # network, prepared images -> (B, C, h, w)

HIPT, HIPT_NETWORK = "hipt", "vit_small_patch16_224"
HIPT_MEAN = HIPT_STD = (0.5, 0.5, 0.5)
HEADS = ("head.", "classifier.", "fc.")  # of DINO's training, or of whoever fine-tuned it
WRAPPERS = ("teacher", "student", "state_dict", "model")  # where a file may keep the tensors
PREFIXES = ("module.", "backbone.", "encoder.")
READ_ERRORS = (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError)


class DenseEncoder(nn.Module):
    """Maps of features float (B, C, h, w) of images in [0, 1]; frozen, and in eval mode for ever.

    name        for records, with `weights_id`, a hash of the tensors as they were loaded
    channels    C
    input_px    edge of the square that images are resized to (bilinearly): the one asked for, or
                the nearest that the network takes
    grid        edge of the maps, to which they are resized, in cells
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: Any,
        mapper: Mapper,
        *,
        name: str,
        weights_id: str,
        channels: int,
        input_px: int,
        grid: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.mapper, self.name, self.channels = mapper, name, channels
        self.input_px, self.grid = input_px, grid
        self.weights_id = weights_id
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> DenseEncoder:  # noqa: ARG002
        """Self, unchanged: dropout and batch norm stay as in evaluation."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        prepared = (fitted(images, (self.input_px, self.input_px)) - self.mean) / self.std
        cells = self.mapper(self.network, prepared)
        if cells.ndim != 4 or cells.shape[1] != self.channels:
            raise ShapeError(
                f"{self.name}: its features are {tuple(cells.shape)}, "
                f"not a map of {self.channels} channels"
            )
        return fitted(cells, (self.grid, self.grid))


def load_dense_encoder(name: str, input_px: int, grid: int) -> DenseEncoder:
    """A pathology encoder by name, for square images of `input_px` and maps of `grid` cells.

    name    `hipt@FILE` for HIPT's vit256_small_dino.pth, or whatever `load_embedder` takes
    raises  WeightsError, MissingExtraError, UnknownNameError; ShapeError for an embedder whose
            network has no map of features
    """
    kind, _, path = name.partition("@")
    if kind != HIPT:
        return of_embedder(load_embedder(name), input_px, grid)
    if not path:
        raise WeightsError(
            "hipt: its weights come from a local file; pass 'hipt@FILE' with the "
            "vit256_small_dino.pth of github.com/mahmoodlab/HIPT"
        )
    network = load_hipt(Path(path))
    facts = {
        "name": f"{HIPT}:{Path(path).stem}",
        "weights_id": hash_tensors(network.state_dict(), {}),
        "mean": HIPT_MEAN,
        "std": HIPT_STD,
    }
    return of_dino(network, network.pos_embed.detach().clone(), input_px, grid, facts)


def of_embedder(embedder: NetworkEmbedder, input_px: int, grid: int) -> DenseEncoder:
    """The map that an embedder's network makes before it pools; ShapeError where it makes none."""
    card = embedder.card
    network: Any = embedder.network
    while hasattr(network, "network"):  # inside what pools its tokens
        network = network.network
    facts = {n: getattr(card, n) for n in ("name", "weights_id", "mean", "std")}
    table = getattr(embedder.network, "trained_positions", None)
    if table is not None:
        return of_dino(network, table, input_px, grid, facts)
    if hasattr(network, "forward_features"):
        return of_timm(network, input_px, grid, facts)
    if hasattr(network, "config") and hasattr(network.config, "patch_size"):
        edge = nearest_multiple(input_px, int(network.config.patch_size))
        channels = int(network.config.hidden_size)
        return DenseEncoder(
            network, dinov2_map, channels=channels, input_px=edge, grid=grid, **facts
        )
    raise ShapeError(f"{card.name}: its network ({type(network).__name__}) has no map of features")


def of_dino(
    network: Any, table: Tensor, input_px: int, grid: int, facts: dict[str, Any]
) -> DenseEncoder:
    """`of_timm` with positions made of the trained table (1, P + n x n, D) as DINO makes them.

    timm's set_input_size resamples with antialiasing and without DINO's offset.
    """
    encoder, prefix = of_timm(network, input_px, grid, facts), int(network.num_prefix_tokens)
    edge, new = math.isqrt(table.shape[1] - prefix), tuple(network.patch_embed.grid_size)
    network.pos_embed.data = resample_positions(table, (edge, edge), new, prefix)
    return encoder


def of_timm(network: Any, input_px: int, grid: int, facts: dict[str, Any]) -> DenseEncoder:
    """A timm network's map. Position embeddings are interpolated once, to the size of the images.

    The images keep their scale: cells of another size than asked for are resized, not the images.
    """
    edge = input_px
    if hasattr(network, "set_input_size"):  # transformers; CNNs take any size
        edge = nearest_multiple(input_px, int(network.patch_embed.patch_size[0]))
        network.set_input_size(img_size=(edge, edge))
    channels = int(network.num_features)
    return DenseEncoder(network, timm_map, channels=channels, input_px=edge, grid=grid, **facts)


def timm_map(network: Any, prepared: Tensor) -> Tensor:
    """Last features of a timm network: a CNN's map, or a transformer's tokens after its prefix."""
    features: Tensor = network.forward_features(prepared)
    if features.ndim == 4:
        is_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
        return features.permute(0, 3, 1, 2) if is_last else features
    return as_map(features[:, int(getattr(network, "num_prefix_tokens", 0)) :])


def dinov2_map(network: Any, prepared: Tensor) -> Tensor:
    """Patch tokens of transformers' Dinov2, which interpolates position embeddings by itself."""
    return as_map(network(pixel_values=prepared).last_hidden_state[:, 1:])


def as_map(tokens: Tensor) -> Tensor:
    """Tokens (B, n * n, C) of a square image as (B, C, n, n)."""
    edge = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], edge, edge)


def nearest_multiple(edge_px: int, cell_px: int) -> int:
    """The multiple of `cell_px` nearest to an edge, at least one cell."""
    return max(round(edge_px / cell_px), 1) * cell_px


def fitted(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) resized bilinearly (without antialiasing) to `size`; unchanged if it has it."""
    if tuple(maps.shape[-2:]) == size:
        return maps
    return functional.interpolate(maps, size, mode="bilinear", align_corners=False)


def load_hipt(path: Path) -> Any:
    """The network with the file's weights, without a head."""
    network = outline(HIPT_NETWORK)
    fill(network, read_checkpoint(path), path, "HIPT's ViT-S/16")
    return network


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The encoder's float32 tensors in a file, named as timm names them.

    path    a checkpoint of DINO (its teacher's backbone is taken) or a plain state dict; no code
            in it is run
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file of weights")
    try:
        # DINO's checkpoints hold the arguments of their training; a Namespace runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except READ_ERRORS as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise WeightsError(f"{path}: not a file of tensors ({reason})") from error
    if not isinstance(state, Mapping):
        raise WeightsError(f"{path}: holds a {type(state).__name__}, not tensors by name")
    inner = next((state[key] for key in WRAPPERS if isinstance(state.get(key), Mapping)), state)
    tensors = {
        plain_name(str(name)): tensor.float()
        for name, tensor in inner.items()
        if isinstance(tensor, Tensor)
    }
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(HEADS)}


def plain_name(name: str) -> str:
    """A tensor's name without what wrappers put before it."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name
