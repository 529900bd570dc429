"""Measurements: retrieval between captions and pictures, and drift of a text tower at every read point.

Retrieval sees only `projected`; SDXL reads `penultimate`, Flux reads `pooled`. One says nothing about the others, so
both are always measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import READ_POINTS
from .clip import ReadPoints, TextTower
from .tokenizer import lengths

RECALLS = (1, 5, 10)
DRIFT_CAPTIONS = 256  # that drift is measured on: at the full context length, 77 rows each


@dataclass(frozen=True)
class Ranks:
    """One direction of retrieval. Ranks count from 1, as open_clip's `get_clip_metrics` does."""

    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    mean_rank: float
    median_rank: int
    queries: int


@dataclass(frozen=True)
class Retrieval:
    """Both directions, over `images` pictures and `captions` captions."""

    text_to_image: Ranks
    image_to_text: Ranks
    images: int
    captions: int

    def flat(self) -> dict[str, float]:
        """`recall_at_1_text_to_image` and so on."""
        return {
            f"{name}_{direction}": value
            for direction in ("text_to_image", "image_to_text")
            for name, value in asdict(getattr(self, direction)).items()
            if name != "queries"
        }


@dataclass(frozen=True)
class Drift:
    """Agreement with another text tower at one read point, averaged over rows."""

    cosine: float
    one_minus_cosine: float
    relative_norm: float  # length of this tower's rows over the other's: 1 is unchanged


def _summary(ranks: Tensor) -> Ranks:
    """0-based ranks -> recalls, mean rank, floor of the median, + 1 (open_clip's convention)."""
    recalls = [(ranks < k).double().mean().item() for k in RECALLS]
    median = math.floor(torch.quantile(ranks.double(), 0.5).item()) + 1
    return Ranks(*recalls, ranks.double().mean().item() + 1, median, len(ranks))


def _ranks(queries: Tensor, items: Tensor, positives: Callable[[int, int], Tensor], chunk: int) -> Tensor:
    """0-based rank of each query's best positive among all items.

    A tie counts against the query if, and only if, the other item comes first, so that the result does not depend on
    the order in which a sort happens to leave equal scores. (Scores of equal items may round differently where `chunk`
    changes the shape of the matrix product: results are exact for a given chunk.) A score that is not a number is the
    worst of all.
    """
    order = torch.arange(len(items), device=items.device)
    ranks = []
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ items.T  # (chunk, items)
        scores.masked_fill_(scores.isnan(), -torch.inf)
        mask = positives(start, start + len(scores)).to(scores.device)
        best, first = scores.masked_fill(~mask, -torch.inf).max(dim=1, keepdim=True)
        # max() may return any of several equal maxima: take the first
        first = torch.where((scores == best) & mask, order, len(items)).amin(dim=1, keepdim=True)
        ahead = (scores > best) | ((scores == best) & (order < first))
        ranks.append(ahead.sum(dim=1).cpu())
    return torch.cat(ranks)


def retrieval(image_features: Tensor, text_features: Tensor, image_of: Sequence[int], chunk: int = 1024) -> Retrieval:
    """Exact retrieval with any number of captions per picture, in chunks of `chunk` queries.

    image_features (I, E), text_features (T, E) of any length; image_of[j] is the picture that caption j belongs to.
    A caption has found its picture, a picture has found any one of its captions (LAION-AI/CLIP_benchmark).
    """
    images = F.normalize(image_features.float(), dim=-1)
    texts = F.normalize(text_features.float(), dim=-1)
    owner = torch.as_tensor(image_of)
    if len(owner) != len(texts) or len(torch.unique(owner)) != len(images):
        raise ValueError(f"{len(texts)} captions with {len(owner)} owners for {len(images)} pictures")
    every_image = torch.arange(len(images))
    text_to_image = _ranks(texts, images, lambda a, b: owner[a:b, None] == every_image[None], chunk)
    image_to_text = _ranks(images, texts, lambda a, b: every_image[a:b, None] == owner[None], chunk)
    return Retrieval(_summary(text_to_image), _summary(image_to_text), len(images), len(texts))


@torch.no_grad()
def text_features(tower: TextTower, ids: Tensor, batch: int = 256) -> Tensor:
    """Projected features of captions, cut to each batch's longest one. (N, L) -> (N, E) on the CPU"""
    device = tower.positional_embedding.device
    features = []
    for chunk in ids.split(batch):
        features.append(tower(chunk[:, : lengths(chunk).max()].to(device)).projected.float().cpu())
    return torch.cat(features)


def _pairs(tower: TextTower, other: TextTower, ids: Tensor, batch: int) -> Iterator[tuple[ReadPoints, ReadPoints]]:
    for chunk in ids.split(batch):
        yield (
            tower(chunk.to(tower.positional_embedding.device)),
            other(chunk.to(other.positional_embedding.device)),
        )


@torch.no_grad()
def drift(tower: TextTower, other: TextTower, ids: Tensor, batch: int = 64) -> dict[str, Drift]:
    """Drift of `tower` from `other` at every read point, over captions `ids` (N, L).

    Pass ids at the full context length: SDXL reads all 77 rows, also those behind end-of-text.
    """
    sums = {point: torch.zeros(3, dtype=torch.float64) for point in READ_POINTS}
    for a, b in _pairs(tower, other, ids, batch):
        for point in READ_POINTS:
            x, y = (getattr(points, point).cpu().double().flatten(0, -2) for points in (a, b))
            norms = x.norm(dim=-1) / y.norm(dim=-1)
            cosines = F.cosine_similarity(x, y, dim=-1)
            sums[point] += torch.stack([cosines.sum(), norms.sum(), torch.tensor(len(x), dtype=torch.float64)])
    return {
        point: Drift(cosine / rows, 1 - cosine / rows, norm / rows)
        for point, (cosine, norm, rows) in ((point, total.tolist()) for point, total in sums.items())
    }


def measure_tower(
    tower: TextTower, image_features: Tensor, ids: Tensor, owners: Sequence[int], reference: TextTower | None
) -> dict[str, object]:
    """Retrieval at `projected`, and drift from `reference` at every read point, as JSON values.

    ids (captions, context_length); owners[j] is the picture of caption j.
    """
    found = retrieval(image_features, text_features(tower, ids), owners)
    moved = {} if reference is None else drift(tower, reference, ids[:DRIFT_CAPTIONS])
    return found.flat() | {
        "images": found.images,
        "captions": found.captions,
        "drift": {point: asdict(value) for point, value in moved.items()},
    }
