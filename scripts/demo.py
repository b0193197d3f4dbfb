"""A page to try a model in a browser: samples, completions, reconstructions.

    pip install -r requirements-demo.txt
    python scripts/demo.py config=configs/rear_blue_marble.yaml experiment.generator_checkpoint=outputs/quickstart/rear

Prints the address, http://127.0.0.1:7860, and serves it until Ctrl-C. With `demo.host=0.0.0.0` other machines can
connect; there is no password. Uploads and pictures are in a temporary folder, removed at the end or, if the page is
killed, at the next start; nothing else is written, and nothing is downloaded.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

from msgspec import Meta

from utils.config import load_config_or_exit
from utils.keys import PositiveInt, key, section
from utils.schema import Config

READS = {
    "experiment": "tokenizer_checkpoint generator_checkpoint allow_other_tokenizer",
    "model": "all",
    "dataset.params": "all but eval_pretokenization num_workers_per_gpu verify_hashes",
    "dataset.preprocessing": "crop_size resize_shorter_edge background exif_orientation",
    "training": "enable_tf32",
    "sampling": "seed order uint8_rule compile mixed_precision",
    "demo": "all",
}


@dataclass
class DemoConfig:
    """The demo page."""

    host: str = key("127.0.0.1", "address that the page listens on; 0.0.0.0: other machines can connect too")
    port: Annotated[int, Meta(ge=1, le=65_535)] = key(7860, "port of the page")
    max_images: PositiveInt = key(16, "largest number of images per click")


@dataclass
class DemoScriptConfig(Config):
    demo: DemoConfig = section(DemoConfig)


if __name__ == "__main__":  # a wrong config ends here, before the slow imports
    CONFIG = load_config_or_exit(DemoScriptConfig, __doc__, READS)

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from tempfile import TemporaryDirectory, gettempdir

from PIL import Image

from scripts.demo_model import MAX_BYTES, MAX_PIXELS, DemoModel
from utils.errors import InputError, input_errors_exit
from utils.files.lock import only_writer
from utils.precision import matmul_precision

PREFIX = "rear-demo-"
CSS = ".pictures img {width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated}"


def main(config: DemoScriptConfig) -> None:
    if find_spec("gradio") is None:
        raise InputError("scripts/demo.py needs gradio, which is not installed: pip install -r requirements-demo.txt")
    model = DemoModel(config)  # before the page, which makes this process ignore proxies: it may download weights
    from starlette.middleware import Middleware

    from scripts.demo_page import LimitedUploads, build_page

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses twice as many, also for gradio
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: the folder is removed
    with temporary_folder() as folder, matmul_precision(config.training.enable_tf32):
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        page = build_page(model, config.demo.max_images)
        page.queue().launch(
            server_name=config.demo.host,
            server_port=config.demo.port,
            share=False,  # no tunnel from a public address, not even in a notebook
            max_file_size=MAX_BYTES,
            app_kwargs={"middleware": [Middleware(LimitedUploads, folder=folder)]},
            css=CSS,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
        )
        print(f"http://{config.demo.host}:{config.demo.port} (Ctrl-C ends it)", flush=True)
        page.block_thread()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder of this process; those that killed processes have left are removed first."""
    for left in Path(gettempdir()).glob(f"{PREFIX}*"):
        if left.lstat().st_uid == os.getuid():  # others may write to that folder too
            with suppress(InputError, OSError), only_writer(left, inside=True):  # InputError: of a running demo
                shutil.rmtree(left)
    with TemporaryDirectory(prefix=PREFIX) as folder, only_writer(Path(folder), inside=True):
        files = Path(folder, "files")
        files.mkdir()
        yield files


if __name__ == "__main__":
    with input_errors_exit():
        main(CONFIG)
