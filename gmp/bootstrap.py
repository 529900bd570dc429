"""Intervals of shares over pictures: the bootstrap that draws pictures, each with all that belongs to it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .measure import DRAWN, RESAMPLES, Interval, interval, share_interval


def resamples(pictures: int, seed: int, count: int = RESAMPLES) -> Iterator[Tensor]:
    """How often each picture was drawn in each of `count` resamples, some of them at a time. -> (some, pictures)"""
    generator = torch.Generator().manual_seed(seed)
    part = max(1, DRAWN // pictures)
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
