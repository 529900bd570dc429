"""This engine, driven as a run drives it: `set_up`, `begin`, `train`."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from gmp.clip import CLIP, TextTower, load
from gmp.config import SDXL_ANCHOR, RepairConfig
from gmp.data.images import PicturesAhead
from gmp.pairs import Pairs
from gmp.trainer import begin, set_up, train

from .task import Task, captions, picture_paths, weights

ENDLESS = 100_000  # epochs
EPOCH = 4  # steps


def model(task: Task) -> CLIP:
    return load(CLIP, task.shape, weights(task))


def _train(clip: CLIP, pairs: Pairs, config: RepairConfig, task: Task, statistics: bool) -> Iterator[int]:
    device = torch.device(task.device)
    teachers: dict[str, TextTower] = {}
    if config.anchors:
        teacher = TextTower(clip.text_config)
        text = {name: tensor for name, tensor in clip.state_dict().items() if name in teacher.state_dict()}
        teacher.load_state_dict(copy.deepcopy(text))
        teachers["original"] = teacher.requires_grad_(False).to(device)
    optimizer = set_up(clip, config, device)
    training = begin(clip, optimizer, pairs.counts, config, device)
    for event in train(training, pairs, teachers, config, device, statistics=statistics):
        if event["type"] == "step":
            yield config.step_pairs


def cached(task: Task, *, anchored: bool = False, geometric: bool = True, statistics: bool = True) -> Iterator[int]:
    """Endless steps of the text tower against cached features of pictures; each yields its pairs."""
    clip = model(task)
    count = EPOCH * task.pairs
    features = torch.randn(count, task.shape.text.embed_dim, generator=torch.Generator().manual_seed(2))
    pairs = Pairs(ids=captions(count, task.tokens), counts=(1,) * count, features=features, pixels=None)
    config = RepairConfig(
        epochs=ENDLESS,
        batch=task.pairs,
        anchors=(SDXL_ANCHOR,) if anchored else (),
        geometric=geometric,
        precision=task.precision,
    )
    return _train(clip, pairs, config, task, statistics)


def both(task: Task) -> Iterator[int]:
    """Endless steps of both towers; pictures are decoded from JPEG meanwhile. Each yields its pairs."""
    clip = model(task)
    count = EPOCH * task.pairs
    paths = picture_paths(task)
    files = [paths[number % len(paths)] for number in range(count)]
    pairs = Pairs(
        ids=captions(count, task.tokens),
        counts=(1,) * count,
        features=None,
        pixels=PicturesAhead(files, task.shape.vision.image_size),
    )
    config = RepairConfig(train="both", epochs=ENDLESS, batch=task.pairs, anchors=(), precision=task.precision)
    return _train(clip, pairs, config, task, statistics=True)
