"""Confidence intervals over pictures: the bootstrap that draws pictures, each with all that belongs to it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 1000
CONFIDENCE = 0.95
Z = 1.959964  # standard deviations of a normal distribution that hold as much
RARE = 10  # pictures of the rarer outcome below which a bootstrap of a share is not trusted
DRAWN = 2**22  # numbers that the bootstrap holds at once


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def interval(value: float, samples: Tensor) -> Interval:
    """A value with the percentiles of its bootstrap samples (N,)."""
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(samples, samples.new_tensor([tail, 1 - tail])).tolist()
    return Interval(value, low, high)


def share_interval(value: float, samples: Tensor, pictures: int) -> Interval:
    """`interval` of a share; not narrower than Wilson's (1927) where pictures of one outcome are few.

    Resampling hits alone gives hits alone: near 0 and 1 the bootstrap is far too sure, and has no width at all there.
    """
    found = interval(value, samples)
    if pictures * min(value, 1 - value) >= RARE:
        return found
    z2 = Z * Z
    centre = (value + z2 / (2 * pictures)) / (1 + z2 / pictures)
    half = Z * math.sqrt(value * (1 - value) / pictures + z2 / (4 * pictures**2)) / (1 + z2 / pictures)
    return Interval(value, max(0.0, min(found.low, centre - half)), min(1.0, max(found.high, centre + half)))


def resamples(pictures: int, seed: int, count: int = RESAMPLES, width: int = 0) -> Iterator[Tensor]:
    """How often each picture was drawn in each of `count` resamples, some of them at a time. -> (some, pictures) fp64

    width: numbers that the caller computes for each resample, where they are more than the pictures. The same seed and
    number of pictures draw the same ones, however many at a time.
    """
    generator = torch.Generator().manual_seed(seed)
    part = max(1, DRAWN // max(pictures, width))
    for start in range(0, count, part):
        drawn = torch.randint(pictures, (min(part, count - start), pictures), generator=generator)
        yield torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, drawn.new_ones(drawn.shape).double())


def ratio(sums: Tensor, counts: Tensor, seed: int) -> Interval | None:
    """sum of `sums` / sum of `counts`, both (pictures,): a share, of several values a picture, and its interval.

    Values of one picture depend on each other, so pictures are drawn and not values (the cluster bootstrap, Efron and
    Tibshirani 1993, chapter 8). Pictures without values are left out; None where none has any.
    """
    there = counts > 0
    sums, counts = sums[there].double(), counts[there].double()
    if not len(counts):
        return None
    samples = torch.cat([(weights @ sums) / (weights @ counts) for weights in resamples(len(counts), seed)])
    return share_interval((sums.sum() / counts.sum()).item(), samples, len(counts))


def difference(values: Tensor, seed: int) -> Interval:
    """Mean of the difference of two encoders at each picture (pictures,), and its interval."""
    samples = torch.cat([weights @ values.double() / len(values) for weights in resamples(len(values), seed)])
    return interval(values.double().mean().item(), samples)


def share(values: Tensor, seed: int) -> Interval | None:
    """Mean of one value a picture (pictures,), and its interval; None without pictures."""
    return ratio(values, torch.ones(len(values)), seed)
