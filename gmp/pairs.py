"""The training pairs as tokens and features, and those of one step.

Whatever is drawn for a step, which view of a picture, how it is augmented, what becomes of its tags, follows from the
seed, the step and the row alone: a run that goes on draws what it would have drawn.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import Captions, Pictures
from .contrastive import Gallery, Rows
from .data.augment import flipped, seed_of
from .data.captions import first_captions
from .data.images import PicturesAhead
from .data.policy import drawn, finished_ids, has_draws
from .data.sampler import seeded
from .data.words import Words
from .duplicates import alike


@dataclass(frozen=True)
class Batch:
    """The pairs of one step."""

    pictures: Tensor  # (B,) positions
    upcoming: Tensor  # those of the step after this one
    ids: Tensor  # (B, context_length), on the CPU
    same_picture: Tensor | None = None  # (B,) equal numbers where the pictures are the same, or this step's texts are
    same_caption: Tensor | None = None  # (B,) equal numbers where the captions are the same
    views: Tensor | None = None  # (B,) which view of each picture
    seeds: Tensor | None = None  # (B,) how each picture is augmented
    upcoming_seeds: Tensor | None = None  # of `upcoming`


@dataclass(frozen=True)
class Texts:
    """Captions whose tokens are made at each step, since their tags are drawn anew."""

    captions: Sequence[str]
    policy: Captions
    words: Words

    def ids(self, rows: Sequence[int], place: str) -> Tensor:
        """rows: positions of captions; place: as in `drawn_ids`. -> (n, context_length)"""
        return drawn_ids([self.captions[i] for i in rows], self.policy, self.words, place)


def drawn_ids(captions: Sequence[str], policy: Captions, words: Words, place: str) -> Tensor:
    """Tokens of what a policy makes of captions this time; place: names it, each row's draws follow from it."""
    if has_draws(policy):
        captions = [drawn(caption, policy, seeded(f"{place} {n}")) for n, caption in enumerate(captions)]
    return finished_ids(captions, policy, words)


@dataclass(frozen=True)
class Pairs:
    """The training pairs. Captions of picture i are rows first[i] … first[i] + counts[i] - 1 of `ids`.

    Where pictures are flipped, `ids` goes on with the captions of flipped ones, and `mirrored` tells which belongs to
    each; a caption without a left or right belongs to itself.
    """

    ids: Tensor  # (captions, context_length)
    counts: Sequence[int]  # captions per picture
    features: Rows | None  # (pictures, embed_dim) of the locked vision tower
    pixels: PicturesAhead | None  # where the vision tower is trained
    same_picture: Tensor | None = None  # (pictures,) equal numbers where contents are the same; None: all differ
    same_caption: Tensor | None = None  # (rows of `ids`,) group numbers; those of captions drawn anew, of all draws
    more_views: tuple[Rows, ...] = ()  # features of further views, each (pictures, embed_dim)
    keys: Sequence[str] = ()  # the pictures' contents, which the seeds of views follow from
    looks: Pictures = Pictures()  # what varies of them
    mirrored: Tensor | None = None  # (captions,) rows of `ids`
    texts: Texts | None = None  # by rows of `ids`; tokens are made at each step
    seed: int = 0

    @functools.cached_property
    def first(self) -> Tensor:  # (pictures,)
        return torch.tensor(first_captions(self.counts))

    @functools.cached_property
    def gallery(self) -> Gallery:
        """All pictures by their first view."""
        same_caption = self.same_caption
        if same_caption is not None:
            same_caption = same_caption[: int(sum(self.counts))]
        return Gallery.of(self.features, self.same_picture, same_caption, self.counts)

    def gallery_at(self, batch: Batch) -> Gallery:
        """The gallery as a step sees it, in which the step's own pictures are the views that it has."""
        gallery = self.gallery.at(batch.pictures)
        return replace(gallery, features=_Seen(self, batch)) if self.more_views else gallery

    def image_features(self, batch: Batch, rows: slice | Tensor, device: torch.device) -> Tensor:
        """Features of some of a step's pictures, by the views that it has: (n, embed_dim) on the device"""
        pictures = batch.pictures[rows]
        found = self.features[pictures]
        if batch.views is not None:
            views = batch.views[rows]
            for number, features in enumerate(self.more_views, 1):
                here = (views == number).nonzero()[:, 0]
                if len(here):
                    found[here] = features[pictures[here]]
        return found.to(device)

    def batch(self, pictures: Tensor, choice: Tensor, upcoming: Tensor, step: int = 0) -> Batch:
        """pictures, choice: (B,) positions of pictures, and which of its captions each one has. step: from 0."""
        captions = self.first[pictures] + choice
        views = seeds = upcoming_seeds = None
        if self.more_views:
            generator = seeded(f"{self.seed} views {step}")
            views = torch.randint(1 + len(self.more_views), pictures.shape, generator=generator)
        elif self.pixels is not None and self.looks.varies:
            seeds, upcoming_seeds = self._seeds(step, len(pictures)), self._seeds(step + 1, len(upcoming))
        if self.mirrored is not None:
            turned = self._flipped(pictures, views, seeds)
            captions = torch.where(turned, self.mirrored[captions], captions)
        same_picture = None if self.same_picture is None else self.same_picture[pictures]
        if self.texts is None:
            ids = self.ids[captions]
        else:
            ids = self.texts.ids(captions.tolist(), f"{self.seed} captions {step}")
            same_picture = together(same_picture, alike(ids))
        same_caption = None if self.same_caption is None else self.same_caption[captions]
        return Batch(pictures, upcoming, ids, same_picture, same_caption, views, seeds, upcoming_seeds)

    def _seeds(self, step: int, count: int) -> Tensor:
        return torch.randint(2**62, (count,), generator=seeded(f"{self.seed} augmentations {step}"))

    def _flipped(self, pictures: Tensor, views: Tensor | None, seeds: Tensor | None) -> Tensor:
        """Whether each picture of a step is turned left to right. (B,) bool"""
        if seeds is not None:
            return torch.tensor([flipped(self.looks, seed) for seed in seeds.tolist()])
        if views is None:
            return torch.zeros(len(pictures), dtype=torch.bool)
        places = zip(pictures.tolist(), views.tolist(), strict=True)
        return torch.tensor([view > 0 and flipped(self.looks, seed_of(self.keys[i], view)) for i, view in places])


class _Seen:
    """Features of all pictures, (pictures, embed_dim), those of a step's own pictures by its views.

    Of a picture that the step has twice, the first: the two rows are not told from each other.
    """

    def __init__(self, pairs: Pairs, batch: Batch):
        self._features = pairs.features
        self._pictures, order = batch.pictures.sort(stable=True)
        first = torch.ones(len(order), dtype=torch.bool)
        first[1:] = self._pictures[1:] != self._pictures[:-1]
        self._pictures, order = self._pictures[first], order[first]
        self._own = pairs.image_features(batch, order, torch.device("cpu"))

    def __len__(self) -> int:
        return len(self._features)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *self._own.shape[1:]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        positions = torch.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        found = self._features[rows].clone()
        places = torch.searchsorted(self._pictures, positions).clamp_max(len(self._pictures) - 1)
        own = self._pictures[places] == positions
        found[own] = self._own[places[own]].to(found.dtype)
        return found


def together(first: Tensor | None, second: Tensor) -> Tensor:
    """One number for rows that either grouping puts together, directly or through others. (B,), (B,) -> (B,)"""
    if first is None:
        return second
    groups = [each.unique(return_inverse=True)[1] for each in (first, second)]
    labels = torch.arange(len(second))
    while True:
        before = labels
        for group in groups:
            least = torch.full_like(labels, len(labels)).scatter_reduce_(0, group, labels, "amin")
            labels = least[group]
        if labels.equal(before):
            return labels
