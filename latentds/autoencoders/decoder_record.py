"""decoder.json: what a decoder's folder says of it, every value checked before it is used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from latentds.autoencoders.foreign_networks import (
    checked_fields,
    is_count,
    is_identity,
    is_name,
    is_object,
    is_words,
    read_fields,
)

FORMAT = "latentds-decoder/1"
RECORD, WEIGHTS = "decoder.json", "decoder.safetensors"
MAX_CHANNELS, MAX_FACTOR = 4096, 256
CHECKS = {
    "name": is_name,
    "architecture": is_object,
    "autoencoder": is_words,
    "latent_id": is_identity,
    "decoder_id": is_identity,
    "channels": lambda value: is_count(value, MAX_CHANNELS),
    "factor": lambda value: is_count(value, MAX_FACTOR),
    "licence": is_words,
    "trained": is_object,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderRecord:
    """What a decoder.json says.

    name          of the decoder
    architecture  what `decoders.build` makes it from
    autoencoder   name of the autoencoder whose encoder makes the latents
    latent_id     of the latents it reads
    decoder_id    hash of its tensors
    channels      of the latents
    factor        pixels a latent cell, each way
    licence       of the weights
    trained       how: JSON values, for people
    """

    name: str
    architecture: dict[str, Any]
    autoencoder: str
    latent_id: str
    decoder_id: str
    channels: int
    factor: int
    licence: str
    trained: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=1) + "\n"


def read_record(folder: Path) -> DecoderRecord:
    """What the decoder.json of a folder says; FormatError where it is none."""
    return DecoderRecord(**read_fields(folder / RECORD, FORMAT, CHECKS))


def check_readable(record: DecoderRecord, path: Path) -> None:
    """FormatError for a record that could not be read back."""
    checked_fields(json.loads(record.to_json()), path, FORMAT, CHECKS)
