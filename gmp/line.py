"""The line of runs at a device: the first one trains, the others wait in the order in which they came.

A place in the line is a numbered file that its process holds locked, in a folder that all processes of a user share:
repairs of ComfyUI and of the command line wait for each other. A place whose process has died is cleared away.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock

from .owner import is_held


def device_name(device: torch.device) -> str:
    """What tells a device from others on this machine, whatever CUDA_VISIBLE_DEVICES calls it here."""
    if device.type != "cuda":
        return str(device)
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return f"cuda-{uuid}" if uuid else f"cuda-{device.index or 0}"


def _folder(device: str) -> Path:
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()  # a container's user may have no name
    return Path(tempfile.gettempdir()) / f"gmp-{user}" / device.replace(":", "-")


@contextlib.contextmanager
def _still(folder: Path) -> Iterator[None]:
    """While this holds, nobody comes, goes or looks."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "line.lock", timeout=10, thread_local=False):
        yield


class Place:
    """A run's place in the line of a device; left when the `with` block ends."""

    def __init__(self, device: str, run: Path):
        self._folder = _folder(device)
        self._run = run.resolve()
        self._before: list[int] = []
        self._told: list[int] = []  # of these,
        self._known: list[Path] = []  # the runs

    def __enter__(self) -> Place:
        with _still(self._folder):
            self._number = max(_numbers(self._folder), default=0) + 1
            # who looks may hold it for a moment
            self._lock = FileLock(_path(self._folder, self._number, "lock"), timeout=5, thread_local=False)
            self._lock.acquire()
            _path(self._folder, self._number, "run").write_text(str(self._run), encoding="utf-8")
        self._before = [number for number in _numbers(self._folder) if number < self._number]
        return self

    def __exit__(self, *_) -> None:
        with _still(self._folder):
            self._lock.release()
            _clear(self._folder, self._number)

    def is_first(self) -> bool:
        """Whether it is this run's turn. Looks at one place before it, as a rule: whoever left is not asked again."""
        while self._before and not _is_alive(self._folder, self._before[0]):
            del self._before[0]
        return not self._before

    def ahead(self) -> list[Path]:
        """Folders of the runs that are before this one, the one that trains first; looked up when someone has left."""
        if self.is_first():
            return []
        there = set(_numbers(self._folder))
        left = [number for number in self._before if number in there]
        if left != self._told:
            self._before = self._told = left
            self._known = _standing(self._folder, left)
        return self._known


def ahead(device: str, run: Path) -> list[Path]:
    """The runs before another process's run; empty if it is the first, or not in the line."""
    folder, run = _folder(device), run.resolve()
    if not folder.is_dir():
        return []
    numbers = sorted(_numbers(folder))
    mine = next((number for number in numbers if _run_of(folder, number) == run), None)
    return [] if mine is None else _standing(folder, [number for number in numbers if number < mine])


def _standing(folder: Path, numbers: list[int]) -> list[Path]:
    runs = {number: _run_of(folder, number) for number in sorted(numbers) if _is_alive(folder, number)}
    return [run for run in runs.values() if run is not None]


def _run_of(folder: Path, number: int) -> Path | None:
    try:
        return Path(_path(folder, number, "run").read_text(encoding="utf-8"))
    except FileNotFoundError:  # it has just left
        return None


def _is_alive(folder: Path, number: int) -> bool:
    """Whether a place is held; one that is not is cleared away."""
    lock = _path(folder, number, "lock")
    if is_held(lock):
        return True
    with _still(folder):  # nobody takes a place now
        if is_held(lock):
            return True
        _clear(folder, number)
    return False


def _numbers(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("*.lock") if path.stem.isdigit())


def _path(folder: Path, number: int, kind: str) -> Path:
    return folder / f"{number:08d}.{kind}"


def _clear(folder: Path, number: int) -> None:
    for kind in ("run", "lock"):
        _path(folder, number, kind).unlink(missing_ok=True)
