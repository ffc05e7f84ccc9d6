"""The README.md of a trained backbone: what it was trained on, what it is for, how to load it."""

from __future__ import annotations

from latentds.core.display import code_span, facts_table, markdown
from latentds.embedders.backbone_record import RECORD, BackboneRecord

CARD = """---
{front_matter}
---

# {title}

A backbone for pathology patches, trained with latentds: {arch}, {channels} input channels,
embeddings of {dim} numbers. **Not for diagnosis.** For research; try it on data of your own first.

| | |
|---|---|
| network | {arch} of timm, {arguments} |
| input | {input} |
| trained at | {input_px} px |
| normalization | mean {mean}, std {std} |
| weights_id | {weights_id} |
{licence}
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
    return CARD.format(
        front_matter=front_matter,
        title=title,
        arch=code_span(record.arch),
        channels=record.channels,
        dim=record.dim,
        arguments=markdown(describe_arguments(record)),
        input=describe_input(record),
        input_px=record.input_px,
        mean=numbers(record.mean),
        std=numbers(record.std),
        weights_id=code_span(record.weights_id),
        licence=f"| licence | {markdown(licence)} |\n" if licence else "",
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


def describe_input(record: BackboneRecord) -> str:
    if record.stem is None:
        return f"pictures in [0, 1], {record.interpolation} resizing"
    factor = record.stem.get("factor")
    return f"latents of {record.channels} channels, {factor} px a cell, not decoded"


def describe_arguments(record: BackboneRecord) -> str:
    named = [f"{name}={value}" for name, value in (record.model_args or {}).items()]
    return ", ".join(named) or "as timm has it"


def numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
