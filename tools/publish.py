"""latentds publish: a data set's folder to the Hub."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from latentds_tools.reports.commands import picked, show, tell

from latentds.core.display import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishOptions:
    license: str | None = None
    """Licence, as the Hub names it: mit, cc-by-4.0, ... Data sets need one; by default a model has
    the recorded one, if any."""
    license_name: str | None = None
    """Name of the licence, where --license is other."""
    private: bool = False
    """Make a new repository private."""
    revision: str | None = None
    """Branch to publish to, made from main where it is missing; or refs/pr/N, a pull request."""
    notes: Path | None = None
    """Markdown file for the card: of data where the slides come from and consent, of a model what
    it was measured on; intended use."""
    overwrite: bool = False
    """Replace other files in the repository. Its history keeps them."""
    dry_run: bool = False
    """Check, and print the plan. Nothing is sent to the Hub, but data sets are compared with it
    where it can be reached."""
    json: bool = False
    """Print JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PublishOptions):
    """Publish a data set on the Hub, with a card and a preview.

    Files that the repository lacks are sent, shards first, the manifest last. Then checksums are
    compared. An interrupted run is continued by the same command.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a data set."""
    repository: Annotated[str, tyro.conf.Positional]
    """ORG/NAME on the Hub. A missing repository is made."""
    license_link: str | None = None
    """Where to read the licence, where --license is other."""
    citation: Path | None = None
    """BibTeX file for the card."""
    thumbnails: bool = False
    """Also send the small pictures of slides ('latentds show --slides'). Look at these first:
    unlike patches, they show pen, glass and stickers beside the tissue."""
    look: Path | None = None
    """Folder to write card and preview to as well. By default NAME-look in a dry run, else none."""


def run(config: Config) -> None:
    from latentds.hub.set_upload import publish

    result = publish(
        config.folder,
        publication(config),
        look=config.look
        or (Path(f"{config.repository.partition('/')[2]}-look") if config.dry_run else None),
        tell=tell,
        **picked(config, "private", "overwrite", "dry_run", "thumbnails"),
    )
    say_published(result, config.json)


def publish_model_folder(
    send: Callable[..., Any], config: PublishOptions, folder: Path, repository: str
) -> None:
    """Publish a decoder or a backbone by its own function, and say what was done."""
    from latentds.hub.card import Publication
    from latentds.hub.licences import read_markdown

    result = send(
        folder,
        Publication(
            repository=repository,
            licence=config.license,
            licence_name=config.license_name,
            revision=config.revision,
            notes=read_markdown(config.notes),
        ),
        tell=tell,
        **picked(config, "private", "overwrite", "dry_run"),
    )
    say_published(result, config.json)


def say_published(result: Any, as_json: bool) -> None:
    """Warnings to stderr, then what lies on the Hub now."""
    for warning in result.warnings:
        say(f"warning: {warning}", file=sys.stderr)
    show(result.summary(), as_json, as_text)


def publication(config: Config) -> Any:
    from latentds.hub.card import Publication
    from latentds.hub.licences import read_markdown

    return Publication(
        repository=config.repository,
        licence=config.license,
        licence_name=config.license_name,
        licence_link=config.license_link,
        revision=config.revision,
        citation=read_markdown(config.citation),
        notes=read_markdown(config.notes),
    )


def as_text(summary: dict[str, Any]) -> str:
    is_done = summary["commit"] is not None
    sent = summary["sent" if is_done else "to_send"]
    lines = [f"{summary['url']}  {summary['commit'] or '(dry run, nothing written)'}"]
    lines += [f"  send   {path}  {size:,} bytes" for path, size in sent.items() if not is_done]
    lines += [f"  remove {path}" for path in summary["removed" if is_done else "to_remove"]]
    lines.append(
        f"{'sent' if is_done else 'to send'} {len(sent)} of {summary['files']} files, "
        f"{sum(sent.values()):,} of {summary['bytes']:,} bytes; "
        f"{len(summary['already_there'])} there already"
    )
    if summary["not_compared"]:
        lines.append(f"not compared with what the Hub holds: {summary['not_compared']}")
    if is_done:
        lines.append(f"checksums of {summary['checksums_compared']} files on the Hub are ours")
    return "\n".join(lines)
