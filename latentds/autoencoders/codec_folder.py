"""Codec folders: an autoencoder made for entropy-coded records, as `train_codec` writes it.

    codec.json            latentds-codec/1: shape, identities, licence, attribution, how it was made
    weights.safetensors   `encoder.*` and `decoder.*`, fp16
    tables.safetensors    how often each integer came, by quantization step and channel
    fast/                 a decoder's folder: a student for the same latents

Integers are round(gain * latent / step). As with decoders' folders, reading trusts nothing: numbers
are bounded, every tensor must be placed and none left, the identities must be the recorded ones.
"""
# S quantization steps, C latent channels, T symbols

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from latentds.autoencoders.autoencoder import (
    AutoencoderCard,
    NetworkAutoencoder,
    hash_tensors,
    latent_identity,
    short,
)
from latentds.autoencoders.decoders import load_decoder, read_tensors, replace_decoder
from latentds.autoencoders.foreign_networks import (
    check_hash,
    is_count,
    is_identity,
    is_name,
    is_object,
    is_words,
    opened_tensors,
    read_fields,
)
from latentds.autoencoders.tiny import TinyDecoder, TinyEncoder, weights_folder
from latentds.core.storage import write_together
from latentds.errors import FormatError

FORMAT = "latentds-codec/1"
RECORD, WEIGHTS, TABLES = "codec.json", "weights.safetensors", "tables.safetensors"
FAST, CPU = "fast", "cpu"  # folders of decoders that cost less, one for CPUs
FACTOR = 8
LARGEST = 15  # symbols are integers -15 .. 15 and, last of all, one for what lies beyond
MAX_CHANNELS, MAX_WIDTH, MAX_STEPS = 512, 4096, 1024
CHECKS = {
    "name": is_name,
    "channels": lambda value: is_count(value, MAX_CHANNELS),
    "factor": lambda value: value == FACTOR,
    "widths": lambda value: (
        isinstance(value, list)
        and len(value) == 2
        and all(is_count(width, MAX_WIDTH) for width in value)
    ),
    "latent_id": is_identity,
    "decoder_id": is_identity,
    "licence": is_words,
    "attribution": lambda value: isinstance(value, list) and all(map(is_words, value)),
    "trained": is_object,
}


@dataclasses.dataclass(frozen=True)
class SymbolCounts:
    """How often integers came on training crops.

    counts_SCT  int64, T = 32: integers -15 .. 15, then all beyond
    steps_S     float64, ascending
    gains_C     float32: integers are round(gain * latent / step)
    """

    counts_SCT: Tensor
    steps_S: Tensor
    gains_C: Tensor


def build_parts(channels: int, widths: tuple[int, int]) -> nn.ModuleDict:
    """Encoder and decoder with random weights."""
    encoder = TinyEncoder(channels, widths, is_bounded=False)
    return nn.ModuleDict({"encoder": encoder, "decoder": TinyDecoder(channels)})


def save_codec(
    folder: Path,
    parts: nn.ModuleDict,
    counts: SymbolCounts,
    *,
    name: str,
    licence: str,
    attribution: tuple[str, ...],
    trained: dict[str, Any],
) -> AutoencoderCard:
    """Write a codec's folder, all but its fast decoder; what lies there is replaced together.

    parts    of `build_parts`; stored as fp16, of which the identities are made
    returns  the card, with the identities
    """
    state = {key: t.detach().cpu().half().contiguous() for key, t in parts.state_dict().items()}
    encoder = parts["encoder"]
    assert isinstance(encoder, TinyEncoder)
    own = identities(state)
    record = {
        "format": FORMAT,
        "name": name,
        "channels": encoder.channels,
        "widths": encoder.widths,
        **own,
        "licence": licence,
        "attribution": attribution,
        "trained": trained,
        "factor": FACTOR,
    }
    tables = {
        "counts": counts.counts_SCT.contiguous(),
        "steps": counts.steps_S.contiguous(),
        "gains": counts.gains_C.contiguous(),
    }
    header = {"format": FORMAT, "latent_id": own["latent_id"]}
    folder.mkdir(parents=True, exist_ok=True)
    files = {WEIGHTS: save(state, header), TABLES: save(tables, header)}
    files |= {RECORD: (json.dumps(record, indent=1) + "\n").encode()}
    write_together({folder / file: content for file, content in files.items()})
    return card_of(record)


def identities(state: dict[str, Tensor]) -> dict[str, str]:
    """latent_id and decoder_id of tensors named `encoder.*` and `decoder.*`."""
    encoder, decoder = (
        {key.removeprefix(part): t for key, t in state.items() if key.startswith(part)}
        for part in ("encoder.", "decoder.")
    )
    # The same layers behind a tanh would be other latents.
    return {
        "latent_id": latent_identity(encoder, input_range=(-1, 1), bound=None),
        "decoder_id": hash_tensors(decoder, {}),
    }


def card_of(record: Mapping[str, Any]) -> AutoencoderCard:
    names = ("name", "channels", "licence", "latent_id", "decoder_id")
    known = {name: record[name] for name in names}
    return AutoencoderCard(class_name="Tiny", factor=FACTOR, **known)


def load_codec(folder: Path) -> NetworkAutoencoder:
    """The autoencoder of a codec's folder, in fp32 on the CPU and in eval mode.

    raises  FormatError (no codec.json this version reads), WeightsError (weights that are damaged
            or do not fit)
    """
    record = read_fields(folder / RECORD, FORMAT, CHECKS)
    with torch.device("meta"):
        parts = build_parts(record["channels"], tuple(record["widths"]))
    state = read_tensors(folder / WEIGHTS, parts.state_dict(), record["latent_id"])
    for name, identity in identities(state).items():
        check_hash(folder / WEIGHTS, identity, folder / RECORD, record[name])
    parts.load_state_dict(state, assign=True)
    decoder = parts["decoder"].to(memory_format=torch.channels_last)  # faster on CPUs, see tiny.py
    return NetworkAutoencoder(card_of(record), parts["encoder"], decoder)


def read_counts(folder: Path) -> SymbolCounts:
    """The counts that the tables of an entropy coder are made of.

    raises  FormatError where they do not fit the codec, WeightsError where they cannot be read
    """
    record, path = read_fields(folder / RECORD, FORMAT, CHECKS), folder / TABLES
    with opened_tensors(path) as file:
        counts, steps, gains = (file.get_tensor(name) for name in ("counts", "steps", "gains"))
        stated = (file.metadata() or {}).get("latent_id")
    shape = (len(steps), record["channels"], 2 * LARGEST + 2)
    kinds = (counts.dtype, steps.dtype, gains.dtype)
    is_fitting = counts.shape == shape and gains.shape == shape[1:2] and len(steps) <= MAX_STEPS
    if not is_fitting or kinds != (torch.int64, torch.float64, torch.float32):
        raise FormatError(
            f"{path}: counts {list(counts.shape)}, steps {list(steps.shape)}, gains "
            f"{list(gains.shape)} of {kinds}; a codec of {record['channels']} channels has "
            f"{list(shape)}"
        )
    if stated != record["latent_id"]:
        raise FormatError(
            f"{path}: counted on latents {short(str(stated))}, {RECORD} says "
            f"{short(record['latent_id'])}; the two files are not of one codec"
        )
    if not (steps > 0).all() or not (gains > 0).all() or (counts < 0).any():
        raise FormatError(f"{path}: steps and gains have to be positive, counts not negative")
    return SymbolCounts(counts, steps, gains)


def is_codec_folder(path: Path) -> bool:
    return (path / RECORD).is_file()


def load_embedded(card: AutoencoderCard) -> NetworkAutoencoder:
    """`tiny-v2`, or `tiny-v2-fast` and `tiny-v2-cpu`, which have other decoders."""
    with resources.as_file(weights_folder() / "tiny-v2") as folder:
        codec = load_codec(folder)
        if card.name == "tiny-v2":
            return codec
        return replace_decoder(codec, load_decoder(folder / card.name.removeprefix("tiny-v2-")))
