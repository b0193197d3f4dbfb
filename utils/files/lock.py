"""One writer at a time: who makes a file or works in a folder holds a lock beside or inside it.

The lock is a lease of `filelock`: a small file that names its owner, who touches it every few seconds. On one machine
the process table tells whether the owner lives; of another machine that shares the file system, the touching does. So a
lock whose owner was killed needs no hand. Not flock: a file system may keep it to one machine or not have it, and
forked data workers that outlive their parent for some seconds hold it too.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import LeaseCompromise, SoftFileLease, Timeout

from utils.errors import InputError

LOCK = ".lock"
LEASE_S, HEARTBEAT_S = 30, 5  # an owner on another machine that has not touched its lock for a lease is dead
EMPTY_S = 1  # an owner that has not written its name by then was killed before it could
POLL_S = 0.1


@dataclass
class Owner:
    """Who holds a lock: what the lock itself does not tell lies beside it."""

    pid: int
    host: str
    machine: str  # equal where process numbers mean the same
    started: str
    command: str

    def __str__(self) -> str:
        return f"{self.command}, process {self.pid} on {self.host}, since {self.started}"


@contextmanager
def only_writer(path: Path, inside: bool = False) -> Iterator[None]:
    """Inside `with` no other process that asks for the same writes to `path`; folders on the way to it are made.

    Args:
        path: a file or folder that is made or written to.
        inside: `path` is a folder that stays: the lock lies in it, else beside it as `<path>.lock`.

    Raises:
        InputError: another process is at it, which the message names. At once, but for an owner on another machine or
            one that died and was not buried: these are watched, up to `LEASE_S`, until they prove to live.
    """
    if not inside and path.name in ("", ".."):
        raise InputError(f"{path}: expected a path that ends in a name")
    lock_path = path / LOCK if inside else path.with_name(path.name + LOCK)
    is_new = inside and not path.exists()
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    owner_path = lock_path.with_name(lock_path.name + ".owner")
    lock = SoftFileLease(
        lock_path, lease_duration=LEASE_S, heartbeat_interval=HEARTBEAT_S, on_compromise=_end_if_replaced
    )
    _acquire(lock, path, owner_path)
    try:
        owner_path.write_text(json.dumps(asdict(_this_process())))
        yield
    finally:
        owner_path.unlink(missing_ok=True)
        lock.release()
        if is_new:
            with suppress(OSError):  # not empty
                path.rmdir()


def owner_inside(folder: Path) -> int | None:
    """Number of the process that holds the lock in `folder`, or held it when it was killed; None: nobody."""
    try:
        return int(json.loads((folder / f"{LOCK}.owner").read_text())["pid"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _acquire(lock: SoftFileLease, path: Path, owner_path: Path) -> None:
    first_touch, told, emptiness = None, False, _Emptiness(Path(lock.lock_file))
    deadline = time.monotonic() + LEASE_S + 2 * HEARTBEAT_S
    while True:
        try:
            lock.acquire(timeout=0)
            return
        except Timeout:
            owner, touch = _read_owner(lock, owner_path), _last_touch(lock)
        emptiness.remove()
        first_touch = first_touch or touch
        is_alive = owner is not None and (_is_alive(owner) or touch not in (None, first_touch))
        if is_alive or time.monotonic() > deadline:
            raise InputError(f"{path}: in use by {owner}; wait until it has ended (it may be saving), or end it")
        if owner is not None and not told:
            print(f"{path}: locked by {owner}; watching for {LEASE_S} s whether it lives", file=sys.stderr, flush=True)
            told = True
        time.sleep(POLL_S)


class _Emptiness:
    """A lock whose owner was killed between making and writing it. `filelock` keeps it for ever."""

    def __init__(self, path: Path) -> None:
        self.path, self.since = path, 0.0
        self.seen: tuple[int, int] | None = None

    def remove(self) -> None:
        """To be called again and again: the file goes when it has been seen empty for `EMPTY_S`."""
        now = self._identity(self.path)
        if now is None or now != self.seen:
            self.seen, self.since = now, time.monotonic()
        elif time.monotonic() - self.since > EMPTY_S:
            aside = self.path.with_name(f"{self.path.name}.empty.{os.getpid()}")
            with suppress(FileNotFoundError):
                self.path.rename(aside)
                if self._identity(aside) == now:
                    aside.unlink()
                else:  # another process was quicker, and this is its new lock
                    aside.rename(self.path)

    @staticmethod
    def _identity(path: Path) -> tuple[int, int] | None:
        """None: not there or not empty."""
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        return (status.st_ino, status.st_mtime_ns) if status.st_size == 0 else None


def _this_process() -> Owner:
    return Owner(
        pid=os.getpid(),
        host=socket.gethostname(),
        machine=_machine(),
        started=time.strftime("%Y-%m-%d %H:%M:%S"),
        command=Path(sys.argv[0]).name or "python",
    )


def _machine() -> str:
    """Equal for processes that see each other by their numbers: of one boot and one container."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _read_owner(lock: SoftFileLease, owner_path: Path) -> Owner | None:
    """None while the lock changes hands."""
    held = lock.owner
    try:
        owner = Owner(**json.loads(owner_path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return owner if held is not None and held.pid == owner.pid else None


def _last_touch(lock: SoftFileLease) -> tuple[str | None, int] | None:
    held = lock.owner
    try:
        return (held.token, os.stat(lock.lock_file).st_mtime_ns) if held is not None else None
    except FileNotFoundError:
        return None


def _is_alive(owner: Owner) -> bool:
    """Known of processes of this machine only; one that has died and whose parent has not asked for it is a zombie."""
    if owner.machine != _machine():
        return False
    try:
        state = Path(f"/proc/{owner.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _end_if_replaced(compromise: LeaseCompromise) -> None:
    """This process was stopped for so long that another one took it for dead: two must not write."""
    if compromise.reason == "owner-changed":
        print(f"error: {compromise.lock_file}: taken over by another process", file=sys.stderr, flush=True)
        os._exit(1)
