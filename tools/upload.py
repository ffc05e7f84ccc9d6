"""latentds upload: a finished data set to an object store."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from latentds_tools.reports.commands import show


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Copy a data set to s3://BUCKET/PATH, or another location that fsspec writes to.

    Shards are copied first, the manifest last. An interrupted run is continued by the same command.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a data set."""
    location: Annotated[str, tyro.conf.Positional]
    """Location to copy to, for example s3://bucket/brca."""
    overwrite: bool = False
    """Replace another data set at that location."""
    json: bool = False
    """Print JSON."""


def run(config: Config) -> None:
    from latentds.core.display import progress
    from latentds.store.object_store import upload

    total = sum(p.stat().st_size for p in config.folder.rglob("*") if p.is_file())
    with progress(total=total, unit="B", unit_scale=True, desc="upload") as bar:
        manifest = upload(
            config.folder, config.location, config.overwrite, lambda _, size: bar.update(size)
        )
    summary = {
        "location": config.location,
        "patches": manifest.patches,
        "shards": len(manifest.shards),
        "dataset_id": manifest.dataset_id,
    }
    show(summary, config.json)
