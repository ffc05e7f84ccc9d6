"""Publish a data set on the Hub: check it, plan, send what is missing, compare what arrived.

Card and preview are made for the upload and never written into the user's folder: the same folder
may go out under two names or licences, and may be read-only. Neither is hashed by the manifest.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentds.core.display import number_of
from latentds.core.storage import write_atomically
from latentds.errors import FormatError, InputError, UnreachableError
from latentds.hub.card import PREVIEW, README, Publication, hub_card, make_preview
from latentds.hub.client import HubFile, Repository
from latentds.hub.licences import check_licence, licence_warnings, recorded_licences
from latentds.store.composing import dataset_card
from latentds.store.format import MANIFEST, SLIDES_TABLE
from latentds.store.golden import read_golden
from latentds.store.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest, read_manifest
from latentds.store.slide_records import need_slide_records
from latentds.store.transport import Transport
from latentds.store.verification import verify

# The Hub advises 50 to 100 files a commit. What a killed run has sent but not committed is not sent
# again, so large batches lose nothing.
BATCH_FILES = 50
MADE_HERE = (README, PREVIEW)  # may differ from run to run, without being another set's
HUB_OWN = (".gitattributes", README)  # what the Hub puts into a new repository
OURS = ("data/", "preview/", SLIDES_TABLE)  # thumbnails that are no longer to be there
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
        self,
        repository: Repository,
        remote: Mapping[str, HubFile],
        is_same: bool,
        page: str,
        overwrite: bool,
        what: str = "",
    ) -> PublishPlan:
        """The plan with what is to go first; InputError for that where nothing may be overwritten.

        Beside the same set or model people may have put what they like, but not where readers look
        for shards; else all must be what an upload of it that was cut off has left.

        page  without which nobody takes what is half replaced for the old thing
        what  the repository holds instead, where that is known
        """
        foreign = [path for path in remote if path not in self.contents and path not in HUB_OWN]
        if is_same:
            foreign = [path for path in foreign if page == MANIFEST and path.startswith(OURS)]
        else:
            foreign += [path for path in self.missing if path in remote and path not in MADE_HERE]
        foreign.sort()
        if foreign and not overwrite:
            shown = ", ".join(foreign[:SHOWN]) + (", ..." if len(foreign) > SHOWN else "")
            what = what or f"{number_of(len(foreign), 'file')} of something else"
            raise InputError(
                f"{repository.name}@{repository.revision}: holds {what} ({shown}); choose another "
                "repository or --revision, or pass --overwrite to replace it (its history keeps it)"
            )
        deleted = [path for path in foreign if path not in self.contents or path == page]
        return dataclasses.replace(self, deleted=deleted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """What was done, or would be.

    commit   of the published set; None where nothing was written
    checked  files whose checksums were compared after the upload
    unseen   why the plan knows nothing of what the Hub holds; empty where it does
    """

    url: str
    plan: PublishPlan
    warnings: tuple[str, ...]
    commit: str | None = None
    checked: int = 0
    unseen: str = ""

    def summary(self) -> dict[str, Any]:
        """What the tools print, as plain JSON values."""
        plan, is_done = self.plan, self.commit is not None
        return {
            "url": self.url,
            "commit": self.commit,
            "files": len(plan.contents),
            "bytes": sum(plan.size(path) for path in plan.contents),
            "sent" if is_done else "to_send": {path: plan.size(path) for path in plan.missing},
            "already_there": [path for path in plan.contents if path not in plan.missing],
            "removed" if is_done else "to_remove": plan.deleted,
            "checksums_compared": self.checked,
            "not_compared": self.unseen or None,
            "warnings": list(self.warnings),
        }


def publish(
    folder: str | os.PathLike[str],
    publication: Publication,
    *,
    private: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    look: Path | None = None,
    thumbnails: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Published:
    """Publish a data set's folder.

    A run that was cut off is taken up by the same call: what the Hub has is not sent again. Shards
    go first, tables, card and manifest in one last commit: until then the repository has no
    manifest and no reader takes it for a data set.

    private       for a repository that is made now
    overwrite     replace whatever else the repository holds
    dry_run       look, plan, write nothing there; without a network plan as for an empty one
    look          folder that card and preview are written to as well, to be looked at
    thumbnails    send what is kept of slides, too: overviews show pen and glass, which no patch may
    tell          called with what is being done
    raises        InputError without licence, login or rights, where the folder is damaged or the
                  repository holds something else; FormatError where the Hub holds other bytes after
                  the upload
    """
    identifier = check_licence(publication.licence, publication.licence_name)
    repository = Repository(publication.repository, publication.revision)
    if not dry_run:
        repository.check_login()  # before hundreds of GB are hashed
    tell("checking the folder's sha256")
    manifest = check_folder(Path(folder), thumbnails)
    warnings = tuple(licence_warnings(licence_parts(manifest), identifier))
    contents = gather(Path(folder), manifest, publication, warnings, thumbnails)
    card = Path(folder) / README
    if card.is_file() and card.read_text() != dataset_card(manifest):
        warnings += (f"{card} is not published, a card is made anew; pass your own words with "
                     "--notes",)  # fmt: skip
    if look is not None:
        write_look(look, contents)
        tell(f"card and preview, to be looked at: {look}")
    if not thumbnails and (Path(folder) / SLIDES_TABLE).is_file():
        warnings += ("pictures of the slides are not published; --thumbnails sends them",)
    unseen = ""
    try:
        remote = have_repository(repository, private, dry_run)
    except UnreachableError as error:
        if not dry_run:
            raise
        remote, unseen = {}, str(error)
    plan = make_plan(repository, manifest, contents, remote, overwrite)
    published = Published(url=repository.url, plan=plan, warnings=warnings, unseen=unseen)
    if dry_run:
        return published
    return carry_out(repository, published, {shard.name for shard in manifest.shards}, tell)


def licence_parts(manifest: Manifest) -> list[tuple[str, str, bool]]:
    """What a set comes from, as `licence_warnings` takes it."""
    card = manifest.contract.autoencoder
    licence = str(card.get("licence") or "unknown")
    sources = sorted(set(recorded_licences(manifest.made)))
    return [
        (f"the autoencoder {card.get('name')}", licence, bool(card.get("gated"))),
        *(("the source", source, False) for source in sources),
    ]


def carry_out(
    repository: Repository,
    published: Published,
    bulk: Collection[str],
    tell: Callable[[str], None],
) -> Published:
    """Send what a plan says, `bulk` first, and compare what arrived."""
    send(repository, published.plan, bulk, tell)
    tell("comparing checksums")
    checked = compare(repository, published.plan)
    return dataclasses.replace(published, commit=repository.head, checked=checked)


def have_repository(
    repository: Repository, private: bool, dry_run: bool = False
) -> dict[str, HubFile]:
    """What the repository holds; it is made where it is not there, unless nothing may be written.

    raises  InputError without rights, or where it is public and may not be
    """
    remote = repository.files()
    if remote is None and not dry_run:
        repository.create(private)
        remote = repository.files()  # a new branch starts with what main holds
    if remote is not None and private and not repository.is_private():
        raise InputError(
            f"{repository.name}: is public, --private was asked for; make it private in its "
            "settings first, or choose another name"
        )
    return remote or {}


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
    is_same = found == manifest.dataset_id
    what = f"the data set {found}" if found and not is_same else ""
    return plan.replacing(repository, remote, is_same, MANIFEST, overwrite, what)


def remote_dataset_id(repository: Repository) -> str | None:
    """The identity of the set a repository holds; None where its manifest cannot be read."""
    transport = Transport(f"hf://datasets/{repository.name}@{repository.head}")
    where = f"{transport.shown}/{MANIFEST}"
    content = transport.read(MANIFEST, 0, None, MAX_MANIFEST_BYTES)
    try:
        return parse_manifest(content, where).dataset_id
    except FormatError:
        return None


def check_folder(folder: Path, thumbnails: bool) -> Manifest:
    """The manifest of a folder whose files are what it says; thumbnails only where it has some."""
    if thumbnails:
        need_slide_records(folder)
    result = verify(folder, "sha256")
    if not result.is_good:
        more = f" (and {len(result.problems) - 1} more)" if len(result.problems) > 1 else ""
        raise InputError(
            f"{result.problems[0][1]}{more}; not published. 'latentds verify' tells all"
        )
    return read_manifest(folder)


def gather(
    folder: Path,
    manifest: Manifest,
    publication: Publication,
    warnings: tuple[str, ...],
    thumbnails: bool = False,
) -> dict[str, Path | bytes]:
    """Every file of the published set: shards first, manifest last."""
    golden = read_golden(folder, manifest.contract, manifest.patches, manifest.golden_sha256)
    card = hub_card(manifest, golden, publication, warnings)
    contents: dict[str, Path | bytes] = {
        shard.name: folder / shard.name for shard in manifest.shards
    }
    contents |= {name: folder / name for name in manifest.tables}
    if thumbnails:
        contents[SLIDES_TABLE] = folder / SLIDES_TABLE
    if len(golden.rows):
        contents[PREVIEW] = make_preview(folder)
    return contents | {README: card.encode(), MANIFEST: (folder / MANIFEST).read_bytes()}


def write_look(folder: Path, contents: dict[str, Path | bytes]) -> None:
    """Write card and preview to a folder, over those of an earlier run; InputError for others'."""
    ours = {README, PREVIEW.partition("/")[0]}
    others = sorted({path.name for path in folder.iterdir()} - ours) if folder.is_dir() else []
    if others:
        raise InputError(f"--look {folder}: holds {others[0]}; name an empty folder")
    for name in (README, PREVIEW):
        content = contents.get(name)
        if isinstance(content, bytes):
            write_atomically(folder / name, content)


def send(
    repository: Repository, plan: PublishPlan, bulk: Collection[str], tell: Callable[[str], None]
) -> None:
    """Make the commits: what is to go, `bulk` in batches, then everything else at once."""
    large = [path for path in plan.missing if path in bulk]
    steps: list[tuple[list[str], list[str]]] = [([], plan.deleted)]
    steps += [(large[at : at + BATCH_FILES], []) for at in range(0, len(large), BATCH_FILES)]
    steps += [([path for path in plan.missing if path not in bulk], [])]
    steps = [step for step in steps if step[0] or step[1]]
    for number, (paths, deleted) in enumerate(steps, 1):
        size, files = sum(plan.size(path) for path in paths), number_of(len(paths), "file")
        tell(f"commit {number} of {len(steps)}: {files}, {size / 1e6:,.1f} MB")
        message = f"Publish with latentds ({number} of {len(steps)})"
        repository.commit({path: plan.contents[path] for path in paths}, deleted, message)


def compare(repository: Repository, plan: PublishPlan) -> int:
    """Number of files the Hub now lists with the checksums of ours; FormatError where it does not.

    Of large files it lists the sha256, which is compared with the manifest's; of small ones git's
    SHA-1, compared with the file's.
    """
    remote = repository.files() or {}
    wrong = [path for path in plan.contents if not plan.is_there(path, remote)]
    if wrong:
        listed = (
            remote[wrong[0]].sha256 or remote[wrong[0]].blob if wrong[0] in remote else "nothing"
        )
        raise FormatError(
            f"{repository.name}@{repository.revision}: {len(wrong):,} not as sent of "
            f"{number_of(len(plan.contents), 'file')}; {wrong[0]} is listed as {listed}, ours is "
            f"{plan.sha256.get(wrong[0], 'another')}. "
            "Run the same command again; if it stays so, tell the Hub"
        )
    return len(plan.contents)


def front_matter(
    publication: Publication,
    tags: Sequence[str],
    base_model: str | None = None,
    library: str = "latentds",
) -> str:
    base = [f"base_model: {base_model}"] if base_model else []
    lines = [*publication.licence_lines, *base, f"library_name: {library}", "tags:"]
    return "\n".join([*lines, *(f"- {tag}" for tag in tags)])


def publish_files(
    publication: Publication,
    contents: dict[str, Path | bytes],
    *,
    weights: str,
    page: str,
    warnings: Sequence[str],
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
    repository = Repository(publication.repository, publication.revision, kind="model")
    if not dry_run:
        repository.check_login()
    remote = have_repository(repository, private, dry_run)
    plan = plan_missing(contents, remote, {})
    is_same = page in remote and weights not in plan.missing
    plan = plan.replacing(repository, remote, is_same, page, overwrite)
    published = Published(url=repository.url, plan=plan, warnings=tuple(warnings))
    return published if dry_run else carry_out(repository, published, {weights}, tell)
