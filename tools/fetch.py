"""latentds fetch: a published data set into a folder."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from latentds.core.display import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Fetch a published data set from the Hub into a folder, every file checked by its sha256.

    A run that was cut off is taken up by the same command. To read one split, or a few patches,
    nothing need be fetched: LatentLoader("hf://datasets/ORG/NAME") reads by range.
    """

    repository: Annotated[str, tyro.conf.Positional]
    """ORG/NAME, or ORG/NAME@REVISION (branch, tag, commit, refs/pr/N)."""
    out: Path | None = None
    """Folder to fetch into; NAME by default."""
    json: bool = False
    """Print JSON."""


def run(config: Config) -> None:
    """Fetch, and say what lies where."""
    from latentds.hub.fetching import fetch

    with progress_bar() as show:
        result = fetch(config.repository, config.out, show)
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
    if config.json:
        say(json.dumps(summary, indent=1))
        return
    say(
        f"{result.folder}: {result.manifest.patches:,} patches at commit {result.commit}; "
        f"{result.new} of {result.files} files fetched ({result.bytes:,} bytes), all checksums "
        "right"
    )


def progress_bar() -> Any:
    """A context that gives a function of (bytes done, bytes of all), shown on a terminal."""
    import contextlib

    from tqdm import tqdm

    @contextlib.contextmanager
    def bar() -> Any:
        with tqdm(unit="B", unit_scale=True, disable=None, file=sys.stderr) as shown:

            def show(done: int, total: int) -> None:
                shown.total = total
                shown.update(done - shown.n)

            yield show

    return bar()
