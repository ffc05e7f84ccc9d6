"""Ranges of remote files: https and the Hub by requests, the rest by fsspec, with retries."""

from __future__ import annotations

import email.utils
import hashlib
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from latentds.errors import DamagedPackError, FormatError, InputError, missing_extra

logger = logging.getLogger(__name__)

ATTEMPTS = 8
FIRST_DELAY_S, LAST_DELAY_S, LONGEST_WAIT_S = 0.5, 60.0, 300.0  # a minute of waiting in all
TIMEOUT_S = (10, 60)  # connect, between two reads
READ_BYTES = 1 << 20
PART_BYTES = 1 << 23  # of a table, read and tried again as one
HUB = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([^/]+(?:/pr/\d+)?))?(?:/(.*))?")
COMMIT = re.compile(r"[0-9a-f]{40}")


class TransientError(Exception):
    """Worth another try; `wait_s` where the server said when."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def shown(location: str) -> str:
    """A location without what may be secret: user, password, query."""
    parts = urlsplit(location)
    host = parts.netloc.rpartition("@")[2] if not location.startswith("hf://") else parts.netloc
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def unopenable(location: str, error: ImportError | ValueError) -> Exception:
    """The error of a location that fsspec has no file system for; it names the missing package."""
    if isinstance(error, ImportError) and location.startswith("s3:"):
        return missing_extra("s3fs", "s3")
    return InputError(f"{shown(location)}: {error}")


def join(location: str, name: str) -> str:
    """The location of a file in a folder."""
    parts = urlsplit(location)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


class Transport:
    """Reads files of one folder.

    location  https://..., hf://datasets/ORG/NAME[@REVISION][/FOLDER], or what fsspec opens
    revision  commit of the Hub, None elsewhere
    """

    def __init__(self, location: str) -> None:
        self.location, self.shown = location, shown(location)
        self.revision: str | None = None
        self.headers: dict[str, str] = {}
        found = HUB.fullmatch(location)
        self.hub = (found[0], *found.groups()) if found else None  # whole, repository, ref, folder
        if location.startswith("hf://") and not self.hub:
            raise InputError(f"{location}: not hf://datasets/ORG/NAME[@REVISION][/FOLDER]")
        if self.hub and COMMIT.fullmatch(self.hub[2] or ""):
            self.revision = self.hub[2]
        self.local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name != "local"}
        return kept | {"headers": {}}  # a token is no business of whoever gets the pickle

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.local = threading.local()  # connections are not carried to another process

    def resolve(self) -> None:
        """Ask the Hub which commit the revision is; nothing elsewhere."""
        if self.hub and self.revision is None:
            self.revision = retry(self.ask_hub, self.shown)

    def ask_hub(self) -> str:
        """The commit of a branch, tag or pull request."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

        assert self.hub is not None
        try:
            info = HfApi().repo_info(self.hub[1], repo_type="dataset", revision=self.hub[2])
        except RepositoryNotFoundError as error:
            raise InputError(
                f"{self.shown}: no such data set on the Hub, or not for you; check the name, log "
                "in with 'hf auth login'"
            ) from error
        except HfHubHTTPError as error:
            raise judge(error.response.status_code, error.response.headers, self.shown) from error
        except Exception as error:  # httpx's are no OSError, and were requests' before 1.0
            if is_network(error):
                raise TransientError(type(error).__name__) from None
            raise
        return str(info.sha)

    def url(self, name: str) -> str:
        """Where a file is fetched from."""
        if not self.hub:
            return join(self.location, name)
        from huggingface_hub import constants, get_token

        token = get_token()
        if token and "authorization" not in self.headers:
            self.headers["authorization"] = f"Bearer {token}"
        folder = f"{self.hub[3].strip('/')}/" if self.hub[3] else ""
        path = quote(folder + name)
        return f"{constants.ENDPOINT}/datasets/{self.hub[1]}/resolve/{self.revision}/{path}"

    def read(
        self,
        name: str,
        start: int,
        size: int | None,
        limit: int,
        check: Callable[[bytes], bool] = bool,
        attempts: int = ATTEMPTS,
    ) -> bytes:
        """Bytes [start, start + size) of a file, or all of it where size is None.

        limit   bytes that are read at most
        attempts  tries before giving up
        check   whether bytes are what they should be; wrong ones are fetched once more
        raises  DamagedPackError for wrong bytes, FileNotFoundError, InputError where access is
                refused or the server stays away
        """
        where, wrong = f"{self.shown.rstrip('/')}/{name}", 0

        def attempt() -> bytes:
            nonlocal wrong
            content = self.fetch(name, start, size, limit)
            if size is not None and len(content) != size:
                raise TransientError(f"{len(content)} of {size} bytes came")
            if not check(content):
                wrong += 1
                if wrong > 1:
                    raise DamagedPackError(
                        f"{where}: bytes {start}..{start + len(content)} are not of the recorded "
                        "hash, twice; the file was replaced or damaged, tell its publisher"
                    )
                raise TransientError("wrong hash", 0.0)
            return content

        read: bytes = retry(attempt, where, attempts)
        return read

    def download(self, name: str, path: Path, size: int, digest: str) -> None:
        """Write a whole file of known size and sha256 to `path`, a part in memory at a time."""
        where = f"{self.shown.rstrip('/')}/{name}"
        for number in (1, 2):
            sha256 = hashlib.sha256()
            with path.open("wb") as file:
                for start in range(0, size, PART_BYTES):
                    length = min(PART_BYTES, size - start)
                    content = self.read(name, start, length, length)
                    sha256.update(content)
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())  # from now on only its size is looked at
            if sha256.hexdigest() == digest:
                return
            logger.warning(
                "%s: not of the recorded hash%s", where, ", again" if number == 1 else ""
            )
        raise FormatError(
            f"{where}: not of the recorded hash, twice; the file was replaced or damaged, tell its "
            "publisher"
        )

    def fetch(self, name: str, start: int, size: int | None, limit: int) -> bytes:
        """One try."""
        if self.hub or self.location.startswith(("https://", "http://")):
            return self.fetch_http(self.url(name), start, size, limit)
        return self.fetch_fsspec(join(self.location, name), start, size, limit)

    def fetch_http(self, url: str, start: int, size: int | None, limit: int) -> bytes:
        """A range by HTTP, never more than asked for."""
        import requests

        session = self.session()
        wanted = {"range": f"bytes={start}-{start + size - 1}"} if size is not None else {}
        headers = self.headers | wanted | {"accept-encoding": "identity"}
        most, parts, got = size if size is not None else limit, [], 0
        try:
            with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
                if answer.status_code >= 400:
                    raise judge(answer.status_code, answer.headers, shown(url))
                if size is not None and answer.status_code != 206:
                    raise InputError(
                        f"{shown(url)}: the server ignores Range requests; latentds reads packs by "
                        "range, serve the files from one that knows them (nginx, S3, the Hub)"
                    )
                for part in answer.iter_content(READ_BYTES):
                    parts.append(part)
                    got += len(part)
                    if got > most:
                        raise FormatError(f"{shown(url)}: more than {most} bytes came; refused")
        except requests.RequestException as error:  # its text has the address, token and all
            raise TransientError(type(error).__name__) from None
        expected = answer.headers.get("content-length")
        if expected is not None and got != int(expected):
            raise TransientError(f"{got} of {expected} bytes came")
        return b"".join(parts)

    def session(self) -> Any:
        """This thread's connections, in this process."""
        import requests

        if getattr(self.local, "pid", None) != os.getpid():
            self.local.pid, self.local.session = os.getpid(), requests.Session()
        return self.local.session

    def fetch_fsspec(self, url: str, start: int, size: int | None, limit: int) -> bytes:
        """A range by fsspec."""
        import fsspec

        try:
            if getattr(self.local, "pid", None) != os.getpid():
                # An event loop does not survive a fork: every process has a file system of its own.
                made, _ = fsspec.core.url_to_fs(url, skip_instance_cache=True)
                self.local.pid, self.local.filesystem = os.getpid(), made
            filesystem = self.local.filesystem
            path = filesystem._strip_protocol(url)
            if size is None and (found := filesystem.size(path) or 0) > limit:
                raise FormatError(f"{shown(url)}: {found} bytes, more than {limit}; refused")
            content: bytes = filesystem.cat_file(
                path, start=start, end=None if size is None else start + size
            )
        except ImportError as error:
            raise unopenable(url, error) from error
        except (FileNotFoundError, PermissionError) as error:
            raise judge(
                404 if isinstance(error, FileNotFoundError) else 403, {}, shown(url)
            ) from error
        except Exception as error:  # botocore's are no OSError
            if is_network(error):
                raise TransientError(type(error).__name__) from None
            if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
                raise judge(401, {}, shown(url)) from None
            raise
        return content


def judge(status: int, headers: Any, where: str) -> Exception:
    """What an HTTP status means for us."""
    if status == 404:
        return FileNotFoundError(f"{where}: not there (404)")
    if status in (401, 403):
        return InputError(
            f"{where}: access refused ({status}); log in ('hf auth login', cloud credentials) or "
            "ask for access"
        )
    if status in (408, 425, 429) or status >= 500:
        return TransientError(f"status {status}", wait_of(headers.get("retry-after")))
    return InputError(f"{where}: the server answers {status}")


def is_network(error: Exception) -> bool:
    """Whether an error of a client library is one of the connection."""
    names = {name for kind in type(error).__mro__ for name in (kind.__name__,)}
    network = {"TransportError", "TimeoutException", "EndpointConnectionError", "ClientError",
               "HTTPClientError", "RequestException"}  # fmt: skip
    return isinstance(error, OSError) or bool(names & network)


def wait_of(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or a date."""
    if not value:
        return None
    if value.strip().isdigit():
        return float(value)
    moment = email.utils.parsedate_tz(value)
    return max(0.0, email.utils.mktime_tz(moment) - time.time()) if moment else None


def retry(attempt: Callable[[], Any], where: str, attempts: int = ATTEMPTS) -> Any:
    """The result of the first try that works; waits longer each time, or as long as it is told."""
    delay = FIRST_DELAY_S
    for number in range(1, attempts + 1):
        try:
            return attempt()
        except TransientError as error:
            if number == attempts or (error.wait_s or 0) > LONGEST_WAIT_S:
                raise InputError(
                    f"{where}: {error}, after {number} tries; check the network and go on: what is "
                    "fetched is kept"
                ) from error
            wait = max(error.wait_s or 0.0, delay * random.uniform(0.5, 1.5))
            logger.debug("%s: %s; again in %.1f s", where, error, wait)
            time.sleep(wait)
            delay = min(delay * 2, LAST_DELAY_S)
