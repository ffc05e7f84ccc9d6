"""Files of model repositories on the Hub, from the network or the Hub's own cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from latentds.errors import WeightsError

SNAPSHOTS = "snapshots"  # the folder of the Hub's cache that has a folder a commit


def download(
    repository: str, files: Sequence[str], revision: str | None, advice: str
) -> tuple[Path, str | None]:
    """The folder the files lie in, and the commit they are of: all of one commit.

    returns None for the commit where neither a revision was given nor the path tells one
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
    return path.parent, commit


def login_hint(repository: str | None, gated: bool) -> str:
    """How to get files that ask for a login; nothing for others."""
    if not gated:
        return ""
    page = f"https://huggingface.co/{repository}"
    return f"It is gated: accept its licence at {page}, then run 'hf auth login'. "


def commit_of(path: Path) -> str | None:
    """The commit a file in the Hub's cache is of."""
    parts = path.parts[::-1]
    return parts[parts.index(SNAPSHOTS) - 1] if SNAPSHOTS in parts[1:] else None
