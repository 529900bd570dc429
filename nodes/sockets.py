"""What travels along the links between the pack's nodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io

from ..gmp.errors import InputError
from ..gmp.layouts import TowerFile
from ..gmp.plots.figure import pixels
from ..gmp.verdict import REPAIR_TARGETS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CATEGORY = "model/text encoder repair"
# What menus call the diffusion model that reads the encoder -> its name in gmp.verdict.TARGETS
TARGETS = {
    REPAIR_TARGETS["penultimate"]: "sdxl",
    REPAIR_TARGETS["pooled"]: "flux",
    REPAIR_TARGETS["last"]: "sd1",
}

TextEncoder = io.Custom("GMP_TEXT_ENCODER")  # gmp.layouts.TowerFile
VisionTower = io.Custom("GMP_VISION_TOWER")  # VisionPart
ReassembledCLIP = io.Custom("GMP_CLIP")  # ClipParts
Dataset = io.Custom("GMP_DATASET")  # gmp.data.captions.Index
TarDataset = io.Custom("GMP_TARS")  # gmp.data.tars.Tars
Run = io.Custom("GMP_RUN")  # RunHandle


def as_image(figure: Figure) -> torch.Tensor:
    """A figure as ComfyUI's IMAGE: (1, H, W, 3), 0 to 1"""
    return torch.from_numpy(pixels(figure))[None]


@dataclass(frozen=True)
class VisionPart:
    """A vision tower, and the text tower that its file holds too where it is a full CLIP."""

    vision: TowerFile
    original: TowerFile | None


def original_input(optional: bool, tooltip: str) -> io.MultiType.Input:
    """A socket `original` that takes a text encoder, or the full CLIP that Load Vision Tower gives."""
    return io.MultiType.Input("original", [TextEncoder, VisionTower], optional=optional, tooltip=tooltip)


def original_text(given: TowerFile | VisionPart) -> TowerFile:
    """The text encoder of what came through such a socket. Raises InputError where the full CLIP has none."""
    if isinstance(given, TowerFile):
        return given
    if given.original is None:
        raise InputError(
            f"{given.vision.source.path} has no text tower: load the full original CLIP as vision tower, or connect "
            "the original text encoder."
        )
    return given.original


@dataclass(frozen=True)
class ClipParts:
    """What a repair starts from, known to belong together."""

    text: TowerFile
    vision: TowerFile
    original: TowerFile | None


@dataclass(frozen=True)
class RunHandle:
    """One repair. The folder says everything about it."""

    id: str
    folder: Path
