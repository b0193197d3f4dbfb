"""A page to try a model in a browser: samples, completions, reconstructions.

    pip install -r requirements-demo.txt
    python scripts/demo.py config=configs/rear_blue_marble.yaml experiment.generator_checkpoint=outputs/quickstart/rear

Prints the address, http://127.0.0.1:7860, and serves it until Ctrl-C. Other machines reach it with `demo.host=0.0.0.0`:
there is no password. Uploads and pictures lie in a temporary folder that goes with it; nothing else is written, and
nothing is fetched.
"""

import sys
from pathlib import Path

READS = (
    *("experiment.tokenizer_checkpoint", "experiment.generator_checkpoint", "experiment.allow_other_tokenizer"),
    *("model", "demo", "training.enable_tf32"),
    *(f"sampling.{key}" for key in ("seed", "order", "uint8_rule", "compile", "mixed_precision")),
    *(f"dataset.params.{key}" for key in ("train_shards_path_or_url", "pretokenization")),  # for names of classes
    *(f"dataset.params.{key}" for key in ("eval_shards_path_or_url", "on_bad_sample", "max_bad_fraction")),
    *(f"dataset.preprocessing.{key}" for key in ("resize_shorter_edge", "crop_size", "background", "exif_orientation")),
)

if __name__ == "__main__":  # a typo in the config ends here, before the slow imports
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory
    from utils.config import load_config_or_exit

    CONFIG = load_config_or_exit(__doc__, READS)

import os
import signal
import socket
from importlib.util import find_spec
from tempfile import TemporaryDirectory

from scripts.demo_page.model import DemoModel
from scripts.demo_page.uploads import bound_all_pictures
from utils.errors import InputError, input_errors_exit
from utils.precision import matmul_precision
from utils.schema import Config, DemoConfig


def main(config: Config) -> None:
    if find_spec("gradio") is None:
        raise InputError("scripts/demo.py needs gradio, which is not installed: pip install -r requirements-demo.txt")
    check_address(config.demo)
    model = DemoModel(config)
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
