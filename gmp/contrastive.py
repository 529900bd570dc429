"""InfoNCE of large batches, exactly, in blocks: the loss and its gradients without a matrix of all pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .distributed import ALONE, Group
from .duplicates import blocks
from .errors import InputError


class Rows(Protocol):
    """Features that are read part by part: a tensor, or what keeps them in a file. (N, E) floats of any precision."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Gallery:
    """All N training pictures, as what a caption's own picture is told apart from, and which of them a batch holds.

    Made once by `Gallery.of`, and for every batch `gallery.at(pictures)`. Pictures that share content or a caption are
    found through keys: what a picture is (2 × group + 1) and what it is called (2 × group).
    """

    features: Rows  # (N, E), any length; no gradient goes to them
    same_picture: Tensor | None  # (N,) group numbers
    keys: Tensor  # (K,) sorted; only those that several pictures have
    pictures: Tensor  # (K,) a picture that has it
    rows: Tensor | None = None  # (B,) the batch's own pictures

    @classmethod
    def of(
        cls,
        features: Rows,
        same_picture: Tensor | None = None,
        same_caption: Tensor | None = None,
        counts: Sequence[int] | Tensor | None = None,
    ) -> Gallery:
        """same_picture: (N,) and same_caption: (captions,) as of `duplicates.alike`; counts: captions per picture.

        Raises InputError where they do not fit each other.
        """
        numbers = torch.arange(len(features))
        keys, pictures = [numbers[:0]], [numbers[:0]]
        if same_picture is not None:
            if len(same_picture) != len(features):
                raise InputError(f"{len(features)} pictures were given with {len(same_picture)} picture groups")
            same_picture = same_picture.cpu()
            keys.append(2 * same_picture + 1)
            pictures.append(numbers)
        if same_caption is not None:
            counts = torch.as_tensor(() if counts is None else counts, dtype=torch.int64).cpu()
            if len(counts) != len(features) or counts.sum() != len(same_caption):
                raise InputError(
                    f"{len(same_caption)} caption groups were given for {len(features)} pictures with "
                    f"{counts.sum().item()} captions: give `counts`, how many captions each picture has"
                )
            keys.append(2 * same_caption.cpu())
            pictures.append(numbers.repeat_interleave(counts))
        distinct, rank = torch.cat(keys).unique(return_inverse=True)
        # one number for key and picture: sorted, and a caption that a picture has twice counts once
        both = (rank * max(1, len(features)) + torch.cat(pictures)).unique()
        rank, pictures = both // max(1, len(features)), both % max(1, len(features))
        several = torch.bincount(rank, minlength=len(distinct))[rank] > 1
        return cls(features, same_picture, distinct[rank[several]], pictures[several])

    def at(self, rows: Tensor) -> Gallery:
        """The gallery as a batch of pictures at these positions, (B,), sees it."""
        return replace(self, rows=rows.cpu())


def contrastive(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    *,
    smoothing: float = 0.0,
    same_picture: Tensor | None = None,
    same_caption: Tensor | None = None,
    gallery: Gallery | None = None,
    group: Group = ALONE,
    block: int = 1024,
) -> Tensor:
    """`losses.info_nce`, value and gradients, without a (B, B) matrix: in blocks of `block` × `block` logits.

    Loss and gradients come from one call: the sums of every softmax first, then its gradient, logits computed anew
    (as FlashAttention does, arXiv 2205.14135). Products of matrices in fp32 or better, whatever autocast says; the
    order of additions depends on `block` only.

    gallery: captions are told from all its pictures in place of the batch's. Of other pictures those that equal the
    caption's own, or have an equal caption, are left out; same_caption: (B,) group numbers as in `Gallery.of`.
    Pictures are told from the batch's captions still. Features are read once per call, a block at a time.
    group: processes that all have this batch; each computes its share of the blocks, and all get the whole result.
    Raises InputError for features or rows that do not pair up.
    """
    if images.shape != texts.shape or images.ndim != 2 or not len(images):
        raise InputError(f"pairs of features are (B, E) twice, not {tuple(images.shape)} and {tuple(texts.shape)}")
    if gallery is not None and (gallery.rows is None or len(gallery.rows) != len(texts)):
        found = "none" if gallery.rows is None else len(gallery.rows)
        raise InputError(f"the gallery has {found} of the batch's {len(texts)} pictures: take gallery.at(pictures)")
    wanted = tuple(torch.is_grad_enabled() and each.requires_grad for each in (images, texts, logit_scale))
    groups = [group.cpu() for group in (same_picture, same_caption) if group is not None]
    captions = None if same_caption is None else same_caption.cpu()
    return _Contrastive.apply(images, texts, logit_scale, smoothing, groups, captions, gallery, group, block, wanted)


class _Contrastive(torch.autograd.Function):
    """Computes its gradients in its forward; the backward only scales them."""

    @staticmethod
    def forward(ctx, images, texts, logit_scale, smoothing, groups, captions, gallery, group, block, wanted):
        keep = torch.promote_types(torch.promote_types(images.dtype, texts.dtype), torch.float32)
        ctx.dtypes = (images.dtype, texts.dtype, logit_scale.dtype)
        with torch.autocast(images.device.type, enabled=False):
            (images, image_lengths), (texts, text_lengths) = _unit(images.to(keep)), _unit(texts.to(keep))
            scale = logit_scale.to(keep).exp()
            to_images = torch.zeros_like(images) if wanted[0] else None
            to_texts = torch.zeros_like(texts) if wanted[1] or wanted[2] else None
            loss = torch.zeros_like(scale)
            if gallery is not None:  # first: it gathers in `to_texts` what fades
                shared = _Shared(gallery, captions)
                loss += _in_gallery(texts, scale, smoothing, gallery, shared, group, block, to_texts)
            duplicates = _Duplicates(groups, len(images), min(block, -(-len(images) // group.size)))
            both = gallery is None
            loss += _in_batch(images, texts, scale, smoothing, duplicates, both, group, to_images, to_texts)
            share = 1 / (2 * len(images))
            to_scale = None
            if to_images is not None:
                _through_length(to_images.mul_(share * scale), images, image_lengths)
            if to_texts is not None:  # a logit is scale · image · text: its derivative for log scale is itself
                to_scale = _through_length(to_texts.mul_(share), texts, text_lengths)
        ctx.save_for_backward(to_images, to_texts if wanted[1] else None, to_scale if wanted[2] else None)
        return loss * share

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if g is None else (gradient * g).to(dtype) for g, dtype in found), *[None] * 7


def _in_batch(
    images: Tensor,  # (B, E) of unit length
    texts: Tensor,  # (B, E) of unit length
    scale: Tensor,
    smoothing: float,
    duplicates: _Duplicates,
    both: bool,  # directions; else only pictures told from captions
    group: Group,
    to_images: Tensor | None,
    to_texts: Tensor | None,
) -> Tensor:
    """The sum of the rows' losses; adds its derivative for texts, and for images but for their factor `scale`."""
    every = list(enumerate(duplicates.blocks))
    mine = every[group.rows(len(every))]
    of_images, of_texts = (_Softmax(len(images), scale, smoothing) for _ in range(2))
    for p, rows in every:
        scaled = images[rows] * scale
        for q, columns in mine:
            logits = scaled @ texts[columns].T
            if p == q:
                of_images.own[rows] = of_texts.own[rows] = logits.diagonal()
            duplicates.leave_out(logits, p, q)
            of_images.add(rows, logits, dim=1)
            if both:
                of_texts.add(columns, logits, dim=0)
    of_images.merge(group)
    of_texts.merge(group)
    loss = of_images.losses().sum() + (of_texts.losses().sum() if both else 0)
    if to_images is None and to_texts is None:
        return loss
    image_weights, text_weights = of_images.weights(), of_texts.weights()
    own = of_images.of_own() + (of_texts.of_own() if both else 0)
    alone = group.size == 1
    parts = [each if alone or each is None else torch.zeros_like(each) for each in (to_images, to_texts)]
    for p, rows in every:
        scaled = images[rows] * scale
        for q, columns in mine:
            logits = scaled @ texts[columns].T
            duplicates.leave_out(logits, p, q)
            if smoothing:
                share = smoothing / of_images.left[rows, None]
                share = (share + smoothing / of_texts.left[columns] if both else share) * (logits > -torch.inf)
            gradient = (logits - of_images.top[rows, None]).exp_().mul_(image_weights[rows, None])
            if both:
                gradient.addcmul_(logits.sub_(of_texts.top[columns]).exp_(), text_weights[columns])
            if smoothing:
                gradient.sub_(share)
            if p == q:
                gradient.diagonal().copy_(own[rows])
            if to_images is not None:
                parts[0][rows].addmm_(gradient, texts[columns])
            if to_texts is not None:
                parts[1][columns].addmm_(gradient.T, scaled)
    for whole, part in zip((to_images, to_texts), parts, strict=True):
        if not alone and whole is not None:
            whole += group.sum(part)
    return loss


def _in_gallery(
    texts: Tensor,  # (B, E) of unit length
    scale: Tensor,
    smoothing: float,
    gallery: Gallery,
    shared: _Shared,
    group: Group,
    block: int,
    to_texts: Tensor | None,
) -> Tensor:
    """The sum of the captions' losses among all pictures; its derivative for texts goes to `to_texts`, zero before.

    One pass: the mean of pictures that a softmax weighs is summed with what is known of it so far, and fades as larger
    logits come.
    """

    def load(pictures: slice | Tensor) -> Tensor:
        return _unit(gallery.features[pictures].to(texts.device).to(texts.dtype))[0].mul_(scale)

    softmax = _Softmax(len(texts), scale, smoothing)
    spreads = bool(smoothing) and to_texts is not None
    total = torch.zeros_like(texts[0])  # Σ of all pictures, and for each caption of those that are left out
    left_out = torch.zeros_like(texts) if spreads else None
    every = blocks(len(gallery.features), min(block, -(-len(gallery.features) // group.size)))
    for pictures in every[group.rows(len(every))]:
        features = load(pictures)
        total += features.sum(dim=0)
        for rows in blocks(len(texts), block):
            logits = texts[rows] @ features.T
            own = gallery.rows[rows] - pictures.start
            here = ((own >= 0) & (own < len(features))).nonzero().squeeze(1)
            softmax.own[rows][here] = logits[here, own[here]]
            less = torch.cat([here, shared.leave_out(logits, rows, pictures)]).unique()
            logits[here, own[here]] = -torch.inf
            weights, fade = softmax.add(rows, logits, dim=1)
            if to_texts is not None:
                to_texts[rows].mul_(fade[:, None]).addmm_(weights, features)
            if spreads and len(less):
                left_out[rows][less] += logits[less].isneginf().to(features.dtype) @ features
    faded = softmax.merge(group)
    if to_texts is not None:
        to_texts.copy_(group.sum(to_texts.mul_(faded[:, None])))
    if spreads:
        total, left_out = group.sum(total), group.sum(left_out)
    if to_texts is not None:
        factors, of_own = softmax.weights(), softmax.of_own()
        for rows in blocks(len(texts), block):
            to_texts[rows].mul_(factors[rows, None]).addcmul_(load(gallery.rows[rows]), of_own[rows, None])
            if spreads:
                to_texts[rows].sub_((total - left_out[rows]) * (smoothing / softmax.left[rows, None]))
    return softmax.losses().sum()


class _Softmax:
    """The softmax of each row, block by block: Σ exp(logit) over all but its own pair is total · exp(top).

    With the own pair apart, 1 - p of a pair that is all but learnt is no difference of two numbers near 1.
    """

    def __init__(self, count: int, scale: Tensor, smoothing: float):
        self.top = (-scale).expand(count).clone()  # (B,) the largest logit so far; none is smaller than -scale
        self.total, self.own = scale.new_zeros(2, count)
        self.smoothing = smoothing
        self.sum, self.left = scale.new_zeros(count), scale.new_ones(count)  # logits that are left, the own one counted

    def add(self, rows: slice, logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """More logits of `rows`, along `dim`, -inf where left out. -> exp(logit - top); what former ones fade by"""
        if self.smoothing:
            there = logits > -torch.inf
            self.left[rows] += there.sum(dim)
            self.sum[rows] += logits.where(there, 0).sum(dim)
        top = torch.maximum(self.top[rows], logits.amax(dim))
        fade = (self.top[rows] - top).exp_()
        weights = (logits - top.unsqueeze(dim)).exp_()
        self.total[rows] = self.total[rows] * fade + weights.sum(dim)
        self.top[rows] = top
        return weights, fade

    def merge(self, group: Group) -> Tensor:
        """Takes in what the other processes have added. -> what was summed here fades by, (B,)"""
        top = group.most(self.top)
        fade = (self.top - top).exp_()
        self.top = top
        self.total, self.own, self.sum, left = group.sum(
            torch.stack([self.total * fade, self.own, self.sum, self.left - 1])
        )
        self.left = left + 1
        return fade

    def losses(self) -> Tensor:
        others = self.top + self.total.log() - self.own
        losses = torch.logaddexp(others, torch.zeros_like(others))
        return losses + self.smoothing * (self.own - (self.sum + self.own) / self.left) if self.smoothing else losses

    def weights(self) -> Tensor:
        """What exp(logit - top) is multiplied with to be a probability. (B,)"""
        return 1 / (self.total + (self.own - self.top).exp())

    def of_own(self) -> Tensor:
        """The loss's derivative for the own pair's logit. (B,)"""
        missed = self.total * self.weights()
        return self.smoothing - self.smoothing / self.left - missed if self.smoothing else -missed


class _Duplicates:
    """Which rows of a batch are not each other's negatives, block by block."""

    def __init__(self, groups: Sequence[Tensor], count: int, block: int):
        self.blocks = blocks(count, block)
        self.groups = groups
        repeated = torch.zeros(count, dtype=torch.bool)
        for group in groups:
            _, rank, sizes = group.unique(return_inverse=True, return_counts=True)
            repeated |= sizes[rank] > 1
        self.repeated = [rows.start + repeated[rows].nonzero().squeeze(1) for rows in self.blocks]

    def leave_out(self, logits: Tensor, p: int, q: int) -> None:
        """Sets logits of block p × block q to -inf that are no negatives: duplicates, and the pairs themselves."""
        rows, columns = self.repeated[p], self.repeated[q]
        if len(rows) and len(columns):
            i, j = _equal([(group[rows], group[columns]) for group in self.groups])
            logits[rows[i] - self.blocks[p].start, columns[j] - self.blocks[q].start] = -torch.inf
        if p == q:
            logits.fill_diagonal_(-torch.inf)


class _Shared:
    """Which pictures of a gallery are no negatives of a batch's captions, their own ones included."""

    def __init__(self, gallery: Gallery, captions: Tensor | None):
        self.own = [] if gallery.same_picture is None else [2 * gallery.same_picture[gallery.rows] + 1]
        self.own += [] if captions is None else [2 * captions]
        wanted = torch.cat([gallery.keys[:0], *self.own]).unique()
        first, last = (torch.searchsorted(gallery.keys, wanted, right=right) for right in (False, True))
        counts = last - first
        places = torch.arange(counts.sum()) + (last - counts.cumsum(0)).repeat_interleave(counts)
        self.pictures, order = gallery.pictures[places].sort(stable=True)
        self.keys = gallery.keys[places][order]

    def leave_out(self, logits: Tensor, rows: slice, pictures: slice) -> Tensor:
        """Sets logits of captions `rows` × `pictures` to -inf that are no negatives. -> the captions concerned"""
        start, stop = torch.searchsorted(self.pictures, torch.tensor([pictures.start, pictures.stop])).tolist()
        if start == stop:
            return self.pictures[:0]
        i, j = _equal([(own[rows], self.keys[start:stop]) for own in self.own])
        logits[i, self.pictures[start:stop][j] - pictures.start] = -torch.inf
        return i


def _equal(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Positions i, j where x[i] == y[j] for any of the pairs (x, y)."""
    same = pairs[0][0][:, None] == pairs[0][1]
    for x, y in pairs[1:]:
        same |= x[:, None] == y
    return same.nonzero(as_tuple=True)


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit length, and their lengths, as torch.nn.functional.normalize has them."""
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(1e-12)
    return rows / lengths, lengths


def _through_length(gradient: Tensor, unit: Tensor, lengths: Tensor) -> Tensor:
    """Turns, in place, a derivative for `unit` into that for unit · lengths. -> Σ gradient · unit as it was before"""
    along = torch.einsum("be,be->b", gradient, unit)[:, None]
    gradient.addcmul_(unit, along, value=-1).div_(lengths)
    return along.sum()
