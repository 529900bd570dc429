"""Which parameters train: towers, blocks at their output, embeddings; and when, where blocks join one after the other.

N unlocked blocks are counted from the output, as OpenCLIP counts the groups of a locked tower (LiT, arXiv 2111.07991;
open_clip `lock`): the projection is never locked, the final LayerNorm comes with the last block, and what is before the
first block stays locked.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator

from .clip import CLIP, CLIPConfig, TextConfig, VisionConfig
from .config import RepairConfig, Unfreeze
from .errors import InputError
from .geometric import split_trained
from .gradients import role

_BLOCK = re.compile(r"^(?:visual\.)?transformer\.resblocks\.(\d+)\.")
_GATE = re.compile(r"^visual\.transformer\.intermediate_fusion_mlps\.(\d+)\.")
_OUTSIDE = {
    "logit_scale": "scale",
    "text_projection": "projection",
    "proj": "projection",
    "ln_final": "norm",
    "ln_post": "norm",
    "fusion_mlp": "norm",  # of a vision tower with registers: behind ln_post
}


def part(name: str, config: CLIPConfig) -> int | str:
    """Where in its tower a parameter is: its block, or `input`, `norm` (the final one), `projection`; or `scale`.

    A gate of a vision tower with registers belongs to the block that it is behind.
    """
    if match := _BLOCK.match(name):
        return int(match[1])
    if match := _GATE.match(name):
        return int(match[1]) + config.vision.layers - config.vision.gates + 1
    return _OUTSIDE.get(name.removeprefix("visual.").partition(".")[0], "input")


def trains(name: str, config: CLIPConfig, settings: RepairConfig) -> bool:
    """Whether a parameter trains at some time, by its canonical name or that of its r or theta.

    A factor of 0 in the settings' `rates` and parts of a geometric layer freeze further ones. The temperature trains
    unless the settings fix it.
    """
    where = part(name, config)
    if where == "scale":
        return settings.trains_temperature
    vision = name.startswith("visual.")
    if vision and settings.train != "both":
        return False
    unlocked = _unlocked(vision, settings)
    if where == "projection" or (unlocked is None and where != "input"):
        return True
    if where == "input":
        return unlocked is None and (settings.embeddings or role(name) != "embedding")
    return unlocked > 0 if where == "norm" else where >= _tower(vision, config).layers - unlocked


def _unlocked(vision: bool, settings: RepairConfig) -> int | None:
    return settings.vision_blocks if vision else settings.text_blocks


def _tower(vision: bool, config: CLIPConfig) -> TextConfig | VisionConfig:
    return config.vision if vision else config.text


def check_locks(config: CLIPConfig, settings: RepairConfig) -> None:
    """Raises InputError for more unlocked blocks than a tower has."""
    for tower, vision in (("text", False), ("vision", True)):
        unlocked, layers = _unlocked(vision, settings), _tower(vision, config).layers
        if unlocked is not None and unlocked > layers:
            raise InputError(
                f"{tower}_blocks is {unlocked} and the {tower} tower has {layers} blocks: set it to {layers} at the "
                f"most, or leave it out to train all of the tower"
            )


def choose(clip: CLIP, settings: RepairConfig) -> None:
    """Makes of a CLIP what trains, in place: locks the rest, and splits layers into r and theta.

    Raises InputError for locks and geometric layers that this model cannot have.
    """
    check_locks(clip.config, settings)
    for name, parameter in clip.named_parameters():
        parameter.requires_grad_(trains(name, clip.config, settings))
    split_trained(clip, settings)


# ---- one block after the other --------------------------------------------------------------------------------------


def blocks_at(unfreeze: Unfreeze, blocks: int, step: int, total: int) -> int:
    """How many of a tower's blocks train in step `step` of `total`, counted from 0.

    `start` of them in the first step, then at an even pace more, all from `until · total` on. It never falls.
    """
    start = min(unfreeze.start, blocks)
    share = min(1.0, step / (unfreeze.until * total))
    return start + math.floor((blocks - start) * share + 1e-9)  # a count that is whole but for rounding is that count


def joined(name: str, config: CLIPConfig, settings: RepairConfig, step: int, total: int) -> bool:
    """Whether a parameter that trains has begun to in this step of `total`, counted from 0.

    Projection, final LayerNorm and temperature have from the start. What is before the first block joins with the
    block beside it: with the last one to join where the output is first, else from the start.
    """
    if settings.unfreeze is None or isinstance(where := part(name, config), str) and where != "input":
        return True
    vision, from_output = name.startswith("visual."), settings.unfreeze.end == "output"
    layers, unlocked = _tower(vision, config).layers, _unlocked(vision, settings)
    blocks = layers if unlocked is None else unlocked
    now = blocks_at(settings.unfreeze, blocks, step, total)
    if where == "input":
        return now == blocks or not from_output
    return (layers - 1 - where if from_output else where - (layers - blocks)) < now


@contextlib.contextmanager
def unfrozen(clip: CLIP, settings: RepairConfig, step: int, total: int) -> Iterator[None]:
    """Meanwhile parameters that have not joined in this step get no gradient, and none is computed for them.

    Afterwards all that trains at some time requires gradients again, so that checkpoints, measurements and the
    optimizer see the same parameters in every step.
    """
    waiting = [
        parameter
        for name, parameter in clip.named_parameters()
        if parameter.requires_grad and not joined(name, clip.config, settings, step, total)
    ]
    try:
        for parameter in waiting:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in waiting:
            parameter.requires_grad_(True)
