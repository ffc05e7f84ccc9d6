"""latentds merge: one data set of several of the same latents."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from latentds_tools.reports.commands import show
from latentds_tools.reports.set_lines import set_facts, set_lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Merge data sets of one latent_id and patch size, without decoding or quantizing anything
    anew.

    Shards are copied, and codebooks stay side by side. If two sets have patches of one name, merge
    stops and says whether their codes are the same too.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Two or more data sets. The decoder of the first is recorded."""
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
    done = f"of {len(config.folders)} sets"
    show(summary, config.json, lambda _: set_lines(set_facts(config.out, manifest), done))
