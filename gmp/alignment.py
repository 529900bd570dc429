"""How pictures and captions lie to each other on the unit sphere, and whether CLIP's softmax is as sure as it is right.

Retrieval only sees which of two scores is higher. These numbers see by how much, and where the vectors lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .data.captions import first_captions

SAMPLE = 10_000  # pictures, evenly spread over all: 5·10⁷ pairs and 100 softmaxes settle these numbers to 3 digits
CANDIDATES = 100  # one softmax chooses among: the error depends on it, so it is the same for every data set
BINS = 15  # Guo et al. 2017
LARGEST_SCALE = 1000.0  # ten times CLIP's clamp; with no mistake at all the best scale is infinite
FLAT = 1e-12  # a slope of the loss that is rounding
CHUNK = 2048  # rows whose distances are computed at once


@dataclass(frozen=True)
class Alignment:
    """Geometry of matched and unmatched vectors, all of length 1."""

    modality_gap: float  # distance of the two centroids, 0 to 2
    matched_cosine: float  # mean, of a caption and its picture
    alignment: float  # mean squared distance of a caption and its picture; lower is closer
    uniformity_images: float  # 0 is collapse, lower is more evenly spread, -4 and less is a wide sphere
    uniformity_texts: float  # of one caption per picture
    images: int
    captions: int


@dataclass(frozen=True)
class Bin:
    """Predictions with a confidence above `low` and at most `high`."""

    low: float
    high: float
    count: int
    confidence: float  # mean; NaN where there are none
    accuracy: float


@dataclass(frozen=True)
class Reliability:
    """Calibration of one direction."""

    error: float  # expected calibration error: mean over predictions of |accuracy - confidence| of their bin
    accuracy: float
    confidence: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Calibration:
    """Whether a choice among `candidates` is right as often as the softmax says."""

    candidates: int
    images: int  # that were used: whole groups of candidates
    scale: float  # exp(logit_scale), the inverse temperature
    best_scale: float  # of least negative log-likelihood, both directions together
    text_to_image: Reliability
    image_to_text: Reliability
    best_error: dict[str, float]  # direction -> expected calibration error at best_scale


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.double(), dim=-1)


def spread(count: int, limit: int) -> Tensor:
    """At most `limit` of `count` places, evenly spread."""
    return torch.arange(count) if count <= limit else torch.arange(limit) * count // limit


def modality_gap(images: Tensor, texts: Tensor, chunk: int = CHUNK) -> float:
    """Distance of the centroids of two sets of vectors, each normalised first (Liang et al. 2022). (I, E), (T, E)"""
    centroids = [sum(_unit(rows).sum(dim=0) for rows in one.split(chunk)) / len(one) for one in (images, texts)]
    return (centroids[0] - centroids[1]).norm().item()


def matched_cosines(images: Tensor, texts: Tensor, owners: Tensor, chunk: int = CHUNK) -> Tensor:
    """Cosine of each caption with its own picture. (I, E), (T, E), (T,) -> (T,)"""
    found = torch.empty(len(texts), dtype=torch.float64)
    for start in range(0, len(texts), chunk):
        rows = slice(start, start + chunk)
        found[rows] = (_unit(texts[rows]) * _unit(images[owners[rows]])).sum(dim=-1)
    return found


def uniformity(vectors: Tensor, chunk: int = CHUNK) -> float:
    """log of the mean of exp(-2 d²) over all pairs of different rows (Wang and Isola 2020, t = 2). (N, E)

    NaN for less than two rows.
    """
    units, count, total = _unit(vectors), len(vectors), 0.0
    for start in range(0, count, chunk):
        rows = units[start : start + chunk]
        kernel = torch.exp(4 * (rows @ units[start:].T) - 4)  # d² = 2 - 2 cosine
        total += kernel[:, : len(rows)].triu(1).sum().item() + kernel[:, len(rows) :].sum().item()
    pairs = count * (count - 1) // 2
    return math.log(total / pairs) if pairs else math.nan


def alignment(images: Tensor, texts: Tensor, caption_counts: Sequence[int]) -> Alignment:
    """Pictures (I, E) and captions (T, E), those of the first picture first: `caption_counts` says how many each has.

    Uniformity is taken over at most `SAMPLE` pictures and the first caption of each: captions of one picture are close
    to each other by right, and would make texts look collapsed.
    """
    owners = torch.arange(len(images)).repeat_interleave(torch.as_tensor(caption_counts))
    chosen = spread(len(images), SAMPLE)
    firsts = torch.as_tensor(first_captions(caption_counts))[chosen]
    cosines = matched_cosines(images, texts, owners)
    return Alignment(
        modality_gap=modality_gap(images, texts),
        matched_cosine=cosines.mean().item(),
        alignment=(2 - 2 * cosines).mean().item(),
        uniformity_images=uniformity(images[chosen]),
        uniformity_texts=uniformity(texts[firsts]),
        images=len(images),
        captions=len(texts),
    )


# ---- calibration ----------------------------------------------------------------------------------------------------


def _groups(images: Tensor, texts: Tensor, candidates: int) -> Tensor:
    """Cosines within groups of pictures and their captions, row i of one belonging to row i of the other. (G, N, N)

    Group g takes every G-th picture from g on: neighbours in a folder, which are often alike, fall into different
    groups. What does not fill a group is left out, so that every softmax has equally many candidates.
    """
    groups = len(images) // candidates
    pictures, captions = (
        _unit(one[: groups * candidates]).view(candidates, groups, -1).transpose(0, 1) for one in (images, texts)
    )
    return captions @ pictures.transpose(1, 2)


def reliability(logits: Tensor) -> Reliability:
    """Of choices by softmax over the last dimension, where choice i of N is right in row i. (G, N, N)"""
    confidence, choice = logits.softmax(dim=-1).max(dim=-1)
    right = (choice == torch.arange(logits.shape[-1])).double().flatten()
    confidence = confidence.flatten()
    bin_of = (confidence * BINS).ceil().clamp(1, BINS).nan_to_num(BINS).long() - 1
    counts, sure, correct = (
        torch.zeros(BINS, dtype=torch.float64).index_add_(0, bin_of, one)
        for one in (torch.ones_like(confidence), confidence, right)
    )
    error = (correct - sure).abs().sum().item() / len(right)
    bins = tuple(
        Bin(i / BINS, (i + 1) / BINS, int(count), share, accuracy)
        for i, (count, share, accuracy) in enumerate(
            zip(counts.tolist(), (sure / counts).tolist(), (correct / counts).tolist(), strict=True)
        )
    )
    return Reliability(error, right.mean().item(), confidence.mean().item(), bins)


def _slope(cosines: Tensor, scale: float) -> float:
    """Derivative of the mean negative log-likelihood of the right choices by the scale, both directions together."""
    right = cosines.diagonal(dim1=1, dim2=2)
    expected = sum(((cosines * scale).softmax(dim=dim) * cosines).sum(dim=dim) for dim in (1, 2)) / 2
    return (expected - right).mean().item()


def best_scale(cosines: Tensor) -> float:
    """The inverse temperature of least negative log-likelihood (Guo et al. 2017, temperature scaling). (G, N, N)

    The loss is convex in the scale, so its slope is bisected, between 0 and `LARGEST_SCALE`. NaN where all scales are
    equally good, since all cosines are the same, and where one is not a number.
    """
    low, high = 0.0, LARGEST_SCALE
    slopes = [_slope(cosines, scale) for scale in (low, high)]
    if not all(map(math.isfinite, slopes)) or max(map(abs, slopes)) < FLAT:
        return math.nan
    if slopes[1] < FLAT:  # all is right, or nearly: surer is better without an end
        return high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _slope(cosines, middle) < 0 else (low, middle)
    return (low + high) / 2


def calibration(
    images: Tensor,
    texts: Tensor,
    caption_counts: Sequence[int],
    logit_scale: float,
    candidates: int = CANDIDATES,
) -> Calibration:
    """Of the softmax with exp(logit_scale) over groups of `candidates` pictures with their first captions.

    images (I, E), texts (T, E) as in `alignment`; at most `SAMPLE` pictures. With fewer pictures than candidates, all
    are one group, and the numbers are comparable to those of as many pictures only. Raises ValueError for less than
    two pictures.
    """
    if len(images) < 2:
        raise ValueError("a choice needs two pictures at least")
    candidates = min(candidates, len(images))
    chosen = spread(len(images), SAMPLE)
    firsts = torch.as_tensor(first_captions(caption_counts))[chosen]
    cosines = _groups(images[chosen], texts[firsts], candidates)
    scale, best = math.exp(logit_scale), best_scale(cosines)
    directions = {"text_to_image": cosines, "image_to_text": cosines.transpose(1, 2)}
    return Calibration(
        candidates=candidates,
        images=candidates * len(cosines),
        scale=scale,
        best_scale=best,
        best_error={name: reliability(one * best).error for name, one in directions.items()},
        **{name: reliability(one * scale) for name, one in directions.items()},
    )
