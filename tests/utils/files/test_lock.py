"""One writer at a time, and a lock whose owner is dead needs no hand."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.runs import launch_environment
from utils.errors import InputError
from utils.files import lock
from utils.files.lock import only_writer

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


def test_the_second_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    process = hold(tmp_path / "a.tokens")
    try:
        owner = json.loads((tmp_path / "a.tokens.lock.owner").read_text())
        expected = rf"process {process.pid} on {owner['host']}, since {owner['started']}"
        with pytest.raises(InputError, match=f"a.tokens: in use by .*{expected}"), only_writer(tmp_path / "a.tokens"):
            pass
        with only_writer(tmp_path / "b.tokens"):
            pass
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    with only_writer(tmp_path / "a.tokens"):  # at once
        assert (tmp_path / "a.tokens.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_an_owner_that_was_killed_before_it_wrote_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.npz.lock").touch()
    with only_writer(tmp_path / "a.npz"):
        assert (tmp_path / "a.npz.lock").stat().st_size > 0
    assert list(tmp_path.iterdir()) == []


def test_inside_a_folder_that_is_removed_if_nothing_came_of_it(tmp_path: Path) -> None:
    with only_writer(tmp_path / "made/run", inside=True):
        assert (tmp_path / "made/run/.lock").exists()
        with pytest.raises(InputError, match="in use by"), only_writer(tmp_path / "made/run", inside=True):
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
    record = "filelock/2\npid=1\nhost=node7\nmode=lease\ntoken=ab\nduration=0.6\nstart=5\n"
    (tmp_path / "a.npz.lock").write_text(record)
    owner = lock.Owner(1, "node7", "another", "2026-01-02 03:04:05", "sample_imagenet_rear.py")
    (tmp_path / "a.npz.lock.owner").write_text(json.dumps(vars(owner)))
    return path


def test_an_owner_on_another_machine_that_is_silent_is_dead(elsewhere: Path, capsys: pytest.CaptureFixture) -> None:
    with only_writer(elsewhere):
        pass
    assert "process 1 on node7, since 2026-01-02 03:04:05; watching for 0.6 s" in capsys.readouterr().err


def test_an_owner_on_another_machine_that_touches_its_lock_lives(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = lock.time.sleep

    def touched_meanwhile(seconds: float) -> None:
        elsewhere.with_name("a.npz.lock").touch()
        sleep(seconds)

    monkeypatch.setattr(lock.time, "sleep", touched_meanwhile)
    message = r"a\.npz: in use by sample_imagenet_rear\.py, process 1 on node7"
    with pytest.raises(InputError, match=message), only_writer(elsewhere):
        pass
    assert elsewhere.with_name("a.npz.lock").exists()
