"""HIPT's ViT-S/16 over patches of 256 px, from its published file or a plain state dict.

Chen et al., CVPR 2022; github.com/mahmoodlab/HIPT, file `vit256_small_dino.pth`, a checkpoint of
DINO. The network is timm's `vit_small_patch16_224`, whose tensors carry the same names. Its table
of positions is of 14x14 cells, HIPT's patches have 16x16: see `positions.resample_positions`.
"""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentds.embedders.timm_models import outline
from latentds.errors import WeightsError

NETWORK, WHAT = "vit_small_patch16_224", "HIPT's ViT-S/16"
MEAN = STD = (0.5, 0.5, 0.5)
HEADS = ("head.", "classifier.", "fc.")  # of DINO's training, or of whoever fine-tuned it
WRAPPERS = ("teacher", "student", "state_dict", "model")  # where a file may keep the tensors
PREFIXES = ("module.", "backbone.", "encoder.")
NAMED = 3  # tensors that an error lists
READ_ERRORS = (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError)


def load_hipt(path: Path) -> Any:
    """The network with the file's weights, without a head; WeightsError names what is missing."""
    network = outline(NETWORK)
    tensors = read_checkpoint(path)
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in tensors]
    foreign = [name for name in tensors if name not in wanted]
    odd = [n for n, t in tensors.items() if n in wanted and t.shape != wanted[n].shape]
    for names, what in ((missing, "are missing"), (foreign, "have no place in it")):
        if names:
            raise WeightsError(f"{path}: tensors of {WHAT} {what}: {some(names)}")
    if odd:
        seen, right = (tuple(of[odd[0]].shape) for of in (tensors, wanted))
        raise WeightsError(f"{path}: tensor {odd[0]!r} is {seen}, {WHAT} needs {right}")
    network.load_state_dict(tensors, assign=True)
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
    if not tensors:
        raise WeightsError(f"{path}: no tensors by name; it holds {some(list(inner))}")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(HEADS)}


def plain_name(name: str) -> str:
    """A tensor's name without what wrappers put before it."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def some(names: list[str]) -> str:
    """The first few names, and how many there are."""
    listed = ", ".join(map(str, names[:NAMED])) or "nothing"
    return listed if len(names) <= NAMED else f"{listed} and {len(names) - NAMED} more"
