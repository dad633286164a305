"""A stand-in of the Hugging Face hub's API on this machine: repositories in memory.

It speaks what `huggingface_hub` asks for to make, look at, fill and fetch a repository; large files
travel in the commit itself, which the hub leaves to its own storage.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_right"
SHA = "0" * 39 + "1"


@dataclass
class Repository:
    """One repository: its files by name."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Hub:
    """The repositories by (kind, id); `status` is answered to every call that writes, if set."""

    address: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    status: int | None = None


@contextmanager
def running_hub() -> Generator[Hub]:
    """A hub that listens until the end of the block."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, status: int, value: Any = b"", **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _may(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self) -> None:
        body = self._body()
        if not self._may():
            return self._answer(401, {"error": "who are you"})
        if self.hub.status is not None:
            return self._answer(self.hub.status, {"error": "not now"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            kind, name = asked.get("type") or "model", f"{asked['organization']}/{asked['name']}"
            is_new = (kind, name) not in self.hub.repositories
            if is_new:
                private = bool(asked.get("private")) or asked.get("visibility") == "private"
                self.hub.repositories[kind, name] = Repository(private=private)
            status = 200 if is_new else 409
            return self._answer(status, {"url": f"{self.hub.address}/{name}", "name": name})
        if self.path.startswith("/api/validate-yaml"):
            return self._answer(200, {"errors": [], "warnings": []})
        found = re.match(r"/api/(model|dataset)s/([^/]+/[^/]+)/(preupload|commit)/", self.path)
        assert found is not None, self.path
        repository = self.hub.repositories[found[1], found[2]]
        if found[3] == "preupload":
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        for line in body.splitlines():
            change = json.loads(line)
            if change["key"] == "file":
                data = base64.b64decode(change["value"]["content"])
                repository.files[change["value"]["path"]] = data
            if change["key"] == "deletedFile":
                del repository.files[change["value"]["path"]]
        address = f"{self.hub.address}/{found[2]}/commit/{SHA}"
        self._answer(200, {"commitUrl": address, "commitOid": SHA, "pullRequestUrl": None})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        found = re.match(r"/api/(model|dataset)s/([^/]+/[^/]+)(/.*)?$", path)
        held = found and self.hub.repositories.get((found[1], found[2]))
        if found is not None:
            if held is None or (held.private and not self._may()):
                return self._answer(404, {"error": "none"}, X_Error_Code="RepoNotFound")
            if (found[3] or "").startswith("/tree/"):
                return self._answer(200, [_entry(name, held.files[name]) for name in held.files])
            siblings = [{"rfilename": name} for name in held.files]
            told = {"id": found[2], "sha": SHA, "private": held.private, "siblings": siblings}
            return self._answer(200, told)
        found = re.match(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)$", path)
        assert found is not None, self.path
        data = self.hub.repositories["dataset", found[1]].files[found[2]]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        self._answer(200, data, ETag=etag, X_Repo_Commit=SHA)

    do_HEAD = do_GET


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {
        "type": "file",
        "path": name,
        "size": len(data),
        "oid": hashlib.sha1(data).hexdigest(),
    }
