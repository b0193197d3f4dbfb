"""The page of scripts/demo.py in a browser: Debian's Chromium, which scripts_bash/test.sh installs where it may."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import IncompleteRead
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scripts.complete_images import GREY
from scripts.demo_model import DemoModel, Settings
from tests.processes import ROOT, WAIT_S, free_port
from tests.scripts.test_demo import demo_arguments, validation_image
from utils.config import load_config

MISSING = [name for name in ("gradio", "selenium") if find_spec(name) is None]
MISSING += [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"the test of the demo page needs {', '.join(MISSING)}"),
]
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"


@pytest.fixture(scope="module")
def arguments(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    config = load_config([*tiny_arguments, "experiment.output_dir=unused"])
    return [*tiny_arguments, *demo_arguments(config, tmp_path_factory.mktemp("demo_page")), "demo.max_images=5"]


@pytest.fixture(scope="module")
def model(arguments: list[str]) -> DemoModel:
    return DemoModel(load_config(arguments))


@pytest.fixture(scope="module")
def settings(model: DemoModel) -> Settings:
    """Those that the page starts with."""
    generator = model.config.model.generator
    return Settings(*(getattr(generator, name) for name in Settings._fields))


@pytest.fixture(scope="module")
def url(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page, as a user starts it; afterwards it has left nothing behind."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [sys.executable, str(ROOT / "scripts/demo.py"), *arguments, f"demo.port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    with (folder / "err").open("w") as errors:
        server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        line = server.stdout.readline()
        assert line == f"http://127.0.0.1:{port} (Ctrl-C ends it)\n", (folder / "err").read_text()
        second = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert second.returncode == 1
        assert second.stderr.splitlines()[-1].startswith("error: ")
        assert str(port) in second.stderr  # taken by the first one
        yield line.split()[0]
        assert list(folder.glob("rear-demo-*")) != []
        server.send_signal(signal.SIGTERM)
        assert server.wait(WAIT_S) == 0
        assert list(folder.glob("rear-demo-*")) == []
        assert "scripts/demo" not in (folder / "err").read_text()  # no traceback of ours
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser that reaches nothing but this machine."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1400", OFFLINE):
        options.add_argument(argument)
    driver = Chrome(options, Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(url: str, browser: Any) -> "Page":
    browser.get(url)
    return Page(browser)


class Page:
    def __init__(self, browser: Any) -> None:
        self.browser = browser
        self.find("#sample")

    def find_all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def find(self, selector: str) -> Any:
        return self.until(lambda: next(iter(self.find_all(selector)), None), selector)

    def until(self, found: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + WAIT_S
        while not (value := found()):
            assert time.monotonic() < deadline, f"{what}: not found; {self.find_all('body')[0].text}"
            time.sleep(0.1)
        return value

    def open_tab(self, name: str) -> None:
        next(tab for tab in self.find_all("button[role=tab]") if tab.text == name).click()

    def type(self, selector: str, text: str) -> None:
        from selenium.webdriver import Keys

        self.find(selector).send_keys(Keys.CONTROL, "a")
        self.find(selector).send_keys(text, Keys.ENTER)

    def pictures(self, name: str) -> list[np.ndarray]:
        """Those of a gallery or image, as they are served; none while one of them is being written."""
        addresses = self.browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(image => image.src)", f"#{name} img"
        )
        with suppress(IncompleteRead):
            return [download(address) for address in addresses]
        return []

    def fetched(self) -> list[str]:
        """Addresses of everything that the page consists of."""
        return self.browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")

    def wait_for(self, name: str, expected: np.ndarray) -> None:
        """Until the pictures of a gallery or image are these."""
        self.until(lambda: np.array_equal(self.pictures(name), expected), name)


def download(address: str) -> np.ndarray:
    with urllib.request.urlopen(address, timeout=WAIT_S) as reply:
        return np.asarray(Image.open(io.BytesIO(reply.read())))


def test_a_click_gives_the_samples_of_the_sampler(page: Page, model: DemoModel, settings: Settings) -> None:
    page.type("#class input", "3")
    page.type("#count input[type=number]", "2")
    page.type("#seed input", "7")
    page.find("#sample").click()
    page.wait_for("samples", model.sample(3, 2, 7, settings))
    elsewhere = [name for name in page.fetched() if not name.startswith((page.browser.current_url, "data:", "blob:"))]
    assert elsewhere == []


def test_a_brushed_part_of_a_validation_image_is_completed(page: Page, model: DemoModel, settings: Settings) -> None:
    from selenium.webdriver import ActionChains

    page.open_tab("Complete")
    page.find("#take").click()
    canvas = page.find("#canvas canvas")
    page.until(lambda: any("/file=" in name for name in page.fetched()), "the picture to brush over")
    image = validation_image(model)

    def completed() -> bool:
        stays = page.pictures("stays")
        if not stays:
            return False
        kept = torch.from_numpy(~(stays[0] == GREY).reshape(4, 4, 4, 4, 3).all(axis=(1, 3, 4))).flatten()
        assert 0 < kept.sum() < 16
        assert kept[0]
        return np.array_equal(page.pictures("completions"), model.complete(image, kept, None, 4, 42, settings))

    def stroke() -> bool:  # draws nothing until the editor is ready
        moves = ActionChains(page.browser, duration=50).move_to_element_with_offset(canvas, -20, -20).click_and_hold()
        moves.move_by_offset(40, 40).release().perform()
        page.find("#complete").click()
        time.sleep(2)
        return completed()

    page.until(stroke, "completions")


def test_an_upload_is_reconstructed_and_a_bad_one_gives_a_message(page: Page, model: DemoModel, tmp_path: Path) -> None:
    page.open_tab("Reconstruct")
    (tmp_path / "<b>text.png").write_text("no picture")
    page.find("input[type=file]").send_keys(str(tmp_path / "<b>text.png"))
    page.until(lambda: "text.png: found no picture" in page.find("body").text, "message")
    assert page.pictures("reconstruction") == []
    good = Path(model.config.dataset.params.eval_shards_path_or_url, "cat/0.png")
    page.find("input[type=file]").send_keys(str(good))
    decoded, psnr = model.reconstruct(validation_image(model))
    page.wait_for("reconstruction", decoded[None])
    page.until(lambda: f"PSNR {psnr:.2f} dB" in page.find("#psnr").text, "PSNR")
