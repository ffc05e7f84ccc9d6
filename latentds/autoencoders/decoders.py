"""Decoder folders: weights and a page of JSON that says which latents they read.

    decoder.safetensors   the decoder's tensors by their names, its latent_id in the header
    decoder.json          latentds-decoder/1: architecture, identities, licence, how it was trained

A decoder needs no encoder: whoever has the latents decodes them. Reading trusts nothing: the class
is of a closed list, numbers are bounded, every tensor must be placed and none may be left, and the
decoder's hash must be the recorded one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from latentds.autoencoders.autoencoder import (
    AutoencoderCard,
    NetworkAutoencoder,
    hash_tensors,
    short,
)
from latentds.autoencoders.foreign_networks import (
    BUILD_ERRORS,
    check_bounded,
    check_hash,
    check_placed,
    checked_fields,
    download,
    is_count,
    is_identity,
    is_name,
    is_object,
    is_words,
    opened_tensors,
    read_fields,
)
from latentds.autoencoders.students import STUDENTS, Student, build_student
from latentds.autoencoders.taesd import Clamp, build_decoder, has_pool
from latentds.autoencoders.tiny import TinyDecoder
from latentds.core.storage import write_together
from latentds.errors import ContractError, UnknownNameError, WeightsError, first_words, unknown_name

RUN_FOLDER = "decoder"  # of a training run, where its decoder lies
HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*(@[\w./-]+)?", re.ASCII)
FLOATS = ("F32", "F16", "BF16")
CELLS = 4  # latent cells each way of the trial that tells a decoder's factor
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


def save_decoder(
    folder: Path,
    decoder: nn.Module,
    card: AutoencoderCard,
    architecture: dict[str, Any],
    trained: dict[str, Any],
    *,
    name: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a decoder's folder; a decoder that lies there is replaced.

    decoder       plain module (latents to images), of the architecture
    card          of the autoencoder whose latents it reads, or of a decoder it was trained from
    architecture  what `architecture_of` gives; a student's is {"class": "student", "name": ...}
    trained       how it was trained: JSON values, for the Hub's card
    name          of the decoder; by default the folder's, or its parent's where it is `decoder`
    dtype         of the stored weights: float32, or float16 for half the bytes
    raises        WeightsError where decoder and architecture do not belong together
    """
    folder = Path(folder)
    expected = build(architecture, card.channels, card.factor).state_dict()
    tensors = {
        name: (t.detach().to("cpu", dtype) if t.is_floating_point() else t.cpu()).contiguous()
        for name, t in decoder.state_dict().items()
    }
    check_placed(
        expected, {name: list(t.shape) for name, t in tensors.items()}, "the decoder to save"
    )
    record = DecoderRecord(
        name=name or default_name(folder),
        architecture=architecture,
        autoencoder=card.encoder or card.name,
        latent_id=card.latent_id,
        decoder_id=hash_tensors(tensors, {}),
        channels=card.channels,
        factor=card.factor,
        licence=card.licence,
        trained=trained,
    )
    # A record that could not be read back is a FormatError now.
    checked_fields(json.loads(record.to_json()), folder / RECORD, FORMAT, CHECKS)
    header = {"format": FORMAT, "latent_id": card.latent_id}
    write_together(
        {folder / WEIGHTS: save(tensors, header), folder / RECORD: record.to_json().encode()}
    )


def default_name(folder: Path) -> str:
    """A decoder's name after its folder, or after the run whose folder it lies in."""
    folder = folder.resolve()
    name = folder.parent.name if folder.name == RUN_FOLDER else folder.name
    return re.sub(r"[^\w.-]", "-", name, flags=re.ASCII).lstrip(".-")[:100] or "decoder"


def find_decoder_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder with a decoder.json: the path itself, or `decoder` in a run's folder."""
    for folder in (Path(path), Path(path) / RUN_FOLDER):
        if (folder / RECORD).is_file():
            return folder
    return None


def is_hub_name(name: str | os.PathLike[str]) -> bool:
    """Whether it is ORG/NAME[@REVISION], and no path here."""
    return bool(HUB_NAME.fullmatch(str(name))) and not Path(name).exists()


def load_decoder(name_or_path: str | os.PathLike[str]) -> NetworkAutoencoder:
    """A decoder without an encoder, in fp32 on the CPU and in eval mode; `encode` raises.

    name_or_path  a decoder's folder, a run's folder, or ORG/NAME[@REVISION] on the Hub
    raises        FileNotFoundError, FormatError (no decoder.json this version reads), WeightsError
                  (weights that cannot be fetched, are damaged or do not fit), UnknownNameError
    """
    folder = find_decoder_folder(name_or_path)
    if folder is not None:
        return load_folder(folder)
    folder, repository, commit = fetch(name_or_path, (RECORD, WEIGHTS))
    return load_folder(folder, repository=repository, revision=commit)


def find_record(name_or_path: str | os.PathLike[str]) -> DecoderRecord:
    """What a decoder's decoder.json says, without its weights; raises as `load_decoder` does."""
    folder = find_decoder_folder(name_or_path)
    return read_record(folder or fetch(name_or_path, (RECORD,))[0])


def fetch(name: str | os.PathLike[str], files: Sequence[str]) -> tuple[Path, str, str | None]:
    """Files of a decoder on the Hub: their folder, the repository, the commit."""
    if not is_hub_name(name):
        raise FileNotFoundError(f"{name}: no {RECORD} there or in its {RUN_FOLDER}/")
    repository, _, revision = str(name).partition("@")
    advice = f"{repository} is no folder here either: pass a decoder's folder, or its Hub name."
    folder, commit = download(repository, files, revision or None, advice)
    return folder, repository, commit


def load_folder(
    folder: Path, repository: str | None = None, revision: str | None = None
) -> NetworkAutoencoder:
    """The decoder of a folder, checked."""
    record = read_record(folder)
    try:
        decoder = build(record.architecture, record.channels, record.factor)
    except (WeightsError, UnknownNameError) as error:
        raise type(error)(f"{folder / RECORD}: {error}") from error
    tensors = read_tensors(folder / WEIGHTS, decoder.state_dict(), record.latent_id)
    found = hash_tensors(tensors, {})
    check_hash(folder / WEIGHTS, found, folder / RECORD, record.decoder_id)
    decoder.load_state_dict(tensors, assign=True)
    card = AutoencoderCard(
        name=record.name,
        class_name=str(record.architecture["class"]),
        repository=repository,
        revision=revision,
        channels=record.channels,
        factor=record.factor,
        licence=record.licence,
        latent_id=record.latent_id,
        decoder_id=record.decoder_id,
        encoder=record.autoencoder,
    )
    if isinstance(decoder, TinyDecoder | Student):  # faster so on CPUs, see tiny.py
        decoder = decoder.to(memory_format=torch.channels_last)
    return NetworkAutoencoder(card, NoEncoder(card), decoder)


class NoEncoder(nn.Module):
    """What stands for the encoder of a decoder alone."""

    def __init__(self, card: AutoencoderCard) -> None:
        super().__init__()
        self.card = card

    def forward(self, images: Tensor) -> Tensor:
        del images
        raise WeightsError(
            f"{self.card.name}: a decoder alone cannot encode; load it with its encoder: "
            f"load_autoencoder(FOLDER, encoder=...), {self.card.encoder!r} made the latents"
        )


def replace_decoder(base: NetworkAutoencoder, decoder: NetworkAutoencoder) -> NetworkAutoencoder:
    """The encoder of one and the decoder of the other, under the decoder's name.

    raises  ContractError where the decoder reads other latents
    """
    if base.card.latent_id != decoder.card.latent_id:
        raise ContractError(
            f"the decoder {decoder.card.name!r} reads latents with latent_id "
            f"{short(decoder.card.latent_id)} (made by {decoder.card.encoder!r}), the encoder of "
            f"{base.card.name!r} makes {short(base.card.latent_id)}"
        )
    card = dataclasses.replace(
        decoder.card, encoder=base.card.encoder or base.card.name, gated=base.card.gated
    )
    return NetworkAutoencoder(card, base.encoder, decoder.decoder)


def read_tensors(path: Path, expected: Mapping[str, Tensor], latent_id: str) -> dict[str, Tensor]:
    """The tensors of a file, floats in fp32: just those expected, of their shapes.

    Names, shapes and dtypes are compared in the file's header, before a tensor is read.
    """
    with opened_tensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        check_placed(expected, {n: list(s.get_shape()) for n, s in slices.items()}, str(path))
        for name, tensor in expected.items():
            dtype = slices[name].get_dtype()
            allowed = FLOATS if tensor.is_floating_point() else ("I64",)  # as BatchNorm counts
            if dtype not in allowed:
                raise WeightsError(f"{path}: {name} is {dtype}, not {' or '.join(allowed)}")
        stated = (file.metadata() or {}).get("latent_id", latent_id)
        tensors = {name: file.get_tensor(name) for name in slices}
    if stated != latent_id:
        raise WeightsError(
            f"{path}: reads latents with latent_id {short(stated)}, {RECORD} says "
            f"{short(latent_id)}; the two files are not of one decoder"
        )
    return {name: t.to(expected[name].dtype) for name, t in tensors.items()}


def architecture_of(autoencoder: NetworkAutoencoder) -> dict[str, Any]:
    """JSON values that `build` makes the autoencoder's decoder from again.

    raises  WeightsError where its decoder is of no class known here
    """
    decoder = autoencoder.decoder
    if isinstance(decoder, TinyDecoder):
        return {"class": "tiny"}
    if isinstance(decoder, Student):
        names = [name for name, spec in STUDENTS.items() if spec == decoder.spec]
        if names:
            return {"class": "student", "name": names[0]}
    if isinstance(decoder, nn.Sequential) and len(decoder) and isinstance(decoder[0], Clamp):
        return {"class": "taesd", "has_pool": has_pool(decoder.state_dict())}
    architecture = getattr(decoder, "architecture", None)
    if isinstance(architecture, dict):
        described: dict[str, Any] = json.loads(json.dumps(architecture))  # tuples become lists
        return described
    raise WeightsError(f"a decoder of class {type(decoder).__name__} cannot be described in JSON")


def build(architecture: Mapping[str, Any], channels: int, factor: int) -> nn.Module:
    """The decoder of an architecture on the meta device, in eval mode: shapes, no weights.

    Nothing is allocated for it: its shapes are compared with the tensors of a file first, so that a
    foreign decoder.json costs no more memory than its file has bytes.

    channels, factor  of the latents; checked by a trial on the meta device
    raises            UnknownNameError for a class not known here, WeightsError for values that do
                      not fit, MissingExtraError
    """
    class_name = str(architecture.get("class"))
    if class_name not in BUILDERS:
        raise unknown_name("decoder class", class_name, BUILDERS)
    check_bounded(architecture, "architecture")
    pixels = CELLS * factor
    try:
        with torch.device("meta"), torch.no_grad():
            decoder = BUILDERS[class_name](architecture, channels, factor).eval()
            shape = list(decoder(torch.zeros(1, channels, CELLS, CELLS)).shape)
    except BUILD_ERRORS as error:
        reason = first_words(error, 200)
        raise WeightsError(f"cannot build a decoder of class {class_name} ({reason})") from error
    if shape != [1, 3, pixels, pixels]:
        raise WeightsError(
            f"a decoder of class {class_name} makes {shape} of {CELLS}x{CELLS} latents; factor "
            f"{factor} asks for {[1, 3, pixels, pixels]}"
        )
    return decoder


def build_diffusers(architecture: Mapping[str, Any], *_: int) -> nn.Module:
    from latentds.autoencoders.diffusers_ae import build_decoder

    return build_decoder(str(architecture["class"]), dict(architecture["config"]))


# A closed list: functions of the architecture, the latents' channels and their factor.
BUILDERS: dict[str, Callable[[Mapping[str, Any], int, int], nn.Module]] = {
    "student": lambda words, *shape: build_student(str(words["name"]), *shape),
    "tiny": lambda _, channels, __: TinyDecoder(channels),
    "taesd": lambda words, channels, _: build_decoder(channels, words["has_pool"] is True),
    "AutoencoderKL": build_diffusers,
    "AutoencoderDC": build_diffusers,
    "AutoencoderTiny": build_diffusers,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderRecord:
    """What a decoder.json says.

    architecture  what `decoders.build` makes it from
    autoencoder   name of the autoencoder whose encoder makes the latents
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
