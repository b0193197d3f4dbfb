"""Checkpoints: the state of a run on disk, written atomically and verified before reading.

`checkpoint-<step>/` holds a safetensors file for each module (`model`, `ema`, ...), a `.bin` file for each optimizer
with its state by parameter name and, written last, manifest.json with the sha256 of every file. It is written as
`checkpoint-<step>.tmp/` and renamed. Random-number states are not saved: all random numbers depend on the step alone.

State dicts come from `torch.distributed.checkpoint.state_dict`, so a checkpoint does not depend on the number of
processes or on sharding. Its writer (`dcp.save`) is not used, nor accelerate's: their files have no hashes, are not
renamed at the end, and depend on the number of processes.
"""

import logging
import math
import pickle
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from utils.errors import InputError, environment_error, first_line
from utils.faults import fault_point
from utils.files.atomic import atomic_folder
from utils.files.weights import check_fits, load_state_dict, save_weights
from utils.run.manifest import Provenance, TrainingState, check_sizes, write_manifest
from utils.run.sharding import is_sharded
from utils.schema import ExperimentConfig

StateDict = dict[str, Tensor]
Snapshot = dict[str, dict[str, Any]]  # by file of a checkpoint, in host memory
Optimizers = Mapping[str, tuple[nn.Module, torch.optim.Optimizer]]
MODEL, EMA = "model", "ema"  # names of modules
UNFINISHED = re.compile(r"checkpoint-\d+\.(tmp|deleted)")


@dataclass
class Resumable:
    """The modules and optimizers of a run, by their file names in a checkpoint.

    Args:
        modules: their parameters and buffers are saved.
        optimizers: each with the module whose parameters it updates; several optimizers may share a module.
    """

    modules: Mapping[str, nn.Module]
    optimizers: Optimizers = field(default_factory=dict)

    @property
    def is_sharded(self) -> bool:
        return any(is_sharded(module) for module in self.modules.values())


def weights_of(module: nn.Module) -> StateDict:
    """The state dict. For a sharded module, all ranks must call this, and only rank 0 gets it, in host memory."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # a slow import

    sharded = is_sharded(module)
    options = StateDictOptions(full_state_dict=sharded, cpu_offload=sharded)
    return cast(StateDict, get_model_state_dict(module, options=options))


def load_weights(module: nn.Module, weights: StateDict, source: object) -> None:
    """Load a state dict in place; raises InputError for keys or shapes other than the module's."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    check_fits(module, weights, source)
    options = StateDictOptions(full_state_dict=is_sharded(module))
    set_model_state_dict(module, cast(dict[str, Any], weights), options=options)


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state dict with names instead of the numbers of parameters; ranks and memory as for `weights_of`."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    if not optimizer.state:  # before the first update, torch would invent a state with a step
        names = _parameter_names(module, optimizer)
        groups = [group | {"params": of_group} for group, of_group in zip(optimizer.param_groups, names, strict=True)]
        return {"state": {}, "param_groups": groups}
    sharded = is_sharded(module)
    options = StateDictOptions(full_state_dict=sharded, cpu_offload=sharded)
    return get_optimizer_state_dict(module, optimizer, options=options)


def load_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any], source: object) -> None:
    """Load the result of `optimizer_state` in place; learning rate, betas and the like stay as configured. Raises
    InputError for the state of other parameters."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    expected = {name for of_group in _parameter_names(module, optimizer) for name in of_group}
    found = {name for group in saved["param_groups"] for name in group["params"]}
    if found != expected:
        differing = sorted(found ^ expected)
        raise InputError(f"{source}: found other parameters than expected; {len(differing)} differ ({differing[0]})")
    if not saved["state"]:
        return
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    # Not strict: a parameter that was never updated has no state.
    options = StateDictOptions(full_state_dict=is_sharded(module), strict=False)
    set_optimizer_state_dict(module, optimizer, saved, options=options)
    for group, of_config in zip(optimizer.param_groups, settings, strict=True):
        group.update(of_config)


def _parameter_names(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Names of each group."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def take_snapshot(resumable: Resumable) -> Snapshot:
    """Copy the state to host memory, so that training can continue while it is written. For a sharded model all ranks
    must call this, and only rank 0 gets the tensors."""
    snapshot: Snapshot = {f"{name}.safetensors": weights_of(module) for name, module in resumable.modules.items()}
    for name, (module, optimizer) in resumable.optimizers.items():
        snapshot[f"{name}.bin"] = optimizer_state(module, optimizer)
    own = {tensor.data_ptr() for tensor in _live_tensors(resumable) if not hasattr(tensor, "full_tensor")}
    return _on_host(snapshot, own)


def _live_tensors(resumable: Resumable) -> Iterator[Tensor]:
    for module in resumable.modules.values():
        yield from module.state_dict().values()
    for _, optimizer in resumable.optimizers.values():
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _on_host(value: Any, own: set[int]) -> Any:
    """Nested dicts with their tensors in host memory. Tensors at the addresses `own`, which training changes, are
    copied; tensors gathered from shards are copies already."""
    if isinstance(value, Tensor):
        return value.to("cpu", copy=value.data_ptr() in own)
    if isinstance(value, dict):
        return {key: _on_host(inner, own) for key, inner in value.items()}
    return value


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, by their path."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from named_tensors(inner, f"{name} {key}".strip())


def write_checkpoint(output_dir: Path, state: TrainingState, provenance: Provenance, snapshot: Snapshot) -> Path:
    """Write `checkpoint-<step>` in `output_dir`, replacing one of the same step.

    Raises:
        InputError: a tensor that is not finite; nothing is written.
        OSError, RuntimeError: the disk is full or fails; `.tmp` is removed, older checkpoints are untouched.
    """
    step = state.global_step
    final = output_dir / f"checkpoint-{step}"
    nonfinite = [name for name, tensor in named_tensors(snapshot) if not torch.isfinite(tensor).all()]
    if nonfinite:
        raise InputError(f"{final.name}: found a value that is not finite in {nonfinite[0]}; it is not written")
    _remove_unfinished(output_dir)
    with atomic_folder(final, replace=True) as partial:
        fault_point("save.begin", step)
        for file, content in snapshot.items():
            if file.endswith(".safetensors"):
                save_weights(content, partial / file)
            else:
                torch.save(content, partial / file)
            fault_point(f"save.{Path(file).stem}", step)
        fault_point("save.manifest", step)
        write_manifest(partial, state, provenance)
        fault_point("save.rename", step)
    return final


def _remove_unfinished(output_dir: Path) -> None:
    """Delete half-written and half-deleted checkpoints of killed runs."""
    for path in output_dir.glob("checkpoint-*"):
        if UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def prune_checkpoints(output_dir: Path, keep_last: int, keep_every: int) -> None:
    """Delete all checkpoints but the newest `keep_last` complete ones and every `keep_every`-th step (0: none).
    Raises OSError if a deletion fails, which the next save tries again."""
    for old in list_checkpoints(output_dir)[:-keep_last]:
        if keep_every and step_of(old) % keep_every == 0:
            continue
        fault_point("save.prune", step_of(old))
        doomed = old.with_name(old.name + ".deleted")  # a half-deleted one must not have a final name
        old.rename(doomed)
        shutil.rmtree(doomed)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints whose files have the sizes of their manifest, ordered by step."""
    return [path for path in checkpoint_folders(output_dir) if _looks_complete(path)]


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """All folders with the name of a checkpoint, complete or not, ordered by step."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _looks_complete(path: Path) -> bool:
    try:
        check_sizes(path)
    except InputError:
        return False
    return True


def load_modules(path: Path, resumable: Resumable) -> list[str]:
    """Load the weights of a checkpoint in place; a missing EMA starts from the model's weights. Returns lines for the
    log.

    Raises InputError for a missing file, or keys or shapes other than the modules'.
    """
    notices = []
    for name, module in resumable.modules.items():
        file = path / f"{name}.safetensors"
        if name == EMA and not file.is_file():
            notices.append(f"{path.name} has no EMA: it starts from the weights of this step")
            file = path / f"{MODEL}.safetensors"
        load_weights(module, load_state_dict(file), file)
    return notices


def load_optimizers(path: Path, resumable: Resumable) -> None:
    """Load the optimizer states of a checkpoint in place, without running code in the files. Raises InputError for the
    state of other parameters, or a pickle that holds more than tensors."""
    for name, (module, optimizer) in resumable.optimizers.items():
        file = path / f"{name}.bin"
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise InputError(f"{file}: refused, damaged or a pickle of more than tensors") from error
        load_optimizer(module, optimizer, saved, file)


class CheckpointSaver:
    """Writes checkpoints in a thread of rank 0, one at a time, from a copy of the whole state in host memory. A failure
    is logged, and training continues.

    Attributes:
        last_good: the newest checkpoint, written or resumed from.
        failures_in_a_row: failed saves since `last_good`.
    """

    def __init__(
        self, experiment: ExperimentConfig, provenance: Provenance, last_good: str | None, logger: logging.Logger
    ) -> None:
        self.experiment = experiment
        self.provenance = provenance
        self.logger = logger
        self.output_dir = Path(experiment.output_dir)
        self.last_good = last_good
        self.failures_in_a_row = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait, since the folder's lock is released next, except after a second Ctrl-C."""
        if not isinstance(error, KeyboardInterrupt):
            self.wait()

    @property
    def gave_up(self) -> bool:
        return self.failures_in_a_row >= self.experiment.max_save_failures

    def start(self, state: TrainingState, resumable: Resumable, is_rank0: bool) -> None:
        """Copy the state and start writing it. Call it on rank 0, or on all ranks if the state is sharded."""
        self.wait()  # two copies of the state may not fit in host memory
        snapshot = take_snapshot(resumable)
        if is_rank0:
            self._thread = threading.Thread(target=self._write, args=(replace(state), snapshot))
            self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def describe_last_good(self) -> str:
        self.wait()
        return f"the last good checkpoint is {self.last_good}" if self.last_good else "there is no checkpoint"

    def _write(self, state: TrainingState, snapshot: Snapshot) -> None:
        try:
            self.last_good = str(write_checkpoint(self.output_dir, state, self.provenance, snapshot))
        except Exception as error:  # a full disk is an OSError or torch's RuntimeError; all ranks must learn of any
            self.failures_in_a_row += 1
            needed, free = sum(tensor.nbytes for _, tensor in named_tensors(snapshot)), math.nan
            with suppress(OSError):  # the mount is gone
                free = shutil.disk_usage(self.output_dir).free
            self.logger.error(
                f"{self.output_dir / f'checkpoint-{state.global_step}'} was not written (failure "
                f"{self.failures_in_a_row} of {self.experiment.max_save_failures} in a row): "
                f"{environment_error(error) or first_line(error)}; needed {needed / 1e9:.3f} GB, free "
                f"{free / 1e9:.3f} GB"
            )
            return
        self.failures_in_a_row = 0
        try:
            prune_checkpoints(self.output_dir, self.experiment.keep_last, self.experiment.keep_every)
        except (OSError, RuntimeError) as error:
            self.logger.warning(f"an old checkpoint could not be deleted: {error}")
