"""Whether the contenders compute the same thing: gradients of one step on the same weights, captions and pictures."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gmp.config import RepairConfig
from gmp.data.images import PicturesAhead, load_picture, preprocess
from gmp.losses import info_nce
from gmp.pairs import Pairs
from gmp.trainer import begin, set_up, train

from . import hugging_face, ours, seed
from .task import Task, captions, picture_paths

PAIRS = 4


def check(task: Task) -> dict[str, float]:
    """Relative differences, the largest of all tensors: the engine's steps against the seed's towers and transformers.

    All with symmetric InfoNCE in fp32. ‖difference‖ / ‖reference‖ of each tensor.
    """
    task = replace(task, pairs=PAIRS, precision="fp32", device="cpu")
    ids, paths = captions(PAIRS, task.tokens), picture_paths(task)[:PAIRS]
    images = torch.stack([preprocess(load_picture(path), task.shape.vision.image_size) for path in paths])

    clip = seed.model(task)
    logits = clip(images, ids)
    own = torch.arange(PAIRS)
    loss = (torch.nn.functional.cross_entropy(logits, own) + torch.nn.functional.cross_entropy(logits.T, own)) / 2
    loss.backward()
    expected = {name: p.grad for name, p in clip.named_parameters()}
    del clip, logits, loss
    pixels = PicturesAhead(paths, task.shape.vision.image_size)
    found = _engine(task, Pairs(ids=ids, counts=(1,) * PAIRS, features=None, pixels=pixels), train="both")
    differences = {"both_from_seed": _largest(found, expected)}

    clip = hugging_face.model(task)
    pictures, texts = hugging_face.features(clip, images, ids)
    info_nce(pictures, texts, clip.logit_scale).backward()
    expected = hugging_face.gradients(clip)
    pairs = Pairs(ids=ids, counts=(1,) * PAIRS, features=pictures.detach(), pixels=None)
    found = _engine(task, pairs, geometric=())
    return differences | {"cached_from_transformers": _largest(found, expected)}


def _engine(task: Task, pairs: Pairs, **settings: object) -> dict[str, Tensor]:
    """Gradients of one step, which leaves them as they were before it."""
    config = RepairConfig(epochs=1, batch=PAIRS, anchors=(), precision="fp32", clip_norm=0.0, **settings)
    clip, device = ours.model(task), torch.device("cpu")
    training = begin(clip, set_up(clip, config, device), pairs.counts, config, device)
    list(train(training, pairs, {}, config, device, statistics=False))
    return {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}


def _largest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    if found.keys() != expected.keys():
        raise RuntimeError(f"gradients of {sorted(found.keys() ^ expected.keys())} on one side only")
    return torch.stack([(found[n] - expected[n]).norm() / expected[n].norm() for n in expected]).max().item()
