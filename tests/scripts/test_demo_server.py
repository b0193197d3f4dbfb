"""The page of scripts/demo.py as strangers may use it, over its API; in a browser: test_demo_page.py."""

import html
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scripts.demo_model import MAX_BYTES
from tests.processes import ROOT, WAIT_S, free_port
from tests.scripts.test_demo import demo_arguments
from utils.config import load_config

gradio_client = pytest.importorskip("gradio_client", reason="the test of the demo's API needs gradio")
handle_file = gradio_client.handle_file
pytestmark = pytest.mark.slow
# A proxy that answers nothing, a service of Kubernetes, and a public tunnel: nothing of this is for the page.
ENVIRONMENT = {
    **{"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "ALL_PROXY": "socks5://127.0.0.1:9"},
    **{"GRADIO_SERVER_PORT": "tcp://10.0.0.1:80", "GRADIO_NUM_PORTS": "x", "GRADIO_SHARE": "True"},
}
NUMBERS = [3, 2, 7, 2.0, 0.9, 20, 0.95]  # class, images, seed and the settings


@dataclass
class Server:
    process: subprocess.Popen
    address: str
    errors: Path
    temporary: Path

    @property
    def picture(self) -> Path:
        path = self.temporary / "small.png"
        Image.new("RGBA", (9, 9)).save(path)
        return path

    @property
    def files(self) -> Path:
        return next(path for path in self.temporary.glob("rear-demo-*") if (path / "files").is_dir()) / "files"


def start(arguments: list[str], folder: Path) -> Server:
    port, errors = free_port(), folder / "err"
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    command = [sys.executable, str(ROOT / "scripts/demo.py"), *arguments, f"demo.port={port}"]
    with errors.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=file, text=True)
    assert process.stdout.readline().startswith("http://127.0.0.1:"), errors.read_text()
    return Server(process, f"http://127.0.0.1:{port}", errors, folder)


def stop(server: Server, number: signal.Signals) -> None:
    server.process.send_signal(number)
    server.process.wait(WAIT_S)


@pytest.fixture(scope="module")
def arguments(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    config = load_config([*tiny_arguments, "experiment.output_dir=unused"])
    return [*tiny_arguments, *demo_arguments(config, tmp_path_factory.mktemp("demo")), "demo.max_images=4"]


@pytest.fixture(scope="module")
def server(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start(arguments, tmp_path_factory.mktemp("server"))
    yield server
    stop(server, signal.SIGTERM)


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return gradio_client.Client(server.address, verbose=False)


def with_value(index: int, value: Any) -> list[Any]:
    return [*NUMBERS[:index], value, *NUMBERS[index + 1 :]]


def test_samples_over_the_api(client: Any, arguments: list[str]) -> None:
    assert len(client.predict(*NUMBERS, api_name="/sample")) == 2


def test_wrong_values_are_one_line(server: Server, client: Any) -> None:
    wrong = [
        ("sample", with_value(index, value), "")
        for index in range(len(NUMBERS))
        for value in ("x", [1], {"a": 1}, 1e30)
    ]
    wrong += [("sample", with_value(1, value), "count") for value in (2.5, True)]
    layer = {"background": None, "layers": [handle_file(server.picture)], "composite": None}
    client.predict(0, api_name="/choose_validation")
    wrong += [
        ("complete", ["x", "brush", False, *NUMBERS], "another type"),
        ("complete", [None, "elsewhere", False, *NUMBERS], "elsewhere"),
        ("complete", [None, "brush", False, *NUMBERS], "the brush leaves 16 of 16 codes"),
        ("complete", [layer, "brush", False, *NUMBERS], "found a layer of (9, 9, "),
        ("choose_upload", [None], ""),
        ("choose_upload", ["/etc/passwd"], ""),
        ("choose_upload", [handle_file(server.picture.with_name("err"))], "no picture that can be read"),
        ("choose_validation", ["x"], "another type"),
        ("choose_validation", [99], "99"),
    ]
    for name, values, message in wrong:
        with pytest.raises(Exception) as error:  # noqa: PT011
            client.predict(*values, api_name=f"/{name}")
        assert message in html.unescape(str(error.value)), (name, values)
    errors = server.errors.read_text()
    assert "Traceback" not in errors, errors


def upload(server: Server, size: int, **headers: str) -> int:
    """The status of an upload of that size."""
    start = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = start + b"0" * size + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x", **headers}
    request = urllib.request.Request(f"{server.address}/gradio_api/upload", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def test_uploads_are_limited_in_total(server: Server) -> None:
    assert upload(server, 1000) == 200
    assert upload(server, MAX_BYTES + 1) == 413
    full = server.files / "full"
    full.touch()
    os.truncate(full, 10**9 - 100_000)
    assert upload(server, 200_000) == 507
    assert upload(server, 1000) == 200
    full.unlink()
    assert upload(server, 200_000) == 200


def test_files_of_a_killed_demo_are_removed_at_the_next_start(arguments: list[str], tmp_path: Path) -> None:
    killed = start(arguments, tmp_path)
    assert upload(killed, 1000) == 200
    left = killed.files.parent
    running = start(arguments, tmp_path)
    assert left.is_dir()  # of a running demo
    stop(killed, signal.SIGKILL)
    assert any(path.is_file() for path in left.rglob("*.png"))
    third = start(arguments, tmp_path)
    assert not left.exists()
    assert running.files.is_dir()
    for server in (running, third):
        stop(server, signal.SIGTERM)
    assert list(tmp_path.glob("rear-demo-*")) == []
