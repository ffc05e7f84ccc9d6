"""What publishing will do: files the Hub lacks, files that go, and whose the repository is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from latentds.errors import FormatError, InputError
from latentds.hub.card import PREVIEW
from latentds.hub.client import HubFile, Repository
from latentds.store.format import MANIFEST, SLIDES_TABLE
from latentds.store.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from latentds.store.transport import Transport

README = "README.md"
MADE_HERE = (README, PREVIEW)  # may differ from run to run, without being another set's
HUB_OWN = (".gitattributes", README)  # what the Hub puts into a new repository
SHOWN = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishPlan:
    """What publishing will do.

    contents  every file of the published set: a path here, or bytes made for it; manifest last
    sha256    of those the manifest lists
    missing   paths to be sent, in that order
    deleted   paths to be removed first
    """

    contents: dict[str, Path | bytes]
    sha256: dict[str, str]
    missing: list[str]
    deleted: list[str]

    def size(self, path: str) -> int:
        content = self.contents[path]
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    def is_there(self, path: str, remote: Mapping[str, HubFile]) -> bool:
        """Whether the Hub has just these bytes at a path."""
        return path in remote and remote[path].holds(self.contents[path], self.sha256.get(path))

    def replacing(
        self, repository: Repository, foreign: list[str], page: str, overwrite: bool, what: str = ""
    ) -> PublishPlan:
        """The plan with what is to go first; InputError for that where nothing may be overwritten.

        foreign  what the repository holds of something else
        page     without which nobody takes what is half replaced for the old thing
        what     the something else, where that is known
        """
        if foreign and not overwrite:
            shown = ", ".join(foreign[:SHOWN]) + (", ..." if len(foreign) > SHOWN else "")
            raise InputError(
                f"{repository.name}@{repository.revision}: holds "
                f"{what or f'{len(foreign)} file(s) of something else'} ({shown}); choose another "
                "repository or --revision, or pass --overwrite to replace it (its history keeps it)"
            )
        deleted = [path for path in foreign if path not in self.contents or path == page]
        return dataclasses.replace(self, deleted=deleted)


def plan_missing(
    contents: dict[str, Path | bytes], remote: Mapping[str, HubFile], sha256: dict[str, str]
) -> PublishPlan:
    """The plan that sends what the Hub lacks, and removes nothing."""
    plan = PublishPlan(contents=contents, sha256=sha256, missing=[], deleted=[])
    missing = [path for path in contents if not plan.is_there(path, remote)]
    return dataclasses.replace(plan, missing=missing)


def make_plan(
    repository: Repository,
    manifest: Manifest,
    contents: dict[str, Path | bytes],
    remote: dict[str, HubFile],
    overwrite: bool,
) -> PublishPlan:
    """What is to be sent and removed; InputError where the repository holds something else."""
    sha256 = {shard.name: shard.sha256 for shard in manifest.shards}
    sha256 |= {name: str(entry["sha256"]) for name, entry in manifest.tables.items()}
    plan = plan_missing(contents, remote, sha256)
    found = remote_dataset_id(repository) if MANIFEST in remote else None
    foreign = find_foreign(plan, remote, is_same=found == manifest.dataset_id)
    is_other = MANIFEST in remote and found != manifest.dataset_id
    foreign = [MANIFEST, *foreign] if is_other else foreign
    what = f"the data set {found}" if found and is_other else ""
    return plan.replacing(repository, foreign, MANIFEST, overwrite, what)


def find_foreign(plan: PublishPlan, remote: dict[str, HubFile], is_same: bool) -> list[str]:
    """Paths in a repository that are no part of this set.

    Beside the same set people may have put what they like, but not where readers look for shards;
    without a manifest all must be what an upload of this set that was cut off has left.
    """
    extra = [path for path in remote if path not in plan.contents and path not in HUB_OWN]
    if is_same:
        ours = ("data/", "preview/", SLIDES_TABLE)  # thumbnails that are no longer to be there
        return sorted(path for path in extra if path.startswith(ours))
    free = (*MADE_HERE, MANIFEST)
    others = [path for path in plan.missing if path in remote and path not in free]
    return sorted(extra + others)


def remote_dataset_id(repository: Repository) -> str | None:
    """The identity of the set a repository holds; None where its manifest cannot be read."""
    transport = Transport(f"hf://datasets/{repository.name}@{repository.head}")
    where = f"{transport.shown}/{MANIFEST}"
    content = transport.read(MANIFEST, 0, None, MAX_MANIFEST_BYTES)
    try:
        return parse_manifest(content, where).dataset_id
    except FormatError:
        return None
