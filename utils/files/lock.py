"""One writer at a time: the process that writes a file or folder holds a lock next to it or in it.

The lock is a `filelock` lease: a small file that names its owner, who touches it every few seconds. A dead owner's lock
is taken over at once on this machine, and after a lease without a touch on another machine with the same file system.
Not flock: some file systems lack it or keep it to one machine, and forked data workers that outlive their parent hold
it too.
"""

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import LeaseCompromise, OwnerRecord, SoftFileLease, Timeout

from utils.errors import InputError, errors_name

LOCK = ".lock"
LEASE_S, HEARTBEAT_S = 30, 5
EMPTY_S = 1  # an owner that has not written its record by then was killed
POLL_S = 0.1


@contextmanager
def only_writer(path: Path, inside: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock of `path`; missing parent folders are created, and removed at the end if they are empty.

    Args:
        path: the file or folder to write.
        inside: the lock file is in the folder `path`; else it is `<path>.lock`.
        wait: until another process has released it, however long that takes.

    Raises InputError, with the owner's name, if another process holds it: at once for an owner on this machine, else
    after watching for up to `LEASE_S` whether the owner touches the lock.
    """
    if not inside and path.name in ("", ".."):
        raise InputError(f"{path}: expected a path that ends in a name")
    lock_path = path / LOCK if inside else path.with_name(path.name + LOCK)
    new_folders = [folder for folder in lock_path.parents if not folder.exists()]
    lock = SoftFileLease(
        lock_path, lease_duration=LEASE_S, heartbeat_interval=HEARTBEAT_S, on_compromise=_exit_if_replaced
    )
    try:
        with errors_name(lock_path):
            lock_path.parent.mkdir(parents=True, exist_ok=True)
            _acquire(lock, path, wait)
        yield
    finally:
        lock.release()
        with suppress(OSError):  # not empty
            for folder in new_folders:
                folder.rmdir()


def owner_inside(folder: Path) -> int | None:
    """Process number of the owner of the lock in `folder`, which may be dead; None without a lock."""
    return SoftFileLease(folder / LOCK).pid


def is_in_use(folder: Path) -> bool:
    """Whether another process holds the lock in `folder`: it runs on this machine, or has touched the lock within the
    last `LEASE_S` on another one."""
    lock_path = folder / LOCK
    owner, touch = SoftFileLease(lock_path).owner, _last_touch(lock_path)
    if owner is None or touch is None:
        return False
    if owner.hostname.partition("?")[0] == socket.gethostname():
        return _runs_here(owner)
    return time.time() - touch / 1e9 < LEASE_S


def still_held(folder: Path) -> bool:
    """Whether the lock of this process is still in `folder`; ends this process if another one holds it now."""
    try:
        (folder / LOCK).stat()
    except FileNotFoundError:
        return False
    except OSError:  # of the mount; writing reports it
        return True
    if owner_inside(folder) not in (None, os.getpid()):
        _exit(folder / LOCK)
    return True


def _acquire(lock: SoftFileLease, path: Path, wait: bool) -> None:
    lock_path = Path(lock.lock_file)
    deadline = time.monotonic() + LEASE_S + 2 * HEARTBEAT_S
    first_touch = None
    while True:
        try:
            lock.acquire(timeout=0)  # also takes over the lock of a dead owner
            return
        except Timeout:
            _mark_if_abandoned(lock_path)
        if wait:
            time.sleep(POLL_S)
            continue
        owner, touch = lock.owner, _last_touch(lock_path)
        was_touched = first_touch is not None and touch not in (None, first_touch)
        name = "another process"
        if owner is not None:
            name = f"process {owner.pid} on {owner.hostname.partition('?')[0]}"
        if was_touched or (owner is not None and _runs_here(owner)) or time.monotonic() > deadline:
            raise InputError(f"{path}: in use by {name}; wait until it has ended (it may be saving), or end it")
        if owner is not None and first_touch is None:
            print(f"{path}: locked by {name}; waiting {LEASE_S} s for a sign of life", file=sys.stderr, flush=True)
            first_touch = touch
        time.sleep(POLL_S)


def _last_touch(lock_path: Path) -> int | None:
    try:
        return lock_path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _runs_here(owner: OwnerRecord) -> bool:
    """Whether this machine runs the owner: the process of its number, unless that is a zombie or started later."""
    try:
        fields = Path(f"/proc/{owner.pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return False
    state, started = fields[0], int(fields[19])  # since boot, as in the lower half of filelock's start token
    return state not in b"ZX" and owner.start is not None and owner.start % 2**64 == started


def _mark_if_abandoned(lock_path: Path) -> None:
    """Write to a lock that stays empty: filelock would keep it forever, but takes over an invalid record."""
    with suppress(FileNotFoundError), lock_path.open("r+b", buffering=0) as file:
        if os.fstat(file.fileno()).st_size == 0:
            time.sleep(EMPTY_S)
            if os.fstat(file.fileno()).st_size == 0:
                file.write(b"abandoned\n")


def _exit_if_replaced(compromise: LeaseCompromise) -> None:
    """End this process, which was suspended for so long that another one took over its lock."""
    if compromise.reason == "owner-changed":
        _exit(compromise.lock_file)


def _exit(lock_path: str | Path) -> None:
    print(f"error: {lock_path}: taken over by another process", file=sys.stderr, flush=True)
    os._exit(1)
