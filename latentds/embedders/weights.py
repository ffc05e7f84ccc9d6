"""Weights of embedders: read from a file without running its code, fetched, fitted, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from latentds.autoencoders.downloads import commit_of
from latentds.autoencoders.taesd import read_tensors
from latentds.embedders.embedder import EmbedderCard
from latentds.errors import WeightsError


def read_weights(path: Path) -> dict[str, Tensor]:
    """The float32 state dict of a `.safetensors` file, or of a torch file of tensors only."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file of weights")
    if path.suffix != ".safetensors":
        return read_tensors(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a safetensors file ({error})") from error


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


def fetch(card: EmbedderCard, files: tuple[str, ...]) -> tuple[list[Path], str | None]:
    """Files of a card's repository, from the Hub or its cache, and the commit they are of."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    paths, file = [], ""
    try:
        for file in files:
            path = hf_hub_download(card.repository or "", file, revision=card.revision)
            paths.append(Path(path))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise WeightsError(fetch_advice(card, file, error)) from error
    return paths, commit_of(paths[-1]) or card.revision


def fetch_advice(card: EmbedderCard, file: str, error: Exception) -> str:
    """Which file is missing, and the ways to get it."""
    login = (
        f"It is gated: accept its licence at https://huggingface.co/{card.repository}, "
        "then run 'hf auth login'. "
        if card.gated
        else ""
    )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"cannot get {file} of {card.repository} at {card.revision or 'main'} ({reason}). {login}"
        f"Without the Hub, pass a local copy as '{card.name}@PATH'."
    )
