"""Paths to weights, a checkpoint or a run, for sampling, export, fine-tuning and `experiment.resume`.

| path | meaning |
|---|---|
| `hf://OWNER/REPO/FILE` | the file, downloaded |
| a file | its weights; `*.index.json`: the shards next to it |
| a folder with manifest.json | a checkpoint: its EMA if there is one, else its model |
| a folder with checkpoint-<step>/ or status.json | a run: its newest complete checkpoint or its final weights |
| a folder with one of `PUBLISHED_FILES` or one `*.index.json` | its weights |

A checkpoint and a run's final weights are compared with their sha256.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from utils.distributed import DistributedContext
from utils.errors import InputError, first_of
from utils.files.hashing import file_sha256
from utils.files.hub import local_file
from utils.files.weight_formats import INDEX_SUFFIX, is_index
from utils.files.weights import read_record
from utils.keys import keys_of
from utils.run.checkpoint import EMA, MODEL, UNFINISHED, checkpoint_folders, list_checkpoints, step_of
from utils.run.manifest import MANIFEST_FILE, check_sizes, read_manifest
from utils.run.status import STATUS_FILE, read_status
from utils.schema import SAMPLING_NAMES, Config, ExperimentConfig

C = TypeVar("C", bound=Config)

FINAL_FILE = "model.safetensors"  # in a run folder, when the run is complete
KEPT_FILE = re.compile(r"(checkpoint-\d+/\w+|weights/\d+)\.safetensors")  # of a run, in its folder
# Keys of model.generator that keep the values of the given config: sizes, which loading compares, memory, sampling.
NOT_FROM_TRAINING = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("image_seq_len", "condition_num_classes", "z_dim", "use_checkpoint"),
    *SAMPLING_NAMES,
)
NO_TOKENIZER = "records no tokenizer; whether it is the configured one is not compared"
PUBLISHED_FILES = (FINAL_FILE, "unwrapped_model/model.safetensors", "unwrapped_model/pytorch_model.bin")


@dataclass(frozen=True)
class ResolvedPath:
    """
    Attributes:
        path: the folder of a run or a checkpoint; for weights the file, or the index of their shards.
    """

    kind: Literal["weights", "checkpoint", "run"]
    path: Path


@dataclass(frozen=True)
class TrainedWeights:
    """
    Attributes:
        path: the file to load, or the index of its shards.
        record: `Provenance.record` of the file or its checkpoint; empty if it has none.
        notices: lines for the user: which file was chosen and why.
    """

    path: Path
    record: dict[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    @property
    def step(self) -> int | None:
        """Number of training steps; None: not recorded."""
        return self.record.get("step")

    @property
    def tokenizer_sha256(self) -> str | None:
        """sha256 of the tokenizer of the training data; None: not recorded."""
        return self.record.get("tokenizer_sha256")

    @property
    def class_names(self) -> list[str] | None:
        """Class names of the training data, in the order of the class ids; None: not recorded."""
        names = self.record.get("class_names")
        return [str(name) for name in names] if isinstance(names, list) else None

    @property
    def untrained_classes(self) -> list[int]:
        """Ids of the classes that had no training samples; empty if that is not recorded."""
        return self.record.get("untrained_classes") or []

    @property
    def config(self) -> dict[str, Any]:
        """The values that decided the weights, by config key; empty: not recorded."""
        values = self.record.get("config")
        return values if isinstance(values, dict) else {}


def resolve_path(source: str) -> ResolvedPath:
    """Resolve a path or `hf://OWNER/REPO/FILE`, which is downloaded; raises InputError unless the table above has a
    match."""
    path = local_file(source)
    if path.is_file():
        return ResolvedPath("weights", path)
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; expected weights, a checkpoint or a run folder")
    if (path / MANIFEST_FILE).is_file():
        return ResolvedPath("checkpoint", path)
    if UNFINISHED.fullmatch(path.name):
        raise InputError(f"{path}: found an unfinished or half deleted checkpoint; choose a complete one")
    if checkpoint_folders(path) or (path / STATUS_FILE).is_file():
        return ResolvedPath("run", path)
    published = [path / name for name in PUBLISHED_FILES if (path / name).is_file()]
    if published:
        return ResolvedPath("weights", published[0])
    indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    if len(indices) == 1:
        return ResolvedPath("weights", indices[0])
    expected = ", ".join((MANIFEST_FILE, STATUS_FILE, *PUBLISHED_FILES))
    raise InputError(f"{path}: found {len(indices)} *{INDEX_SUFFIX} and none of {expected}; give a weights file")


def find_weights(source: str) -> TrainedWeights:
    """The weights that a path names, verified if a manifest has their sha256; raises InputError for missing, damaged or
    incomplete weights."""
    resolved = resolve_path(source)
    if resolved.kind == "checkpoint":
        return _checkpoint_weights(resolved.path)
    if resolved.kind == "run":
        return _run_weights(resolved.path)
    if (resolved.path.parent / MANIFEST_FILE).is_file():
        return _checkpoint_weights(resolved.path.parent, resolved.path.name)
    return TrainedWeights(resolved.path, read_record(resolved.path))


def find_generator_weights(
    config: C, tokenizer_sha256: str, ctx: DistributedContext | None = None
) -> tuple[TrainedWeights, C]:
    """The weights of `experiment.generator_checkpoint`, found by rank 0, which prints its choice, and the config with
    the values of their training. All ranks call it.

    `tokenizer_sha256` is of the tokenizer that decodes the samples. Raises InputError for missing weights, or weights
    trained with a different tokenizer or number of attention heads.
    """
    source = config.experiment.generator_checkpoint
    if source is None:
        raise InputError("experiment.generator_checkpoint: missing; give a weights file, a checkpoint or a run folder")
    weights = find_weights(source) if ctx is None else ctx.broadcast_from_rank0(lambda: find_weights(source))
    trained, changes = as_trained(config, weights)
    for notice in (*weights.notices, *changes) if ctx is None or ctx.is_rank0 else ():
        print(notice)
    check_weights(weights, tokenizer_sha256, config)
    return weights, trained


def as_trained(config: C, weights: TrainedWeights) -> tuple[C, list[str]]:
    """The config with the recorded values of keys that only training reads, and a line for the user if any differ.

    Raises InputError for a recorded value that a key cannot have.
    """
    generator, keys = config.model.generator, keys_of(Config)
    trained: dict[str, Any] = {}
    for name, value in vars(generator).items():
        key = keys[f"model.generator.{name}"]
        if name not in NOT_FROM_TRAINING and weights.config.get(key.name, value) != value:
            trained[name] = key.read(weights.config[key.name])
    if not trained:
        return config, []
    values = ", ".join(f"{name}={value}, not {getattr(generator, name)}" for name, value in trained.items())
    model = replace(config.model, generator=replace(generator, **trained))
    return replace(config, model=model), [f"{weights.path}: trained with model.generator.{values}"]


def check_weights(weights: TrainedWeights, tokenizer_sha256: str, config: Config) -> None:
    """Raise InputError if the weights were trained with a different tokenizer (see `check_tokenizer`) or number of
    attention heads, which their shapes do not show."""
    check_tokenizer(weights.tokenizer_sha256, tokenizer_sha256, weights.path, config.experiment)
    key, found = "model.generator.num_attention_heads", config.model.generator.num_attention_heads
    heads = weights.config.get(key, found)
    if heads != found:
        raise InputError(f"{weights.path}: trained with {key}={heads}, found {found}; give the value of the training")


def check_classes(weights: TrainedWeights, asked: Sequence[int] | None) -> list[str]:
    """Lines for the user about classes without training samples, if no class is named (`asked` is None); raises
    InputError for a named one."""
    untrained = weights.untrained_classes
    wrong = [class_id for class_id in asked or [] if class_id in untrained]
    without = f"found no training samples of classes {first_of(wrong or untrained, 10)}"
    if wrong:
        raise InputError(f"{weights.path}: {without}, expected classes that the weights were trained on")
    if untrained and asked is None:
        return [f"{weights.path}: {without}; their images mean nothing (sampling.class_labels selects classes)"]
    return []


def check_tokenizer(trained_with: str | None, found: str | None, source: object, experiment: ExperimentConfig) -> None:
    """Raise InputError if the sha256 of the tokenizer of the training data and of the configured one are recorded and
    differ, unless `experiment.allow_other_tokenizer` is set; `source` is for its message."""
    if trained_with is not None and trained_with != found and not experiment.allow_other_tokenizer:
        raise InputError(
            f"{source}: trained with the tokenizer of sha256 {trained_with[:12]}..., found {str(found)[:12]}... in "
            f"experiment.tokenizer_checkpoint={experiment.tokenizer_checkpoint}; set "
            "experiment.allow_other_tokenizer=true to use it anyway"
        )


def find_run_folder(weights: TrainedWeights) -> Path | None:
    """The folder with config.yaml of the run that has written the weights; None for files of another origin in it."""
    path = weights.path.resolve()
    with_config = [folder for folder in (path.parent, path.parent.parent) if (folder / "config.yaml").is_file()]
    if not with_config:
        return None
    folder = with_config[0]
    name = path.relative_to(folder).as_posix()
    if not (name in PUBLISHED_FILES or is_index(path) or KEPT_FILE.fullmatch(name)):
        return None
    for checkpoint in list_checkpoints(folder):
        manifest = read_manifest(checkpoint)
        record = manifest.provenance.record(manifest.state.global_step)
        same = record if record["step"] == weights.step else {"data": record["data"]}
        if any(weights.record.get(key) != value for key, value in same.items() if key in ("data", *weights.record)):
            return None
    return folder


def _run_weights(folder: Path) -> TrainedWeights:
    """The final weights, unless there is a good checkpoint of a later step."""
    final = folder / FINAL_FILE
    record = read_record(final) if final.is_file() else {}
    damaged = []
    for checkpoint in reversed(checkpoint_folders(folder)):
        if final.is_file() and ("step" not in record or record["step"] >= step_of(checkpoint)):
            break
        try:
            weights = _checkpoint_weights(checkpoint)
        except InputError as error:
            damaged.append(f"skipped: {error}")
            continue
        status = read_status(folder).status if (folder / STATUS_FILE).is_file() else "unknown"
        older = f", its {FINAL_FILE} is of step {record['step']}" if final.is_file() else ""
        notice = f"{folder}: using {checkpoint.name} (status of the run: {status}{older})"
        return TrainedWeights(weights.path, weights.record, (*damaged, notice))
    if not final.is_file():
        raise InputError(f"{folder}: found no weights: {'; '.join(damaged) or 'no complete checkpoint yet'}")
    return TrainedWeights(final, record, tuple(damaged))


def _checkpoint_weights(folder: Path, name: str | None = None) -> TrainedWeights:
    """A weights file of a checkpoint; `name` None: its EMA, else its model."""
    manifest = check_sizes(folder)
    names = [name] if name is not None else [f"{EMA}.safetensors", f"{MODEL}.safetensors"]
    known = [name for name in names if name in manifest.files]
    if not known:
        raise InputError(f"{folder}: found none of {', '.join(names)} in its {MANIFEST_FILE}")
    path, expected = folder / known[0], manifest.files[known[0]].sha256
    found = file_sha256(path)
    if found != expected:
        raise InputError(f"{path}: damaged, found sha256 {found[:12]}..., expected {expected[:12]}...")
    return TrainedWeights(path, manifest.provenance.record(manifest.state.global_step))
