"""Where a run starts: the rules of `experiment.resume`, and what must be as it was when the checkpoint was written."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from utils.checkpoint import MODEL_FILE, checkpoint_folders, load_model, step_of
from utils.errors import InputError
from utils.manifest import MANIFEST_FILE, Provenance, TrainingState, read_manifest, verify
from utils.schema import Config
from utils.weights import load_state_dict, load_strict

# Keys of the model section that may change in the middle of a run: sampling, memory and the recipe. All others make
# another model.
FREE_MODEL_KEYS = {
    *("randomize_temperature", "guidance_scale", "guidance_scale_pow", "top_k", "top_p", "use_checkpoint"),
    *("dropout", "attn_drop", "class_label_dropout", "perturb_mode", "randomness_anneal_start"),
    *("randomness_anneal_end", "transition_alignment_weight", "mask_perturbed_encode"),
}
# What may differ between two starts of the same run without a word: where and how it runs, logs and stops.
SILENT_KEYS = {
    *("output_dir", "name", "project", "entity", "resume", "save_every", "keep_last", "keep_every", "generate_every"),
    *("log_every", "log_grad_norm_every", "stop_steps", "num_workers_per_gpu", "tokenizer_checkpoint"),
    *("generator_checkpoint", "per_gpu_batch_size", "gradient_accumulation_steps", "global_batch_size"),
    *("process_group_timeout", "launch_timeout", "max_save_failures", "enable_wandb", "fsdp", "allow_batch_change"),
}
MODEL_FILES = (MODEL_FILE, "unwrapped_model/model.safetensors", "unwrapped_model/pytorch_model.bin")


@dataclass
class Start:
    """What a run starts from.

    Attributes:
        checkpoint: a verified checkpoint folder, or weights without a manifest; None: from scratch.
        weights_only: `checkpoint` holds weights in the published layout; optimizer, step and data start anew.
        notices: lines for the log.
        set_aside: checkpoints of `output_dir` that are damaged or of later steps, to be renamed before training.
    """

    checkpoint: str | None = None
    weights_only: bool = False
    notices: list[str] = field(default_factory=list)
    set_aside: list[str] = field(default_factory=list)


def find_start(output_dir: Path, resume: str) -> Start:
    """Choose and verify a checkpoint, reading all of it; changes nothing.

    Args:
        resume: `auto`: the newest good checkpoint of `output_dir`, from scratch if there is none at all; `true`: there
            must be one; `false`: there must be none; else a path: a checkpoint, or weights of the published layout.
            With a path, checkpoints that a run from this path has written to `output_dir` come first, so that the
            same command continues.

    Raises:
        InputError: a rule above is broken, every checkpoint is damaged, or the one asked for by name is.
    """
    folders = checkpoint_folders(output_dir)
    if resume == "false":
        if folders:
            raise InputError(f"experiment.resume=false: {output_dir} already holds {folders[-1].name}")
        return Start()
    if resume not in ("auto", "true"):
        return _start_from_path(output_dir, resume)
    newest, damaged = _newest_good(folders)
    if newest is not None:
        return Start(str(newest), notices=[*damaged.values()], set_aside=[str(path) for path in damaged])
    if damaged:
        reasons = "; ".join(damaged.values())
        raise InputError(f"experiment.resume={resume}: no checkpoint in {output_dir} is whole: {reasons}")
    if resume == "true":
        raise InputError(f"experiment.resume=true: no complete checkpoint in {output_dir}")
    return Start()


def _newest_good(folders: list[Path]) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is as its manifest says, and by path what is wrong with newer ones."""
    damaged = {}
    for path in reversed(folders):
        try:
            verify(path)
        except InputError as error:
            damaged[path] = f"passed over: {error}"
        else:
            return path, damaged
    return None, damaged


def _start_from_path(output_dir: Path, resume: str) -> Start:
    path = Path(resume)
    if not path.exists():
        raise InputError(f"experiment.resume={resume}: no such path; expected auto, true, false or a checkpoint")
    folders = checkpoint_folders(output_dir)
    own, damaged = _newest_good(folders)
    if own is not None and read_manifest(own).state.started_from == str(path.resolve()):
        notice = f"continuing {own.name}, which began with experiment.resume={resume}"
        return Start(str(own), notices=[*damaged.values(), notice], set_aside=[str(p) for p in damaged])
    if not (path / MANIFEST_FILE).is_file():
        weights = path if path.is_file() else next((path / n for n in MODEL_FILES if (path / n).is_file()), None)
        if weights is None:
            raise InputError(f"{path}: found neither {MANIFEST_FILE} nor weights, one of {', '.join(MODEL_FILES)}")
        start = Start(str(weights), weights_only=True)
        start.notices = [f"{weights}: no manifest, so weights only; optimizer, step and data order start anew"]
    else:
        verify(path)
        start = Start(str(path))
    first_step = 0 if start.weights_only else read_manifest(path).state.global_step
    start.set_aside = [str(p) for p in folders if p in damaged or step_of(p) > first_step]
    start.notices += [f"{Path(p).name} is set aside" for p in start.set_aside]
    return start


def set_aside(start: Start) -> None:
    """Rename what must neither be taken for the newest checkpoint nor be lost: `checkpoint-<step>.aside`."""
    for path in map(Path, start.set_aside):
        target = path.with_name(path.name + ".aside")
        number = 1
        while target.exists():
            number, target = number + 1, path.with_name(f"{path.name}.aside{number}")
        path.rename(target)


def starting_state(start: Start, resume: str, global_batch_size: int) -> TrainingState:
    """The state that the run goes on from."""
    if start.checkpoint is not None and not start.weights_only:
        state = read_manifest(Path(start.checkpoint)).state
        state.global_batch_size = global_batch_size
    else:
        state = TrainingState(global_step=0, global_batch_size=global_batch_size, samples_seen=0)
    if resume not in ("auto", "true", "false"):
        state.started_from = str(Path(resume).resolve())
    return state


def load_start(start: Start, model: nn.Module, ema: nn.Module | None) -> None:
    """Load the weights of `start`, in place and strictly; the EMA of weights without one begins with them.

    Raises:
        InputError: keys or shapes that differ from the model's.
    """
    if start.checkpoint is None:
        return
    path = Path(start.checkpoint)
    if not start.weights_only:
        load_model(path, model, ema)
        return
    for module in filter(None, (model, ema)):
        load_strict(module, load_state_dict(path), path)


def check_same_run(start: Start, config: Config, provenance: Provenance, global_batch_size: int) -> list[str]:
    """Compare with the run that wrote the checkpoint, before anything is loaded.

    Returns:
        A line for every other difference that a reader of the log should know of.

    Raises:
        InputError: another model, other data, or another global batch without `training.allow_batch_change`.
    """
    if start.checkpoint is None or start.weights_only:
        return []
    manifest = read_manifest(Path(start.checkpoint))
    changes = differences(manifest.provenance.config, asdict(config))
    model_changes = [
        line for key, line in changes.items() if key.startswith("model.") and _leaf(key) not in FREE_MODEL_KEYS
    ]
    if model_changes:
        raise InputError(f"{start.checkpoint}: written by another model: {'; '.join(model_changes)}")
    if manifest.provenance.data_hash != provenance.data_hash:
        raise InputError(
            f"{start.checkpoint}: written on other training data: found hash {provenance.data_hash[:12]}..., expected "
            f"{manifest.provenance.data_hash[:12]}...; use another experiment.output_dir, or the data of that run"
        )
    written_at = manifest.state.global_batch_size
    if written_at != global_batch_size and not config.training.allow_batch_change:
        raise InputError(
            f"{start.checkpoint}: written at a global batch of {written_at} images, found {global_batch_size} = "
            "per_gpu_batch_size * gradient_accumulation_steps * processes; keep the product, or set "
            "training.allow_batch_change=true"
        )
    notices = [line for key, line in changes.items() if _leaf(key) not in SILENT_KEYS]
    if manifest.provenance.code_hash != provenance.code_hash:
        notices.append("the code has changed")
    return [f"since {Path(start.checkpoint).name}: {notice}" for notice in notices]


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """By dotted key: `key=new, was old`, for keys that both have."""
    old, new = flatten(old), flatten(new)
    common = [key for key in new if key in old and old[key] != new[key]]
    return {key: f"{key}={new[key]}, was {old[key]}" for key in common}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections to dotted keys."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _leaf(key: str) -> str:
    return key.rsplit(".", 1)[-1]
