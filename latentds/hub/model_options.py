"""Settings that every tool which publishes a model has. No heavy import."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishOptions:
    """What a tool that publishes a model inherits."""

    license: str | None = None
    """Licence, as the Hub names it: mit, cc-by-nc-4.0, ...; by default the one recorded, if any."""
    license_name: str | None = None
    """Name of the licence, with --license other."""
    private: bool = False
    """Make a new repository private."""
    revision: str | None = None
    """Branch to publish to (made from main where it is not there)."""
    notes: Path | None = None
    """Markdown file for the card: what it was measured on, intended use."""
    overwrite: bool = False
    """Replace another model there; its history keeps it."""
    dry_run: bool = False
    """Check, look and print the plan; write nothing."""
    json: bool = False
    """Print JSON."""
