"""The page's pictures as PNG, None where the history has nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..plots import plot_losses, png
from ..plots.gradients import plot_gradients, plot_moved

History = Mapping[str, object]


def losses(history: History, folder: Path) -> bytes | None:
    """Of a finished run the picture that lies in its folder, since drawing takes a second."""
    if not history["at"]:
        return None
    if (folder / "result.json").exists() and (folder / "loss.png").is_file():
        return (folder / "loss.png").read_bytes()
    return png(plot_losses(history))


def gradients(history: History) -> bytes | None:
    return png(plot_gradients(history)) if history["layers"]["names"] else None


def moved(history: History) -> bytes | None:
    return png(plot_moved(history)) if any(one.get("moved") for one in history["measures"]) else None
