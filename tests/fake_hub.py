"""A small Hub on 127.0.0.1 that speaks as much of the protocol as huggingface_hub needs to push and to load.

Repositories are dictionaries of contents. Everything that was asked is kept in `calls`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin")  # what goes through LFS
USERS = {"hf_annwrites": ("ann", True), "hf_annreads": ("ann", False), "hf_bobwrites": ("bob", True)}


@dataclass
class Repo:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors lfs\n"})
    commits: int = 0

    @property
    def head(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


class FakeHub:
    """`url`, `repos`, `calls`, `lfs` (sha256 -> content), and `broken`: how many uploads are still to fail."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.broken = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def environment(self, token: str | None, home: Any) -> dict[str, str]:
        """Of a child process: set before anything is imported."""
        found = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
        }
        return {**found, "HF_TOKEN": token} if token else found


@contextmanager
def running() -> Iterator[FakeHub]:
    hub = FakeHub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def answer(
            self, status: int, value: Any = None, content: bytes | None = None, **headers: str
        ) -> None:
            body = content if content is not None else json.dumps(value).encode()
            self.send_response(status)
            for name, text in headers.items():
                self.send_header(name.replace("_", "-"), text)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status: int, code: str, message: str) -> None:
            self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

        def user(self) -> tuple[str, bool] | None:
            return USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

        def begin(self) -> tuple[str, bytes]:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            hub.calls.append(f"{self.command} {path}")
            return path, body

        def repo(self, name: str, write: bool = False) -> Repo | None:
            """The repository, or None when the refusal has been sent."""
            repo, user = hub.repos.get(name), self.user()
            if self.headers.get("Authorization") and user is None:
                self.refuse(401, "", "Invalid credentials in Authorization header")
            elif repo is None or (repo.private and (user is None or user[0] != name.split("/")[0])):
                self.refuse(404, "RepoNotFound", "Repository not found")
            elif write and (user is None or not user[1] or user[0] != name.split("/")[0]):
                self.refuse(403, "", "Forbidden: you need write access")
            else:
                return repo
            return None

        def do_POST(self) -> None:
            path, body = self.begin()
            if path == "/api/repos/create":
                self.create(json.loads(body))
            elif path == "/api/validate-yaml":
                bad = b"license: unknown-to-the-hub" in json.loads(body)["content"].encode()
                errors = [{"message": '"license" must be one of [apache-2.0, mit, other]'}] if bad else []
                self.answer(400 if bad else 200, {"errors": errors, "warnings": []})
            elif found := re.fullmatch(r"/api/models/(.+?)/preupload/main", path):
                if self.repo(found[1], write=True):
                    modes = [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(body)["files"]
                    ]
                    self.answer(200, {"files": modes})
            elif found := re.fullmatch(r"/(.+?)\.git/info/lfs/objects/batch", path):
                if self.repo(found[1], write=True):
                    self.answer(
                        200,
                        {"transfer": "basic", "objects": [*map(self.action, json.loads(body)["objects"])]},
                    )
            elif found := re.fullmatch(r"/api/models/(.+?)/commit/main", path):
                repo = self.repo(found[1], write=True)
                if repo is not None:
                    self.commit(repo, found[1], [json.loads(line) for line in body.splitlines() if line])
            else:
                self.refuse(404, "", f"the fake Hub does not know {path}")

        def create(self, asked: dict[str, Any]) -> None:
            user, owner = self.user(), asked.get("organization")
            if user is None:
                return self.refuse(401, "", "Invalid credentials in Authorization header")
            if not user[1] or (owner or user[0]) != user[0]:
                return self.refuse(403, "", f"You don't have the rights to create a model under {owner}")
            name = f"{user[0]}/{asked['name']}"
            if name in hub.repos:
                return self.refuse(409, "", "You already created this model repo")
            hub.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
            self.answer(200, {"url": f"{hub.url}/{name}", "name": name})

        def action(self, asked: dict[str, Any]) -> dict[str, Any]:
            made = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in hub.lfs:
                made["actions"] = {"upload": {"href": f"{hub.url}/store/{asked['oid']}"}}
            return made

        def commit(self, repo: Repo, name: str, lines: list[dict[str, Any]]) -> None:
            if lines[0]["value"].get("parentCommit") not in (None, repo.head):
                return self.refuse(412, "", "A commit has happened since")
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "deletedFile":
                    del repo.files[value["path"]]
                elif line["key"] == "lfsFile":
                    repo.files[value["path"]] = hub.lfs[value["oid"]]
                else:
                    repo.files[value["path"]] = base64.b64decode(value["content"])
            repo.commits += 1
            url = f"{hub.url}/{name}/commit/{repo.head}"
            self.answer(200, {"success": True, "commitOid": repo.head, "commitUrl": url})

        def do_PUT(self) -> None:
            path, body = self.begin()
            if hub.broken:
                hub.broken -= 1
                return self.refuse(400, "", "the connection broke")
            hub.lfs[path.rsplit("/", 1)[-1]] = body
            self.answer(200, {})

        def do_GET(self) -> None:
            path, _ = self.begin()
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
                repo = self.repo(found[1])
                if repo is not None:
                    self.about(repo, found[1], found[2] or "")
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                repo = self.repo(found[1])
                if repo is not None:
                    self.resolve(repo, found[2])
            else:
                self.refuse(404, "", f"the fake Hub does not know {path}")

        do_HEAD = do_GET

        def about(self, repo: Repo, name: str, rest: str) -> None:
            if rest.startswith("/tree"):
                rows = [
                    {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
                    for path, content in repo.files.items()
                ]
                return self.answer(200, rows)
            siblings = []
            for path, content in repo.files.items():
                row: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": _blob(content)}
                if path.endswith(LARGE):
                    row["lfs"] = {
                        "sha256": hashlib.sha256(content).hexdigest(),
                        "size": len(content),
                        "pointerSize": 130,
                    }
                siblings.append(row)
            self.answer(200, {"id": name, "sha": repo.head, "private": repo.private, "siblings": siblings})

        def resolve(self, repo: Repo, path: str) -> None:
            if path not in repo.files:
                return self.refuse(404, "EntryNotFound", "Entry not found")
            content = repo.files[path]
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            part = content[int(found[1]) : int(found[2]) + 1 if found[2] else None] if found else content
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": repo.head}
            self.answer(200 if found is None else 206, None, part, **headers)

    return Handler
