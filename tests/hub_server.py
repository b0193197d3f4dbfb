"""A small Hub on this machine: repositories in memory, made, filled and read by huggingface_hub itself."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """
    Attributes:
        files: by repository and name.
        private: repositories that were made so.
        cards: texts whose metadata were to be validated.
        asked: methods and paths of all requests.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.cards: list[str] = []
        self.asked: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def local_hub() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def file_facts(files: dict[str, bytes], name: str) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(files[name]), "oid": COMMIT}


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self._chunks()
        self.server.asked.append(f"POST {self.path}")
        if self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}" if given.get("organization") else given["name"]
            self.server.files.setdefault(name, {})
            self.server.private |= {name} if given.get("private") or given.get("visibility") == "private" else set()
            self._json({"url": f"{self.server.endpoint}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            answers = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self._json({"files": answers})
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/[^/]+", self.path):
            files = self.server.files[f"datasets/{found[1]}"]
            asked = parse_qs(body.decode())["paths"] if b"=" in body else json.loads(body)["paths"]
            self._json([file_facts(files, name) for name in asked if name in files])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[found[1]][line["value"]["path"]] = content
            self._json(
                {
                    "success": True,
                    "commitOid": COMMIT,
                    "commitUrl": f"{self.server.endpoint}/{found[1]}/commit/{COMMIT}",
                }
            )
        else:
            self._json({"error": "unknown"}, 404)

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        path = path.replace("/api/datasets/", "/api/models/datasets/")
        repository = r"((?:datasets/)?[^/]+/[^/]+)"
        if found := re.fullmatch(rf"/api/models/{repository}(?:/(revision|tree)/[^/]+)?", path):
            files = self.server.files.get(found[1])
            if files is None:
                self._json({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
            elif found[2] == "tree":
                self._json([file_facts(files, name) for name in files])
            else:
                siblings = [{"rfilename": name} for name in files]
                self._json({"_id": "0", "id": found[1], "sha": COMMIT, "siblings": siblings})
        elif found := re.fullmatch(rf"/{repository}/resolve/[^/]+/(.+)", path):
            content = self.server.files.get(found[1], {}).get(found[2])
            if content is None:
                self._json({"error": "Entry not found"}, 404, **{"X-Error-Code": "EntryNotFound"})
            else:
                tag = hashlib.sha256(content).hexdigest()
                headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}
                part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if part:
                    content = content[int(part[1]) : int(part[2]) + 1]
                self._answer(content, 206 if part else 200, **headers)
        else:
            self._json({"error": "unknown"}, 404)

    do_HEAD = do_GET  # noqa: N815, the name is http.server's

    def _json(self, content: Any, status: int = 200, **headers: str) -> None:
        self._answer(json.dumps(content).encode(), status, **{"Content-Type": "application/json", **headers})

    def _answer(self, body: bytes, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _chunks(self) -> bytes:
        """A body without a Content-Length."""
        parts = []
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *arguments: object) -> None:
        pass
