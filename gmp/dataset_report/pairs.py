"""Which captions hardly fit their picture, as the original CLIP sees it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..alignment import spread
from ..clip import TextTower
from ..data.captions import Index
from ..events import Event, progress
from ..features import Features, embed_index
from ..join import Joined
from ..measure import embed_captions, text_features
from ..tokenizer import Tokenize
from .findings import Case, Finding, found

OTHERS = 2048  # pictures, and captions, that every pair is compared with; evenly spread over the data set
FEWEST = 10  # of them, or "most others" says nothing
MOST = 0.5  # share of the others that fit better, from which on a pair is likely wrong
CHUNK = 4096  # captions at once
_CLOSE = 1e-6  # of two cosines, which copies of a picture have


@dataclass(frozen=True)
class Fits:
    """How each of C captions fits its picture, in the order of `Index.captions`; NaN where it cannot be read."""

    cosines: np.ndarray  # (C,) fp32, of the original CLIP's features
    pictures_better: np.ndarray  # (C,) fp32: the share of other pictures that fit the caption better
    captions_better: np.ndarray  # (C,) fp32: the share of other pictures' captions that fit the picture better
    others: int  # pictures that were compared with, at the most

    @property
    def misfit(self) -> np.ndarray:
        """(C,) the mean of both shares: 0 fits best of all, a random pair has 1/2 in the mean."""
        return (self.pictures_better + self.captions_better) / 2


def read_fits(
    clip: Joined,
    index: Index,
    faults: Mapping[str, str],
    keys: Mapping[str, str],
    tokenize: Tokenize,
    cache: Path,
    device: torch.device,
) -> Generator[Event, None, Fits]:
    """Every caption against its picture and against some of all others. Yields progress events.

    A low cosine alone says little: some captions fit nothing well and some fit everything. So each pair is compared
    with pairs of its own caption and of its own picture.
    faults: pictures that cannot be read, name -> reason. keys: `features.index_keys`. tokenize: for the text tower.
    """
    captions, owners = index.captions(), np.array(index.owners(), np.int64)
    vision = clip.build_vision().to(device)
    seen, features, _ = yield from embed_index(vision, index.without(faults), cache, keys)
    rows = {picture.path: row for row, picture in enumerate(seen.pictures)}
    row_of = np.array([rows.get(picture.path, -1) for picture in index.pictures])[owners]  # (C,) -1: not read
    places = np.flatnonzero(row_of >= 0)
    text = clip.build_text().to(device)
    some = _Others(features, row_of, places, captions, text, tokenize)
    found = np.full((3, len(captions)), np.nan, np.float32)
    for start in range(0, len(places), CHUNK):
        here = places[start : start + CHUNK]
        ids = tokenize([captions[i] for i in here.tolist()]).ids.to(device)
        texts = yield from _quietly(embed_captions(text, ids), start, len(places))
        found[:, here] = some.compare(texts, torch.from_numpy(row_of[here])).numpy()
    return Fits(*found, others=len(some.rows))


class _Others:
    """The pictures and captions that pairs are compared with."""

    def __init__(
        self,
        features: Features,
        row_of: np.ndarray,
        places: np.ndarray,
        captions: list[str],
        text: TextTower,
        tokenize: Tokenize,
    ):
        self._features = features
        self.rows = spread(len(features), OTHERS)  # of pictures
        self._images = F.normalize(features[self.rows], dim=-1)
        chosen = places[spread(len(places), OTHERS).numpy()]
        self._owners = torch.from_numpy(row_of[chosen])
        ids = tokenize([captions[i] for i in chosen.tolist()]).ids.to(text.text_projection.device)
        self._texts = F.normalize(text_features(text, ids), dim=-1)

    def compare(self, texts: Tensor, rows: Tensor) -> Tensor:
        """Cosines, and the shares of other pictures and captions that fit better. (B, E), (B,) -> (3, B)

        A picture is not compared with itself, nor with its own captions.
        """
        texts, images = F.normalize(texts, dim=-1), F.normalize(self._features[rows], dim=-1)
        own = (texts * images).sum(dim=-1, keepdim=True)
        pictures = _better(texts @ self._images.T, own, rows[:, None] != self.rows)
        captions = _better(images @ self._texts.T, own, rows[:, None] != self._owners)
        return torch.stack([own[:, 0], pictures, captions])


def _better(scores: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """The share of others whose score is above a pair's own. (B, K), (B, 1), (B, K) bool -> (B,); NaN without any"""
    return ((scores > own + _CLOSE) & other).sum(dim=1) / other.sum(dim=1)


def _quietly(events: Generator[Event, None, Tensor], start: int, total: int) -> Generator[Event, None, Tensor]:
    """The same work; its progress counts through all chunks."""
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            return end.value
        yield progress("match captions", start + event["done"], total)


def wrong_pairs(index: Index, fits: Fits) -> Finding:
    """The pairs that most others are better than, the worst first. None where there are too few others."""
    worst = _worst(fits)
    likely = worst[fits.misfit[worst] > MOST] if fits.others > FEWEST else worst[:0]
    return found("wrong_pairs", _cases(index, fits, likely))


def lowest_pairs(index: Index, fits: Fits, count: int) -> tuple[Case, ...]:
    """The pairs that fit worst, the worst first, be they wrong or not."""
    return _cases(index, fits, _worst(fits)[:count])


def _worst(fits: Fits) -> np.ndarray:
    """Positions of all pairs that could be compared, by misfit, then by cosine."""
    order = np.lexsort((fits.cosines, -fits.misfit))
    return order[np.isfinite(fits.misfit[order])]


def _cases(index: Index, fits: Fits, places: np.ndarray) -> tuple[Case, ...]:
    captions, owners = index.captions(), index.owners()
    return tuple(
        Case(
            index.pictures[owners[i]].path,
            f"{100 * fits.pictures_better[i]:.0f} % of other pictures fit it better, "
            f"{100 * fits.captions_better[i]:.0f} % of other captions fit the picture better; "
            f"cosine {fits.cosines[i]:.2f}",
            captions[i],
        )
        for i in places.tolist()
    )
