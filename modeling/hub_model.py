"""Models as folders, here or on the Hugging Face Hub: config.json and model.safetensors.

config.json is a config file like any other (`config=FOLDER/config.json`), and is checked like one.
"""

import json
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from utils.config import Config, load_config
from utils.errors import InputError
from utils.files.atomic import write_text
from utils.files.hub import local_folder
from utils.files.weights import load_state_dict, load_strict, save_weights

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
CARD = """---
{{ card_data }}
---

A model of reAR ({{ paper_url }}) or its tokenizer, as `save_pretrained` of its class left it: `model.safetensors`, and
`config.json` with its sizes. `from_pretrained` of the same class loads it.
"""
M = TypeVar("M", bound="HubModel")


class HubModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="re-ar",
    paper_url="https://arxiv.org/abs/2510.04450",
    model_card_template=CARD,
):
    """Gives `from_pretrained`; huggingface_hub's mixin gives `save_pretrained` and `push_to_hub`.

    The mixin's own way to a config takes a dataclass without its nested ones and drops keys that it does not know, so
    that only files and uploads are left to it. Its card is filled by jinja2, which torch brings.
    """

    @abstractmethod
    def sections(self) -> dict[str, Any]:
        """What config.json holds, as a config file has it."""

    @classmethod
    @abstractmethod
    def of_config(cls: type[M], config: Config) -> M:
        """With the sizes of a config, and random weights."""

    def load_weights(self, path: Path) -> None:
        """
        Raises:
            InputError: the file is missing, damaged or refused, or its keys or shapes are not those of this model.
        """
        load_strict(self, load_state_dict(path), path)

    @classmethod
    def from_pretrained(cls: type[M], pretrained_model_name_or_path: str | Path, **download: Any) -> M:
        """Load a folder, or a repository of the Hub; in eval mode, float32, on the CPU.

        Args:
            pretrained_model_name_or_path: a folder, or `OWNER/REPO`; see `utils.files.hub.local_folder`.
            download: further arguments of `huggingface_hub.snapshot_download`, as revision, token and cache_dir.

        Raises:
            InputError: a folder or a file that is missing or damaged, a config with a wrong key or value, or weights
                that do not fit it.
        """
        folder = local_folder(pretrained_model_name_or_path, [CONFIG_FILE, WEIGHTS_FILE], **download)
        config = read_config(folder)
        with naming(folder / CONFIG_FILE):
            model = cls.of_config(config)
        model.load_weights(folder / WEIGHTS_FILE)
        return model.eval()

    def write(self, folder: Path, record: dict[str, Any]) -> None:
        """The two files.

        Args:
            record: kept with the weights; see `save_weights`.
        """
        save_weights(self.state_dict(), folder / WEIGHTS_FILE, record)
        self.write_config(folder)

    def write_config(self, folder: Path) -> None:
        write_text(folder / CONFIG_FILE, json.dumps(self.sections(), indent=2) + "\n")

    def _save_pretrained(self, save_directory: Path) -> None:
        self.write(save_directory, {})


def read_config(folder: Path) -> Config:
    """The config.json of a folder.

    Raises:
        InputError: there is none, or a key or value of it is wrong.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{folder}: found no {CONFIG_FILE}, expected a folder of save_pretrained or export_model.py")
    with naming(path):
        # Values that follow from others are not compared: what matters of them, the weights tell.
        return load_config([f"config={path}", "experiment.output_dir=unused"], reads={})


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An InputError inside begins with the name of the file."""
    try:
        yield
    except InputError as error:
        text = str(error)
        raise InputError(text if str(path) in text else f"{path}: {text}") from error
