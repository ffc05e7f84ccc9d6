"""What the local Hub server of the tests answers to writes: repositories, large files, commits."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

LARGE = (".tar", ".npy", ".parquet", ".png", ".safetensors")  # as the Hub's default .gitattributes


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Writing:
    """Half of the request handler; the other half has the plumbing."""

    server: Any
    query: dict[str, list[str]]
    path: str

    def may_write(self, name: str) -> bool:
        """Its owners may."""
        if self.role == "write" and name.startswith("org/"):
            return True
        self.refuse(403, "", f"You don't have the rights to write to {name}")
        return False

    def create(self) -> None:
        wanted = json.loads(self.body())
        name = f"{wanted['organization']}/{wanted['name']}"
        if not self.may_write(name):
            return
        place = "" if wanted.get("type", "model") == "model" else "datasets/"
        url = f"{self.server.url}/{place}{name}"
        if name in self.server.repos:
            return self.answer(409, {"error": "You already created this repo", "url": url})
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.server.make(name, private=bool(private))
        self.answer(200, {"url": url, "id": name})

    def branch(self, name: str, branch: str) -> None:
        self.body()
        repo = self.repo(name)
        if repo and self.may_write(name):
            if branch in repo.refs:
                return self.answer(409, {"error": "Reference already exists"})
            repo.refs[branch] = repo.refs["main"]
            self.answer(200, {})

    def preupload(self, name: str, revision: str) -> None:
        files = json.loads(self.body())["files"]
        repo = self.repo(name, revision)
        if not repo or not self.may_write(name):
            return
        tree = repo.tree(revision) or {}
        modes = []
        for file in files:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            stored = tree.get(file["path"])
            oid = None
            if stored:
                oid = hashlib.sha256(stored[1]).hexdigest() if stored[0] else git_blob(stored[1])
            modes.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        self.answer(200, {"files": modes})

    def batch(self, name: str) -> None:
        wanted = json.loads(self.body())
        if not self.may_write(name):
            return
        objects = wanted["objects"]
        for entry in objects:
            if entry["oid"] not in self.server.large:
                href = f"{self.server.url}/large/{entry['oid']}"
                entry["actions"] = {"upload": {"href": href}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer(400, {"error": "wrong bytes"})
        self.server.large[oid] = content
        self.answer(200, b"")

    def validate(self) -> None:
        import yaml

        text = json.loads(self.body())["content"]
        try:
            card = yaml.safe_load(text.split("---\n")[1])
        except (IndexError, yaml.YAMLError) as error:
            return self.answer(400, {"errors": [{"message": str(error)}], "warnings": []})
        errors = [] if card.get("license") else [{"message": "no license"}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        repo = self.repo(name, revision)
        if not repo or not self.may_write(name):
            return
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.refs[revision]):
            return self.refuse(412, "", "A commit has happened since")
        tree = dict(repo.tree(revision) or {})
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del tree[value["path"]]
            elif line["key"] == "file":
                tree[value["path"]] = (False, base64.b64decode(value["content"]))
            elif value["oid"] not in self.server.large:
                return self.refuse(400, "", f"{value['path']} was not uploaded")
            else:
                tree[value["path"]] = (True, self.server.large[value["oid"]])
        for path in self.server.corrupt & {line["value"].get("path") for line in lines[1:]}:
            is_large, content = tree[path]
            tree[path] = (is_large, bytes([content[0] ^ 1]) + content[1:])
        oid = repo.commit(revision, tree, header["summary"])
        place = "datasets/" if self.path.startswith("/api/datasets/") else ""
        base = f"{self.server.url}/{place}{name}"
        answer = {"commitUrl": f"{base}/commit/{oid}", "commitOid": oid, "success": True}
        self.answer(200, answer)
