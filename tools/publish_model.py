"""latentds publish-model: a trained backbone's folder to the Hub."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from latentds.core.display import say
from latentds.hub.model_options import PublishOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PublishOptions):
    """Publish a backbone that `pretrain` has trained on the Hub, with a card; timm loads it.

    Checks its tensors, sends weights first, configuration and card in one last commit, then
    compares checksums. A run that was cut off is taken up by the same command.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a backbone (latentds.json, model.safetensors), or of the run that trained it."""
    repository: Annotated[str, tyro.conf.Positional]
    """ORG/NAME on the Hub; made where it is not there."""


def run(config: Config) -> None:
    """Publish, and say what was done."""
    from latentds.hub.backbone_upload import publish_model
    from latentds.hub.model_files import publication_of, summary_text

    result = publish_model(
        config.folder,
        publication_of(config.repository, config),
        private=config.private,
        overwrite=config.overwrite,
        dry_run=config.dry_run,
        tell=lambda line: say(f"{line} ...", file=sys.stderr),
    )
    for warning in result.warnings:
        say(f"warning: {warning}", file=sys.stderr)
    summary = result.summary()
    say(json.dumps(summary, indent=1) if config.json else summary_text(summary))
