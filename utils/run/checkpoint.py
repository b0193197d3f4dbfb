"""Checkpoints that exist only when they are complete, and that are read only when they are whole.

`checkpoint-<step>/` of a reAR run holds model.safetensors, ema.safetensors (with EMA), optimizer.bin and, written last,
manifest.json; one of a tokenizer's training holds its discriminator's too. It is written as `checkpoint-<step>.tmp/`
and renamed, so that a killed run leaves nothing half-written under a final name. No random-number state is saved: all
noise is keyed by the step.

Not accelerate's or torch's own checkpoints: these have no hash of what they hold and no rename at the end, and theirs
depend on the number of processes.
"""

import pickle
import re
import shutil
from pathlib import Path

import torch

from utils.errors import InputError
from utils.faults import fault_point
from utils.files.atomic import sync
from utils.files.weights import load_state_dict, save_weights
from utils.run.manifest import MANIFEST_FILE, Provenance, TrainingState, check_sizes, write_manifest
from utils.run.snapshot import Resumable, Snapshot, restore_module, restore_optimizer

MODEL, EMA = "model", "ema"  # names of modules
UNFINISHED = re.compile(r"checkpoint-\d+\.(tmp|deleted)")


def write_checkpoint(output_dir: Path, state: TrainingState, provenance: Provenance, snapshot: Snapshot) -> Path:
    """Write `checkpoint-<step>` below `output_dir`, replacing one of the same step.

    Raises:
        InputError: a tensor that is not finite. Nothing is written.
        OSError, RuntimeError: the disk is full or fails; `.tmp` is removed, older checkpoints are as before.
    """
    step = state.global_step
    final = output_dir / f"checkpoint-{step}"
    partial = final.with_name(final.name + ".tmp")
    nonfinite = snapshot.first_nonfinite()
    if nonfinite is not None:
        raise InputError(f"{final.name}: found a value that is not finite in {nonfinite}; it is not written")
    try:
        _remove_unfinished(output_dir)
        partial.mkdir(parents=True)
        fault_point("save.begin", step)
        for name, weights in snapshot.modules.items():
            save_weights(weights, partial / f"{name}.safetensors")
            fault_point(f"save.{name}", step)
        for name, optimizer in snapshot.optimizers.items():
            torch.save(optimizer, partial / f"{name}.bin")
            fault_point(f"save.{name}", step)
        for path in partial.iterdir():
            sync(path)
        fault_point("save.manifest", step)
        write_manifest(partial, state, provenance)
        sync(partial / MANIFEST_FILE)
        sync(partial)
        fault_point("save.rename", step)
        if final.exists():
            final.rename(final.with_name(final.name + ".deleted"))
        partial.rename(final)
        sync(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def prune_checkpoints(output_dir: Path, keep_last: int, keep_every: int) -> None:
    """Delete all but the newest `keep_last` complete checkpoints and those of every `keep_every`-th step (0: none).

    A checkpoint is renamed before it is deleted, so that one that is half deleted has no final name.

    Raises:
        OSError: the deletion failed; it is tried again after the next save.
    """
    for old in list_checkpoints(output_dir)[:-keep_last]:
        if keep_every and step_of(old) % keep_every == 0:
            continue
        fault_point("save.prune", step_of(old))
        doomed = old.with_name(old.name + ".deleted")
        old.rename(doomed)
        shutil.rmtree(doomed)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints whose files have the sizes of their manifest, in the order of their steps."""
    return [path for path in checkpoint_folders(output_dir) if _looks_complete(path)]


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """All folders with the name of a checkpoint in the order of their steps, whatever they hold; no other names."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def load_modules(path: Path, resumable: Resumable) -> list[str]:
    """Load the weights that `write_checkpoint` wrote, in place. An EMA that the checkpoint lacks begins with the model.

    Returns:
        Lines for the log.

    Raises:
        InputError: keys or shapes that differ from the modules', or a missing file.
    """
    notices = []
    for name, module in resumable.modules.items():
        file = path / f"{name}.safetensors"
        if name == EMA and not file.is_file():
            notices.append(f"{path.name} has no EMA: it begins with the weights of this step")
            file = path / f"{MODEL}.safetensors"
        restore_module(module, load_state_dict(file), file, resumable.sharded)
    return notices


def load_optimizers(path: Path, resumable: Resumable) -> None:
    """Load the optimizer states that `write_checkpoint` wrote, in place; no code in them is run.

    Raises:
        InputError: the state of another set of parameters, or a pickle of more than tensors.
    """
    for name, (module, optimizer) in resumable.optimizers.items():
        file = path / f"{name}.bin"
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise InputError(f"{file}: refused, damaged or a pickle of more than tensors") from error
        restore_optimizer(module, optimizer, saved, file, resumable.sharded)


def _remove_unfinished(output_dir: Path) -> None:
    """What earlier, killed runs left: half-written and half-deleted checkpoints."""
    for path in output_dir.glob("checkpoint-*"):
        if UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _looks_complete(path: Path) -> bool:
    try:
        check_sizes(path)
    except InputError:
        return False
    return True
