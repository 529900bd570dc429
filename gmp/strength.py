"""How much of a repair to take: broken to repaired and a little past it, measured at every strength.

Three things are watched, since none stands for the others: recall, which sees only `projected`; the arrangement of
prompts at the read points (gmp/structure.py), which is what a diffusion model can tell apart; and drift, from the
original and from the broken encoder, whose states the paired diffusion model was trained with. The strength that is
suggested is the smallest that has nearly all of the gain in recall and in structure, never in one of them alone.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PureWindowsPath

import torch
from torch import Tensor

from .blend import ALONG, STRONGEST, blend
from .bootstrap import Interval, interval
from .clip import TextTower
from .data.captions import Index, split
from .errors import InputError
from .evaluate import Document, document
from .events import Event, mapped, progress
from .features import embed_index, index_keys
from .join import Joined, join, text_tower, unlike
from .layouts import Source, TowerFile
from .layouts.canonical import text_part
from .measure import Drift, Seen, row_drift, rows, see
from .prompts import prompts
from .structure import Structure, compare_structure, prompt_vectors
from .tokenizer import Tokenize
from .unseen import unseen
from .verdict import target_of

POINTS = 13
ENOUGH = 0.95  # of the best gain
LEAST = 0.01  # recall, or agreement of structure, that counts as a gain or a loss
FEW = 50  # pictures below which no interval says how certain recall is: resampling equal hits gives equal hits
WIDE = 0.1  # of the interval of a gain in recall; a larger gain may have an interval as wide as itself
MOST = 1000  # pictures that recall is measured on
DRIFT_PROMPTS = 32  # at the full context length, of every kind


@dataclass(frozen=True)
class Point:
    """What was measured at one strength."""

    strength: float
    recall: Interval | None  # recall@1, mean of both directions; None without pictures
    recall_gain: Interval | None  # recall minus that of strength 0, resampled in pairs
    structure: dict[str, Structure]  # by read point, against the original
    from_original: dict[str, Drift]  # by read point
    from_broken: dict[str, Drift]


@dataclass(frozen=True)
class Suggestion:
    """A strength to take, None if the measurements do not allow one, and why."""

    strength: float | None
    reason: str  # a sentence


@dataclass(frozen=True)
class Curve:
    """The strengths along one way of blending."""

    along: str
    points: tuple[Point, ...]
    suggested: Suggestion


@dataclass(frozen=True)
class Scan:
    """A repair at growing strength, for one target."""

    target: str
    read_points: tuple[str, ...]  # that the target reads
    curves: tuple[Curve, ...]
    broken: Source
    repaired: Source
    original: Source
    vision: Source | None  # None without pictures
    pictures: int
    captions: int
    warnings: tuple[str, ...]

    @property
    def suggested(self) -> Suggestion:
        """That of the first way of blending, which is the one that was asked for first."""
        return self.curves[0].suggested

    def as_json(self) -> Document:
        """The measurement document of kind "scan"; `encoder` is the repaired one."""
        about = {"target": self.target, "read_points": self.read_points}
        none = [
            f"no strength is suggested along {c.along}: {c.suggested.reason}"
            for c in self.curves
            if c.suggested.strength is None
        ]
        name = PureWindowsPath(self.broken.path).name
        curve = {
            "broken": {"path": name, "sha256": self.broken.sha256, "member": self.broken.member},
            "pictures": self.pictures,
            "captions": self.captions,
            "ways": [
                {"along": c.along, "points": [asdict(p) for p in c.points], "suggested": asdict(c.suggested)}
                for c in self.curves
            ],
        }
        return document(
            "scan",
            self.repaired,
            self.original,
            self.vision,
            curve=about | curve,
            suggested=about | {"along": self.curves[0].along} | asdict(self.suggested),
            warnings=[*self.warnings, *none],
        )


def even(points: int) -> tuple[float, ...]:
    """Strengths in equal steps from 0 to `STRONGEST`, and 1, the repair itself. Raises InputError for fewer than 3."""
    if points < 3:
        raise InputError(f"{points} strengths make no curve; take at least 3, {POINTS} are usual")
    return tuple(sorted({round(STRONGEST * i / (points - 1), 4) for i in range(points)} | {1.0}))


# ---- the suggestion -------------------------------------------------------------------------------------------------


def knee(strengths: Sequence[float], curves: Mapping[str, Sequence[float]]) -> Suggestion:
    """The smallest strength from which nothing that is watched improves much any more.

    curves: by what it measures, values at the strengths, of which the first is 0; higher is better. A curve gains if
    its highest value is at least `LEAST` above its first one. Strengths at which any curve is `LEAST` below its first
    value are left out. Of the others it is the smallest that has `ENOUGH` of the best gain of every curve that gains;
    where none has, the smallest that has `ENOUGH` of the share that the best of them has of every gain. It is 0 where
    no curve gains, or whatever gains costs another one. No suggestion where a value is not a number.
    """
    if bad := [name for name, values in curves.items() if not all(map(math.isfinite, values))]:
        return Suggestion(None, f"{' and '.join(bad)} cannot be measured at every strength")
    gains = {name: [value - values[0] for value in values] for name, values in curves.items()}
    best = {name: max(values) for name, values in gains.items() if max(values) >= LEAST}
    every = " and ".join(curves)
    if not best:
        return Suggestion(0.0, f"no strength improves {every}")
    allowed = [i for i in range(len(strengths)) if all(values[i] > -LEAST for values in gains.values())]
    shares = {i: min(gains[name][i] / gain for name, gain in best.items()) for i in allowed}
    most = max(shares.values())
    worse = [name for name, values in gains.items() if min(values) <= -LEAST]
    if most <= 0:
        words = f"improves only where {' and '.join(worse)} gets worse" if worse else "never improve at one strength"
        return Suggestion(0.0, f"{' and '.join(best)} {words}")
    at = min(i for i, share in shares.items() if share >= ENOUGH * min(most, 1.0))
    words = f"the smallest strength with {ENOUGH:.0%} of the best gain in {' and '.join(best)}"
    if most < ENOUGH:
        loss = f" without a loss in {' and '.join(worse)}" if worse else ""
        words = (
            f"no strength has {ENOUGH:.0%} of the best gain in {' and '.join(best)}{loss}; this one has "
            f"{shares[at]:.0%} of each, and no other one notably more"
        )
    if still := [name for name in curves if name not in best]:
        words += f"; {' and '.join(still)} improves at none"
    return Suggestion(strengths[at], words)


def suggest(points: Sequence[Point], at: Sequence[str], pictures: int) -> Suggestion:
    """`knee` of recall, where there are pictures, and of structure at the read points.

    Structure is the lower one of CKA and rank correlation with the original. No suggestion where recall is too
    uncertain: below `FEW` pictures, or where the interval of its gain is at any strength wider than `WIDE` and than the
    best gain.
    """
    curves: dict[str, list[float]] = {}
    if points[0].recall is not None:
        curves["recall"] = [point.recall.value for point in points]
        best = max(point.recall_gain.value for point in points)
        width = max(point.recall_gain.high - point.recall_gain.low for point in points)
        if pictures < FEW or width > max(WIDE, best):
            found = f"its best gain is {best:.2f}, with a 95 % interval up to {width:.2f} wide"
            return Suggestion(None, f"{pictures} pictures are too few to measure recall ({found})")
    for name in at:
        curves[f"structure at {name}"] = [point.structure[name].agreement for point in points]
    return knee([point.strength for point in points], curves)


# ---- the measurement ------------------------------------------------------------------------------------------------


def scan(
    broken: TowerFile,
    repaired: TowerFile,
    original: TowerFile,
    vision: TowerFile,
    tokenize: Tokenize,
    index: Index | None = None,
    *,
    target: str = "sdxl",
    along: Sequence[str] = ("weights",),
    strengths: Sequence[float] = even(POINTS),
    texts: Sequence[str] | None = None,
    cache: Path,
    device: torch.device,
) -> Generator[Event, None, Scan]:
    """Measures every strength along every way of blending; yields progress events.

    index: captioned pictures for recall, at most `MOST` of them; where the file of one of the two encoders tells that
    it was trained on them, those that its run held out. strengths: rising from 0. texts: prompts whose structure is
    measured; None takes the shipped ones. Raises InputError for encoders that do not belong together and settings that
    cannot be.
    """
    at = target_of(target, repaired.source.member or broken.source.member).read_points
    _check(broken, repaired, original, strengths, along)
    parts = {name: join(file, vision, original) for name, file in (("broken", broken), ("repaired", repaired))}
    base, end = (text_part(joined.state) for joined in parts.values())
    blend(base, end, 0)  # refuses what does not belong together before pictures are embedded
    texts = [prompt.text for prompt in prompts()] if texts is None else list(texts)
    pairs, warnings = None, []
    if index is not None:
        pairs = yield from _pairs(index, broken, repaired, parts["broken"], tokenize, cache, device, warnings)
    tower = parts["broken"].build_text().to(device)
    step = progress("measure strengths", 0, 2 + len(along) * (len(strengths) - 1))
    yield step
    watched = _Watched(tokenize(texts).ids, text_tower(original, parts["broken"]).to(device))
    yield (step := step | {"done": 1})
    curves, first, start = [], None, None
    for way in along:
        points = []
        for strength in strengths:
            if strength == 0 and first is not None:
                points.append(first)
                continue
            tower.load_state_dict(blend(base, end, strength, way))
            seen = None
            if pairs is not None:  # its own bars, one per strength, would tell nothing
                seeing = see(tower, pairs.ids, pairs.features, pairs.owners)
                seen = yield from mapped(seeing, lambda event, step=step: step)
            start = start or seen
            points.append(watched.point(tower, strength, seen, start))
            first = first or points[0]
            yield (step := step | {"done": step["done"] + 1})
        curves.append(Curve(way, tuple(points), suggest(points, at, len(pairs.features) if pairs else 0)))
    counts = (len(pairs.features), len(pairs.ids)) if pairs else (0, 0)
    sources = broken.source, repaired.source, original.source, vision.source if pairs else None
    return Scan(target, at, tuple(curves), *sources, *counts, tuple(warnings))


def _check(
    broken: TowerFile, repaired: TowerFile, original: TowerFile, strengths: Sequence[float], along: Sequence[str]
) -> None:
    if difference := next((d for file in (broken, repaired) if (d := unlike(file, original))), None):
        raise InputError(f"structure and drift cannot be measured: {difference}; give the original of this encoder")
    rising = all(a < b for a, b in zip(strengths, strengths[1:], strict=False))
    if len(strengths) < 3 or strengths[0] != 0 or not rising or strengths[-1] > STRONGEST:
        raise InputError(f"strengths are {list(strengths)}; give at least 3, rising from 0 to {STRONGEST} at the most")
    if not along or len(set(along)) < len(along) or not set(along) <= set(ALONG):
        raise InputError(
            f"along is {', '.join(along) or 'empty'}; give one or several of {', '.join(ALONG)}, each once"
        )


@dataclass(frozen=True)
class _Pairs:
    """Captioned pictures: features (pictures, embed_dim), ids (captions, context), and each caption's picture."""

    features: Tensor
    ids: Tensor
    owners: list[int]


def _pairs(
    index: Index,
    start: TowerFile,
    repaired: TowerFile,
    joined: Joined,
    tokenize: Tokenize,
    cache: Path,
    device: torch.device,
    warnings: list[str],
) -> Generator[Event, None, _Pairs]:
    """The pictures that recall is measured on, embedded or taken from the cache."""
    keys = yield from index_keys(index, cache)
    if "gmp_run" not in repaired.source.metadata:
        warnings.append("recall may count pictures that the repair was trained on: its file tells of no run")
    index, left_out = unseen(index, keys, [start, repaired])
    warnings += left_out
    if len(index) > MOST:
        _, index = split(index, keys, MOST)
    index, features, broken = yield from embed_index(joined.build_vision().to(device), index, cache, keys)
    warnings += [f"left out: {name} ({reason})" for name, reason in broken.items()]
    return _Pairs(features[:], tokenize(index.captions()).ids, index.owners())


class _Watched:
    """The prompts, and what the original and the broken encoder make of them, computed once."""

    def __init__(self, ids: Tensor, original: TextTower):
        self.ids = ids
        self.few = ids[:: max(1, len(ids) // DRIFT_PROMPTS)]  # of every kind
        self.original = prompt_vectors(original, ids)
        self.rows = rows(original, self.few)
        self.broken: dict[str, Tensor] | None = None

    def point(self, tower: TextTower, strength: float, seen: Seen | None, start: Seen | None) -> Point:
        """What there is to know of a tower; the first one that is asked for is the broken one."""
        recall = gain = None
        if seen is not None:
            value, first = seen.retrieval.recall_at_1, start.retrieval.recall_at_1
            recall, gain = interval(value, seen.recalls), interval(value - first, seen.recalls - start.recalls)
        states = rows(tower, self.few)
        self.broken = self.broken or states
        return Point(
            strength,
            recall,
            gain,
            compare_structure(prompt_vectors(tower, self.ids), self.original),
            row_drift(states, self.rows),
            row_drift(states, self.broken),
        )
