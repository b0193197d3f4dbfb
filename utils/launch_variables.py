"""Environment variables of a launch, read without importing torch."""

import os

from utils.errors import InputError

NUMBERS, COUNTS, PORTS = range(2**31), range(1, 2**31), range(2**16)
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # of srun and mpirun
# Settings of accelerate that have no effect here: default, and the setting to use instead.
LAUNCHER_SETTINGS = {
    "ACCELERATE_USE_DEEPSPEED": ("false", "torch's own DDP is used; training.fsdp=true shards"),
    "ACCELERATE_USE_FSDP": ("false", "training.fsdp=true shards"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "torch's own DDP is used; training.fsdp=true shards"),
    "ACCELERATE_MIXED_PRECISION": ("no", "training.mixed_precision alone counts"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "nothing is compiled by it"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "training.gradient_accumulation_steps alone counts"),
}


def launch_environment() -> tuple[int, int, int]:
    """Rank, number of processes and rank within this machine; 0, 1, 0 without a launcher. Raises InputError for missing
    or invalid environment variables of a launch."""
    size = int_variable("WORLD_SIZE", default=1, allowed=COUNTS)
    local_rank = int_variable("LOCAL_RANK", default=0)
    if "WORLD_SIZE" not in os.environ:
        _refuse_separate_tasks()
    if size == 1:
        return 0, 1, local_rank
    missing = [name for name in LAUNCH_VARIABLES if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"WORLD_SIZE={size} in the environment, but no {missing[0]}: start with torchrun or accelerate"
        )
    return int_variable("RANK", default=0, allowed=range(size)), size, local_rank


def _refuse_separate_tasks() -> None:
    for name in TASK_COUNTS:
        if (tasks := int_variable(name, default=1)) > 1:
            raise InputError(
                f"{name}={tasks} in the environment, but no WORLD_SIZE: SLURM_NTASKS > 1 (or mpirun) needs torchrun or "
                "accelerate, one task on each machine (docs/cluster.md); WORLD_SIZE=1 makes the tasks separate runs"
            )


def ignored_launcher_settings() -> list[str]:
    """A line for each setting of the launcher that has no effect here."""
    lines = [
        f"{name}={os.environ[name]} in the environment (from accelerate) has no effect: {alternative}"
        for name, (default, alternative) in LAUNCHER_SETTINGS.items()
        if os.environ.get(name, default).lower() != default
    ]
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        lines.append(
            "accelerate was asked for several processes and has started this one alone, as it does without GPUs; "
            "--multi_gpu makes it start all of them"
        )
    return lines


def int_variable(name: str, default: int, allowed: range = NUMBERS) -> int:
    """Raises InputError if the variable is not one of the allowed numbers."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) not in allowed:
        raise InputError(f"{name}={text!r} in the environment: expected {allowed[0]} to {allowed[-1]}")
    return int(text)
