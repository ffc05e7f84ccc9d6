"""Files of model repositories on the Hub, from the network or the Hub's own cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from latentds.errors import WeightsError

SNAPSHOTS = "snapshots"  # the folder of the Hub's cache that has a folder a commit


def download(
    repository: str, files: Sequence[str], revision: str | None, advice: str
) -> tuple[Path, str]:
    """The folder the files lie in, and the commit they are of: all of one commit.

    raises  WeightsError: which file, why, and `advice`
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    file, commit = "", revision
    path = Path()
    try:
        for file in files:
            path = Path(hf_hub_download(repository, file, revision=commit))
            commit = commit_of(path) or commit
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"cannot get {file} of {repository} at {revision or 'main'} ({reason}). {advice}"
        ) from error
    return path.parent, str(commit)


def commit_of(path: Path) -> str | None:
    """The commit a file in the Hub's cache is of."""
    parts = path.parts[::-1]
    return parts[parts.index(SNAPSHOTS) - 1] if SNAPSHOTS in parts[1:] else None
