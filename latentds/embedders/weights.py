"""Weights of embedders: read from a file without running its code, fetched, fitted, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from latentds.autoencoders.downloads import download, login_hint
from latentds.autoencoders.foreign_networks import load_tensors
from latentds.autoencoders.taesd import read_tensors
from latentds.embedders.embedder import EmbedderCard
from latentds.errors import WeightsError


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
