"""Checkpoints that exist only when they are complete.

`checkpoint-<step>/` holds model.safetensors, optimizer.bin, ema.safetensors (with EMA) and, written last, state.json.
It is written as `checkpoint-<step>.tmp/` and renamed, so that a killed run leaves nothing half-written under a final
name. No random-number state is saved: all noise is keyed by the step.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from utils.errors import InputError
from utils.weights import load_state_dict, load_strict

MODEL_FILE, EMA_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "ema.safetensors", "optimizer.bin", "state.json"


@dataclass
class TrainingState:
    """Where a run stands; the data position follows from it."""

    global_step: int  # optimizer steps done
    global_batch_size: int  # images per optimizer step


def save_checkpoint(
    output_dir: Path,
    state: TrainingState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: nn.Module | None,
    keep_last: int,
) -> None:
    """Write `checkpoint-<step>` below `output_dir`, replacing one of the same step; then delete the oldest ones."""
    final = output_dir / f"checkpoint-{state.global_step}"
    partial = final.with_name(final.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_weights(model.state_dict(), partial / MODEL_FILE)
    if ema is not None:
        save_weights(ema.state_dict(), partial / EMA_FILE)
    torch.save(optimizer.state_dict(), partial / OPTIMIZER_FILE)
    (partial / STATE_FILE).write_text(json.dumps(asdict(state)))
    for path in [*partial.iterdir(), partial]:
        _fsync(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _fsync(output_dir)
    for old in list_checkpoints(output_dir)[:-keep_last]:
        shutil.rmtree(old)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None
) -> TrainingState:
    """Load what `save_checkpoint` wrote, in place.

    Raises:
        InputError: keys or shapes that differ from the model's, or a missing file.
    """
    load_strict(model, load_state_dict(path / MODEL_FILE), path / MODEL_FILE)
    if ema is not None:
        load_strict(ema, load_state_dict(path / EMA_FILE), path / EMA_FILE)
    optimizer.load_state_dict(torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True))
    return TrainingState(**json.loads((path / STATE_FILE).read_text()))


def find_checkpoint(output_dir: Path, resume: str) -> Path | None:
    """The newest complete checkpoint, or None to start anew.

    Args:
        resume: auto, true or false, as in `experiment.resume`.

    Raises:
        InputError: `true` without a checkpoint, or `false` in a folder that has one.
    """
    checkpoints = list_checkpoints(output_dir)
    if resume == "false":
        if checkpoints:
            raise InputError(f"experiment.resume=false: {output_dir} already holds {checkpoints[-1].name}")
        return None
    if checkpoints:
        return checkpoints[-1]
    if resume == "true":
        raise InputError(f"experiment.resume=true: no complete checkpoint in {output_dir}")
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints in the order of their steps; other folders are ignored."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if (path / STATE_FILE).is_file()), key=lambda path: int(path.name[11:]))


def save_weights(state_dict: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions that the umask gives (safetensors itself writes 0600)."""
    partial = path.with_name(path.name + ".tmp")
    save_file({key: value.detach().contiguous().cpu() for key, value in state_dict.items()}, partial)
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o666 & ~umask)
    partial.replace(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
