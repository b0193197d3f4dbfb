"""Names on the Hub, with a cache written by hand, or a Hub on this machine that fails."""

import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from utils.errors import InputError
from utils.files import hub

COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The layout of the Hub's cache, with one file of someone/model."""
    repo = tmp_path / "models--someone--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(COMMIT)
    (repo / f"snapshots/{COMMIT}/sub").mkdir(parents=True)
    (repo / f"snapshots/{COMMIT}/sub/weights.bin").write_text("weights")

    def from_cache_only(repo_id: str, filename: str, revision: str | None) -> str:
        arguments = {"revision": revision, "cache_dir": tmp_path, "local_files_only": True}
        return huggingface_hub.hf_hub_download(repo_id, filename, **arguments)

    monkeypatch.setattr(hub, "hf_hub_download", from_cache_only)
    return tmp_path


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_cached_file_is_found(cache: Path, revision: str) -> None:
    assert hub.local_file(f"hf://someone/model{revision}/sub/weights.bin").read_text() == "weights"


def test_the_shards_of_an_index_are_downloaded_too(cache: Path) -> None:
    folder = cache / f"models--someone--model/snapshots/{COMMIT}/sub"
    (folder / "w.index.json").write_text('{"weight_map": {"a": "weights.bin"}}')
    assert hub.local_file("hf://someone/model/sub/w.index.json") == folder / "w.index.json"
    (folder / "w.index.json").write_text('{"weight_map": {"a": "weights.bin", "b": "more.bin"}}')
    with pytest.raises(InputError, match="neither on the Hub nor in its cache"):
        hub.local_file("hf://someone/model/sub/w.index.json")


def test_a_path_is_unchanged(cache: Path) -> None:
    assert hub.local_file("someone/model/weights.bin") == Path("someone/model/weights.bin")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://someone/model", "expected hf://OWNER/REPO/FILE"),
        ("hf://someone/model/other.bin", "neither on the Hub nor in its cache"),
        ("hf://someone/model@v2/sub/weights.bin", "neither on the Hub nor in its cache"),
    ],
)
def test_errors_name_the_source(cache: Path, source: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        hub.local_file(source)
    assert str(error.value).startswith(f"{source}: ")
    assert "\n" not in str(error.value)


def test_a_folder_is_looked_up_on_the_hub_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, **options: object) -> str:
        asked.append((repo, options["revision"]))
        raise LocalEntryNotFoundError("cannot\nreach the Hub")

    asked: list[tuple[str, object]] = []
    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/rear").mkdir(parents=True)
    (tmp_path / "outputs/file").write_text("")
    for source in ("outputs/rear", Path("outputs/rear"), "outputs", str(tmp_path / "outputs/rear")):
        assert hub.local_folder(source, []) == Path(source)
    for source, message in {
        "outputs/raer": "outputs/raer: found no such folder, expected a folder; hf://outputs/raer would",
        "outputs/file": "outputs/file: found a file, expected a folder",
        Path("someone/model"): "someone/model: found no such folder, expected a folder",
        "model": "model: found no such folder, expected a folder",
        "./someone/model": "./someone/model: found no such folder, expected a folder",
        "/someone/model": "/someone/model: found no such folder, expected a folder",
    }.items():
        with pytest.raises(InputError, match=f"^{message}"):
            hub.local_folder(source, [])
    assert asked == []
    for source in ("someone/model", "hf://someone/model", "hf://someone/model@v2", "hf://outputs/raer"):
        with pytest.raises(InputError, match=r"neither on the Hub nor in its cache: cannot reach the Hub$"):
            hub.local_folder(source, [])
    assert asked == [("someone/model", None)] * 2 + [("someone/model", "v2"), ("outputs/raer", None)]


class FailingHub(BaseHTTPRequestHandler):
    """The first folder of a path is how it fails."""

    def do_HEAD(self) -> None:
        kind = self.path.split("/")[1]
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        self.send_response({"circle": 302, "refused": 403}.get(kind, 200))
        self.send_header("Location", self.path)
        self.send_header("X-Error-Message", "Accept the licence on the\x1b[2J page of the model")
        self.send_header("Content-Length", "9" if kind == "cut" else "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def failing_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FailingHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("reset", "Connection reset by peer"),
        ("circle", "redirects"),
        ("refused", r"403 Forbidden: Accept the licence on the\\x1b\[2J page"),
        ("cut", ""),
        ("no_hub", ""),
    ],
)
def test_a_hub_that_fails_is_one_line_with_its_reason(
    kind: str, reason: str, failing_hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"{failing_hub}/{kind}")
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        failing_hub + f"/{kind}/{{repo_id}}/{{revision}}/{{filename}}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=rf"^hf://a/b: neither on the Hub nor in its cache: .*{reason}") as error:
        hub.local_folder("hf://a/b", ["*"], endpoint=f"{failing_hub}/{kind}", cache_dir=tmp_path)
    assert "\n" not in str(error.value)
    if kind != "cut":  # the client tries that again for seconds
        with pytest.raises(InputError, match=rf"^hf://a/b/c: neither on the Hub nor in its cache: .*{reason}"):
            hub.local_file("hf://a/b/c")
