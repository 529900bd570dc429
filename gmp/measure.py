"""Measurements: retrieval between captions and pictures, and drift of a text tower at every read point.

Retrieval sees only `projected`; SDXL reads `penultimate`, Flux reads `pooled`. One says nothing about the others, so
both are always measured.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from . import READ_POINTS, bootstrap
from .bootstrap import RESAMPLES, Interval, interval, share_interval
from .clip import TextTower
from .events import Event, finish, progress

RECALLS = (1, 5, 10)
SUMMARY = (*(f"recall_at_{k}" for k in RECALLS), "mean_rank", "median_rank")
DIRECTIONS = ("text_to_image", "image_to_text")
DRIFT_CAPTIONS = 256  # that drift is measured on: at the full context length, 77 rows each
CHUNK = 2048  # pictures, and captions, whose scores are computed at once: 34 MB
STEP = 2.0**-26  # of the features that scores are computed from
WORST = -2.0  # a score that is not a number; cosines are -1 at the least
CPU = torch.device("cpu")


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

    @property
    def recall_at_1(self) -> float:
        """Mean of both directions."""
        return (self.text_to_image.recall_at_1 + self.image_to_text.recall_at_1) / 2

    def flat(self) -> dict[str, float]:
        """`recall_at_1_text_to_image` and so on."""
        return {
            f"{name}_{direction}": value
            for direction in DIRECTIONS
            for name, value in asdict(getattr(self, direction)).items()
            if name != "queries"
        }


@dataclass(frozen=True)
class Places:
    """Where every query's best positive stands among all items, counted from 0."""

    text_to_image: Tensor  # (T,) int64
    image_to_text: Tensor  # (I,) int64
    image_of: Tensor  # (T,) int64, the picture that a caption belongs to


@dataclass(frozen=True)
class Drift:
    """Agreement with another text tower at one read point, averaged over rows."""

    cosine: float
    one_minus_cosine: float
    relative_norm: float  # length of this tower's rows over the other's: 1 is unchanged


# ---- retrieval ------------------------------------------------------------------------------------------------------


def _units(features: Tensor, device: torch.device) -> Tensor:
    """Rows of length 1 in fp64, rounded to multiples of 2^-26: scores of such rows are exact. (N, E)

    A query's best positive is scored once as a pair and once more among all items, in a product of another shape, and
    matrix products round differently with their shape. Half an ulp would put a positive ahead of itself. Here nothing
    is left to round: products are multiples of 2^-52, and so are their partial sums, which by Cauchy and Schwarz stay
    below 2 in any order; fp64 holds all of those. So results do not depend on chunks, threads or machine.
    """
    rows = F.normalize(features.to(device, torch.float64), dim=-1)
    return rows.div_(STEP).round_().mul_(STEP)


def _scores(images: Tensor, texts: Tensor) -> Tensor:
    """(I, E), (T, E) -> (I, T)"""
    return (images @ texts.T).nan_to_num_(nan=WORST)


def _positives(images: Tensor, texts: Tensor, image_of: Tensor, chunk: int, device: torch.device) -> Tensor:
    """The score of each caption with its own picture. (T,) fp64"""
    # Written into one tensor: small ones that are kept between large ones that are freed would hold on to their memory
    found = torch.empty(len(texts), dtype=torch.float64, device=device)
    for start in range(0, len(texts), chunk):
        rows = slice(start, start + chunk)
        found[rows] = (_units(texts[rows], device) * _units(images[image_of[rows]], device)).sum(dim=-1)
    return found.nan_to_num_(nan=WORST)


def _ahead(scores: Tensor, best: Tensor, first: Tensor, start: int) -> Tensor:
    """How many of a block's items, the first of which is item `start`, stand before each query's best positive.

    scores (Q, K); best, first (Q,): the positive's score, and its place in the order of items. A tie counts against the
    query if, and only if, the other item comes first, so that the result does not depend on the order in which a sort
    happens to leave equal scores.
    """
    behind = first >= start + scores.shape[1]  # the whole block comes before the positive: ties count
    threshold = torch.where(behind, torch.nextafter(best, best.new_tensor(WORST - 1)), best)
    count = (scores > threshold[:, None]).sum(dim=1)
    (inside,) = ((first >= start) & ~behind).nonzero(as_tuple=True)
    if len(inside):
        order = torch.arange(start, start + scores.shape[1], device=scores.device)
        tied = (scores[inside] == best[inside, None]) & (order < first[inside, None])
        count[inside] += tied.sum(dim=1)
    return count


def rank_pairs(
    image_features: Tensor,
    text_features: Tensor,
    image_of: Sequence[int] | Tensor,
    *,
    chunk: int = CHUNK,
    device: torch.device = CPU,
) -> Generator[Event, None, Places]:
    """The place of each caption's picture among all pictures, and of each picture's best caption among all captions.

    image_features (I, E), text_features (T, E): floats of any kind and length. Exact for any number of captions per
    picture. Every score is computed once, for both directions, in blocks of `chunk` pictures and `chunk` captions:
    beside the features, memory is that of a block. A score that is not a number is the worst of all. Raises ValueError
    where owners and features do not fit. The device must know fp64; where it does not (MPS), the CPU computes.
    """
    owner = torch.as_tensor(image_of, dtype=torch.int64)
    images, texts = len(image_features), len(text_features)
    if len(owner) != texts or not texts or not torch.equal(torch.unique(owner), torch.arange(images)):
        raise ValueError(f"{texts} captions with {len(owner)} owners for {images} pictures")
    device = CPU if device.type == "mps" else device
    with torch.no_grad():
        pairs = _positives(image_features, text_features, owner, chunk, device)
        owner = owner.to(device)
        best = pairs.new_full((images,), WORST).scatter_reduce(0, owner, pairs, "amax")
        place = torch.where(pairs == best[owner], torch.arange(texts, device=device), texts)
        first = place.new_full((images,), texts).scatter_reduce(0, owner, place, "amin")
    to_image, to_text = torch.zeros(texts, dtype=torch.int64), torch.zeros(images, dtype=torch.int64)
    total = len(range(0, images, chunk)) * len(range(0, texts, chunk))
    done = 0
    for start in range(0, images, chunk):
        rows = slice(start, start + chunk)
        with torch.no_grad():
            pictures = _units(image_features[rows], device)
        for begin in range(0, texts, chunk):
            columns = slice(begin, begin + chunk)
            with torch.no_grad():
                scores = _scores(pictures, _units(text_features[columns], device))
                to_text[rows] += _ahead(scores, best[rows], first[rows], begin).cpu()
                to_image[columns] += _ahead(scores.T, pairs[columns], owner[columns], start).cpu()
            done += 1
            yield progress("rank captions and pictures", done, total)
    return Places(to_image, to_text, owner.cpu())


def _median(ranks: Tensor) -> int:
    """Floor of the median, counted from 1 (open_clip's convention)."""
    ordered = ranks.sort().values
    return (ordered[(len(ranks) - 1) // 2] + ordered[len(ranks) // 2]).item() // 2 + 1


def _summary(ranks: Tensor) -> Ranks:
    """0-based ranks -> recalls, mean rank, median rank."""
    recalls = [(ranks < k).double().mean().item() for k in RECALLS]
    return Ranks(*recalls, ranks.double().mean().item() + 1, _median(ranks), len(ranks))


def summarize(places: Places) -> Retrieval:
    """Recalls and ranks of both directions."""
    to_image, to_text = places.text_to_image, places.image_to_text
    return Retrieval(_summary(to_image), _summary(to_text), len(to_text), len(to_image))


def retrieval(
    image_features: Tensor, text_features: Tensor, image_of: Sequence[int] | Tensor, chunk: int = CHUNK
) -> Retrieval:
    """Exact retrieval with any number of captions per picture, as `rank_pairs` computes it.

    image_features (I, E), text_features (T, E) of any length; image_of[j] is the picture that caption j belongs to.
    A caption has found its picture, a picture has found any one of its captions (LAION-AI/CLIP_benchmark).
    """
    return summarize(finish(rank_pairs(image_features, text_features, image_of, chunk=chunk)))


# ---- confidence -----------------------------------------------------------------------------------------------------


def _statistics(ranks: Tensor, owner: Tensor, images: int) -> Tensor:
    """Sums over each picture's queries: hits at 1, 5, 10, ranks counted from 1, and queries. (I, 5) fp64"""
    columns = [
        *((ranks < k).double() for k in RECALLS),
        ranks.double() + 1,
        torch.ones(len(ranks), dtype=torch.float64),
    ]
    rows = torch.stack(columns, dim=1)
    return torch.zeros(images, rows.shape[1], dtype=torch.float64).index_add_(0, owner, rows)


def _medians(weights: Tensor, ranks: Tensor, owner: Tensor) -> Tensor:
    """`_median` where each query is there as often as its picture was drawn. weights (B, I) int64 -> (B,)"""
    ordered, order = ranks.sort(stable=True)
    counts = weights[:, owner[order]].cumsum(dim=1)  # (B, T)
    total = counts[:, -1:]
    places = torch.cat([(total - 1) // 2, total // 2], dim=1)
    found = ordered[torch.searchsorted(counts, places, right=True)]
    return found.sum(dim=1) // 2 + 1


def resample(places: Places, resamples: int = RESAMPLES, seed: int = 0) -> Generator[Event, None, dict[str, Tensor]]:
    """What retrieval would have been with other pictures: the cluster bootstrap. Direction -> (resamples, 5) fp64.

    Columns are those of `SUMMARY`. Pictures are drawn with replacement, each with all its captions, whose ranks depend
    on each other (Efron and Tibshirani 1993, chapter 8); their ranks stay those among all items. The same seed and
    number of pictures draw the same ones, so that two encoders' samples are paired and may be subtracted.
    """
    images = len(places.image_to_text)
    directions = {
        "text_to_image": (places.text_to_image, places.image_of),
        "image_to_text": (places.image_to_text, torch.arange(images)),
    }
    statistics = {name: _statistics(ranks, owner, images) for name, (ranks, owner) in directions.items()}
    found: dict[str, list[Tensor]] = {name: [] for name in directions}
    done = 0
    for weights in bootstrap.resamples(images, seed, resamples, len(places.image_of)):
        for name, (ranks, owner) in directions.items():
            sums = weights @ statistics[name]
            medians = _medians(weights.long(), ranks, owner).double()
            found[name].append(torch.cat([sums[:, :-1] / sums[:, -1:], medians[:, None]], dim=1))
        done += len(weights)
        yield progress("confidence", done, resamples)
    return {name: torch.cat(rows) for name, rows in found.items()}


def with_intervals(found: Retrieval, samples: Mapping[str, Tensor]) -> dict[str, dict[str, Interval]]:
    """Direction -> name of `SUMMARY` -> value with its interval."""
    return {
        direction: {
            name: _interval(name, getattr(getattr(found, direction), name), samples[direction][:, column], found.images)
            for column, name in enumerate(SUMMARY)
        }
        for direction in DIRECTIONS
    }


def _interval(name: str, value: float, samples: Tensor, pictures: int) -> Interval:
    return share_interval(value, samples, pictures) if name.startswith("recall") else interval(value, samples)


def intervals_json(found: Mapping[str, Mapping[str, Interval]]) -> dict[str, dict[str, object]]:
    return {direction: {name: asdict(one) for name, one in values.items()} for direction, values in found.items()}


def retrieval_json(found: Retrieval, intervals: Mapping[str, Mapping[str, Interval]]) -> dict[str, object]:
    """The section `retrieval` of a measurement document; intervals as `with_intervals` gives them."""
    section: dict[str, object] = {"images": found.images, "captions": found.captions}
    for direction, values in intervals_json(intervals).items():
        section[direction] = values | {"queries": getattr(found, direction).queries}
    return section


def changes(
    found: Retrieval, samples: Mapping[str, Tensor], before: Retrieval, samples_before: Mapping[str, Tensor]
) -> dict[str, dict[str, Interval]]:
    """What another encoder changed on the same pictures, with intervals of the difference itself.

    Both are drawn from the same pictures (`resample` with one seed), so what is hard for both cancels out: a difference
    may be certain where the two intervals overlap. 0 outside of the interval: the encoders differ.
    """
    return {
        direction: {
            name: interval(
                getattr(getattr(found, direction), name) - getattr(getattr(before, direction), name),
                samples[direction][:, column] - samples_before[direction][:, column],
            )
            for column, name in enumerate(SUMMARY)
        }
        for direction in DIRECTIONS
    }


# ---- text towers ----------------------------------------------------------------------------------------------------


def embed_captions(tower: TextTower, ids: Tensor, batch: int = 256) -> Generator[Event, None, Tensor]:
    """Projected features of captions. (N, L) -> (N, E) fp32 on the CPU"""
    features = torch.empty(len(ids), tower.text_projection.shape[1])
    for start in range(0, len(ids), batch):
        chunk = ids[start : start + batch]
        with torch.no_grad():
            features[start : start + batch] = tower.encode_text(chunk).float().cpu()
        yield progress("embed captions", start + len(chunk), len(ids))
    return features


def text_features(tower: TextTower, ids: Tensor, batch: int = 256) -> Tensor:
    """`embed_captions`, without its events."""
    return finish(embed_captions(tower, ids, batch))


@dataclass(frozen=True)
class Seen:
    """A text tower before captioned pictures: its captions, and how they find their pictures."""

    features: Tensor  # (captions, E)
    places: Places
    samples: dict[str, Tensor]  # of the bootstrap, as `resample` gives them

    @cached_property
    def retrieval(self) -> Retrieval:
        return summarize(self.places)

    @property
    def recalls(self) -> Tensor:
        """`Retrieval.recall_at_1` of every resample; paired with those of another tower before the same pictures."""
        return sum(rows[:, SUMMARY.index("recall_at_1")] for rows in self.samples.values()) / 2


def see(
    tower: TextTower, ids: Tensor, images: Tensor, owners: Sequence[int], device: torch.device = CPU
) -> Generator[Event, None, Seen]:
    """Captions (N, L) against pictures' features (pictures, E); owners[j] is the picture of caption j."""
    features = yield from embed_captions(tower, ids)
    places = yield from rank_pairs(images, features, owners, device=device)
    return Seen(features, places, (yield from resample(places)))


def compare_states(
    tower: TextTower, other: TextTower, ids: Tensor, batch: int = 64
) -> Generator[Event, None, dict[str, Drift]]:
    """Drift of `tower` from `other` at every read point, over captions `ids` (N, L).

    Pass ids at the full context length: SDXL reads all 77 rows, also those behind end-of-text.
    """
    sums = {point: torch.zeros(3, dtype=torch.float64) for point in READ_POINTS}
    done = 0
    for chunk in ids.split(batch):
        with torch.no_grad():
            a, b = (one(chunk.to(one.positional_embedding.device)) for one in (tower, other))
            for point in READ_POINTS:
                sums[point] += sum_rows(getattr(a, point), getattr(b, point))
        done += len(chunk)
        yield progress("compare states", done, len(ids))
    return {point: as_drift(total) for point, total in sums.items()}


def as_drift(sums: Tensor) -> Drift:
    """Means of what `sum_rows` has summed."""
    cosine, norm, rows = sums.tolist()
    return Drift(cosine / rows, 1 - cosine / rows, norm / rows)


def sum_rows(states: Tensor, others: Tensor) -> Tensor:
    """Sums over rows: cosines, ratios of lengths, rows. (…, W), (…, W) -> (3,) fp64 on the CPU"""
    x, y = (one.cpu().double().flatten(0, -2) for one in (states, others))
    norms = x.norm(dim=-1) / y.norm(dim=-1)
    return torch.stack([F.cosine_similarity(x, y, dim=-1).sum(), norms.sum(), norms.new_tensor(len(x))])


def drift(tower: TextTower, other: TextTower, ids: Tensor, batch: int = 64) -> dict[str, Drift]:
    """`compare_states`, without its events."""
    return finish(compare_states(tower, other, ids, batch))


@torch.no_grad()
def rows(tower: TextTower, ids: Tensor, batch: int = 32) -> dict[str, Tensor]:
    """Every row that a diffusion model can read, by read point: (N, L) -> (N · L, D), or (N, D) where one is read."""
    device = tower.positional_embedding.device
    found: dict[str, list[Tensor]] = {point: [] for point in READ_POINTS}
    for chunk in ids.split(batch):
        points = tower(chunk.to(device))
        for name, states in found.items():
            states.append(getattr(points, name).flatten(0, -2).float().cpu())
    return {name: torch.cat(states) for name, states in found.items()}


def row_drift(states: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Drift]:
    """Drift at every read point between rows of two towers, as `drift` computes it from the towers."""
    return {point: as_drift(sum_rows(mine, others[point])) for point, mine in states.items()}


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
