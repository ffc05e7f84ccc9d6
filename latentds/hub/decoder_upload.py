"""Publish a decoder's folder on the Hub, as a model repository with a card."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from latentds.autoencoders.cards import CARDS
from latentds.autoencoders.decoders import (
    RECORD,
    WEIGHTS,
    DecoderRecord,
    find_decoder_folder,
    load_decoder,
    read_record,
)
from latentds.core.display import MAX_FACT, code_span, facts_table, markdown
from latentds.embedders.embedder import EmbedderCard
from latentds.embedders.embedder_cards import CARDS as EMBEDDERS
from latentds.errors import InputError
from latentds.hub.client import Repository
from latentds.hub.licences import HUB_LICENCES, check_licence, is_non_commercial
from latentds.hub.publish_plan import README
from latentds.hub.set_upload import Published, front_matter, publish_files
from latentds.hub.snippets import Publication

CARD = """---
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

    The same call takes up a run that was cut off. `load_decoder` reads it from the Hub.

    private, overwrite, dry_run, tell  as of `set_upload.publish`
    raises     FileNotFoundError where there is no decoder; WeightsError where it is damaged;
               InputError without licence, login or rights, or where the repository holds something
               else; FormatError where the Hub holds other bytes after the upload
    """
    found = find_decoder_folder(folder)
    if found is None:
        raise FileNotFoundError(
            f"{folder}: no {RECORD} there or in its decoder/; give a decoder's folder, or the one "
            "that a finished finetune_decoder run was told as --out"
        )
    tell("checking the decoder's tensors")
    load_decoder(found)
    record = read_record(found)
    publication = dataclasses.replace(publication, licence=choose_licence(record, publication))
    repository = Repository(publication.repository, publication.revision, kind="model")
    contents: dict[str, Path | bytes] = {
        WEIGHTS: found / WEIGHTS,
        README: decoder_card(record, publication).encode(),
        RECORD: (found / RECORD).read_bytes(),
    }
    return publish_files(
        repository,
        contents,
        weights=WEIGHTS,
        page=RECORD,
        warnings=tuple(licence_warnings(record, str(publication.licence))),
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
            f"no licence the Hub knows ({RECORD} says {record.licence!r}); pass --license ID, such "
            "as mit or cc-by-nc-4.0, or '--license other --license-name NAME'"
        )
    return check_licence(identifier, publication.licence_name)


def licence_warnings(record: DecoderRecord, identifier: str) -> Iterator[str]:
    """What a publisher should know before a decoder goes out under `identifier`."""
    base, embedder = CARDS.get(record.autoencoder), find_embedder(record)
    licences = {record.licence: "the decoder"}
    licences |= {base.licence: f"the autoencoder {base.name}"} if base else {}
    for licence, what in licences.items():
        if is_non_commercial(licence) and not is_non_commercial(identifier):
            yield f"trained from non-commercial weights ({licence}), published as {identifier}"
        if licence.lower().startswith("unknown"):
            yield f"the licence of {what} is not known ({licence}); ask those it comes from"
    if base is not None and base.gated:
        yield (
            f"the autoencoder {base.name} is gated ({base.licence}); see that its licence allows a "
            "trained copy of its decoder to be passed on"
        )
    if embedder is None:
        return
    if is_non_commercial(embedder.licence) and not is_non_commercial(identifier):
        yield (
            f"trained with the non-commercial embedder {embedder.name} ({embedder.licence}), "
            f"published as {identifier}"
        )
    if embedder.gated:
        yield (
            f"the embedder {embedder.name} it was trained with is gated ({embedder.licence}); see "
            "that its licence allows what was trained with it to be passed on"
        )
    if embedder.licence.startswith("unknown"):
        yield (
            f"the licence of the embedder {embedder.name} it was trained with is not known here; "
            "see what it allows"
        )


def find_embedder(record: DecoderRecord) -> EmbedderCard | None:
    """The card of the embedder a decoder was trained with; None where none is recorded."""
    config = record.trained.get("config")
    recorded = config.get("embedder") if isinstance(config, Mapping) else None
    if not isinstance(recorded, str) or not recorded:
        return None
    name = recorded.partition("@")[0]
    return EMBEDDERS.get(name, EmbedderCard(name=name[:MAX_FACT], class_name=""))


def decoder_card(record: DecoderRecord, publication: Publication) -> str:
    licence = publication.licence_name or publication.licence
    base = CARDS.get(record.autoencoder)
    tags = ("pathology", "latents", "decoder")
    return CARD.format(
        front_matter=front_matter(publication, tags, base.repository if base else None),
        title=publication.repository.partition("/")[2],
        autoencoder=code_span(record.autoencoder),
        channels=record.channels,
        factor=record.factor,
        network=code_span(record.architecture.get("name") or record.architecture["class"]),
        latent_id=code_span(record.latent_id),
        decoder_id=code_span(record.decoder_id),
        base=describe_base(record),
        licence=markdown(str(licence)),
        repository=publication.repository,
        at=publication.at,
        trained=facts_table(record.trained, RECORD),
        notes=f"\n{publication.notes.strip()}\n" if publication.notes.strip() else "",
    )


def describe_base(record: DecoderRecord) -> str:
    """Name and place of the autoencoder whose encoder makes the latents."""
    card = CARDS.get(record.autoencoder)
    text = code_span(record.autoencoder)
    if card is not None and card.repository:
        text += f", `{card.repository}` {card.subfolder or ''} at `{card.revision or 'main'}`"
    return text
