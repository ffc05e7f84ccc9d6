"""A real HTTP server that speaks what data sets and decoders need of the Hub's API; misbehaves."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from tests.closing_server import ClosingServer
from tests.hub_writing import LARGE, Writing, git_blob

PAGE = 5  # entries of a tree listed at once: the Hub's 1,000, small enough to need pages
TOKENS = {"hf_write": "write", "hf_read": "read"}


@dataclasses.dataclass
class Repo:
    """Commits are whole trees: path to (large?, bytes)."""

    private: bool = False
    commits: dict[str, dict[str, tuple[bool, bytes]]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    messages: list[str] = dataclasses.field(default_factory=list)

    def commit(self, ref: str, tree: dict[str, tuple[bool, bytes]], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[oid], self.refs[ref] = tree, oid
        self.messages.append(message)
        return oid

    def tree(self, revision: str) -> dict[str, tuple[bool, bytes]] | None:
        return self.commits.get(self.refs.get(revision, revision))


class HubServer(ClosingServer):
    """Repositories in memory. `org` may be written to with hf_write, every other name may not.

    faults   what the next requests of a kind meet ("put", "commit", "batch", "resolve", ...): a
             status, "drop" (connection closed in the middle) or "hang" (until `resume` is set)
    corrupt  paths whose bytes are stored with a flipped bit, whatever was sent
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.requests: Counter[str] = Counter()
        self.corrupt: set[str] = set()
        self.hanging, self.resume = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        tree = self.repos[name].tree(revision)
        assert tree is not None
        return {path: content for path, (_, content) in tree.items()}

    def make(self, name: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        repo = self.repos[name] = Repo(private=private)
        tree = {".gitattributes": (False, b"*.tar filter=lfs\n")}
        tree |= {path: (path.endswith(LARGE), c) for path, c in (files or {}).items()}
        repo.commit("main", tree, "initial commit")
        return repo


class Handler(Writing, BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def route(self) -> None:
        parts = urlsplit(self.path)
        self.query, path = parse_qs(parts.query), unquote(parts.path)
        for method, pattern, kind in ROUTES:
            match = re.fullmatch(pattern, path)
            if method in (self.command, "*") and match:
                self.server.requests[kind] += 1
                if not self.misbehave(kind):
                    getattr(self, kind)(*match.groups())
                return
        self.answer(404, {"error": f"no route {self.command} {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = route

    def misbehave(self, kind: str) -> bool:
        fault = self.server.faults[kind].pop(0) if self.server.faults[kind] else ""
        if fault == "drop":
            self.rfile.read(int(self.headers.get("content-length", 0)) // 2)
            self.close_connection = True
            self.connection.close()
        elif fault == "hang":
            self.server.hanging.set()
            self.server.resume.wait(60)
            self.close_connection = True
        elif fault:
            self.body()
            self.answer(int(fault), {"error": "told to"})
        return bool(fault)

    def body(self) -> bytes:
        if self.headers.get("transfer-encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"content-length": str(len(encoded))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(encoded)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    @property
    def role(self) -> str | None:
        return TOKENS.get(self.headers.get("authorization", "").removeprefix("Bearer "))

    def repo(self, name: str, revision: str = "main") -> Repo | None:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self.role is None):
            return self.refuse(401 if self.role is None else 404, "RepoNotFound", "not found")
        if repo.tree(revision) is None:
            return self.refuse(404, "RevisionNotFound", f"no revision {revision}")
        return repo

    def whoami(self) -> None:
        if self.role is None:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        self.answer(200, {"name": "someone", "auth": {"accessToken": {"role": self.role}}})

    def info(self, name: str, revision: str | None = None) -> None:
        repo = self.repo(name, revision or "main")
        if repo:
            sha = repo.refs.get(revision or "main", revision)
            siblings = [{"rfilename": path} for path in repo.commits[sha]]
            self.answer(
                200, {"id": name, "sha": sha, "private": repo.private, "siblings": siblings}
            )

    def entries(self, repo: Repo, revision: str) -> dict[str, dict[str, object]]:
        tree = repo.tree(revision)
        assert tree is not None
        found: dict[str, dict[str, object]] = {}
        for path, (is_large, content) in sorted(tree.items()):
            for depth in range(1, path.count("/") + 1):
                folder = "/".join(path.split("/")[:depth])
                found[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            found[path] = {"type": "file", "path": path, "size": len(content)}
            pointer = f"sha256:{hashlib.sha256(content).hexdigest()} {len(content)}".encode()
            found[path]["oid"] = git_blob(pointer if is_large else content)
            if is_large:
                oid = hashlib.sha256(content).hexdigest()
                found[path]["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
        return found

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        repo = self.repo(name, revision)
        if not repo:
            return
        prefix = f"{folder}/" if folder else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        listed = [
            entry
            for path, entry in self.entries(repo, revision).items()
            if path.startswith(prefix) and (recursive or "/" not in path[len(prefix) :])
        ]
        if folder and not listed:
            return self.refuse(404, "EntryNotFound", f"no {folder}")
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(listed):
            url = f"{self.server.url}{urlsplit(self.path).path}?recursive={recursive}"
            headers["link"] = f'<{url}&cursor={start + PAGE}>; rel="next"'
        self.answer(200, listed[start : start + PAGE], headers)

    def paths_info(self, name: str, revision: str) -> None:
        content = self.body().decode()
        is_json = "json" in self.headers.get("content-type", "")
        paths = json.loads(content)["paths"] if is_json else parse_qs(content).get("paths", [])
        if repo := self.repo(name, revision):
            found = self.entries(repo, revision)
            self.answer(200, [found[path] for path in paths if path in found])

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.repo(name, revision)
        if not repo:
            return
        commit = repo.refs.get(revision, revision)
        if path not in repo.commits[commit]:
            return self.refuse(404, "EntryNotFound", f"no {path}")
        is_large, content = repo.commits[commit][path]
        etag = hashlib.sha256(content).hexdigest() if is_large else git_blob(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        if not wanted:
            return self.answer(200, content, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self.answer(206, content[first : last + 1], headers)


NAME = r"([\w.-]+/[\w.-]+)"
KIND = "(?:datasets|models)"  # names are not kept apart by kind: no test has one name twice
ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", f"/api/{KIND}/{NAME}/branch/(.+)", "branch"),
    ("GET", f"/api/{KIND}/{NAME}", "info"),
    ("GET", f"/api/{KIND}/{NAME}/revision/(.+)", "info"),
    ("GET", rf"/api/{KIND}/{NAME}/tree/(refs/pr/\d+|[^/]+)(?:/(.+))?", "tree"),
    ("POST", f"/api/{KIND}/{NAME}/paths-info/(.+)", "paths_info"),
    ("POST", f"/api/{KIND}/{NAME}/preupload/(.+)", "preupload"),
    ("POST", f"/api/{KIND}/{NAME}/commit/(.+)", "commit"),
    ("POST", f"/(?:datasets/)?{NAME}.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/large/([0-9a-f]{64})", "put"),
    ("*", rf"/(?:datasets/)?{NAME}/resolve/(refs/pr/\d+|[^/]+)/(.+)", "resolve"),
]


@contextlib.contextmanager
def hub_serving() -> Iterator[HubServer]:
    """The server in a thread."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.resume.set()
        server.shutdown()
        server.server_close()
