"""Ranges of remote files: https and the Hub by requests, the rest by fsspec, with retries."""

from __future__ import annotations

import email.utils
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from latentds.errors import DamagedPackError, FormatError, InputError, missing_extra

logger = logging.getLogger(__name__)

ATTEMPTS = 6
FIRST_DELAY_S, LAST_DELAY_S, LONGEST_WAIT_S = 0.5, 30.0, 300.0
TIMEOUT_S = (10, 60)  # connect, between two reads
READ_BYTES = 1 << 20
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
        self.hub = HUB.fullmatch(location)
        if location.startswith("hf://") and not self.hub:
            raise InputError(f"{location}: not hf://datasets/ORG/NAME[@REVISION][/FOLDER]")
        if self.hub and COMMIT.fullmatch(self.hub[2] or ""):
            self.revision = self.hub[2]
        self.local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "local"}

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
        except OSError as error:  # requests' and httpx' connection errors among them
            raise TransientError(str(error)) from error
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
    ) -> bytes:
        """Bytes [start, start + size) of a file, or all of it where size is None.

        limit   bytes that are read at most
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

        read: bytes = retry(attempt, where)
        return read

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
        except requests.RequestException as error:
            raise TransientError(type(error).__name__) from error
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
            extra = "s3" if url.startswith("s3:") else "remote"
            raise missing_extra(str(error), extra) from error
        except (FileNotFoundError, PermissionError) as error:
            raise judge(
                404 if isinstance(error, FileNotFoundError) else 403, {}, shown(url)
            ) from error
        except OSError as error:
            raise TransientError(str(error)[:200]) from error
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


def wait_of(value: str | None) -> float | None:
    """Seconds of a Retry-After header: a number, or a date."""
    if not value:
        return None
    if value.strip().isdigit():
        return float(value)
    moment = email.utils.parsedate_tz(value)
    return max(0.0, email.utils.mktime_tz(moment) - time.time()) if moment else None


def retry(attempt: Callable[[], Any], where: str) -> Any:
    """The result of the first try that works; waits longer each time, or as long as it is told."""
    delay = FIRST_DELAY_S
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except TransientError as error:
            if number == ATTEMPTS or (error.wait_s or 0) > LONGEST_WAIT_S:
                raise InputError(
                    f"{where}: {error}, after {number} tries; check the network and go on: what is "
                    "fetched is kept"
                ) from error
            wait = delay * random.uniform(0.5, 1.5) if error.wait_s is None else error.wait_s
            logger.debug("%s: %s; again in %.1f s", where, error, wait)
            time.sleep(wait)
            delay = min(delay * 2, LAST_DELAY_S)
