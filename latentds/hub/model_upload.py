"""Publish a trained backbone's or a decoder's folder on the Hub, as a model repository."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from latentds.autoencoders import decoders
from latentds.autoencoders.autoencoder import hash_tensors
from latentds.autoencoders.cards import CARDS
from latentds.autoencoders.decoders import DecoderRecord
from latentds.autoencoders.foreign_networks import check_hash
from latentds.core.display import MAX_FACT, code_span, facts_table, markdown
from latentds.embedders import backbone_record as backbones
from latentds.embedders.backbone_record import CODEBOOK, CONFIG, BackboneRecord
from latentds.embedders.embedder import EmbedderCard
from latentds.embedders.embedder_cards import CARDS as EMBEDDERS
from latentds.embedders.weights import read_weights
from latentds.errors import InputError, WeightsError
from latentds.hub.card import README, Publication
from latentds.hub.licences import HUB_LICENCES, check_licence, licence_warnings, recorded_licences
from latentds.hub.set_upload import Published, front_matter, publish_files
from latentds.models.backbone_folder import TAGS, backbone_card

RUN_FOLDER = "backbone"  # where a pretraining's folder has it
NETWORKS = ("autoencoder", "decoder")  # fields of a record that tell of no data
DECODER_CARD = """---
{front_matter}
---

# {title}

A decoder for the latents that the autoencoder {autoencoder} makes of pathology patches:
{channels} channels, {factor} px a latent cell, network {network}. It turns latents stored as
`latentds/1` sets back into pictures. Decoding loses detail and makes some up. **Not for
diagnosis.**

| | |
|---|---|
| reads latent_id | {latent_id} |
| base autoencoder | {base} |
| decoder_id | {decoder_id} |
| licence | {licence} |

## Load

It decodes any set whose manifest names this `latent_id`, and refuses every other:

```python
from latentds import LatentLoader

loader = LatentLoader("SET", split="train", batch_size=64, decoder="{repository}{at}")
```

Alone, latents float (B, {channels}, h, w), unscaled means, to pictures (B, 3, {factor}h, {factor}w)
in [0, 1]:

```python
from latentds.autoencoders.decoders import load_decoder

decoder = load_decoder("{repository}{at}")
images = decoder.decode(latents)
```

## How it was trained

{trained}
{notes}"""


def publish_model(
    folder: str | os.PathLike[str],
    publication: Publication,
    *,
    private: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Published:
    """Publish a backbone's folder, or the one in a pretraining's folder: weights first.

    The same call takes up a run that was cut off. `timm:hf-hub:ORG/NAME` embeds with it, and timm
    itself loads `hf-hub:ORG/NAME`.

    private, overwrite, dry_run, tell  as of `set_upload.publish`
    raises     FileNotFoundError where there is no backbone; WeightsError, FormatError where it is
               damaged; InputError without licence, login or rights, or where the repository holds
               something else; FormatError where the Hub holds other bytes after the upload
    """
    found = find_backbone_folder(Path(folder))
    identifier = check_licence(publication.licence, publication.licence_name)
    tell("checking the backbone's tensors")
    record = check_backbone(found)
    contents: dict[str, Path | bytes] = {
        backbones.WEIGHTS: found / backbones.WEIGHTS,
        README: published_card(record, publication).encode(),
    }
    if record.model_args is not None:
        contents[CONFIG] = (found / CONFIG).read_bytes()
    if (found / CODEBOOK).is_file():
        contents[CODEBOOK] = (found / CODEBOOK).read_bytes()
    contents[backbones.RECORD] = (found / backbones.RECORD).read_bytes()
    return publish_files(
        publication,
        contents,
        weights=backbones.WEIGHTS,
        page=backbones.RECORD,
        warnings=backbone_warnings(record, identifier),
        private=private,
        overwrite=overwrite,
        dry_run=dry_run,
        tell=tell,
    )


def find_backbone_folder(folder: Path) -> Path:
    """The folder itself, or the one in a pretraining's; FileNotFoundError where neither is one."""
    for place in (folder, folder / RUN_FOLDER):
        if (place / backbones.RECORD).is_file():
            return place
    raise FileNotFoundError(
        f"{folder}: no {backbones.RECORD} there or in its {RUN_FOLDER}/; give the folder that a "
        "finished pretrain run was told as --out"
    )


def check_backbone(folder: Path) -> BackboneRecord:
    """The record of a folder whose files belong together.

    raises  WeightsError, FormatError
    """
    record, weights = backbones.read_record(folder), folder / backbones.WEIGHTS
    found = hash_tensors(read_weights(weights), {})
    check_hash(weights, found, folder / backbones.RECORD, record.weights_id)
    if record.model_args is None:
        return record
    if not (folder / CONFIG).is_file():
        raise WeightsError(f"{folder}: no {CONFIG} there; export the backbone anew")
    config = backbones.read_json(folder / CONFIG)
    stated = (config.get("architecture"), config.get("model_args"))
    if stated != (record.arch, record.model_args):
        raise WeightsError(
            f"{folder / CONFIG}: is of {stated[0]!r}, {backbones.RECORD} of {record.arch!r}, or "
            "their model_args differ; export the backbone anew"
        )
    return record


def published_card(record: BackboneRecord, publication: Publication) -> str:
    head = front_matter(publication, TAGS, library="timm")
    return backbone_card(
        record,
        title=publication.title,
        front_matter=f"{head}\npipeline_tag: image-feature-extraction",
        repository=f"{publication.repository}{publication.at}",
        licence=str(publication.licence_name or publication.licence),
        notes=publication.notes,
    )


def backbone_warnings(record: BackboneRecord, identifier: str) -> list[str]:
    """What a publisher should know before a backbone goes out under `identifier`."""
    licences = sorted(set(recorded_licences(record.trained)))
    lines = licence_warnings((("what it was trained on", x, False) for x in licences), identifier)
    if not any(recorded_licences(without_networks(record.trained))):
        lines.append("no licence of the training data is recorded; see what theirs allow")
    return lines


def without_networks(record: Any) -> Any:
    """A record less its autoencoders and decoders: what is left is of the data."""
    if isinstance(record, dict):
        kept = {name: value for name, value in record.items() if name not in NETWORKS}
        return {name: without_networks(value) for name, value in kept.items()}
    if isinstance(record, list):
        return [without_networks(value) for value in record]
    return record


def publish_decoder(
    folder: str | os.PathLike[str],
    publication: Publication,
    *,
    private: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Published:
    """Publish a decoder's folder, or the one in a run's folder: weights first, decoder.json last.

    `load_decoder` reads it from the Hub. Otherwise as `publish_model`; WeightsError where it is
    damaged.
    """
    found = decoders.find_decoder_folder(folder)
    if found is None:
        raise FileNotFoundError(
            f"{folder}: no {decoders.RECORD} there or in its decoder/; give a decoder's folder, or "
            "the one that a finished finetune_decoder run was told as --out"
        )
    tell("checking the decoder's tensors")
    decoders.load_decoder(found)
    record = decoders.read_record(found)
    publication = dataclasses.replace(publication, licence=choose_licence(record, publication))
    contents: dict[str, Path | bytes] = {
        decoders.WEIGHTS: found / decoders.WEIGHTS,
        README: decoder_card(record, publication).encode(),
        decoders.RECORD: (found / decoders.RECORD).read_bytes(),
    }
    return publish_files(
        publication,
        contents,
        weights=decoders.WEIGHTS,
        page=decoders.RECORD,
        warnings=licence_warnings(decoder_parts(record), str(publication.licence)),
        private=private,
        overwrite=overwrite,
        dry_run=dry_run,
        tell=tell,
    )


def choose_licence(record: DecoderRecord, publication: Publication) -> str:
    """The licence's identifier: the publisher's, else the recorded one where the Hub knows it."""
    recorded = record.licence.lower().replace(" ", "-")
    identifier = publication.licence or (recorded if recorded in HUB_LICENCES else None)
    if identifier is None:
        raise InputError(
            f"no licence the Hub knows ({decoders.RECORD} says {record.licence!r}); pass --license "
            "ID, such as mit or cc-by-nc-4.0, or '--license other --license-name NAME'"
        )
    return check_licence(identifier, publication.licence_name)


def decoder_parts(record: DecoderRecord) -> Iterator[tuple[str, str, bool]]:
    """What a decoder comes from, as `licence_warnings` takes it."""
    yield "the decoder", record.licence, False
    base = CARDS.get(record.autoencoder)
    if base is not None:
        yield f"the autoencoder {base.name}", base.licence, base.gated
    config = record.trained.get("config")
    recorded = config.get("embedder") if isinstance(config, Mapping) else None
    if isinstance(recorded, str) and recorded:
        name = recorded.partition("@")[0]
        card = EMBEDDERS.get(name, EmbedderCard(name=name[:MAX_FACT], class_name=""))
        yield f"the embedder {card.name} it was trained with", card.licence, card.gated


def decoder_card(record: DecoderRecord, publication: Publication) -> str:
    base, autoencoder = CARDS.get(record.autoencoder), code_span(record.autoencoder)
    place = ""
    if base is not None and base.repository:
        place = f", `{base.repository}` {base.subfolder or ''} at `{base.revision or 'main'}`"
    tags = ("pathology", "latents", "decoder")
    return DECODER_CARD.format(
        front_matter=front_matter(publication, tags, base.repository if base else None),
        title=publication.title,
        autoencoder=autoencoder,
        channels=record.channels,
        factor=record.factor,
        network=code_span(record.architecture.get("name") or record.architecture["class"]),
        latent_id=code_span(record.latent_id),
        decoder_id=code_span(record.decoder_id),
        base=f"{autoencoder}{place}",
        licence=markdown(str(publication.licence_name or publication.licence)),
        repository=publication.repository,
        at=publication.at,
        trained=facts_table(record.trained, decoders.RECORD),
        notes=f"\n{publication.notes.strip()}\n" if publication.notes.strip() else "",
    )
