"""Publish a trained backbone's folder on the Hub, as a model repository that timm loads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from latentds.autoencoders.autoencoder import hash_tensors
from latentds.autoencoders.foreign_networks import check_hash
from latentds.embedders.backbone_record import (
    CODEBOOK,
    CONFIG,
    RECORD,
    WEIGHTS,
    BackboneRecord,
    read_json,
    read_record,
)
from latentds.embedders.weights import read_weights
from latentds.errors import WeightsError
from latentds.hub.client import Repository
from latentds.hub.licences import check_licence, is_non_commercial, recorded_licences
from latentds.hub.publish_plan import README
from latentds.hub.set_upload import Published, front_matter, publish_files
from latentds.hub.snippets import Publication
from latentds.models.backbone_folder import TAGS, backbone_card

RUN_FOLDER = "backbone"  # where a pretraining's folder has it
NETWORKS = ("autoencoder", "decoder")  # fields of a record that tell of no data


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
    repository = Repository(publication.repository, publication.revision, kind="model")
    contents: dict[str, Path | bytes] = {
        WEIGHTS: found / WEIGHTS,
        README: published_card(record, publication).encode(),
    }
    if record.model_args is not None:
        contents[CONFIG] = (found / CONFIG).read_bytes()
    if (found / CODEBOOK).is_file():
        contents[CODEBOOK] = (found / CODEBOOK).read_bytes()
    contents[RECORD] = (found / RECORD).read_bytes()
    return publish_files(
        repository,
        contents,
        weights=WEIGHTS,
        page=RECORD,
        warnings=tuple(licence_warnings(record, identifier)),
        private=private,
        overwrite=overwrite,
        dry_run=dry_run,
        tell=tell,
    )


def find_backbone_folder(folder: Path) -> Path:
    """The folder itself, or the one in a pretraining's; FileNotFoundError where neither is one."""
    for place in (folder, folder / RUN_FOLDER):
        if (place / RECORD).is_file():
            return place
    raise FileNotFoundError(
        f"{folder}: no {RECORD} there or in its {RUN_FOLDER}/; give the folder that a finished "
        "pretrain run was told as --out"
    )


def check_backbone(folder: Path) -> BackboneRecord:
    """The record of a folder whose files belong together.

    raises  WeightsError, FormatError
    """
    record = read_record(folder)
    found = hash_tensors(read_weights(folder / WEIGHTS), {})
    check_hash(folder / WEIGHTS, found, folder / RECORD, record.weights_id)
    if record.model_args is None:
        return record
    if not (folder / CONFIG).is_file():
        raise WeightsError(f"{folder}: no {CONFIG} there; export the backbone anew")
    config = read_json(folder / CONFIG)
    stated = (config.get("architecture"), config.get("model_args"))
    if stated != (record.arch, record.model_args):
        raise WeightsError(
            f"{folder / CONFIG}: is of {stated[0]!r}, {RECORD} of {record.arch!r}, or their "
            "model_args differ; export the backbone anew"
        )
    return record


def published_card(record: BackboneRecord, publication: Publication) -> str:
    head = front_matter(publication, TAGS, library="timm")
    return backbone_card(
        record,
        title=publication.repository.partition("/")[2],
        front_matter=f"{head}\npipeline_tag: image-feature-extraction",
        repository=f"{publication.repository}{publication.at}",
        licence=str(publication.licence_name or publication.licence),
        notes=publication.notes,
    )


def licence_warnings(record: BackboneRecord, identifier: str) -> Iterator[str]:
    """What a publisher should know before a backbone goes out under `identifier`."""
    for licence in sorted(set(recorded_licences(record.trained))):
        if is_non_commercial(licence) and not is_non_commercial(identifier):
            yield f"trained on what is non-commercial ({licence}), published as {identifier}"
    if not any(recorded_licences(without_networks(record.trained))):
        yield "no licence of the training data is recorded; see what theirs allow"


def without_networks(record: Any) -> Any:
    """A record less its autoencoders and decoders: what is left is of the data."""
    if isinstance(record, dict):
        kept = {name: value for name, value in record.items() if name not in NETWORKS}
        return {name: without_networks(value) for name, value in kept.items()}
    if isinstance(record, list):
        return [without_networks(value) for value in record]
    return record
