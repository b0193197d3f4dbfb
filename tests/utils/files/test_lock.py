"""One writer at a time; the lock of a dead owner is taken over."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.runs import launch_environment
from utils.errors import InputError
from utils.files import lock
from utils.files.lock import is_in_use, only_writer, owner_inside

HOLD = """
import sys, time
from pathlib import Path
from utils.files.lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(path: Path) -> subprocess.Popen:
    """Another process that has the lock."""
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, env=launch_environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_at_once_and_a_killed_one_is_replaced_at_once(tmp_path: Path) -> None:
    process = hold(tmp_path / "a.tokens")
    try:
        started = time.monotonic()
        with pytest.raises(InputError, match=f"a.tokens: .*{process.pid}"), only_writer(tmp_path / "a.tokens"):
            pass
        with only_writer(tmp_path / "b.tokens"):
            pass
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    with only_writer(tmp_path / "a.tokens"):
        assert (tmp_path / "a.tokens.lock").exists()
        assert time.monotonic() - started < lock.HEARTBEAT_S
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "abandoned\n"])
def test_an_owner_that_was_killed_before_it_wrote_its_record(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.npz.lock").write_text(content)
    with only_writer(tmp_path / "a.npz"):
        assert "mode=lease" in (tmp_path / "a.npz.lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_slow_to_write_its_record_keeps_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.npz.lock"
    path.touch()
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: path.write_text("record"))
    lock._mark_if_abandoned(path)
    assert path.read_text() == "record"


def test_the_owner_inside_a_folder(tmp_path: Path) -> None:
    assert owner_inside(tmp_path) is None
    with only_writer(tmp_path, inside=True):
        assert owner_inside(tmp_path) == os.getpid()
    assert owner_inside(tmp_path) is None


def test_inside_a_folder_that_is_removed_if_nothing_came_of_it(tmp_path: Path) -> None:
    with only_writer(tmp_path / "made/run", inside=True):
        assert (tmp_path / "made/run/.lock").exists()
        with pytest.raises(InputError, match="made/run: "), only_writer(tmp_path / "made/run", inside=True):
            pass
    assert not (tmp_path / "made/run").exists()
    with only_writer(tmp_path / "made", inside=True):
        (tmp_path / "made/file").touch()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["file"]


def test_paths_without_a_name(tmp_path: Path) -> None:
    for path in (".", "/", ".."):
        with pytest.raises(InputError, match="expected a path that ends in a name"), only_writer(Path(path)):
            pass


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path whose owner ran on another machine; its leases are short."""
    monkeypatch.setattr(lock, "LEASE_S", 0.6)
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.1)
    path = tmp_path / "a.npz"
    record = f"filelock/2\npid={os.getpid()}\nhost=node7\nmode=lease\ntoken=ab\nduration=0.6\nstart=5\n"
    (tmp_path / "a.npz.lock").write_text(record)
    return path


def test_an_owner_on_another_machine_that_is_silent_is_replaced(elsewhere: Path, capsys: pytest.CaptureFixture) -> None:
    with only_writer(elsewhere):
        pass
    assert f"process {os.getpid()} on node7" in capsys.readouterr().err


def test_whether_a_folder_is_in_use(tmp_path: Path) -> None:
    """By a process that runs on this machine, or an owner on another one that touched the lock lately."""
    assert not is_in_use(tmp_path)
    with only_writer(tmp_path, inside=True):
        assert is_in_use(tmp_path)
    assert not is_in_use(tmp_path)
    for host, start, age_s, expected in (
        (socket.gethostname(), 5, 0, False),  # the number of this process, which started at another time
        ("node7", 5, 0, True),
        ("node7", 5, lock.LEASE_S + 1, False),
    ):
        record = f"filelock/2\npid={os.getpid()}\nhost={host}\nmode=lease\ntoken=ab\nduration=30\nstart={start}\n"
        (tmp_path / lock.LOCK).write_text(record)
        os.utime(tmp_path / lock.LOCK, (time.time() - age_s,) * 2)
        assert is_in_use(tmp_path) == expected, host


def test_an_owner_on_another_machine_that_touches_its_lock_stays(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = lock.time.sleep

    def touched_meanwhile(seconds: float) -> None:
        elsewhere.with_name("a.npz.lock").touch()
        sleep(seconds)

    monkeypatch.setattr(lock.time, "sleep", touched_meanwhile)
    with pytest.raises(InputError, match=r"a\.npz: .*process \d+ on node7"), only_writer(elsewhere):
        pass
    assert elsewhere.with_name("a.npz.lock").exists()
