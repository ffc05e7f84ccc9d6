"""latentds publish-decoder: a decoder's folder to the Hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from latentds_tools.publish import PublishOptions, publish_model_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PublishOptions):
    """Publish a decoder on the Hub, with a card.

    Its tensors are checked. Weights are sent first, decoder.json last, and then checksums are
    compared. An interrupted run is continued by the same command.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a decoder (decoder.json, decoder.safetensors), or of the run that trained it."""
    repository: Annotated[str, tyro.conf.Positional]
    """ORG/NAME on the Hub. A missing repository is made."""


def run(config: Config) -> None:
    from latentds.hub.model_upload import publish_decoder

    publish_model_folder(publish_decoder, config, config.folder, config.repository)
