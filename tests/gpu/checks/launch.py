"""Scripts of this project as processes of their own, started as a user does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1"]


def start(script: str, arguments: list[str], ranks: int = 1, **environment: str) -> subprocess.Popen:
    launcher = [*TORCHRUN, f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, f"scripts/{script}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


def launch(script: str, arguments: list[str], ranks: int = 1) -> None:
    """Run a script to its end; what it prints goes to this process's output."""
    status = start(script, arguments, ranks=ranks).wait()
    assert status == 0, f"scripts/{script} on {ranks} processes ended with exit status {status}"
