"""Losses and gradients of one step: of all its pairs, and anchors, in pieces that fit into memory.

However many pieces and processes a step is divided into, its gradient is that of the whole: every pair is a negative
of every other one (GradCache, arXiv 2101.06983). The mean of the losses of small batches is another objective; so is
their sum, which is asked for by negatives = "pass".
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .clip import CLIP, TextTower
from .config import Anchor, RepairConfig
from .contrastive import Gallery, contrastive
from .data.images import normalize
from .data.sampler import seeded
from .distributed import ALONE, Group
from .duplicates import blocks, masked_pairs
from .errors import InputError
from .losses import anchor, info_nce, mean_cosine, seed_loss, siglip
from .memory import used
from .pairs import Batch, Pairs

SEED_TEMPERATURE = 0.07  # of CLIP-fine-tune's GmP scripts


@dataclass(frozen=True)
class Figures:
    """What a step computed, still on the device: reading a number makes the host wait for it."""

    losses: dict[str, Tensor]
    text_cosine: Tensor
    masked: int  # pairs that are no negatives of each other, since caption or picture is the same
    memory: int  # bytes, before the backward pass frees what it needed


# ---- the loss that is configured -------------------------------------------------------------------------------------


def temperature_of(config: RepairConfig, clip: CLIP) -> Tensor:
    """The logarithm of the inverse temperature of the loss: the CLIP's own, or the configured one as a constant."""
    if config.trains_temperature:
        return clip.logit_scale
    return torch.full_like(clip.logit_scale, -math.log(config.temperature or SEED_TEMPERATURE), requires_grad=False)


def pair_loss(
    images: Tensor,
    texts: Tensor,
    clip: CLIP,
    config: RepairConfig,
    *,
    same_picture: Tensor | None = None,
    same_caption: Tensor | None = None,
    gallery: Gallery | None = None,
    group: Group = ALONE,
) -> Tensor:
    """The configured loss of pairs, (B, E) and (B, E) -> scalar. Arguments as of `contrastive.contrastive`.

    InfoNCE in blocks, whose work the group shares. The others, and InfoNCE with entropy, hold a matrix of all pairs,
    and every process of the group computes all of it.
    """
    scale, alike = temperature_of(config, clip), (same_picture, same_caption)
    if config.loss == "siglip":
        return siglip(images, texts, scale, None, *alike)
    if config.loss == "seed":
        return seed_loss(images, texts, scale, config.smoothing, *alike, config.entropy)
    if config.entropy:
        return info_nce(images, texts, scale, config.smoothing, *alike, config.entropy)
    return contrastive(
        images,
        texts,
        scale,
        smoothing=config.smoothing,
        same_picture=same_picture,
        same_caption=same_caption,
        gallery=gallery,
        group=group,
    )


def pairs_of_a_loss(config: RepairConfig) -> int:
    """How many pairs one loss is about: all of a step, or those of a forward pass."""
    return config.batch if config.negatives == "pass" else config.step_pairs


# ---- captions and pictures -------------------------------------------------------------------------------------------


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
    """The configured loss over the pairs of the step, backward included. size: pairs that fit into memory.

    Where negatives is "pass" every `config.batch` pairs have a loss of their own and the losses are summed, whatever
    `size` is, as the original scripts accumulate; otherwise there is one loss.
    """
    work = _Work(clip, pairs, batch, config, size, device, group)
    if group.size == 1 and work.passes[0].stop <= size:
        return _loss_by_loss(work, scaler)
    return _piece_by_piece(work, scaler)


@dataclass(frozen=True)
class _Work:
    """What a step computes of its pairs, by rows of the batch."""

    clip: CLIP
    pairs: Pairs
    batch: Batch
    config: RepairConfig
    size: int
    device: torch.device
    group: Group

    @property
    def passes(self) -> list[slice]:
        """The rows of each loss."""
        count = len(self.batch.ids)
        return blocks(count, min(count, pairs_of_a_loss(self.config)))

    @property
    def masked(self) -> int:
        return sum(masked_pairs(*self._groups(rows)) for rows in self.passes)

    def texts(self, rows: slice) -> Tensor:
        return self.clip.encode_text(self.batch.ids[rows])

    def images(self, rows: slice, then: slice | None) -> Tensor:
        """then: the rows whose pictures are to be decoded meanwhile; None: those of the next step."""
        pairs, batch = self.pairs, self.batch
        if pairs.features is not None:
            return pairs.image_features(batch, rows, self.device)
        pixels = pairs.pixels(*_asked(batch.pictures, batch.seeds, rows))
        if then is None:
            first = pieces(len(batch.upcoming), self.size, self.group)[0]
            pairs.pixels.ahead(*_asked(batch.upcoming, batch.upcoming_seeds, first))
        else:
            pairs.pixels.ahead(*_asked(batch.pictures, batch.seeds, then))
        return self.clip.encode_image(normalize(pixels.to(self.device)))

    def loss(self, rows: slice, image_features: Tensor, text_features: Tensor) -> Tensor:
        same_picture, same_caption = self._groups(rows)
        return pair_loss(
            image_features,
            text_features,
            self.clip,
            self.config,
            same_picture=same_picture,
            same_caption=same_caption,
            gallery=self.pairs.gallery_at(self.batch) if self.config.negatives == "all" else None,
            group=self.group,
        )

    def _groups(self, rows: slice) -> list[Tensor | None]:
        return [each if each is None else each[rows] for each in (self.batch.same_picture, self.batch.same_caption)]


def _asked(pictures: Tensor, seeds: Tensor | None, rows: slice) -> list[list[int]]:
    """What `PicturesAhead` is asked for: positions and, where pictures vary, seeds."""
    return [each[rows].tolist() for each in (pictures, seeds) if each is not None]


def _loss_by_loss(work: _Work, scaler: torch.amp.GradScaler) -> Figures:
    """Each loss forward and backward at once."""
    losses, features, memory = [], [], 0
    for rows, then in zip(work.passes, [*work.passes[1:], None], strict=True):
        text_features = work.texts(rows)
        loss = work.loss(rows, work.images(rows, then), text_features)
        memory = max(memory, used(work.device))
        scaler.scale(loss).backward()
        losses.append(loss.detach())
        features.append(text_features.detach())
    cosine = mean_cosine(features[0] if len(features) == 1 else torch.cat(features))
    return Figures({"contrastive": _sum(losses)}, cosine, work.masked, memory)


def _piece_by_piece(work: _Work, scaler: torch.amp.GradScaler) -> Figures:
    """All features first, without a graph; the losses' gradient for each feature; then one piece after the other again,
    with that gradient pushed through it.

    Of several processes each has its share of the pairs, and the gradient for `logit_scale` is whole in each.
    """
    chunks = pieces(len(work.batch.ids), work.size, work.group)
    locked = work.pairs.features is not None
    with torch.no_grad():
        # pictures are decoded in both passes: a step's pixels may be more than memory holds
        ahead = zip(chunks, [*chunks[1:], chunks[0]], strict=True)
        images = work.group.gather(torch.cat([work.images(rows, then) for rows, then in ahead]))
        texts = work.group.gather(torch.cat([work.texts(rows) for rows in chunks]))
    images.requires_grad_(not locked)
    texts.requires_grad_(True)
    if len(work.passes) == 1:
        loss = work.loss(work.passes[0], images, texts)
    else:
        loss = _sum([work.loss(rows, images[rows], texts[rows]) for rows in work.passes])
    scaler.scale(loss).backward()
    memory = 0
    for rows, then in zip(chunks, [*chunks[1:], None], strict=True):
        text_features = work.texts(rows)
        memory = max(memory, used(work.device))
        if text_features.requires_grad:  # a tower may be locked, or not have joined the training yet
            text_features.backward(texts.grad[rows])
        if not locked:
            image_features = work.images(rows, then)
            if image_features.requires_grad:
                image_features.backward(images.grad[rows])
    return Figures({"contrastive": loss.detach()}, mean_cosine(texts.detach()), work.masked, memory)


def pieces(count: int, size: int, group: Group) -> list[slice]:
    """This process's share of `count` rows, in pieces of `size` at the most that are as even as they go.

    As many in every process: those that share their weights out gather each block together, so that none may make a
    pass more than the others.
    """
    mine = group.rows(count)
    number = max(1, math.ceil(math.ceil(count / group.size) / size))
    edges = [mine.start + i * (mine.stop - mine.start) // number for i in range(number + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def _sum(losses: Sequence[Tensor]) -> Tensor:
    return functools.reduce(operator.add, losses)


# ---- anchors ---------------------------------------------------------------------------------------------------------


def anchor_weight(one: Anchor, progress: float) -> float:
    """The weight of an anchor; progress: 0 at the first step, 1 at the last one."""
    if one.end is None:
        return one.weight
    gone = (1 - math.cos(math.pi * progress)) / 2 if one.fade == "cosine" else progress
    return (1 - gone) * one.weight + gone * one.end


def concept_batch(ids: Tensor, count: int, seed: int, step: int) -> Tensor:
    """`count` captions of a step, or all where there are fewer, none of them twice. (captions, L) -> (count, L)"""
    order = torch.randperm(len(ids), generator=seeded(f"{seed} concepts {step}"))
    return ids[order[:count]]


def anchor_captions(batch: Batch, concepts: Tensor | None, config: RepairConfig, step: int) -> dict[str, Tensor]:
    """The captions that anchors of this step read, (captions, context_length), by their source."""
    captions = {"dataset": batch.ids[: config.anchor_captions]}
    if concepts is not None and len(concepts):
        captions["concepts"] = concept_batch(concepts, config.anchor_captions, config.seed, step)
    return captions


def anchor_step(
    clip: CLIP,
    teachers: Mapping[str, TextTower],
    captions: Mapping[str, Tensor],
    config: RepairConfig,
    progress: float,
    scaler: torch.amp.GradScaler,
    size: int,
    device: torch.device,
    group: Group,
) -> dict[str, Tensor]:
    """The anchors' weighted losses, backward included, by name.

    captions: of each source that anchors name, (captions, context_length): SDXL reads every row, also those behind
    end-of-text. progress: of the run, 0 to 1, for weights that move. size: captions of one pass. Raises InputError
    where a source is missing.
    """
    if not config.anchors:
        return {}
    values = {str(one): torch.zeros((), device=device) for one in config.anchors}
    for source, anchors in by_source(config.anchors, captions).items():
        for chunk, share in _shares(captions[source], size, group):
            chunk = chunk.to(device)
            points = read(clip, chunk, anchors)
            with torch.no_grad():
                targets = targets_of(teachers, chunk, anchors)
            losses = {
                str(a): share * anchor_weight(a, progress) * anchor(points[a.read_point], targets[a][a.read_point])
                for a in anchors
            }
            total = sum(losses.values())
            if total.requires_grad:  # no block below the read point may have joined the training yet
                scaler.scale(total).backward()
            for name, loss in losses.items():
                values[name] += loss.detach()
    return dict(zip(values, group.sum(torch.stack(list(values.values()))), strict=True))


def _shares(ids: Tensor, size: int, group: Group) -> list[tuple[Tensor, float]]:
    """What of the captions this process has, in pieces, and the share of each in the mean over all."""
    if len(ids) < group.size:  # too few to go round: every process has all, and counts for one of them
        return [(ids[rows], (rows.stop - rows.start) / len(ids) / group.size) for rows in pieces(len(ids), size, ALONE)]
    return [(ids[rows], (rows.stop - rows.start) / len(ids)) for rows in pieces(len(ids), size, group)]


def by_source(anchors: Sequence[Anchor], captions: Mapping[str, Tensor]) -> dict[str, list[Anchor]]:
    """The anchors by the source of their captions. Raises InputError where there are no such captions."""
    found: dict[str, list[Anchor]] = {}
    for one in anchors:
        if one.captions not in captions:
            raise InputError(
                f"anchor {one} reads captions of {one.captions}, and none are given: give some, or leave it out"
            )
        found.setdefault(one.captions, []).append(one)
    return found


def targets_of(
    teachers: Mapping[str, TextTower], ids: Tensor, anchors: Sequence[Anchor]
) -> dict[Anchor, dict[str, Tensor]]:
    """What each anchor's teacher has at the read points; a teacher that several anchors name computes once."""
    names = dict.fromkeys(one.teacher for one in anchors)
    found = {name: read(teachers[name], ids, [one for one in anchors if one.teacher == name]) for name in names}
    return {one: found[one.teacher] for one in anchors}


def read(tower: TextTower, ids: Tensor, anchors: Sequence[Anchor]) -> dict[str, Tensor]:
    """The read points that anchors name; without the last block where `penultimate` is all they need."""
    wanted = {anchor.read_point for anchor in anchors}
    if wanted == {"penultimate"}:
        return {"penultimate": tower.penultimate(ids)}
    points = tower(ids)
    return {name: getattr(points, name) for name in wanted}
