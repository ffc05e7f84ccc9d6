"""decoder.json: what a decoder's folder says of it, every value checked before it is used."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from latentds.core.json_text import read_json
from latentds.errors import FormatError

FORMAT = "latentds-decoder/1"
RECORD, WEIGHTS = "decoder.json", "decoder.safetensors"
MAX_RECORD_BYTES = 1 << 20
MAX_CHANNELS, MAX_FACTOR, MAX_WORDS = 4096, 256, 200
NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,99}", re.ASCII)
IDENTITY = re.compile(r"sha256:[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderRecord:
    """What a decoder.json says.

    name          of the decoder
    architecture  what `architectures.build` makes it from
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
        """The text of decoder.json."""
        return json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=1) + "\n"


def read_record(folder: Path) -> DecoderRecord:
    """What the decoder.json of a folder says; FormatError where it is none."""
    path = folder / RECORD
    values = read_json(path, MAX_RECORD_BYTES)
    return parse_record(values, path)


def parse_record(values: Any, path: Path) -> DecoderRecord:
    """A record of JSON values, all of them checked."""
    stated = values.get("format") if isinstance(values, dict) else None
    if not isinstance(stated, str) or not stated.startswith("latentds-decoder/"):
        raise FormatError(f"{path}: no decoder's page (format {stated!r:.60}, not {FORMAT})")
    if stated != FORMAT:
        raise FormatError(
            f"{path}: is {stated!r:.60}, this version reads {FORMAT}; update latentds"
        )
    checks = {
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
    for field, is_good in checks.items():
        if not is_good(values.get(field)):
            raise FormatError(f"{path}: {field} is {values.get(field)!r:.60}; refused")
    return DecoderRecord(**{field: values[field] for field in checks})


def is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(NAME.fullmatch(value))


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_words(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_WORDS and value.isprintable()


def is_identity(value: Any) -> bool:
    return isinstance(value, str) and bool(IDENTITY.fullmatch(value))


def is_count(value: Any, limit: int) -> bool:
    return type(value) is int and 0 < value <= limit
