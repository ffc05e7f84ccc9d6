"""Weights of embedders: read from a file without running its code, fetched, fitted, or refused."""
# P prefix positions, h w cells of a grid, D features

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentds.autoencoders.foreign_networks import download, load_tensors, login_hint
from latentds.autoencoders.taesd import read_tensors
from latentds.embedders.embedder import EmbedderCard
from latentds.errors import WeightsError

OFFSET = 0.1  # of a cell: facebookresearch/dino and dinov2, interpolate_pos_encoding


def read_weights(path: Path) -> dict[str, Tensor]:
    """The float32 state dict of a `.safetensors` file, or of a torch file of tensors only."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file of weights")
    if path.suffix != ".safetensors":
        return read_tensors(path)
    return {name: tensor.float() for name, tensor in load_tensors(path).items()}


def fill(network: nn.Module, tensors: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Load every tensor into its place; WeightsError names the first that does not fit.

    A network on the meta device takes the tensors as they are.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    # Batch norm's counter is of use in training only, and some files leave it out.
    counters = (name for name in wanted if name.endswith(".num_batches_tracked"))
    tensors = dict.fromkeys(counters, torch.tensor(0)) | dict(tensors)
    for name, shape in wanted.items():
        if name not in tensors:
            raise WeightsError(
                f"{path}: tensor {name!r} of {what} is missing; {list(shape)} is needed"
            )
        seen = tuple(tensors[name].shape)
        if seen != shape:
            raise WeightsError(
                f"{path}: tensor {name!r} is {list(seen)}, {what} needs {list(shape)}"
            )
    left = sorted(set(tensors) - set(wanted))
    if left:
        raise WeightsError(f"{path}: tensor {left[0]!r} has no place in {what} ({len(left)} left)")
    is_empty = next(network.parameters()).is_meta
    network.load_state_dict(tensors, assign=is_empty)


def fetch(card: EmbedderCard, files: Sequence[str]) -> tuple[Path, str | None]:
    """The folder of files of a card's repository, from the Hub or its cache, and their commit."""
    advice = login_hint(card.repository, card.gated) + (
        f"Without the Hub, pass a local copy as '{card.name}@PATH'."
    )
    return download(card.repository or "", files, card.revision, advice)


def find_weights(card: EmbedderCard, path: Path | None) -> tuple[Path, str | None]:
    """The file of a card's weights: a local one, or its folder, or the Hub's; and the commit."""
    if path is None:
        folder, revision = fetch(card, (card.file,))
        return folder / Path(card.file).name, revision
    return (path / card.file if path.is_dir() else path), card.revision


def resample_positions(
    table: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int
) -> Tensor:
    """The table (1, P + h*w, D) of a grid of `new` (h, w), from that of `old`; itself for the same.

    Bicubic without antialiasing, at steps of old / (new + 0.1) cells. timm antialiases: for local
    crops of 6x6 from 14x14 that is another table, by 0.8 of its norm where it is fresh noise.
    source  Caron et al. 2021 and Oquab et al. 2023, in their code (interpolate_antialias False,
            interpolate_offset 0.1)
    """
    if old == new:
        return table
    head, cells = table[:, :prefix], table[:, prefix:]
    maps = cells.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    scale = tuple((wanted + OFFSET) / had for wanted, had in zip(new, old, strict=True))
    made = functional.interpolate(maps, scale_factor=scale, mode="bicubic", align_corners=False)
    return torch.cat([head, made.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def add_positions(vit: Any, tokens: Tensor) -> Tensor:
    """Patch tokens of a timm ViT with prefix tokens before them and positions added, (B, P + T, D).

    As the network's own `_pos_embed`, but for grids of another size `resample_positions`.

    tokens  (B, h, w, D) with dynamic_img_size, else (B, T, D)
    """
    is_own = tokens.ndim == 3 or tuple(tokens.shape[1:3]) == tuple(vit.patch_embed.grid_size)
    if is_own or vit.pos_embed is None:
        own: Tensor = vit._pos_embed(tokens)
        return own
    prefix = 0 if vit.no_embed_class else int(vit.num_prefix_tokens)
    size = (int(tokens.shape[1]), int(tokens.shape[2]))
    table = resample_positions(vit.pos_embed, tuple(vit.patch_embed.grid_size), size, prefix)
    firsts = [part for part in (vit.cls_token, vit.reg_token) if part is not None]
    heads = [part.expand(len(tokens), -1, -1) for part in firsts]
    flat = tokens.flatten(1, 2)
    if vit.no_embed_class:
        flat = torch.cat([*heads, flat + table], dim=1)
    else:
        flat = torch.cat([*heads, flat], dim=1) + table
    placed: Tensor = vit.pos_drop(flat)
    return placed
