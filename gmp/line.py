"""The line of runs at a device: the first one trains, the others wait in the order in which they came.

A place in the line is a numbered file that its process holds locked, in a folder that all processes of a user share:
repairs of ComfyUI and of the command line wait for each other. A place whose process has died is cleared away.
"""

from __future__ import annotations

import contextlib
import getpass
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout


def device_name(device: torch.device) -> str:
    """What tells a device from others on this machine, whatever CUDA_VISIBLE_DEVICES calls it here."""
    if device.type != "cuda":
        return str(device)
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return f"cuda-{uuid}" if uuid else f"cuda-{device.index or 0}"


def _folder(device: str) -> Path:
    return Path(tempfile.gettempdir()) / f"gmp-{getpass.getuser()}" / device.replace(":", "-")


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

    def __enter__(self) -> Place:
        with _still(self._folder):
            self._number = max(_numbers(self._folder), default=0) + 1
            self._lock = FileLock(_path(self._folder, self._number, "lock"), timeout=0, thread_local=False)
            self._lock.acquire()
            _path(self._folder, self._number, "run").write_text(str(self._run), encoding="utf-8")
        return self

    def __exit__(self, *_) -> None:
        with _still(self._folder):
            self._lock.release()
            _clear(self._folder, self._number)

    def ahead(self) -> list[Path]:
        """Folders of the runs that are before this one, the one that trains first."""
        return _waiting(self._folder, self._number)


def ahead(device: str, run: Path) -> list[Path]:
    """The runs before another process's run; empty if it is the first, or not in the line."""
    folder, run = _folder(device), run.resolve()
    if not folder.is_dir():
        return []
    everyone = _waiting(folder, None)
    return everyone[: everyone.index(run)] if run in everyone else []


def _waiting(folder: Path, before: int | None) -> list[Path]:
    found = []
    with _still(folder):
        for number in sorted(_numbers(folder)):
            if before is not None and number >= before:
                break
            if _is_alive(folder, number):
                found.append(Path(_path(folder, number, "run").read_text(encoding="utf-8")))
    return found


def _is_alive(folder: Path, number: int) -> bool:
    """Whether a place is held; one that is not is cleared away."""
    try:
        with FileLock(_path(folder, number, "lock"), timeout=0, thread_local=False):
            pass
    except Timeout:
        return True
    _clear(folder, number)
    return False


def _numbers(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.lock") if path.stem.isdigit()]


def _path(folder: Path, number: int, kind: str) -> Path:
    return folder / f"{number:08d}.{kind}"


def _clear(folder: Path, number: int) -> None:
    for kind in ("run", "lock"):
        _path(folder, number, kind).unlink(missing_ok=True)
