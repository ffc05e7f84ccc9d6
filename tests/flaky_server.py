"""A real HTTP server of a folder, with Range, that can be told to misbehave."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests.closing_server import ClosingServer

COMMIT = "c0ffee" + "0" * 34
RESOLVED = f"datasets/org/name/resolve/{COMMIT}/"


class FlakyServer(ClosingServer):
    """Serves `root`; `faults[path]` is a list of what the next requests of a path meet.

    Faults: "drop" (half the body, connection closed), "short" (fewer bytes than asked, all well by
    its header), "wrong" (other bytes), a status such as 429 (with `retry_after`), "whole" (ignores
    Range), "silent" (no answer until the server ends). The last one repeats for ever where it ends
    in "!".

    Also answers as much of the Hub's API as resolving a revision takes, for org/name@main. With
    `signature` it sends those who ask for files of it elsewhere, as the Hub does, to addresses that
    hold until it changes; `asked` counts what is asked of the Hub itself.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.retry_after = root, "0"
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.requests: Counter[str] = Counter()
        self.sent, self.is_ending = 0, threading.Event()
        self.signature, self.asked = "", 0
        self.tokens: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self, path: str) -> str:
        for name in (path, "*"):
            if self.faults[name]:
                fault = self.faults[name][0]
                return fault.rstrip("!") if fault.endswith("!") else self.faults[name].pop(0)
        return ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FlakyServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, _, query = self.path.lstrip("/").partition("?")
        self.server.tokens.add(self.headers.get("authorization", ""))
        if path.startswith("api/datasets/org/name/revision/"):
            self.server.requests["api"] += 1
            self.server.asked += 1
            return self.answer(200, json.dumps({"id": "org/name", "sha": COMMIT}).encode())
        if path.startswith(RESOLVED):
            path = path.removeprefix(RESOLVED)
            self.server.asked += 1
            if signature := self.server.signature:
                place = f"http://localhost:{self.server.server_address[1]}/{path}?{signature}"
                return self.answer(302, b"", {"location": place})
        self.server.requests[path] += 1
        if self.server.signature and query != self.server.signature:
            return self.answer(403, b"")
        fault = self.server.next_fault(path)
        if fault == "silent":
            self.server.is_ending.wait()
        if fault.isdigit():
            return self.answer(int(fault), b"busy", {"retry-after": self.server.retry_after})
        file = self.server.root / path
        if not file.is_file():
            return self.answer(404, b"")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        start, status, length = 0, 200, -1
        if wanted and fault != "whole":
            start, status = int(wanted[1]), 206
            length = int(wanted[2]) + 1 - start
        with file.open("rb") as opened:
            opened.seek(start)
            content = opened.read(length)
        if fault == "wrong":
            content = bytes([content[0] ^ 1]) + content[1:]
        if fault == "short":
            content = content[: len(content) // 2]
        return self.answer(status, content, cut=len(content) // 2 if fault == "drop" else None)

    def answer(
        self, status: int, content: bytes, headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:  # fmt: skip
        self.send_response(status)
        for name, value in ((headers or {}) | {"content-length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content[:cut])
            self.server.sent += len(content[:cut])
        if cut is not None:
            self.close_connection = True


@contextlib.contextmanager
def serving(root: Path) -> Iterator[FlakyServer]:
    """The server in a thread."""
    server = FlakyServer(root)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.is_ending.set()
        server.shutdown()
        server.server_close()
