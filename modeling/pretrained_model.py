"""Models as folders, local or on the Hugging Face Hub: config.json, model.safetensors and README.md, a model card.

config.json is a config file like any other (`config=FOLDER/config.json`), and is checked like one.
"""

import json
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from torch import nn

from modeling.model_card import CARD_FILE, model_card
from utils.config import MODEL_CONFIG_FILE as CONFIG_FILE
from utils.config import Config, load_config
from utils.errors import InputError
from utils.files.atomic import write_text
from utils.files.hub import local_folder, upload_files
from utils.files.weights import load_state_dict, load_strict, save_weights, weights_sha256

WEIGHTS_FILE = "model.safetensors"
M = TypeVar("M", bound="PretrainedModel")


class PretrainedModel(nn.Module):
    """A module with `from_pretrained`, `save_pretrained` and `push_to_hub`."""

    @abstractmethod
    def sections(self) -> dict[str, Any]:
        """The sections of config.json."""

    @classmethod
    @abstractmethod
    def from_config(cls: type[M], config: Config) -> M:
        """A model of the config's sizes with random weights."""

    def load_weights(self, path: Path) -> None:
        """Raises InputError for a missing, damaged or refused file, or keys or shapes other than this model's."""
        load_strict(self, load_state_dict(path), path)

    @classmethod
    def from_pretrained(cls: type[M], source: str | Path, **download: Any) -> M:
        """Load a folder, or a repository of the Hub; in eval mode, float32, on the CPU.

        Args:
            source: a folder, or `OWNER/REPO`; see `utils.files.hub.local_folder`.
            download: further arguments of `huggingface_hub.snapshot_download`, such as revision, token and cache_dir.

        Raises:
            InputError: a missing or damaged folder or file, a wrong key or value in the config, or weights that do not
                fit it.
        """
        folder = local_folder(source, [CONFIG_FILE, WEIGHTS_FILE], **download)
        model = build_from_folder(folder, cls.from_config)
        model.load_weights(folder / WEIGHTS_FILE)
        return model.eval()

    def save_pretrained(self, folder: str | Path, source: str | None = None) -> None:
        """Write config.json, model.safetensors and a model card to a folder, replacing existing ones.

        Args:
            source: path or `OWNER/REPO` in the card's loading code; None: the folder's name.
        """
        folder, name = Path(folder), type(self).__name__
        source = source or folder.name
        self.write_files(folder)
        loading = f"from {type(self).__module__} import {name}\n\nmodel = {name}.from_pretrained({json.dumps(source)})"
        write_text(folder / CARD_FILE, model_card(source, loading=loading, facts=self.card_facts()))

    def push_to_hub(self, repository: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the files of `save_pretrained` to OWNER/NAME on the Hub, which is created if needed; returns a URL.

        Raises InputError if the Hub does not answer, or refuses.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, repository)
            files = {path.name: path for path in Path(folder).iterdir()}
            return upload_files(files, repository, private=private, token=token)

    def write_files(self, folder: Path, record: dict[str, Any] | None = None) -> None:
        """Write config.json and model.safetensors; `record` is the provenance kept with the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.state_dict(), folder / WEIGHTS_FILE, record or {})
        self.write_config(folder)

    def write_config(self, folder: Path) -> None:
        write_text(folder / CONFIG_FILE, json.dumps(self.sections(), indent=2) + "\n")

    def card_facts(self) -> dict[str, object]:
        """Rows of the card's table."""
        millions = sum(parameter.numel() for parameter in self.parameters()) / 1e6
        return {"parameters": f"{millions:.1f} M", "sha256 of the weights": weights_sha256(self)}


def build_from_folder(folder: Path, build: Callable[[Config], M]) -> M:
    """Build a model from the config.json of a folder; raises InputError if it is missing or wrong, with the file's name
    first."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{folder}: found no {CONFIG_FILE}, expected a folder of save_pretrained or export_model.py")
    try:
        # reads={}: sizes that follow from others are not compared; loading the weights does that.
        return build(load_config([f"config={path}", "experiment.output_dir=unused"], reads={}))
    except InputError as error:
        message = str(error)
        raise InputError(message if str(path) in message else f"{path}: {message}") from error
