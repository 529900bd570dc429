"""Losses and gradients of one step: InfoNCE over all its pairs, and anchors, in pieces that fit into memory.

However many pieces and processes a step is divided into, its gradient is that of the whole: every pair is a negative
of every other one (GradCache, arXiv 2101.06983). The mean of the losses of small batches is another objective.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .clip import CLIP, TextTower
from .config import Anchor, RepairConfig
from .contrastive import Gallery, Rows, contrastive
from .data.captions import first_captions
from .data.images import PicturesAhead, normalize
from .distributed import Group
from .duplicates import masked_pairs
from .losses import anchor, mean_cosine
from .memory import used


@dataclass(frozen=True)
class Batch:
    """The pairs of one step."""

    pictures: Tensor  # (B,) positions
    upcoming: Tensor  # those of the step after this one
    ids: Tensor  # (B, context_length), on the CPU
    same_picture: Tensor | None = None  # (B,) equal numbers where the pictures are the same
    same_caption: Tensor | None = None  # (B,) equal numbers where the captions are the same


@dataclass(frozen=True)
class Pairs:
    """The training pairs. Captions of picture i are rows first[i] … first[i] + counts[i] - 1 of `ids`."""

    ids: Tensor  # (captions, context_length)
    counts: Sequence[int]  # captions per picture
    features: Rows | None  # (pictures, embed_dim) of the locked vision tower
    pixels: PicturesAhead | None  # where the vision tower is trained
    same_picture: Tensor | None = None  # (pictures,) equal numbers where contents are the same; None: all differ
    same_caption: Tensor | None = None  # (captions,)

    @functools.cached_property
    def first(self) -> Tensor:  # (pictures,)
        return torch.tensor(first_captions(self.counts))

    @functools.cached_property
    def gallery(self) -> Gallery:
        return Gallery.of(self.features, self.same_picture, self.same_caption, self.counts)

    def batch(self, pictures: Tensor, choice: Tensor, upcoming: Tensor) -> Batch:
        """pictures, choice: (B,) positions of pictures, and which of its captions each one has."""
        captions = self.first[pictures] + choice
        return Batch(
            pictures,
            upcoming,
            self.ids[captions],
            None if self.same_picture is None else self.same_picture[pictures],
            None if self.same_caption is None else self.same_caption[captions],
        )


@dataclass(frozen=True)
class Figures:
    """What a step computed, still on the device: reading a number makes the host wait for it."""

    losses: dict[str, Tensor]
    text_cosine: Tensor
    masked: int  # pairs that are no negatives of each other, since caption or picture is the same
    memory: int  # bytes, before the backward pass frees what it needed


def contrastive_step(
    clip: CLIP,
    pairs: Pairs,
    batch: Batch,
    config: RepairConfig,
    scaler: torch.amp.GradScaler,
    size: int,
    device: torch.device,
    group: Group,
) -> Figures:
    """InfoNCE over all pairs of the step, backward included. size: pairs of one pass.

    In several pieces: all features first, without a graph; the loss's gradient for each feature; then one piece after
    the other again, with that gradient pushed through it. Of several processes each has its share of the pairs, and
    the gradient for `logit_scale` is whole in each.
    """
    mine = group.rows(len(batch.ids))
    pictures, ids = batch.pictures[mine], batch.ids[mine]
    upcoming = batch.upcoming[group.rows(len(batch.upcoming))][:size]
    chunks = [slice(start, start + size) for start in range(0, len(ids), size)]
    later = [pictures[rows] for rows in chunks[1:]]

    def texts(rows: slice) -> Tensor:
        return clip.encode_text(ids[rows])

    def images(rows: slice, then: Tensor) -> Tensor:
        if pairs.features is not None:
            return pairs.features[pictures[rows]].to(device)
        pixels = pairs.pixels(pictures[rows].tolist())
        pairs.pixels.ahead(then.tolist())
        return clip.encode_image(normalize(pixels.to(device)))

    def loss_of(image_features: Tensor, text_features: Tensor) -> Tensor:
        return contrastive(
            image_features,
            text_features,
            clip.logit_scale,
            smoothing=config.smoothing,
            same_picture=batch.same_picture,
            same_caption=batch.same_caption,
            gallery=pairs.gallery.at(batch.pictures) if config.negatives == "all" else None,
            group=group,
        )

    masked = masked_pairs(batch.same_picture, batch.same_caption)
    if len(chunks) == 1 and group.size == 1:
        text_features = texts(chunks[0])
        loss = loss_of(images(chunks[0], upcoming), text_features)
        memory = used(device)
        scaler.scale(loss).backward()
        return Figures({"contrastive": loss.detach()}, mean_cosine(text_features.detach()), masked, memory)

    with torch.no_grad():
        # pictures are decoded in both passes: a step's pixels may be more than memory holds
        ahead = zip(chunks, [*later, pictures[chunks[0]]], strict=True)
        image_leaf = group.gather(torch.cat([images(rows, then) for rows, then in ahead]))
        text_leaf = group.gather(torch.cat([texts(rows) for rows in chunks]))
    image_leaf.requires_grad_(pairs.features is None)
    text_leaf.requires_grad_(True)
    loss = loss_of(image_leaf, text_leaf)
    scaler.scale(loss).backward()
    text_grad = text_leaf.grad[mine]
    image_grad = None if pairs.features is not None else image_leaf.grad[mine]
    memory = 0
    for rows, then in zip(chunks, [*later, upcoming], strict=True):
        text_features = texts(rows)
        memory = max(memory, used(device))
        text_features.backward(text_grad[rows])
        if image_grad is not None:
            images(rows, then).backward(image_grad[rows])
    return Figures({"contrastive": loss.detach()}, mean_cosine(text_leaf.detach()), masked, memory)


def anchor_step(
    clip: CLIP,
    teachers: Mapping[str, TextTower],
    ids: Tensor,  # (captions, context_length): SDXL reads every row, also those behind end-of-text
    config: RepairConfig,
    scaler: torch.amp.GradScaler,
    size: int,
    device: torch.device,
    group: Group,
) -> dict[str, Tensor]:
    """The anchors' weighted losses, backward included, by name. size: captions of one pass."""
    if not config.anchors:
        return {}
    values = {str(one): torch.zeros((), device=device) for one in config.anchors}
    for chunk in ids[group.rows(len(ids))].split(size):
        if not len(chunk):
            continue  # fewer captions than processes
        share, chunk = len(chunk) / len(ids), chunk.to(device)
        points = read(clip, chunk, config.anchors)
        with torch.no_grad():
            targets = {name: read(tower, chunk, config.anchors) for name, tower in teachers.items()}
        losses = {
            str(a): share * a.weight * anchor(points[a.read_point], targets[a.teacher][a.read_point])
            for a in config.anchors
        }
        scaler.scale(sum(losses.values())).backward()
        for name, loss in losses.items():
            values[name] += loss.detach()
    return dict(zip(values, group.sum(torch.stack(list(values.values()))), strict=True))


def read(tower: TextTower, ids: Tensor, anchors: Sequence[Anchor]) -> dict[str, Tensor]:
    """The read points that anchors name; without the last block where `penultimate` is all they need."""
    wanted = {anchor.read_point for anchor in anchors}
    if wanted == {"penultimate"}:
        return {"penultimate": tower.penultimate(ids)}
    points = tower(ids)
    return {name: getattr(points, name) for name in wanted}
