"""Who is at work in a run's folder: a process that holds its lock, told by id and start time.

Nothing that a crash could leave behind counts as alive: the system lets go of the lock when a process dies, and a lock
that a dead process's children have inherited is found out by the id.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from .errors import InputError
from .files import write_json

LOCK, OWNER = "lock", "owner.json"
_probing = threading.Lock()  # two who look at once must not take each other for the owner


@dataclass(frozen=True)
class Owner:
    """The process that is at work in a folder."""

    pid: int
    started: float  # of the process, seconds since 1970
    machine: str
    device: str

    @property
    def alive(self) -> bool:
        """Whether this very process still runs; one on another machine is trusted to, while its lock is held."""
        if self.machine != platform.node():
            return True
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:  # it is there, and another user's
            return True


@contextlib.contextmanager
def own(folder: Path, device: str) -> Iterator[None]:
    """Holds a run's folder. Raises InputError where another process, or another thread, is at work in it."""
    # whoever closes the run may be another thread than the one that began it; a second is longer than looks take
    lock = FileLock(folder / LOCK, timeout=1.0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        other = _read(folder)
        who = f"process {other.pid}" if other else "another process"
        raise InputError(f"{folder} is being trained by {who}; wait for it or stop it") from None
    try:
        started = psutil.Process().create_time()
        write_json(asdict(Owner(os.getpid(), started, platform.node(), device)), folder / OWNER)
        yield
    finally:
        (folder / OWNER).unlink(missing_ok=True)
        lock.release()


def owner(folder: Path) -> Owner | None:
    """The live owner of a folder, None if nobody is at work in it."""
    for _ in range(4):  # what holds the lock may be someone who looks, in another process
        if not is_held(folder / LOCK):
            return None
        mine = _read(folder)
        if mine is not None:
            return mine if mine.alive else None
        time.sleep(0.05)
    return None


def is_held(lock: Path) -> bool:
    """Whether anybody holds a lock. Who looks has it for a moment, so that another process may be told yes wrongly."""
    if not lock.exists():
        return False
    try:
        with _probing, FileLock(lock, timeout=0, thread_local=False):
            return False
    except Timeout:
        return True


def _read(folder: Path) -> Owner | None:
    try:
        return Owner(**json.loads((folder / OWNER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
