"""Scripts as separate processes that start fast: forked from a server that has already imported the slow packages.

What runs is the script itself, as `__main__`, with an environment, output and exit status of its own. Launchers and
the start from nothing are tested where they matter: tests/scripts/test_help.py, test_published_commands.py,
test_quickstart.py and tests/faults/test_two_nodes.py.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
STANDALONE = ["torch.distributed.run", "--standalone", "--local_addr=127.0.0.1"]  # the host name need not resolve
WAIT_S = 90  # no test relies on it; it keeps a hanging process from hanging the suite

STARTED: list[BaseProcess] = []  # by the test in progress

SERVER = multiprocessing.get_context("forkserver")
SCRIPTS = (
    "sample_imagenet_rear",
    "pretokenize",
    "reconstruct",
    "train_tokenizer",
    "make_shards",
    "convert_tokens",
    "study",
)
IMPORTED_LATE = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "matplotlib.figure",
)
SERVER.set_forkserver_preload(
    ["tests.faults.worker", "evaluation.evaluator", *(f"scripts.{name}" for name in SCRIPTS), *IMPORTED_LATE]
)


@dataclass
class Done:
    returncode: int  # that of the launcher if there are several processes
    stdout: str  # of all processes
    stderr: str


def run_script(command: list[str], folder: Path, processes: int = 1, **environment: str) -> Done:
    """A script to its end, as one process or as torchrun would run several: if one fails, the others are ended.

    Args:
        command: path of the script below the root of the project, and its arguments.
        folder: for files with the output.
    """
    addresses = rank_environments(processes) if processes > 1 else [{}]
    outputs = [folder / f"{Path(command[0]).stem}.{time.monotonic_ns()}.{rank}" for rank in range(processes)]
    started = [
        start_script(command, output, **environment, **address)
        for output, address in zip(outputs, addresses, strict=True)
    ]
    deadline = time.monotonic() + WAIT_S
    while any(process.is_alive() for process in started) and time.monotonic() < deadline:
        if any(process.exitcode for process in started):
            break
        time.sleep(0.01)
    hanging = time.monotonic() >= deadline
    for process in started:
        process.terminate()
        process.join(WAIT_S)
    texts = ["".join(Path(f"{output}{kind}").read_text() for output in outputs) for kind in (".out", ".err")]
    assert not hanging, f"{command} hangs:\n{texts[1]}"
    codes = [process.exitcode for process in started]
    return Done(codes[0] if processes == 1 else int(any(codes)), *texts)


def rank_environments(processes: int) -> list[dict[str, str]]:
    """The environment variables that torchrun sets."""
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def start_script(command: list[str], output: Path, **environment: str) -> BaseProcess:
    """Start a script that writes to `<output>.out` and `<output>.err`."""
    process = SERVER.Process(target=_be_script, args=(command, str(output), environment))
    process.start()
    STARTED.append(process)
    return process


def run_ranks(target: Callable[..., None], *arguments: Any, processes: int) -> None:
    """A function as the ranks of a launch, each in a process of its own."""
    started = []
    for address in rank_environments(processes):
        started.append(SERVER.Process(target=_be_rank, args=(target, arguments, address)))
        started[-1].start()
        STARTED.append(started[-1])
    for process in started:
        process.join(WAIT_S)
    assert [process.exitcode for process in started] == [0] * processes


def _be_rank(target: Callable[..., None], arguments: tuple, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    target(*arguments)


def _be_script(command: list[str], output: str, environment: dict[str, str]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as in a script on Linux
    for number, kind in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(f"{output}{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    sys.argv = command
    torch.set_num_threads(1)
    runpy.run_path(str(ROOT / command[0]), run_name="__main__")


def kill_started() -> None:
    """End processes that a failed test has left: one that hangs would keep pytest from ending."""
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
