"""What travels along the links between the pack's nodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from comfy_api.latest import io

from ..gmp.layouts import TowerFile

CATEGORY = "model/text encoder repair"

TextEncoder = io.Custom("GMP_TEXT_ENCODER")  # gmp.layouts.TowerFile
VisionTower = io.Custom("GMP_VISION_TOWER")  # VisionPart
ReassembledCLIP = io.Custom("GMP_CLIP")  # ClipParts
Dataset = io.Custom("GMP_DATASET")  # gmp.data.captions.Index
Run = io.Custom("GMP_RUN")  # RunHandle


@dataclass(frozen=True)
class VisionPart:
    """A vision tower, and the text tower that its file holds too where it is a full CLIP."""

    vision: TowerFile
    original: TowerFile | None


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
