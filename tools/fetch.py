"""latentds fetch: a published data set into a folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from latentds_tools.reports.commands import show

from latentds.core.display import number_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fetch a published data set from the Hub into a folder, every file checked by its sha256.

    An interrupted run is continued by the same command. To read one split, or a few patches, there
    is no need to fetch: LatentLoader("hf://datasets/ORG/NAME") reads by range.
    """

    repository: Annotated[str, tyro.conf.Positional]
    """ORG/NAME, or ORG/NAME@REVISION (branch, tag, commit, refs/pr/N)."""
    out: Path | None = None
    """Folder to fetch into. By default NAME."""
    json: bool = False
    """Print JSON."""


def run(config: Config) -> None:
    from latentds.hub.fetching import fetch

    result = fetch(config.repository, config.out)
    summary = {
        "folder": str(result.folder),
        "commit": result.commit,
        "dataset_id": result.manifest.dataset_id,
        "patches": result.manifest.patches,
        "splits": result.manifest.splits,
        "files": result.files,
        "new_files": result.new,
        "new_bytes": result.bytes,
    }
    text = (
        f"{result.folder}: {number_of(result.manifest.patches, 'patch', 'patches')} at commit "
        f"{result.commit}; "
        f"{result.new} of {result.files} files fetched ({result.bytes:,} bytes), all checksums "
        "right"
    )
    show(summary, config.json, lambda _: text)
