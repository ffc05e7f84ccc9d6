"""A trained backbone as a folder that timm and latentds load: weights, configuration, card, record.

    FOLDER/model.safetensors   the tensors, float32
    FOLDER/config.json         timm's: `timm.create_model("local-dir:FOLDER", pretrained=True)`
    FOLDER/latentds.json       what it was trained on and how; the latent stem where it has one
    FOLDER/README.md           a card

Without config.json where timm alone cannot build the network, as with some latent stems.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from latentds.autoencoders.autoencoder import hash_tensors, short
from latentds.core.storage import write_together
from latentds.embedders.backbone_record import (
    CONFIG,
    LATENTS,
    READS,
    RECORD,
    WEIGHTS,
    BackboneRecord,
    read_record,
)
from latentds.embedders.embedder import IMAGENET_MEAN, IMAGENET_STD
from latentds.embedders.latent_stem import LatentStemConfig, timm_arguments
from latentds.embedders.timm_models import outline
from latentds.errors import FormatError, InputError, ShapeError
from latentds.models.backbone_card import TAGS, backbone_card

README = "README.md"
OF_TRAINING = {  # of timm's arguments, what no tensor depends on
    *("num_classes", "drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate"),
    *("pos_drop_rate", "patch_drop_rate", "pretrained_cfg", "weight_init"),
}


def write_backbone(
    folder: str | os.PathLike[str],
    backbone: nn.Module,
    *,
    arch: str,
    trained: Mapping[str, Any],
    input_px: int | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    interpolation: str = "bicubic",
    model_args: Mapping[str, Any] | None = None,
    stem: LatentStemConfig | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a network of timm, without a classifier, as a folder; returns the folder.

    arch        timm's name of it; a tag is left out
    trained     what it was trained on and how: JSON values, for people
    input_px    edge of its pictures; None takes the one its position embedding is laid out for
    mean, std   of the normalization it was trained with; with a stem, the stem's count
    model_args  timm's arguments beside the name; None takes what timm notes of its own networks
    stem        of a network that reads latents
    overwrite   replace another backbone that lies there; the same one is never an error
    raises      InputError where there is another backbone, or timm would not build the network from
                its name and arguments; ValueError for a network with a classifier
    """
    folder = Path(folder)
    if getattr(backbone, "num_classes", 0):
        raise ValueError(f"{arch}: has a classifier of {backbone.num_classes} classes; none here")
    network: Any = backbone
    tensors = {name: as_stored(tensor) for name, tensor in backbone.state_dict().items()}
    layout = image_edge(backbone, arch, stem)
    arguments = find_arguments(backbone, arch, layout, model_args, stem)
    record = BackboneRecord(
        arch=arch.partition(".")[0],
        model_args=arguments,
        channels=stem.channels if stem else 3,
        input_px=input_px or layout,
        mean=tuple(stem.mean if stem else mean),
        std=tuple(stem.std if stem else std),
        interpolation=interpolation,
        dim=int(getattr(network, "head_hidden_size", None) or network.num_features),
        weights_id=hash_tensors(tensors, {}),
        stem=dataclasses.asdict(stem) if stem else None,
        trained=dict(trained),
    )
    check_place(folder, record, overwrite)
    if arguments is not None:
        check_buildable(record, tensors)
    write_together(contents_of(folder, record, backbone, tensors))
    if arguments is None:
        (folder / CONFIG).unlink(missing_ok=True)  # of a backbone that lay here before
    return folder


def contents_of(
    folder: Path, record: BackboneRecord, backbone: nn.Module, tensors: dict[str, Tensor]
) -> dict[Path, bytes]:
    """Bytes of every file; what readers look for first comes last."""
    card = backbone_card(
        record,
        title=f"{record.arch} backbone",
        front_matter="\n".join(["library_name: timm", "tags:", *(f"- {tag}" for tag in TAGS)]),
    )
    contents = {
        WEIGHTS: save(tensors, {"format": "pt"}),
        README: card.encode(),
        RECORD: record.to_json().encode(),
    }
    if record.model_args is not None:
        contents[CONFIG] = json.dumps(timm_config(record, backbone), indent=2).encode()
    return {folder / name: content for name, content in contents.items()}


def as_stored(tensor: Tensor) -> Tensor:
    """A tensor as the file has it: on the CPU, in memory of its own, floats in float32."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


def image_edge(backbone: Any, arch: str, stem: LatentStemConfig | None) -> int:
    """Edge in pixels of the pictures, or of what the latents are of, a network is laid out for."""
    if stem is not None:
        token_px = outline(arch).patch_embed.patch_size[0]
        return int(backbone.patch_embed.grid_size[0] * token_px)
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    config: Any = backbone.pretrained_cfg
    height, width = size or config["input_size"][1:]
    if height != width:
        raise ShapeError(f"a network for {width}x{height} px; only square ones are exported")
    return int(height)


def find_arguments(
    backbone: nn.Module,
    arch: str,
    edge: int,
    given: Mapping[str, Any] | None,
    stem: LatentStemConfig | None,
) -> dict[str, Any] | None:
    """timm's arguments of the network; None where timm alone cannot build it."""
    noted: Mapping[str, Any] = getattr(backbone, "_model_args", {}) if given is None else given
    kept = {name: value for name, value in noted.items() if name not in OF_TRAINING}
    embed = getattr(backbone, "patch_embed", None)
    if getattr(embed, "img_size", None) is not None:
        kept["img_size"] = edge
    if getattr(backbone, "dynamic_img_size", False):
        kept["dynamic_img_size"] = True
    if stem is not None:
        own = timm_arguments(arch, stem, edge)
        if own is None:
            return None
        kept |= own
    odd = [name for name, value in kept.items() if not is_plain(value)]
    if odd:
        raise InputError(
            f"{arch}: timm's argument {odd[0]!r} is {kept[odd[0]]!r:.60}, which no config.json "
            "holds; build the backbone from plain values, or from a name that has them"
        )
    return kept


def is_plain(value: Any) -> bool:
    """Whether JSON holds a value as it is."""
    try:
        return bool(
            json.loads(json.dumps(value)) == (list(value) if type(value) is tuple else value)
        )
    except TypeError:
        return False


def check_place(folder: Path, record: BackboneRecord, overwrite: bool) -> None:
    """Refuse a folder with another backbone, or with something else under the same names."""
    found = [name for name in (RECORD, CONFIG, WEIGHTS) if (folder / name).exists()]
    if not found or overwrite:
        return
    held = ""
    if RECORD in found:
        try:
            held = read_record(folder).weights_id
        except FormatError:
            held = "a damaged record"
    if held != record.weights_id:
        raise InputError(
            f"{folder}: holds {f'the backbone {short(held)}' if held else found[0]} already, this "
            f"one is {short(record.weights_id)}; choose another folder, or overwrite it"
        )


def check_buildable(record: BackboneRecord, tensors: Mapping[str, Tensor]) -> None:
    """InputError where timm's network of that name and arguments has other tensors."""
    network = outline(record.arch, **(record.model_args or {}))
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    seen = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    odd = sorted(n for n in wanted.keys() | seen.keys() if wanted.get(n) != seen.get(n))
    if odd:
        raise InputError(
            f"{record.arch}: tensor {odd[0]!r} is {seen.get(odd[0], 'missing')}, timm builds it as "
            f"{wanted.get(odd[0], 'nothing')} from {record.model_args}; pass model_args that "
            "build this network"
        )


def timm_config(record: BackboneRecord, backbone: nn.Module) -> dict[str, Any]:
    """What config.json says, by the names that timm's `save_for_hf` gives."""
    source: Any = backbone.pretrained_cfg
    arguments = record.model_args or {}
    is_fixed = bool(source.get("fixed_input_size")) and not arguments.get("dynamic_img_size")
    edge = record.input_px
    if is_fixed or record.stem is not None:  # of latents in cells
        edge = arguments.get("img_size", edge)
    return {
        "architecture": record.arch,
        "num_classes": 0,
        "num_features": record.dim,
        READS: "pictures" if record.stem is None else LATENTS,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [record.channels, edge, edge],
            "fixed_input_size": is_fixed,
            "interpolation": record.interpolation,
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(record.mean),
            "std": list(record.std),
            "first_conv": source.get("first_conv"),
            "classifier": source.get("classifier"),
            "pool_size": None,
        },
    }
