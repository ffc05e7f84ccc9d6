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

from latentds.autoencoders.autoencoder import hash_tensors
from latentds.core.display import code_span, facts_table
from latentds.core.storage import write_together
from latentds.embedders.backbone_record import (
    CONFIG,
    LATENTS,
    READS,
    RECORD,
    WEIGHTS,
    BackboneRecord,
)
from latentds.embedders.embedder import IMAGENET_MEAN, IMAGENET_STD
from latentds.embedders.latent_stem import LatentStemConfig, timm_arguments
from latentds.embedders.timm_models import outline
from latentds.errors import ShapeError

README = "README.md"
OF_TRAINING = {  # of timm's arguments, what no tensor depends on
    *("num_classes", "drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate"),
    *("pos_drop_rate", "patch_drop_rate", "pretrained_cfg", "weight_init"),
}
CARD = """---
{front_matter}
---

# {title}

A backbone for pathology patches, trained with latentds: {arch}, {channels} input channels,
embeddings of {dim} numbers. **Not for diagnosis.** For research; try it on data of your own first.

{facts}

## Load

{load}
## How it was trained

{trained}
{notes}"""
PICTURES = """With timm alone:

```python
import timm

model = timm.create_model("{timm_place}", pretrained=True).eval()
data = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**data, is_training=False)  # of a PIL image
```

With latentds, pictures float (B, 3, H, W) in [0, 1] are resized and normalized too:

```python
from latentds.embedders import load_embedder

embedder = load_embedder("{embedder}")
features = embedder.embed(images)
```

    latentds features SET --embedder {embedder} --out FEATURES
"""
FROM_LATENTS = """It reads latents without decoding, of latent_id {latent_id} alone,
and no pictures. With latentds:

    latentds features SET --embedder latent-dir:{folder} --out FEATURES

{timm}
"""
TIMM_BUILDS = """timm builds the same network, for latents float (B, {channels}, h, w) that
are normalized by the mean and std above:

```python
import timm

model = timm.create_model("{timm_place}", pretrained=True).eval()
```"""
TIMM_CANNOT = "timm alone does not build this network: its patch embedding is of latentds."
TAGS = ("pathology", "feature-extraction", "latentds")
INTERPOLATION = "bicubic"  # of pictures' resizing, as in pretraining


def write_backbone(
    folder: str | os.PathLike[str],
    backbone: nn.Module,
    *,
    arch: str,
    trained: Mapping[str, Any],
    input_px: int | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    stem: LatentStemConfig | None = None,
) -> Path:
    """Write a network of timm, without a classifier, as a folder; returns the folder.

    A backbone that lies there is replaced.

    arch        timm's name of it; a tag is left out
    trained     what it was trained on and how: JSON values, for people
    input_px    edge of its pictures; None takes the one its position embedding is laid out for
    mean, std   of the normalization it was trained with; with a stem, the stem's count
    stem        of a network that reads latents
    raises      ValueError for a network with a classifier
    """
    folder = Path(folder)
    if getattr(backbone, "num_classes", 0):
        raise ValueError(f"{arch}: has a classifier of {backbone.num_classes} classes; none here")
    network: Any = backbone
    tensors = {name: as_stored(tensor) for name, tensor in backbone.state_dict().items()}
    layout = image_edge(backbone, arch, stem)
    arguments = find_arguments(backbone, arch, layout, stem)
    record = BackboneRecord(
        arch=arch.partition(".")[0],
        model_args=arguments,
        channels=stem.channels if stem else 3,
        input_px=input_px or layout,
        mean=tuple(stem.mean if stem else mean),
        std=tuple(stem.std if stem else std),
        interpolation=INTERPOLATION,
        dim=int(getattr(network, "head_hidden_size", None) or network.num_features),
        weights_id=hash_tensors(tensors, {}),
        stem=dataclasses.asdict(stem) if stem else None,
        trained=dict(trained),
    )
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
    backbone: nn.Module, arch: str, edge: int, stem: LatentStemConfig | None
) -> dict[str, Any] | None:
    """timm's arguments of the network; None where timm alone cannot build it."""
    noted: Mapping[str, Any] = getattr(backbone, "_model_args", {})
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
    return kept


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


def backbone_card(
    record: BackboneRecord,
    *,
    title: str,
    front_matter: str,
    repository: str | None = None,
    licence: str = "",
    notes: str = "",
) -> str:
    """The text of the README.md.

    repository  ORG/NAME[@REVISION] where it is on the Hub, None for a folder
    """
    facts = dataclasses.asdict(record) | ({"licence": licence} if licence else {})
    del facts["trained"]
    return CARD.format(
        front_matter=front_matter,
        title=title,
        arch=code_span(record.arch),
        channels=record.channels,
        dim=record.dim,
        facts=facts_table(facts, RECORD),
        load=how_to_load(record, repository),
        trained=facts_table(record.trained, RECORD),
        notes=f"\n{notes.strip()}\n" if notes.strip() else "",
    )


def how_to_load(record: BackboneRecord, repository: str | None) -> str:
    timm_place = f"hf-hub:{repository}" if repository else "local-dir:FOLDER"
    if record.stem is None:
        embedder = f"timm:hf-hub:{repository}" if repository else "timm-dir:FOLDER"
        return PICTURES.format(timm_place=timm_place, embedder=embedder)
    builds = TIMM_BUILDS.format(channels=record.channels, timm_place=timm_place)
    return FROM_LATENTS.format(
        latent_id=code_span(record.stem.get("latent_id") or "not recorded"),
        folder="FOLDER",
        timm=TIMM_CANNOT if record.model_args is None else builds,
    )
