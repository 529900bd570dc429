"""What several commands need: the towers that were named, and the device."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    import torch

    from ..layouts import TowerFile


def read_towers(options: argparse.Namespace) -> tuple[TowerFile, TowerFile, TowerFile | None]:
    """text tower, vision tower, and the original's text tower: of --original, or the vision file's where it has one."""
    from ..files import read_header
    from ..layouts import describe, read_text, read_vision

    text = read_text(options.text, options.member, options.heads, options.activation)
    vision = read_vision(options.vision, options.vision_heads, options.activation)
    path = options.original or (options.vision if describe(read_header(options.vision)).text else None)
    original = None
    if path:
        held = describe(read_header(path)).text
        member = text.source.member if text.source.member in held else None
        original = read_text(path, member, options.heads, options.activation)
    return text, vision, original


def check_new(paths: list[Path], force: bool) -> None:
    """Raises InputError for files that would be replaced, unless that is asked for."""
    if not force and (there := [str(path) for path in paths if path.exists()]):
        raise InputError(f"{', '.join(there)} exists; choose another name, or pass --force")


def check_safetensors(path: Path) -> None:
    """Raises InputError for the name of a file that says it is something else than safetensors."""
    if path.suffix not in (".safetensors", ".sft"):
        raise InputError(f"{path} will be a safetensors file; let its name end in .safetensors")


def device(name: str | None) -> torch.device:
    """The device of that name; "auto" and None take the best there is. Raises InputError for one that is not there."""
    import torch

    if name and name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError, NotImplementedError):
            there = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
            there += ["mps"] if torch.backends.mps.is_available() else []
            raise InputError(f"device {name!r} cannot be used here; there is {', '.join(there)}, or auto") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
