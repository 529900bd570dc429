"""What the processes beside the first one do in a run: they take its steps with it, and nothing else.

The first process owns the run's folder: it decides, measures and writes. Between two steps it says what comes:

    {"do": "prepare"}                   read the inputs: the first process has its turn at the device
    {"do": "embed", "start": 0}         embed your share of the pictures from this one on; then listen again
    {"do": "meet"}                      wait until all are through with that; then listen again
    {"do": "read"}                      read what all have embedded
    {"do": "restore", "step": 4}        load the state of that step; then listen again
    {"do": "train"}                     take the next step
    {"do": "gather", "mean": false}     send the weights that the first process has not, or their means; listen again
    {"do": "save"}                      send the moments that the first process has not; then listen again
    {"do": "offload", "away": true}     move what is large off the device, or back; then listen again
    {"do": "end"}                       the run has ended
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from .checkpoint import CHECKPOINTS, Checkpoint
from .clip import TextTower
from .config import RepairConfig
from .distributed import Group
from .events import Event
from .pairs import Pairs
from .session import move, restore, whole_clip, whole_optimizer
from .trainer import Training, train

Said = dict[str, object]


def follow(
    training: Training,
    pairs: Pairs,
    teachers: dict[str, TextTower],
    config: RepairConfig,
    folder: Path,
    device: torch.device,
    group: Group,
    concepts: Tensor | None = None,
) -> Iterator[Event]:
    """Takes every step with the first process, from where that begins until it ends. Yields the steps' events.

    Raises InputError where a checkpoint that the first process loads cannot be read here, and `Lost` when that is gone.
    """
    if not training.shards:
        training.ema = None  # the first process has all weights: it takes their mean
    actions = {
        "offload": lambda said: move(training, pairs, list(teachers.values()), device, said["away"], group),
        "save": lambda said: whole_optimizer(training, group),
        "gather": lambda said: whole_clip(training, said["mean"]),
        "restore": lambda said: restore(training, Checkpoint(folder / CHECKPOINTS, said["step"])),
    }
    if listen(group, actions)["do"] == "end":
        return
    for event in train(training, pairs, teachers, config, device, group=group, concepts=concepts):
        yield event
        if event["type"] == "step" and listen(group, actions)["do"] == "end":
            return
    listen(group, actions)  # no step was left: what comes is the end


def listen(group: Group, actions: Mapping[str, Callable[[Said], object]] = MappingProxyType({})) -> Said:
    """The next thing that the first process says which is not one of the actions; does those before it."""
    while act := actions.get((said := group.broadcast_json())["do"]):
        act(said)
    return said
