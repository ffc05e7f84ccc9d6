"""Codebook files: safetensors whose metadata tell kind, latents and fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from latentds.encodings import ENCODINGS, check_encoding
from latentds.errors import ContractError, FormatError
from latentds.foreign_json import parse_json
from latentds.quantizer import AnyCodebook, Codebook
from latentds.storage import write_atomically


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredCodebook:
    """A codebook, the latents it was fitted to, and how (sample size, seed, distortion, origin)."""

    codebook: AnyCodebook
    latent_id: str
    made: dict[str, Any]

    @property
    def scalar(self) -> Codebook:
        """The codebook where it is of levels; ContractError for an additive one."""
        if isinstance(self.codebook, Codebook):
            return self.codebook
        raise ContractError(
            f"the codebook is {self.codebook.kind}, of vectors; levels of single values are needed "
            "here: fit them with 'latentds fit-codebook --kind scalar'"
        )


def save_codebook(stored: StoredCodebook, path: Path) -> None:
    """Write a codebook file: its tensors are the codebook's tables by name."""
    metadata = {
        "kind": stored.codebook.kind,
        "latent_id": stored.latent_id,
        "codebook_id": stored.codebook.codebook_id,
        "made": json.dumps(stored.made, sort_keys=True),
    }
    if stored.codebook.encoding != Codebook.encoding:  # files of before there were others say none
        metadata["encoding"] = stored.codebook.encoding
    # safetensors writes the memory of an array that is not contiguous, whatever its order.
    arrays = {n: np.ascontiguousarray(v) for n, v in stored.codebook.to_arrays().items()}
    write_atomically(path, save(arrays, metadata))


def load_codebook(path: Path) -> StoredCodebook:
    """Read a codebook file; FormatError where it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such codebook file")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            encoding = metadata.get("encoding", Codebook.encoding)
            check_encoding(encoding, str(path))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            codebook = ENCODINGS[encoding].from_arrays(arrays, metadata["kind"])
        return StoredCodebook(
            codebook=codebook,
            latent_id=metadata["latent_id"],
            made=dict(parse_json(metadata["made"].encode(), str(path))),
        )
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise FormatError(
            f"{path}: not a codebook file ({error}); make one with 'latentds fit-codebook'"
        ) from error
