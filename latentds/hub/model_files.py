"""What every published model has in common: its publication, its front matter, the upload."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentds.hub.client import HubFile, Repository
from latentds.hub.licences import read_markdown
from latentds.hub.model_options import PublishOptions
from latentds.hub.publish_plan import HUB_OWN, README, PublishPlan, holds_other
from latentds.hub.set_upload import Published, compare, have_repository, send


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelPublication:
    """What a publisher says of a model, beyond what its folder says.

    repository    ORG/NAME on the Hub
    licence       identifier the Hub knows; None takes the one the folder has
    licence_name  its name, with 'other'
    revision      branch it goes to; None for main
    notes         Markdown
    """

    repository: str
    licence: str | None = None
    licence_name: str | None = None
    revision: str | None = None
    notes: str = ""

    @property
    def at(self) -> str:
        """What follows the repository's name where it is loaded: @BRANCH, nothing for main."""
        branch = self.revision or "main"
        return "" if branch == "main" or branch.startswith("refs/") else f"@{branch}"


def publication_of(repository: str, options: PublishOptions) -> ModelPublication:
    """What a tool's user says of a model; InputError for notes that are no text."""
    return ModelPublication(
        repository=repository,
        licence=options.license,
        licence_name=options.license_name,
        revision=options.revision,
        notes=read_markdown(options.notes),
    )


def front_matter(
    publication: ModelPublication,
    tags: Sequence[str],
    base_model: str | None = None,
    library: str = "latentds",
) -> str:
    """The card's YAML; what a user wrote is quoted as JSON, which YAML reads."""
    lines = [f"license: {publication.licence}"]
    if publication.licence_name:
        lines.append(f"license_name: {json.dumps(publication.licence_name)}")
    if base_model:
        lines.append(f"base_model: {base_model}")
    return "\n".join([*lines, f"library_name: {library}", "tags:", *(f"- {tag}" for tag in tags)])


def publish_files(
    repository: Repository,
    contents: dict[str, Path | bytes],
    *,
    weights: str,
    page: str,
    warnings: tuple[str, ...],
    private: bool,
    overwrite: bool,
    dry_run: bool,
    tell: Callable[[str], None],
) -> Published:
    """Send a model's files, its weights first, and compare what arrived.

    weights  the file that tells one model from another
    page     without which nobody takes the repository for such a model
    raises   InputError without login or rights, or where the repository holds something else;
             FormatError where the Hub holds other bytes after the upload
    """
    remote = have_repository(repository, private, dry_run)
    plan = plan_files(repository, contents, remote, overwrite, weights=weights, page=page)
    checked = 0
    if not dry_run:
        send(repository, plan, {weights}, False, tell)
        tell("comparing checksums")
        checked = compare(repository, plan)
    return Published(
        url=repository.url,
        commit=None if dry_run else repository.head,
        plan=plan,
        warnings=warnings,
        checked=checked,
    )


def plan_files(
    repository: Repository,
    contents: dict[str, Path | bytes],
    remote: Mapping[str, HubFile],
    overwrite: bool,
    *,
    weights: str,
    page: str,
) -> PublishPlan:
    """What is to be sent and removed; InputError where the repository holds something else."""
    listed = dict(remote)
    plan = PublishPlan(contents=contents, sha256={}, missing=[], deleted=[])
    missing = [path for path in contents if not plan.is_there(path, listed)]
    foreign = [path for path in listed if path not in contents and path not in HUB_OWN]
    is_same = page in listed and weights not in missing
    if is_same:
        foreign = []  # beside their model people may put what they like
    else:
        others = [path for path in missing if path in listed and path != README]
        foreign += sorted(others)
    if foreign and not overwrite:
        raise holds_other(repository, sorted(foreign))
    # Without its page nobody takes what is half replaced for the old model.
    deleted = [path for path in foreign if path not in contents or path == page]
    return dataclasses.replace(plan, missing=missing, deleted=deleted)


def summary_text(summary: dict[str, Any]) -> str:
    """The summary of a publication for people."""
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
