"""Where a run starts: the rules of `experiment.resume`."""

from dataclasses import dataclass, field
from pathlib import Path

from utils.errors import InputError
from utils.files.weights import load_state_dict, read_record
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
from utils.run.manifest import MANIFEST_FILE, TrainingState, read_manifest, verify
from utils.run.trained_weights import FINAL_FILE
from utils.schema import Config, TrainingConfig

MODEL_FILES = (FINAL_FILE, "unwrapped_model/model.safetensors", "unwrapped_model/pytorch_model.bin")


@dataclass
class Start:
    """What a run starts from.

    Attributes:
        checkpoint: a verified checkpoint folder, or weights without a manifest; None: from scratch.
        weights_only: `checkpoint` holds weights in the published layout; optimizer, step and data start anew.
        notices: lines for the log.
        back_up: checkpoints of `output_dir` that are damaged or of later steps, and final weights of later steps, to
            be renamed before training.
    """

    checkpoint: str | None = None
    weights_only: bool = False
    notices: list[str] = field(default_factory=list)
    back_up: list[str] = field(default_factory=list)


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
        return Start(str(newest), notices=[*damaged.values()], back_up=[str(path) for path in damaged])
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
        return Start(str(own), notices=[*damaged.values(), notice], back_up=[str(p) for p in damaged])
    inside = checkpoint_folders(path) if path.is_dir() else []
    notices: list[str] = []
    if inside:  # a run folder
        newest, broken = _newest_good(inside)
        if newest is None:
            raise InputError(f"experiment.resume={resume}: no checkpoint there is whole: {'; '.join(broken.values())}")
        path, notices = newest, [*broken.values(), f"experiment.resume={resume}: taking {newest.name}"]
    if not (path / MANIFEST_FILE).is_file():
        weights = path if path.is_file() else next((path / n for n in MODEL_FILES if (path / n).is_file()), None)
        if weights is None:
            raise InputError(f"{path}: found neither {MANIFEST_FILE} nor weights, one of {', '.join(MODEL_FILES)}")
        if weights.resolve() == (output_dir / FINAL_FILE).resolve():
            raise InputError(
                f"experiment.resume={resume}: found the final weights of this run itself, expected a checkpoint; to "
                "start from them choose another experiment.output_dir"
            )
        start = Start(str(weights), weights_only=True)
        start.notices = [f"{weights}: no manifest, so weights only; optimizer, step and data order start anew"]
    else:
        if not inside:
            verify(path)
        start = Start(str(path), notices=notices)
    first_step = 0 if start.weights_only else read_manifest(path).state.global_step
    others = [p for p in folders if p.resolve() != path.resolve()]
    start.back_up = [str(p) for p in others if p in damaged or step_of(p) >= first_step]
    final = output_dir / FINAL_FILE
    if final.is_file() and (start.weights_only or read_record(final).get("step", first_step + 1) > first_step):
        start.back_up.append(str(final))  # else a sampler would take it for the newest state
    start.notices += [f"{Path(p).name} is set aside" for p in start.back_up]
    return start


def back_up(start: Start) -> None:
    """Rename what must neither be taken for the newest state nor be lost: `checkpoint-<step>.aside`."""
    for path in map(Path, start.back_up):
        target = path.with_name(path.name + ".aside")
        number = 1
        while target.exists():
            number, target = number + 1, path.with_name(f"{path.name}.aside{number}")
        path.rename(target)


def starting_state(start: Start, config: Config, global_batch_size: int) -> TrainingState:
    """The state that the run goes on from.

    Raises:
        InputError: the run is to end before that.
    """
    resume = config.experiment.resume
    if start.checkpoint is not None and not start.weights_only:
        state = read_manifest(Path(start.checkpoint)).state
        state.global_batch_size = global_batch_size
    else:
        state = TrainingState(global_step=0, global_batch_size=global_batch_size, samples_seen=0)
    if resume not in ("auto", "true", "false"):
        state.started_from = str(Path(resume).resolve())
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


def load_start(start: Start, resumable: Resumable) -> list[str]:
    """Load what the run starts from, in place and strictly. With weights alone all but the model and its EMA start
    anew.

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
