"""A repository on the Hub: who may write, what is there, commits; errors a user can use.

The calls are those that huggingface_hub 1.x and 2.x both have: create_commit sends what is missing
of its files first, in either (upload_large_folder is gone from 2.x).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import hashlib
import io
import itertools
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from latentds.core.storage import READ_BYTES
from latentds.errors import InputError, UnreachableError

NAME = re.compile(r"[\w.-]+/[\w.-]+")
LOGIN = "log in with 'hf auth login', or set HF_TOKEN"
AGAIN = "run the same command again, what is there is kept"
REMEDIES = {  # by HTTP status
    401: f"the token is not accepted: {LOGIN}",
    403: "the token has no right to: use one that has, or ask an owner of the organization",
    409: f"somebody else changed it meanwhile: look at it, then {AGAIN}",
    412: f"somebody else changed it meanwhile: look at it, then {AGAIN}",
}


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file as the Hub lists it.

    sha256  of its bytes where it is stored as a large file, else None
    blob    git's id of it: SHA-1 of the bytes behind a short header, where it is no large file
    """

    size: int
    sha256: str | None
    blob: str

    def holds(self, content: Path | bytes, sha256: str | None = None) -> bool:
        """Whether it is these bytes; of a path with a known sha256 nothing is read."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if size != self.size:
            return False
        if self.sha256 is None:
            return self.blob == digest(content, hashlib.sha1(b"blob %d\0" % size))
        return self.sha256 == (sha256 or digest(content, hashlib.sha256()))


def digest(content: Path | bytes, hasher: hashlib._Hash) -> str:
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        while block := file.read(READ_BYTES):
            hasher.update(block)
    return hasher.hexdigest()


def patterns(wanted: set[str], listed: list[str]) -> list[str]:
    """Patterns that match the wanted ones of the paths alone, one where all that begin alike are.

    The client tries every pattern on every path: 10^8 times for 10,000 shards by name.

    listed  all paths, sorted
    """
    if wanted.isdisjoint(listed):
        return []
    start = os.path.commonprefix(listed)  # noqa: RUF071
    if len(listed) == 1 or wanted.issuperset(listed):
        return [glob.escape(start) + "*" * (len(listed) > 1)]
    parts = itertools.groupby(listed, lambda path: path[: len(start) + 1])
    return [pattern for _, part in parts for pattern in patterns(wanted, list(part))]


class Repository:
    """A repository.

    name      ORG/NAME
    revision  branch, or refs/pr/N
    kind      "dataset" or "model"
    head      commit the next one is to follow; None until `files` has found it
    """

    def __init__(self, name: str, revision: str | None = None, kind: str = "dataset") -> None:
        if not NAME.fullmatch(name):
            raise InputError(f"{name!r} is not ORG/NAME on the Hub")
        self.name, self.revision = name, revision or "main"
        self.head: str | None = None
        self.api = HfApi()
        self.options = {"repo_id": name, "repo_type": kind}

    @property
    def url(self) -> str:
        tree = "" if self.revision == "main" else f"/tree/{self.revision}"
        place = "datasets/" if self.options["repo_type"] == "dataset" else ""
        return f"{self.api.endpoint}/{place}{self.name}{tree}"

    def check_login(self) -> None:
        """Refuse to go on without a token that may write (InputError)."""
        if not get_token():
            raise InputError(f"{self.name}: not logged in to the Hub; {LOGIN} (a write token)")
        with self.asking("log in"):
            user = self.api.whoami()
        role = user.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise InputError(
                f"{self.name}: the token of {user['name']} may only read; make one that may write "
                "at https://huggingface.co/settings/tokens, then 'hf auth login'"
            )

    def files(self) -> dict[str, HubFile] | None:
        """What the revision holds, by path; None where there is no repository or no such branch."""
        try:
            with self.asking("list files"):
                info = self.api.repo_info(**self.options, revision=self.revision)
                self.head = info.sha
                tree = self.api.list_repo_tree(**self.options, revision=self.head, recursive=True)
                return {
                    entry.path: HubFile(
                        entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id
                    )
                    for entry in tree
                    if hasattr(entry, "blob_id")  # folders have none
                }
        except FileNotFoundError:
            return None

    def download(self, folder: Path, paths: Collection[str], listed: Collection[str]) -> None:
        """Fetch files into a folder, of those that are listed at `head`."""
        chosen = patterns(set(paths), sorted(listed))
        with self.asking(f"fetch into {folder}"):
            snapshot_download(
                **self.options, revision=self.head, local_dir=folder, allow_patterns=chosen
            )

    def is_private(self) -> bool:
        with self.asking("look at the repository"):
            return bool(self.api.repo_info(**self.options).private)

    def create(self, private: bool) -> None:
        """Have the repository and the branch; one that is there stays as it is."""
        with self.asking("create the repository"):
            # None, not False: a public set is the user's default, not ours to impose on an org.
            self.api.create_repo(**self.options, private=private or None, exist_ok=True)
            if self.revision != "main" and not self.revision.startswith("refs/"):
                self.api.create_branch(**self.options, branch=self.revision, exist_ok=True)

    def commit(self, files: dict[str, Path | bytes], deleted: Sequence[str], message: str) -> None:
        """One commit; what the Hub already has of the files' bytes is not sent again.

        It is refused where somebody else has committed since `files` looked.
        """
        additions = [
            CommitOperationAdd(path, str(content) if isinstance(content, Path) else content)
            for path, content in files.items()
        ]
        with self.asking("upload"):
            made = self.api.create_commit(
                **self.options,
                operations=[CommitOperationDelete(path) for path in deleted] + additions,
                commit_message=message,
                revision=self.revision,
                parent_commit=self.head,
            )
        self.head = str(made.oid)

    @contextlib.contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Turn the client's errors into one line that says what to do."""
        try:
            yield
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            # The client wraps what happened to a large file, or to its question for one.
            is_wrapped = type(error) in (RuntimeError, LocalEntryNotFoundError)
            cause = error.__cause__ if is_wrapped else error
            raise self.explain(cause or error, what) from error

    def explain(self, error: BaseException, what: str) -> Exception:
        if isinstance(error, OSError) and error.filename:
            return error  # a file here, not the Hub
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            missing = isinstance(error, RepositoryNotFoundError | RevisionNotFoundError)
            if missing or status == 404:
                return FileNotFoundError(
                    f"{self.name}@{self.revision}: not on the Hub, or not for you; check the name, "
                    f"{LOGIN}"
                )
            reason = error.response.headers.get("x-error-message") or f"status {status}"
            remedy = REMEDIES.get(status, AGAIN)
            return InputError(f"{self.name}: cannot {what} ({reason}); {remedy}")
        if isinstance(error, ValueError) or error.args[:1] == (errno.ENOSPC,):
            return InputError(f"{self.name}: cannot {what}: {error}")
        return UnreachableError(
            f"{self.name}: cannot {what}, the connection to the Hub failed "
            f"({type(error).__name__}: {error}); {AGAIN}"
        )
