"""The trained objective on pairs that are not trained on."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .clip import CLIP, TextTower
from .config import RepairConfig
from .losses import anchor
from .measure import text_features
from .step import by_source, concept_batch, pair_loss, pairs_of_a_loss, read, targets_of

PIECE = 64  # captions of one pass


@torch.no_grad()
def held_out_loss(
    clip: CLIP,
    image_features: Tensor,
    ids: Tensor,
    teachers: dict[str, TextTower],
    config: RepairConfig,
    batch: int = 256,
    concepts: Tensor | None = None,
) -> dict[str, float]:
    """The trained objective on pairs that are not trained on: (N, embed_dim) pictures and (N, L) captions.

    It weighs alignment and anchors against each other as training does; the best checkpoint is chosen by it, since
    neither recall nor closeness to the original sees what the other does. Without smoothing and entropy; anchors with
    the weight of the first step, so that steps are comparable. They read `batch` captions of theirs, the same every
    time. concepts: (captions, L), for anchors on such. Raises InputError where these are missing.
    """
    device = clip.logit_scale.device
    plain = replace(config, smoothing=0.0, entropy=0.0, negatives="batch")
    images, texts = image_features.to(device), text_features(clip, ids).to(device)
    losses = {"contrastive": 0.0}
    for mine, theirs in zip(*(each.tensor_split(_parts(len(ids), config)) for each in (images, texts)), strict=True):
        losses["contrastive"] += len(mine) / len(ids) * pair_loss(mine, theirs, clip, plain).item()
    captions = {"dataset": ids[:batch]}
    if concepts is not None and len(concepts):
        captions["concepts"] = concept_batch(concepts, batch, config.seed, 0)
    losses |= {str(one): 0.0 for one in config.anchors}
    for source, anchors in by_source(config.anchors, captions).items():
        for chunk in captions[source].split(PIECE):
            share, chunk = len(chunk) / len(captions[source]), chunk.to(device)
            points, targets = read(clip, chunk, anchors), targets_of(teachers, chunk, anchors)
            for one in anchors:
                distance = anchor(points[one.read_point], targets[one][one.read_point])
                losses[str(one)] += share * one.weight * distance.item()
    if not all(math.isfinite(value) for value in losses.values()):
        losses = {name: math.inf for name in losses}
    return losses | {"loss": sum(losses.values())}


def _parts(pairs: int, config: RepairConfig) -> int:
    """Into how many even parts held-out pairs are divided. InfoNCE sees all at once, without a matrix of all pairs.

    The others hold one, and the value of theirs depends on how many pairs there are: as many as when they train.
    """
    return 1 if config.loss == "infonce" else math.ceil(pairs / pairs_of_a_loss(config))
