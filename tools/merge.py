"""latentds merge: one data set of several of the same latents."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from latentds_tools.reports.commands import show


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Merge data sets of one latent_id and patch size; nothing is decoded or quantized anew.

    Shards are copied, codebooks stay side by side. A patch that two sets have is refused by name.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Two or more data sets; the first one's decoder is the recorded one."""
    out: Path
    """Folder of the data set to be made."""
    overwrite: bool = False
    """Replace a data set that lies in --out."""
    json: bool = False
    """Print JSON."""


def run(config: Config) -> None:
    from latentds.edit.merging import merge

    manifest = merge(config.folders, config.out, config.overwrite)
    summary = {
        "out": str(config.out),
        "dataset_id": manifest.dataset_id,
        "patches": manifest.patches,
        "splits": manifest.splits,
        "shards": len(manifest.shards),
        "codebooks": len(manifest.codebooks),
        "slides": len(manifest.slides),
    }
    show(summary, config.json)
