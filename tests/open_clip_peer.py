"""OpenCLIP as a peer: its models, not its picture preprocessing."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

STAND_INS = str(Path(__file__).parent / "peers")
NEEDED = ("torchvision.ops.misc", "torchvision.transforms.functional")  # what open_clip imports


@functools.cache
def open_clip() -> ModuleType:
    """The open_clip module; skips the tests that ask for it where it is not installed.

    It imports torchvision, whose builds for a GPU do not load beside torch for the CPU. Where torchvision does not
    load, a stand-in takes its place while open_clip is imported, and is gone afterwards.
    """
    if absent := [name for name in ("open_clip", "ftfy") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{' and '.join(absent)} not installed: pip install --no-deps -r requirements-peers.txt")
    # transformers remembers whether torchvision is there; asked now, it does not remember the stand-in
    from transformers.utils import is_torchvision_available

    is_torchvision_available()
    if _loads():
        return importlib.import_module("open_clip")
    sys.path.insert(0, STAND_INS)
    try:
        importlib.invalidate_caches()
        return importlib.import_module("open_clip")
    finally:
        sys.path.remove(STAND_INS)
        _forget("torchvision")


def _loads() -> bool:
    try:
        for name in NEEDED:
            importlib.import_module(name)
    except (ImportError, RuntimeError):  # RuntimeError: "operator torchvision::nms does not exist"
        _forget("torchvision")
        return False
    return True


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
