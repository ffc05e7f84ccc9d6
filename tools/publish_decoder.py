"""latentds publish-decoder: a decoder's folder to the Hub."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Publish a decoder on the Hub, with a card.

    Checks its tensors, sends weights first, decoder.json last, then compares checksums. A run that
    was cut off is taken up by the same command.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a decoder (decoder.json, decoder.safetensors), or of the run that trained it."""
    repository: Annotated[str, tyro.conf.Positional]
    """ORG/NAME on the Hub; made where it is not there."""
    license: str | None = None
    """Licence, as the Hub names it: mit, cc-by-nc-4.0, ...; by default the one in decoder.json."""
    license_name: str | None = None
    """Its name, with --license other."""
    private: bool = False
    """Make a new repository private."""
    revision: str | None = None
    """Branch to publish to (made from main where it is not there)."""
    notes: Path | None = None
    """Markdown file for the card: what it was measured on, intended use."""
    overwrite: bool = False
    """Replace another decoder there; its history keeps it."""
    dry_run: bool = False
    """Check, look and print the plan; write nothing."""
    json: bool = False
    """Print JSON."""


def run(config: Config) -> None:
    """Publish, and say what was done."""
    from latentds.hub.decoders import DecoderPublication, publish_decoder
    from latentds.hub.licences import read_markdown

    publication = DecoderPublication(
        repository=config.repository,
        licence=config.license,
        licence_name=config.license_name,
        revision=config.revision,
        notes=read_markdown(config.notes),
    )
    result = publish_decoder(
        config.folder,
        publication,
        private=config.private,
        overwrite=config.overwrite,
        dry_run=config.dry_run,
        tell=lambda line: print(f"{line} ...", file=sys.stderr),
    )
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    summary = result.summary()
    print(json.dumps(summary, indent=1) if config.json else as_text(summary))


def as_text(summary: dict[str, Any]) -> str:
    """The summary for people."""
    is_done = summary["commit"] is not None
    sent, removed = ("sent", "removed") if is_done else ("to_send", "to_remove")
    lines = [f"{summary['url']}  {summary['commit'] or '(dry run, nothing written)'}"]
    lines += [
        f"  {sent.replace('_', ' ')} {path}  {n:,} bytes" for path, n in summary[sent].items()
    ]
    lines += [f"  {removed.replace('_', ' ')} {path}" for path in summary[removed]]
    if is_done:
        lines.append(f"checksums of {summary['checksums_compared']} files on the Hub are ours")
    return "\n".join(lines)
