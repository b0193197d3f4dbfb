"""Errors that a user can fix are one line, bugs ask for a report, and the console may fail."""

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.runs import launch_environment
from utils.console import Console, unbreakable_console
from utils.errors import INSTALL_COMPILER, PROCESSES, REPORT, InputError, input_errors_exit

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("a.npz: damaged"), "error: a.npz: damaged"),
        (PermissionError(errno.EACCES, "Permission denied", "out/log.txt"), "error: out/log.txt: Permission denied"),
        (FileExistsError(errno.EEXIST, "File exists", "a", None, "b"), "error: a: b: File exists"),
        (OSError("5 requested and 0 written"), "error: 5 requested and 0 written"),
        (MemoryError(), "error: out of memory: MemoryError; a smaller batch needs less"),
        (RuntimeError("can't start new thread"), f"error: {PROCESSES}"),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), f"error: {PROCESSES}"),
        (RuntimeError("InvalidCxxCompiler: No working C++ compiler found in x"), f"error: {INSTALL_COMPILER}"),
    ],
)
def test_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="1"), input_errors_exit():
        raise error
    assert capsys.readouterr().err == line + "\n"


COMPILE = """
import torch
from utils.errors import input_errors_exit
with input_errors_exit():
    torch.compile(torch.sin)(torch.ones(3))
"""


@pytest.mark.slow
def test_compiling_without_a_compiler(tmp_path: Path) -> None:
    environment = launch_environment() | {"CXX": "absent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, f"error: {INSTALL_COMPILER}")
    assert "Traceback" not in done.stderr


def test_our_own_mistakes_keep_their_traceback_and_say_so(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="1"), input_errors_exit():
        raise KeyError("x")
    lines = capsys.readouterr().err.splitlines()
    assert (lines[0], *lines[-2:]) == ("Traceback (most recent call last):", "KeyError: 'x'", REPORT)


def entry_points() -> list[Path]:
    sources = [*ROOT.glob("scripts/*.py"), *ROOT.glob("evaluation/*.py"), ROOT / "utils/config.py"]
    return [path for path in sources if 'if __name__ == "__main__"' in path.read_text()]


@pytest.mark.parametrize("path", entry_points(), ids=lambda path: path.name)
def test_every_script_runs_inside_it(path: Path) -> None:
    last = ast.parse(path.read_text()).body[-1]
    assert isinstance(last, ast.If), "the last statement starts the script"
    assert any(
        ast.unparse(inner.items[0]) == "input_errors_exit()" for inner in last.body if isinstance(inner, ast.With)
    )


SAY = """
import sys
from tqdm import tqdm
from utils.errors import input_errors_exit
with input_errors_exit():
    for i in tqdm(range(3), mininterval=0):
        print("x" * 10000, flush=True)
        print("x", file=sys.stderr, flush=True)
    open(sys.argv[1], "w").write("done")
"""


@pytest.mark.parametrize("redirection", [">/dev/full 2>/dev/full", "2>&1 | true", ">&- 2>&-", "<&- >&- 2>&-"])
def test_errors_of_the_console_do_not_stop_the_work(redirection: str, tmp_path: Path) -> None:
    command = f'set -o pipefail; "{sys.executable}" -c "$SAY" "{tmp_path}/result" {redirection}'
    subprocess.run(["bash", "-c", command], env=launch_environment(SAY=SAY), check=True)
    assert (tmp_path / "result").read_text() == "done"


def test_characters_that_the_console_lacks_are_escaped() -> None:
    with open(os.devnull, "w", encoding="ascii") as stream:
        assert Console(stream).write("caf\udce9 \N{SNOWMAN}") == 6


def test_the_streams_come_back() -> None:
    streams = sys.stdout, sys.stderr
    with unbreakable_console():
        assert isinstance(sys.stdout, Console)
    assert (sys.stdout, sys.stderr) == streams


def test_ctrl_c_ends_at_once_with_one_word() -> None:
    code = "from utils.errors import input_errors_exit\nwith input_errors_exit():\n    raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], env=launch_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-2, "interrupted\n")
