"""Codebook files: safetensors whose metadata tell kind, latents and fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from latentds.errors import FormatError
from latentds.quantizer import Codebook
from latentds.storage import write_atomically


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredCodebook:
    """A codebook, the latents it was fitted to, and how (sample size, seed, distortion, origin)."""

    codebook: Codebook
    latent_id: str
    made: dict[str, Any]


def save_codebook(stored: StoredCodebook, path: Path) -> None:
    """Write a codebook file."""
    metadata = {
        "kind": stored.codebook.kind,
        "latent_id": stored.latent_id,
        "codebook_id": stored.codebook.codebook_id,
        "made": json.dumps(stored.made, sort_keys=True),
    }
    write_atomically(path, save({"levels": stored.codebook.levels}, metadata))


def load_codebook(path: Path) -> StoredCodebook:
    """Read a codebook file; FormatError where it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such codebook file")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            codebook = Codebook(file.get_tensor("levels"), metadata["kind"])
        return StoredCodebook(
            codebook=codebook,
            latent_id=metadata["latent_id"],
            made=dict(json.loads(metadata["made"])),
        )
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise FormatError(
            f"{path}: not a codebook file ({error}); make one with 'latentds fit-codebook'"
        ) from error
