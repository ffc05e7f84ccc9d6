"""Ranges of remote files: https and the Hub by requests, the rest by fsspec, with retries."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, thread, wait
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from latentds.core.storage import check_host, naming
from latentds.errors import DamagedPackError, FormatError, InputError, first_words, missing_extra
from latentds.store.client_errors import DIGITS, TransientError, client_errors, is_network, judge

logger = logging.getLogger(__name__)

ATTEMPTS = 8
FIRST_DELAY_S, LAST_DELAY_S, LONGEST_WAIT_S = 0.5, 60.0, 300.0  # a minute of waiting in all
TIMEOUT_S = (10, 60)  # connect, between two reads
HEADERS_S = 75.0  # for an answer to begin, the above together
LOOK_S = 0.2  # between looks whether what is waited for is still wanted
GRACE_S, LEAST_RATE = 30.0, 2048  # of a body: bytes a second, by all that came after the grace
CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-")
READ_BYTES = 1 << 20
PART_BYTES = 1 << 23  # of a table, read and tried again as one
HUB = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([^/]+(?:/pr/\d+)?))?(?:/(.*))?")
COMMIT = re.compile(r"[0-9a-f]{40}")


def shown(location: str) -> str:
    """A location without what may be secret: user, password, query."""
    parts = urlsplit(location)
    host = parts.netloc.rpartition("@")[2] if not location.startswith("hf://") else parts.netloc
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def open_location(location: str, **options: Any) -> tuple[Any, str]:
    """fsspec's file system of a location, and the path there; InputError where there is none."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(location, **options)
    except (ImportError, ValueError, OSError) as error:  # OSError: libraries that are not there
        if isinstance(error, ImportError) and location.startswith("s3:"):
            raise missing_extra("s3fs", "s3") from error
        raise InputError(f"{shown(location)}: {first_words(error, 200)}") from error
    return filesystem, str(path).rstrip("/")


def join(location: str, name: str) -> str:
    if not location.startswith(("https://", "http://")):
        return f"{location.rstrip('/')}/{name}"  # a folder of a store may be named x#2
    parts = urlsplit(location)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


class Transport:
    """Reads files of one folder.

    location  https://..., hf://datasets/ORG/NAME[@REVISION][/FOLDER], or what fsspec opens
    revision  commit of the Hub, None elsewhere
    """

    def __init__(self, location: str) -> None:
        check_host(location)
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
        self.places: dict[str, str] = {}  # addresses that the Hub has sent us to, by file
        self.is_given_up = False

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name != "local"}
        # A token, or an address with a signature, is no business of whoever gets the pickle.
        return kept | {"headers": {}, "places": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.local = threading.local()  # connections are not carried to another process

    @contextlib.contextmanager
    def given_up_together(self) -> Iterator[None]:
        """Where the block fails, other threads give up what they read here."""
        try:
            yield
        except BaseException:
            self.is_given_up = True
            raise

    def check_wanted(self) -> None:
        """Refuse to go on for nobody: a process that ends waits for its threads."""
        # Python joins the threads of pools while its main thread is alive, and tells by this alone.
        if self.is_given_up or thread._shutdown:
            raise InputError(f"{self.shown}: given up, nobody waits for it any more")

    def resolve(self) -> None:
        """Ask the Hub which commit the revision is; nothing elsewhere."""
        if self.hub and self.revision is None:
            self.revision = self.retry(self.ask_hub, self.shown)

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
            if isinstance(error, (ValueError, KeyError, TypeError, AttributeError)):
                raise TransientError(f"the Hub's answer cannot be read ({error!r:.80})") from error
            raise
        if not COMMIT.fullmatch(str(info.sha)):
            raise InputError(f"{self.shown}: the Hub names commit {str(info.sha)[:60]!r}; refused")
        return str(info.sha)

    def url(self, name: str) -> str:
        if not self.hub:
            return join(self.location, name)
        from huggingface_hub import constants, get_token

        self.resolve()
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
            try:
                return fetch()
            except TransientError:
                self.places.pop(self.url(name), None)  # another may be sound
                raise

        def fetch() -> bytes:
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

        read: bytes = self.retry(attempt, where, attempts)
        return read

    def download(self, name: str, path: Path, size: int, digest: str | None = None) -> None:
        """Write a whole file of known size and sha256 to `path`, a part in memory at a time.

        digest  None where it is not known: then its size is all that is checked
        """
        where = f"{self.shown.rstrip('/')}/{name}"
        for number in (1, 2):
            sha256 = hashlib.sha256()
            with naming(path), path.open("wb") as file:
                for start in range(0, size, PART_BYTES):
                    length = min(PART_BYTES, size - start)
                    content = self.read(name, start, length, length)
                    sha256.update(content)
                    file.write(content)
                file.flush()
                os.fsync(file.fileno())  # from now on only its size is looked at
            if digest in (None, sha256.hexdigest()):
                return
            logger.warning(
                "%s: not of the recorded hash%s", where, ", again" if number == 1 else ""
            )
        raise FormatError(
            f"{where}: not of the recorded hash, twice; the file was replaced or damaged, tell its "
            "publisher"
        )

    def retry(self, attempt: Callable[[], Any], where: str, attempts: int = ATTEMPTS) -> Any:
        """What the first try that works gives; waits longer each time, or as long as told."""
        delay = FIRST_DELAY_S
        for number in range(1, attempts + 1):
            self.check_wanted()
            try:
                return attempt()
            except TransientError as error:
                if number == attempts or (error.wait_s or 0) > LONGEST_WAIT_S:
                    raise InputError(
                        f"{where}: {error}, after {number} tries; check the network and go on: "
                        "what is fetched is kept"
                    ) from error
                pause = max(error.wait_s or 0.0, delay * random.uniform(0.5, 1.5))
                logger.debug("%s: %s; again in %.1f s", where, error, pause)
            end = time.monotonic() + pause
            while (left := end - time.monotonic()) > 0:
                self.check_wanted()
                time.sleep(min(left, LOOK_S))
            delay = min(delay * 2, LAST_DELAY_S)

    def fetch(self, name: str, start: int, size: int | None, limit: int) -> bytes:
        """A range or a file, asked for once; TransientError where nothing comes in HEADERS_S.

        Asked for by a thread that is left behind then: a socket's timeout ends only its silence.
        """
        is_http = self.hub is not None or self.location.startswith(("https://", "http://"))
        url = self.url(name) if is_http else join(self.location, name)
        client, read = self.client(url, is_http), self.fetch_http if is_http else self.fetch_fsspec
        future, has_begun = Future[bytes](), threading.Event()

        def ask() -> None:
            try:
                future.set_result(read(client, url, start, size, limit, has_begun))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=ask, daemon=True).start()
        deadline = time.monotonic() + HEADERS_S
        while not wait([future], LOOK_S).done:
            self.check_wanted()
            if time.monotonic() > deadline and not has_begun.is_set():
                self.local.pid = None  # its connections are the other thread's now
                raise TransientError(f"no answer in {HEADERS_S:g} s")
        return future.result()

    def fetch_http(
        self, session: Any, url: str, start: int, size: int | None, limit: int,
        has_begun: threading.Event,
    ) -> bytes:  # fmt: skip
        """A range by HTTP, never more than asked for."""
        from http.client import HTTPException

        from urllib3.exceptions import HTTPError

        wanted = {"range": f"bytes={start}-{start + size - 1}"} if size is not None else {}
        headers = wanted | {"accept-encoding": "identity"}
        try:
            with self.ask_http(session, url, headers) as answer:
                has_begun.set()
                check_answer(answer, shown(url), None if size is None else start)
                return read_body(answer, shown(url), size if size is not None else limit)
        except FileNotFoundError:
            raise
        # Their texts have the address, token and all. RequestException is an OSError, that of an
        # address in a redirect a ValueError.
        except (OSError, HTTPError, HTTPException, ValueError) as error:
            raise TransientError(type(error).__name__) from None

    def ask_http(self, session: Any, url: str, headers: dict[str, str]) -> Any:
        """An answer, from where the Hub has sent an earlier request for the file while that holds.

        The Hub limits how often it is asked itself. As `hf_transfer` has it.
        """
        if place := self.places.get(url):  # signed, holds for a while; no place for our token
            answer = session.get(place, headers=headers, stream=True, timeout=TIMEOUT_S)
            if answer.status_code == (206 if "range" in headers else 200):
                return answer
            answer.close()
            self.places.pop(url, None)
        answer = session.get(url, headers=self.headers | headers, stream=True, timeout=TIMEOUT_S)
        if self.hub and urlsplit(answer.url).netloc != urlsplit(url).netloc:
            self.places[url] = answer.url
        return answer

    def client(self, url: str, is_http: bool) -> Any:
        """This thread's connections or file system, in this process: none survives a fork."""
        if getattr(self.local, "pid", None) != os.getpid():
            if is_http:
                import requests

                made: Any = requests.Session()
            else:
                made, _ = open_location(url, skip_instance_cache=True)
            self.local.pid, self.local.client = os.getpid(), made
        return self.local.client

    def fetch_fsspec(
        self, filesystem: Any, url: str, start: int, size: int | None, limit: int,
        has_begun: threading.Event,
    ) -> bytes:  # fmt: skip
        """A range by a file system of fsspec, whose own limits of time count."""
        has_begun.set()
        with client_errors(shown(url)):
            path = filesystem._strip_protocol(url)
            if size is None and (found := filesystem.size(path) or 0) > limit:
                raise FormatError(f"{shown(url)}: {found} bytes, more than {limit}; refused")
            content: bytes = filesystem.cat_file(
                path, start=start, end=None if size is None else start + size
            )
        return content


def check_answer(answer: Any, where: str, start: int | None) -> None:
    """Refuse an answer that is not what was asked for, as far as its status and headers tell.

    start  of the range that was asked for, None for a whole file
    """
    if answer.status_code >= 400:
        raise judge(answer.status_code, answer.headers, where)
    if start is not None and answer.status_code != 206:
        raise InputError(
            f"{where}: the server ignores Range requests; latentds reads packs by range, serve the "
            "files from one that knows them (nginx, S3, the Hub)"
        )
    coding = answer.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise InputError(
            f"{where}: comes compressed ({coding[:20]!r}) though 'identity' was asked for; switch "
            "compression off for these files, ranges count bytes as they are stored"
        )
    found = CONTENT_RANGE.match(answer.headers.get("content-range", ""))
    if start is not None and found and int(found[1]) != start:
        raise TransientError(f"bytes from {found[1]} came, not from {start}")


def read_body(answer: Any, where: str, most: int) -> bytes:
    """The body of an answer, at most so many bytes, at no less than LEAST_RATE."""
    length = answer.headers.get("content-length")
    expected = int(length) if length and DIGITS.fullmatch(length.strip()) else None
    if length is not None and expected is None:
        raise TransientError(f"content-length is {length[:20]!r}, no number")
    # What has come, not all of READ_BYTES: urllib3 would gather them for as long as it takes.
    read = getattr(answer.raw, "read1", None) or answer.raw._fp.read1  # urllib3 2 has its own
    started, parts, got = time.monotonic(), [], 0
    while part := read(READ_BYTES):
        parts.append(part)
        got += len(part)
        if got > most:
            raise FormatError(f"{where}: more than {most} bytes came; refused")
        late = time.monotonic() - started - GRACE_S
        if late > 0 and got < late * LEAST_RATE:
            raise TransientError(f"{got} bytes in {GRACE_S + late:.0f} s, too slow")
    if expected is not None and got != expected:
        raise TransientError(f"{got} of {expected} bytes came")
    return b"".join(parts)
