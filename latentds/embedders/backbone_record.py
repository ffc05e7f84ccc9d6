"""latentds.json: what the folder of a trained backbone says of it, checked before it is used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from latentds.autoencoders.foreign_networks import (
    is_count,
    is_identity,
    is_numbers,
    is_object,
    is_words,
    read_fields,
)
from latentds.core import storage
from latentds.errors import FormatError

FORMAT = "latentds-backbone/1"
RECORD, WEIGHTS, CONFIG = "latentds.json", "model.safetensors", "config.json"
CODEBOOK = "codebook.safetensors"  # that latents were rounded to, where it is there
READS, LATENTS = "latentds_input", "latents"  # in config.json, which timm leaves alone
MAX_JSON_BYTES = 1 << 24  # a configuration of timm's may name 20,000 classes
MAX_WIDTH, MAX_CHANNELS, MAX_PX = 1 << 16, 4096, 1 << 14


def is_object_or_none(value: Any) -> bool:
    return value is None or is_object(value)


CHECKS = {
    "arch": is_words,
    "model_args": is_object_or_none,
    "channels": lambda value: is_count(value, MAX_CHANNELS),
    "input_px": lambda value: is_count(value, MAX_PX),
    "mean": is_numbers,
    "std": lambda value: is_numbers(value) and all(number > 0 for number in value),
    "interpolation": is_words,
    "dim": lambda value: is_count(value, MAX_WIDTH),
    "weights_id": is_identity,
    "stem": is_object_or_none,
    "trained": is_object,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneRecord:
    """What a latentds.json says.

    arch           timm's name of the network, without a tag
    model_args     timm's arguments that build it, beside its name; None where timm alone cannot
    channels       of its input: 3 for pictures, C for latents
    input_px       edge in pixels of the pictures it was trained on, or that its latents are of
    mean, std      of the input's normalization: of pictures in [0, 1], of latents as stored
    interpolation  of pictures' resizing
    dim            of an embedding
    weights_id     hash of its tensors
    stem           of a network that reads latents: what `LatentStemConfig` is made from, else None
    trained        on what and how: JSON values, for people
    """

    arch: str
    model_args: dict[str, Any] | None
    channels: int
    input_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    dim: int
    weights_id: str
    stem: dict[str, Any] | None
    trained: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=1) + "\n"


def read_record(folder: Path) -> BackboneRecord:
    """What the latentds.json of a folder says; FormatError where it is none."""
    fields = read_fields(folder / RECORD, FORMAT, CHECKS)
    fields |= {name: tuple(map(float, fields[name])) for name in ("mean", "std")}
    return BackboneRecord(**fields)


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; FormatError where it has none, or is larger than any such file."""
    values = storage.read_json(path, MAX_JSON_BYTES)
    if not isinstance(values, dict):
        raise FormatError(f"{path}: a JSON object is wanted, not {type(values).__name__}")
    return values
