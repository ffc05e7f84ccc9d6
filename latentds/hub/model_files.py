"""What every published model has in common: its publication, its front matter, the upload."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentds.hub.client import HubFile, Repository
from latentds.hub.publish_plan import HUB_OWN, README, PublishPlan, holds_other
from latentds.hub.set_upload import Published, carry_out, have_repository
from latentds.hub.snippets import Publication


def front_matter(
    publication: Publication,
    tags: Sequence[str],
    base_model: str | None = None,
    library: str = "latentds",
) -> str:
    """The card's YAML."""
    base = [f"base_model: {base_model}"] if base_model else []
    lines = [*publication.licence_lines, *base, f"library_name: {library}", "tags:"]
    return "\n".join([*lines, *(f"- {tag}" for tag in tags)])


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
    return carry_out(repository, plan, {weights}, warnings, tell, dry_run=dry_run)


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
