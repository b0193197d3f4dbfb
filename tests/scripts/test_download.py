"""Downloads from a small server on this machine that answers as the Hub does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.processes import ROOT
from utils.files.lock import only_writer

CONTENT = b"weights" * 1000


class Hub(BaseHTTPRequestHandler):
    sha256 = hashlib.sha256(CONTENT).hexdigest()

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        self.answer(CONTENT)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        lfs = {"oid": self.sha256, "size": len(CONTENT), "pointerSize": 1}
        file = {"type": "file", "path": "reAR-S.safetensors", "size": len(CONTENT), "oid": "0" * 40, "lfs": lfs}
        self.answer(json.dumps([file]).encode())

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(CONTENT).hexdigest()}"')
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body or CONTENT)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def download(folder: Path, endpoint: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, str(ROOT / "scripts/download.py"), "rear_s"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_file_lands_where_configs_look_for_it(endpoint: str, tmp_path: Path) -> None:
    for message in ("reAR-S.safetensors of qyoo/reAR", "exists"):
        done = download(tmp_path, endpoint)
        assert (done.returncode, done.stdout) == (0, f"ckpt/reAR-S.safetensors: {message}\n"), done.stderr
        assert (tmp_path / "ckpt/reAR-S.safetensors").read_bytes() == CONTENT
        assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["reAR-S.safetensors"]


def test_a_file_that_differs_gets_no_name(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "sha256", "f" * 64)
    done = download(tmp_path, endpoint)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "error: ckpt/reAR-S.safetensors.download/reAR-S.safetensors: sha256: found "
    )
    assert not (tmp_path / "ckpt/reAR-S.safetensors").exists()


def test_a_file_is_downloaded_by_one_process(endpoint: str, tmp_path: Path) -> None:
    with only_writer(tmp_path / "ckpt/reAR-S.safetensors"):
        done = download(tmp_path, endpoint)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ckpt/reAR-S.safetensors: in use by process ")


def test_no_hub_is_one_line(tmp_path: Path) -> None:
    done = download(tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ckpt/reAR-S.safetensors: found no answer for reAR-S.safetensors of qyoo/reAR")
    assert "Traceback" not in done.stderr
