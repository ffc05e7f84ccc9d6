"""Settings that every tool which publishes a model has. No heavy import."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishOptions:
    """What a tool that publishes a model inherits."""

    license: str | None = None
    """Licence, as the Hub names it: mit, cc-by-nc-4.0, ... By default the recorded one, if any."""
    license_name: str | None = None
    """Name of the licence, where --license is other."""
    private: bool = False
    """Make a new repository private."""
    revision: str | None = None
    """Branch to publish to. A missing branch is made from main."""
    notes: Path | None = None
    """Markdown file for the card: what the model was measured on, intended use."""
    overwrite: bool = False
    """Replace another model in the repository. Its history keeps the old one."""
    dry_run: bool = False
    """Check the model and print the plan, without writing to the Hub."""
    json: bool = False
    """Print JSON."""
