"""A page to try a model in a browser: samples, completions, reconstructions.

    pip install -r requirements-demo.txt
    python scripts/demo.py config=configs/rear_blue_marble.yaml experiment.generator_checkpoint=outputs/quickstart/rear

Prints the address, http://127.0.0.1:7860, and serves it until Ctrl-C. Other machines reach it with `demo.host=0.0.0.0`:
there is no password. Uploads and pictures lie in a temporary folder that goes with it; nothing else is written, and
nothing is fetched.
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
    host: str = key("127.0.0.1", "address that the page listens on; 0.0.0.0: other machines reach it too")
    port: Annotated[int, Meta(ge=1, le=65_535)] = key(7860, "port of the page")
    max_images: PositiveInt = key(16, "largest number of images per click")


@dataclass
class DemoScriptConfig(Config):
    demo: DemoConfig = section(DemoConfig)


if __name__ == "__main__":  # a wrong config ends here, before the slow imports
    CONFIG = load_config_or_exit(DemoScriptConfig, __doc__, READS)

import os
import signal
import socket
from importlib.util import find_spec
from tempfile import TemporaryDirectory

from scripts.demo_page.model import DemoModel
from scripts.demo_page.uploads import bound_all_pictures
from utils.errors import InputError, input_errors_exit
from utils.precision import matmul_precision


def main(config: DemoScriptConfig) -> None:
    if find_spec("gradio") is None:
        raise InputError("scripts/demo.py needs gradio, which is not installed: pip install -r requirements-demo.txt")
    check_address(config.demo)
    model = DemoModel(config, config.demo.max_images)
    bound_all_pictures()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what follows is cleaned up
    with TemporaryDirectory(prefix="rear-demo-") as folder, matmul_precision(config.training.enable_tf32):
        os.environ["GRADIO_TEMP_DIR"] = folder  # before gradio is imported
        from scripts.demo_page.page import build_page, launch

        launch(build_page(model), config.demo.host, config.demo.port)


def check_address(demo: DemoConfig) -> None:
    """
    Raises:
        InputError: the page could not be served there.
    """
    try:
        socket.create_server((demo.host, demo.port)).close()
    except OSError as error:
        raise InputError(f"demo.host={demo.host}, demo.port={demo.port}: {error.strerror}") from error


if __name__ == "__main__":
    with input_errors_exit():
        main(CONFIG)
