"""What every published model has in common: its publication, its front matter, the upload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from latentds.hub.client import Repository
from latentds.hub.publish_plan import HUB_OWN, README, plan_missing
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
    plan = plan_missing(contents, remote, {})
    foreign: list[str] = []  # beside their model people may put what they like
    if page not in remote or weights in plan.missing:
        foreign = [path for path in remote if path not in contents and path not in HUB_OWN]
        foreign += [path for path in plan.missing if path in remote and path != README]
    plan = plan.replacing(repository, sorted(foreign), page, overwrite)
    return carry_out(repository, plan, {weights}, warnings, tell, dry_run=dry_run)


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
