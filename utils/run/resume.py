"""Where a run starts: the rules of `experiment.resume` (docs/cluster.md), and what a checkpoint may be resumed with."""

import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.config import flat
from utils.errors import InputError
from utils.files.hub import SCHEME
from utils.files.weights import load_state_dict, read_record
from utils.keys import MAY_CHANGE, SILENT, keys_of
from utils.run.checkpoint import (
    EMA,
    MODEL,
    Resumable,
    checkpoint_folders,
    load_modules,
    load_optimizers,
    load_weights,
    step_of,
)
from utils.run.manifest import (
    MANIFEST_FILE,
    Provenance,
    TrainingState,
    decides_weights,
    read_manifest,
    verify,
    versions,
)
from utils.run.weights_path import (
    FINAL_FILE,
    NO_TOKENIZER,
    TrainedWeights,
    check_tokenizer,
    check_weights,
    find_weights,
    resolve_path,
)
from utils.schema import Config, TrainingConfig

WORDS = ("auto", "true", "false")  # values of experiment.resume that are not paths


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        checkpoint: a verified checkpoint folder, or a weights file; None: from scratch.
        weights: the weights file, with its record; None: `checkpoint` is none.
        notices: lines for the log.
        back_up: checkpoints in `output_dir` that are damaged or of later steps, and final weights of later steps. They
            are renamed before training.
    """

    checkpoint: str | None = None
    weights: TrainedWeights | None = None
    notices: tuple[str, ...] = ()
    back_up: tuple[Path, ...] = ()

    @property
    def weights_only(self) -> bool:
        """`checkpoint` is a weights file; optimizer, step and data order start from the beginning."""
        return self.weights is not None


def find_start(output_dir: Path, resume: str) -> Start:
    """Choose a checkpoint and verify all its files; changes nothing.

    Args:
        resume: `auto`: the newest good checkpoint in `output_dir`, from scratch if there is none at all; `true`: there
            must be one; `false`: there must be none; else a path (`utils.run.weights_path`). With a path, checkpoints
            that a run from this path has written to `output_dir` take precedence, so that the same command resumes.

    Raises:
        InputError: no checkpoint where there must be one, or one where there must be none; every checkpoint is damaged,
            or the one that a path names.
    """
    if resume not in WORDS:
        return _start_from_path(output_dir, resume)
    folders = checkpoint_folders(output_dir)
    if resume == "false":
        if folders:
            raise InputError(f"experiment.resume=false: {output_dir} already holds {folders[-1].name}")
        return Start()
    newest, damaged = _newest_good(folders)
    if newest is not None:
        return Start(str(newest), notices=tuple(damaged.values()), back_up=tuple(damaged))
    if damaged:
        raise InputError(f"experiment.resume={resume}: all checkpoints are damaged: {'; '.join(damaged.values())}")
    if resume == "true":
        raise InputError(f"experiment.resume=true: no complete checkpoint in {output_dir}")
    return Start()


def _start_from_path(output_dir: Path, resume: str) -> Start:
    if not resume.startswith(SCHEME) and not Path(resume).exists():
        raise InputError(f"experiment.resume={resume}: no such path; expected {', '.join(WORDS)} or a path")
    own, damaged = _newest_good(checkpoint_folders(output_dir))
    if own is not None and read_manifest(own).state.started_from == _identity(resume):
        notice = f"resuming {own.name}, which began with experiment.resume={resume}"
        return Start(str(own), notices=(*damaged.values(), notice), back_up=tuple(damaged))
    source = resolve_path(resume)
    if source.kind == "checkpoint":
        verify(source.path)
        return _start_from_checkpoint(output_dir, source.path, notices=(), damaged=damaged)
    in_run = checkpoint_folders(source.path) if source.kind == "run" else []
    if not in_run:
        return _start_from_weights(output_dir, resume)
    newest, skipped = _newest_good(in_run)
    if newest is None:
        raise InputError(f"experiment.resume={resume}: all checkpoints are damaged: {'; '.join(skipped.values())}")
    notices = (*skipped.values(), f"experiment.resume={resume}: using {newest.name}")
    return _start_from_checkpoint(output_dir, newest, notices=notices, damaged=damaged)


def _start_from_checkpoint(
    output_dir: Path, checkpoint: Path, *, notices: tuple[str, ...], damaged: dict[Path, str]
) -> Start:
    """
    Args:
        damaged: checkpoints in `output_dir`.
    """
    step = read_manifest(checkpoint).state.global_step
    others = [path for path in checkpoint_folders(output_dir) if path.resolve() != checkpoint.resolve()]
    back_up = [path for path in others if path in damaged or step_of(path) >= step]
    final = output_dir / FINAL_FILE
    if final.is_file() and read_record(final).get("step", step + 1) > step:
        back_up.append(final)  # else a sampler would take it for the newest state
    return Start(str(checkpoint), notices=(*notices, *_describe(back_up)), back_up=tuple(back_up))


def _start_from_weights(output_dir: Path, resume: str) -> Start:
    found, final = find_weights(resume), output_dir / FINAL_FILE
    weights = found.path
    if weights.resolve() == final.resolve():
        raise InputError(
            f"experiment.resume={resume}: found the final weights of this run itself, expected a checkpoint; to start "
            "from them choose another experiment.output_dir"
        )
    back_up = [path for path in checkpoint_folders(output_dir) if path.resolve() != Path(resume).resolve()]
    if final.is_file():
        back_up.append(final)
    notice = f"{weights}: no {MANIFEST_FILE} there: only the weights are loaded; training starts at step 0"
    return Start(
        str(weights),
        weights=found,
        notices=(notice, *_describe(back_up)),
        back_up=tuple(back_up),
    )


def _newest_good(folders: list[Path]) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that agrees with its manifest, and the problems of newer ones."""
    damaged = {}
    for path in reversed(folders):
        try:
            verify(path)
        except InputError as error:
            damaged[path] = f"skipped: {error}"
        else:
            return path, damaged
    return None, damaged


def _identity(resume: str) -> str:
    """How the state of a run records the path that it was started from."""
    return resume if resume.startswith(SCHEME) else str(Path(resume).resolve())


def _describe(back_up: list[Path]) -> list[str]:
    return [f"{path.name} is renamed to {path.name}.aside" for path in back_up]


def back_up(start: Start) -> None:
    """Rename damaged or later checkpoints to `checkpoint-<step>.aside`, so that nothing loads them."""
    for path in start.back_up:
        target = path.with_name(f"{path.name}.aside")
        number = 1
        while target.exists():
            number += 1
            target = path.with_name(f"{path.name}.aside{number}")
        path.rename(target)


def check_same_run(start: Start, config: Config, provenance: Provenance, global_batch_size: int) -> list[str]:
    """Compare with the run that wrote the checkpoint or the weights, before anything is loaded.

    Keys annotated as MAY_CHANGE or SILENT in the schema may differ.

    Returns:
        A line for the log for each allowed difference.

    Raises:
        InputError: another model, optimizer, data, classes or tokenizer, another global batch without
            `training.allow_batch_change`, or other values for a run that has no steps left.
    """
    if start.checkpoint is None:
        return []
    if start.weights is not None:
        return _check_weights(start.weights, config, provenance)
    manifest = read_manifest(Path(start.checkpoint))
    keys = keys_of(type(config))
    changes = _differences(manifest.provenance.config, asdict(config))
    model_changes = [
        line for key, line in changes.items() if key.startswith("model.") and not keys[key].has(MAY_CHANGE)
    ]
    if model_changes:
        raise InputError(f"{start.checkpoint}: written by another model: {'; '.join(model_changes)}")
    if "optimizer.name" in changes:
        raise InputError(
            f"{start.checkpoint}: {changes['optimizer.name']}: the saved state belongs to another optimizer; keep the "
            f"optimizer, or start from the weights with experiment.resume={start.checkpoint}/{MODEL}.safetensors"
        )
    if manifest.provenance.data_hash != provenance.data_hash:
        raise InputError(
            f"{start.checkpoint}: trained on other data: found hash {provenance.data_hash[:12]}..., expected "
            f"{manifest.provenance.data_hash[:12]}...; use another experiment.output_dir, or the data of that run"
        )
    trained_with = manifest.provenance.tokenizer_sha256
    check_tokenizer(trained_with, provenance.tokenizer_sha256, start.checkpoint, config.experiment)
    _check_classes(manifest.provenance.class_names, provenance, start.checkpoint)
    other_weights = [line for key, line in changes.items() if decides_weights(key)]
    if other_weights and is_finished(start, config):
        raise InputError(
            f"{start.checkpoint}: the run has no steps left, found {'; '.join(other_weights)}; use another "
            "experiment.output_dir, or the values of the run"
        )
    written_at = manifest.state.global_batch_size
    if written_at != global_batch_size and not config.training.allow_batch_change:
        raise InputError(
            f"{start.checkpoint}: written at a global batch of {written_at} images, found {global_batch_size} = "
            "per_gpu_batch_size * gradient_accumulation_steps * processes; keep the product, or set "
            "training.allow_batch_change=true"
        )
    notices = [line for key, line in changes.items() if not keys[key].has(SILENT)]
    if manifest.provenance.code_hash != provenance.code_hash:
        notices.append("the code has changed")
    notices += _differences(manifest.versions, versions()).values()
    return [f"since {Path(start.checkpoint).name}: {notice}" for notice in notices]


def _check_weights(weights: TrainedWeights, config: Config, provenance: Provenance) -> list[str]:
    """`check_same_run` for weights without a checkpoint."""
    _check_classes(weights.class_names, provenance, weights.path)
    if provenance.tokenizer_sha256 is None:  # training of a tokenizer
        return []
    check_weights(weights, provenance.tokenizer_sha256, config)
    return [] if weights.tokenizer_sha256 is not None else [f"{weights.path}: {NO_TOKENIZER}"]


def _check_classes(trained: list[str] | None, provenance: Provenance, source: object) -> None:
    """Raise InputError if weights and data both have class names and these differ."""
    found = provenance.class_names
    if None in (trained, found) or trained == found:
        return
    raise InputError(
        f"{source}: trained on the classes {shortened(trained)}, found {shortened(found)} in the training data; "
        "use the data of that run, or start from its weights with experiment.init_from, whose classes are new"
    )


def shortened(names: list[str] | None) -> str:
    """The names in at most 80 characters, for a message."""
    return textwrap.shorten(", ".join(names or []), 80, placeholder=" ...")


def is_finished(start: Start, config: Config) -> bool:
    """Whether the run resumes from a checkpoint of its last step."""
    if start.checkpoint is None or start.weights_only:
        return False
    return read_manifest(Path(start.checkpoint)).state.global_step == last_step(config.training)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """By dotted key: `key=new, was old`, for keys that both have."""
    old, new = dict(flat(old)), dict(flat(new))
    common = [key for key in new if key in old and old[key] != new[key]]
    return {key: f"{key}={new[key]}, was {old[key]}" for key in common}


def starting_state(start: Start, config: Config, global_batch_size: int) -> TrainingState:
    """The state from which the run continues.

    Raises:
        InputError: the run is configured to end before it.
    """
    resume = config.experiment.resume
    if start.checkpoint is not None and not start.weights_only:
        manifest = read_manifest(Path(start.checkpoint))
        state = manifest.state
        state.global_batch_size = global_batch_size
        if f"{EMA}.safetensors" not in manifest.files:  # see `load_modules`
            state.ema_start = state.global_step
    else:
        state = TrainingState(global_step=0, global_batch_size=global_batch_size, samples_seen=0)
    if resume not in WORDS:
        state.started_from = _identity(resume)
    if state.global_step > last_step(config.training):
        key = "max_train_steps" if config.training.stop_steps is None else "stop_steps"
        raise InputError(
            f"training.{key}={last_step(config.training)}: expected at least {state.global_step}, the step of "
            f"{start.checkpoint}"
        )
    return state


def last_step(training: TrainingConfig) -> int:
    """The number of steps after which the run ends."""
    return training.max_train_steps if training.stop_steps is None else training.stop_steps


def untrained_classes(start: Start, without_samples: list[int]) -> list[int] | None:
    """Classes without samples both in this run and in the run that it starts from; None: unknown, since the weights
    that it starts from do not record theirs.

    Args:
        without_samples: classes without samples in the training data.
    """
    if start.checkpoint is None:
        return without_samples
    if start.weights is not None:
        before = start.weights.record.get("untrained_classes")
    else:
        before = read_manifest(Path(start.checkpoint)).provenance.untrained_classes
    return None if before is None else [class_id for class_id in without_samples if class_id in before]


def load_start(start: Start, resumable: Resumable) -> list[str]:
    """Load what the run starts from, in place and strictly. Weights alone are loaded into the model and its EMA.

    Returns:
        Lines for the log.

    Raises:
        InputError: keys or shapes that differ from the modules', or the optimizer state of other parameters.
    """
    if start.checkpoint is None:
        return []
    path = Path(start.checkpoint)
    if not start.weights_only:
        notices = load_modules(path, resumable)
        load_optimizers(path, resumable)
        return notices
    for name in (MODEL, EMA):
        if name in resumable.modules:
            load_weights(resumable.modules[name], load_state_dict(path), path)
    return []
