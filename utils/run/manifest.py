"""The manifest of a checkpoint: the state of the run, its provenance, and the hash of every file."""

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from utils.config import flat
from utils.errors import InputError
from utils.files.atomic import write_text
from utils.files.hashing import file_sha256, hash_of
from utils.keys import SILENT, keys_of
from utils.schema import SAMPLING_KEYS, Config

MANIFEST_FILE = "manifest.json"
# Sections of the config. The others say where and how it runs, logs and samples.
WEIGHTS_SECTIONS = ("model.", "optimizer.", "lr_scheduler.", "training.", "vq_training.", "dataset.preprocessing.")
VERSIONED_PACKAGES = ["torch", "accelerate", "numpy", "safetensors"]


@dataclass
class TrainingState:
    """The position in the data and all random numbers follow from it."""

    global_step: int  # optimizer steps done, skipped ones included
    global_batch_size: int  # images per optimizer step
    samples_seen: int  # images; global_step * global_batch_size unless the batch size changed
    nonfinite_steps: int = 0  # steps whose update was skipped
    skipped_images: int = 0  # unreadable images that were left out, once per pass
    trained_s: float = 0.0  # seconds of training, pauses included
    started_from: str | None = None  # the path in experiment.resume=PATH that the run started from
    ema_start: int = 0  # the step at which the EMA began


class TrainingData(Protocol):
    """The properties of its data that a run records."""

    @property
    def fingerprint(self) -> str: ...  # equal for equal samples in equal order

    @property
    def class_names(self) -> list[str] | None: ...  # in the order of the class ids; None: unknown

    def __len__(self) -> int: ...


@dataclass
class Provenance:
    """Where the weights come from."""

    config: dict[str, Any] = field(default_factory=dict)  # the resolved config, by section
    data_hash: str = ""  # fingerprint of the training data
    code_hash: str = ""  # of the Python sources
    tokenizer_sha256: str | None = None  # `Tokenizer.sha256` of the generator's tokenizer; None: unknown
    class_names: list[str] | None = None  # of the training data, in the order of the class ids; None: unknown
    untrained_classes: list[int] | None = None  # ids of the classes without training samples; None: unknown

    def record(self, step: int) -> dict[str, Any]:
        """The record of a single weights file. Its config has only the values that decide the weights, without paths,
        which would make files of equal weights differ."""
        values = {key: value for key, value in flat(self.config) if decides_weights(key) and not is_start(key)}
        return {
            "step": step,
            "tokenizer_sha256": self.tokenizer_sha256,
            "code": self.code_hash,
            "data": self.data_hash,
            "class_names": self.class_names,
            "untrained_classes": self.untrained_classes,
            "config": values,
        }


def decides_weights(key: str) -> bool:
    """Whether a different value of this config key trains different weights. Data and tokenizer are compared by
    their hashes instead of their paths."""
    known = keys_of(Config).get(key)
    is_silent = known is not None and known.has(SILENT)
    return is_start(key) or (key.startswith(WEIGHTS_SECTIONS) and key not in SAMPLING_KEYS and not is_silent)


def is_start(key: str) -> bool:
    """The path of the weights that fine-tuning starts from."""
    return key.endswith(".init_from")


@dataclass
class FileRecord:
    size: int  # bytes
    sha256: str


@dataclass
class Manifest:
    state: TrainingState
    provenance: Provenance
    config_hash: str
    versions: dict[str, str]
    files: dict[str, FileRecord]


def versions() -> dict[str, str]:
    """Versions of Python and the packages that affect numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONED_PACKAGES}}


def write_manifest(folder: Path, state: TrainingState, provenance: Provenance) -> None:
    """Write manifest.json for all files of `folder`, with a hash of its own content."""
    manifest = Manifest(
        state=state,
        provenance=provenance,
        config_hash=hash_of(provenance.config),
        versions=versions(),
        files={path.name: FileRecord(path.stat().st_size, file_sha256(path)) for path in sorted(folder.iterdir())},
    )
    content = asdict(manifest)
    content["sha256"] = hash_of(content)
    write_text(folder / MANIFEST_FILE, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Raises InputError for a missing or damaged manifest."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise InputError(f"{folder}: found no {MANIFEST_FILE}, expected a complete checkpoint")
    try:
        raw = json.loads(path.read_bytes())
        if raw.pop("sha256") != hash_of(raw):
            raise ValueError("it differs from its own sha256")
        return Manifest(
            state=TrainingState(**raw["state"]),
            provenance=Provenance(**raw["provenance"]),
            config_hash=raw["config_hash"],
            versions=raw["versions"],
            files={name: FileRecord(**record) for name, record in raw["files"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged, {type(error).__name__}: {error}") from error


def check_sizes(folder: Path) -> Manifest:
    """The manifest, after a fast check of the files' sizes; raises InputError for missing or truncated files, or an
    invalid manifest."""
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else "no file"
        if found != record.size:
            raise InputError(f"{path}: found {found}, expected {record.size} bytes as in {MANIFEST_FILE}")
    return manifest


def verify(folder: Path) -> Manifest:
    """The manifest, after hashing every file, since neither safetensors nor torch.load detects a flipped bit; raises
    InputError for any difference."""
    manifest = check_sizes(folder)
    for name, record in manifest.files.items():
        found = file_sha256(folder / name)
        if found != record.sha256:
            raise InputError(
                f"{folder / name}: damaged, found sha256 {found[:12]}..., expected {record.sha256[:12]}..."
            )
    return manifest
