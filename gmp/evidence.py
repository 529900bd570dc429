"""What a repair has changed, gathered at its end while everything is in memory: before, after, and the original.

Every read point is looked at, since none speaks for another: retrieval sees only `projected`, and closeness to the
original says nothing of the diffusion model that was trained with the broken encoder. gmp/outcome.py puts it in words,
gmp/report makes a page of it. What is found is a measurement document of kind "evidence" (docs/measurements.md).
"""

from __future__ import annotations

import hashlib
import io
import math
import platform
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import READ_POINTS, __version__
from .bootstrap import Interval, interval, share_interval
from .clip import TextTower, VisionTower, end_of_text
from .config import Pictures
from .data.captions import Index
from .data.crops import Box
from .data.images import PLAIN, load_picture
from .errors import InputError
from .evaluate import Document, document, named
from .events import Event, mapped, progress
from .features import embed_now
from .files import write_bytes
from .layouts import Source
from .measure import (
    DRIFT_CAPTIONS,
    Drift,
    Retrieval,
    Seen,
    as_drift,
    retrieval_json,
    rows,
    see,
    sum_rows,
    with_intervals,
)
from .outcome import Outcome, judge
from .strength import DRIFT_PROMPTS
from .structure import Structure, compare_structure, prompt_vectors

EVIDENCE = "evidence.json"
THUMBNAILS = "evidence"  # a folder beside it
LONGEST = 160  # pixels of a thumbnail's longer side
SHOWN = 6  # captions of each kind whose pictures are shown
AT_ONCE = 64  # prompts between two events, of similar length


@dataclass(frozen=True)
class Encoder:
    """One text encoder, as far as it could be measured; by read point."""

    retrieval: Retrieval | None  # None without held-out pairs
    intervals: dict[str, dict[str, Interval]] | None  # of `retrieval`: direction -> name of SUMMARY
    recall: Interval | None  # recall@1, mean of both directions
    structure: dict[str, Structure]  # CKA and rank correlation NaN where there is no original
    to_original: dict[str, Drift] | None
    to_broken: dict[str, Drift]


@dataclass(frozen=True)
class Found:
    """A picture, and its thumbnail where it could be made."""

    picture: str  # path in the data set
    thumbnail: str | None


@dataclass(frozen=True)
class Changed:
    """A caption whose first picture became right or wrong."""

    caption: str
    became: str  # right, wrong
    before: Found
    after: Found


@dataclass(frozen=True)
class Changes:
    """Captions by what became of the picture that they find first; all of them are counted, some are shown."""

    became_right: int
    became_wrong: int
    stayed_right: int
    stayed_wrong: int
    shown: tuple[Changed, ...]


@dataclass(frozen=True)
class Evidence:
    """All that was found. `original` is missing in `encoders` where there is none to compare with."""

    encoders: dict[str, Encoder]
    gain: Interval | None  # of recall@1, repaired minus broken, over the same resamples of pictures
    changes: Changes | None
    target: tuple[str, ...]  # read points that the run was to restore
    prompts: int
    pictures: int
    captions: int
    drift_captions: int  # captions, or prompts without held-out pairs, that drift was measured on
    outcome: Outcome
    warnings: tuple[str, ...]


def gather(
    towers: Mapping[str, TextTower],
    prompts: Tensor,
    index: Index,
    ids: Tensor,
    images: Mapping[str, Tensor],
    *,
    target: Sequence[str],
    folder: Path,
) -> Generator[Event, None, Evidence]:
    """Measures `broken`, `repaired` and, where it is given, `original`; yields progress events.

    prompts (P, L), ids (captions, L): tokens at the full context length, ids those of `index`. images: by the towers'
    names, (pictures, E) each; where there are none, structure and drift only. folder: the run's, for thumbnails.
    """
    structure = yield from _structure(towers, prompts)
    few = ids[:DRIFT_CAPTIONS] if len(index) else prompts[:: max(1, len(prompts) // DRIFT_PROMPTS)]
    drifts = yield from _drifts(towers, few)
    seen: dict[str, Seen] = {}
    for name in towers if len(index) else ():
        work = see(towers[name], ids, images[name], index.owners())
        what = f"evidence: {name} encoder, "
        seen[name] = yield from mapped(work, lambda event, what=what: event | {"stage": f"{what}{event['stage']}"})
    changes = None
    if seen:
        changes = yield from _changes(seen, index, images, folder)
    encoders = {
        name: Encoder(
            seen[name].retrieval if seen else None,
            with_intervals(seen[name].retrieval, seen[name].samples) if seen else None,
            _recall(seen[name]) if seen else None,
            structure[name],
            {point: drifts[name, "original"][point] for point in READ_POINTS} if "original" in towers else None,
            drifts[name, "broken"],
        )
        for name in towers
    }
    gain = _gain(seen["broken"], seen["repaired"]) if seen else None
    counts = {"pictures": len(index), "captions": len(ids) if len(index) else 0}
    outcome = judge(encoders, gain, target, counts["pictures"])
    warnings = (*outcome.warnings, *_not_finite(encoders))
    return Evidence(
        encoders, gain, changes, tuple(target), len(prompts), **counts, drift_captions=len(few), outcome=outcome,
        warnings=warnings,
    )  # fmt: skip


def as_json(
    evidence: Evidence, sources: Mapping[str, Source | None], run: Mapping[str, object], device: torch.device
) -> Document:
    """The measurement document.

    sources: of `broken`, `repaired`, `original`, `vision`. run: `step`, `steps`, `early`, `train`.
    """
    section = {
        "run": dict(run),
        "versions": versions(device),
        "broken": named(sources["broken"]),
        "target": list(evidence.target),
        "counts": {name: getattr(evidence, name) for name in ("prompts", "pictures", "captions", "drift_captions")},
        "encoders": {
            name: _encoder_json(one, comparable="original" in evidence.encoders)
            for name, one in evidence.encoders.items()
        },
        "gain": evidence.gain and asdict(evidence.gain),
        "changes": evidence.changes and asdict(evidence.changes),
        "outcome": {name: value for name, value in asdict(evidence.outcome).items() if name != "warnings"},
    }
    heads = sources["repaired"], sources["original"], sources["vision"]
    return document("evidence", *heads, evidence=section, warnings=list(evidence.warnings))


def versions(device: torch.device) -> dict[str, str]:
    """What computed: this program, torch, Python, and the device by its name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "gmp": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "device": f"{device.type}: {name}",
    }


def _encoder_json(one: Encoder, comparable: bool) -> dict[str, object]:
    return {
        "retrieval": one.retrieval and retrieval_json(one.retrieval, one.intervals),
        "recall": one.recall and asdict(one.recall),
        "structure": {point: asdict(value) for point, value in one.structure.items()},
        "to_original": {p: asdict(value) for p, value in one.to_original.items()} if comparable else None,
        "to_broken": {point: asdict(value) for point, value in one.to_broken.items()},
    }


def _progress(stage: str, done: int, total: int) -> Event:
    return progress(f"evidence: {stage}", done, total)


# ---- read points ----------------------------------------------------------------------------------------------------


def _structure(
    towers: Mapping[str, TextTower], prompts: Tensor
) -> Generator[Event, None, dict[str, dict[str, Structure]]]:
    """How every tower arranges the prompts, against the original's arrangement."""
    vectors, done = {}, 0
    order = end_of_text(prompts, towers["broken"].text_config.end_of_text).argsort()
    for name, tower in towers.items():
        parts = []
        for chunk in order.split(AT_ONCE):
            parts.append(prompt_vectors(tower, prompts[chunk]))
            done += len(chunk)
            yield _progress("prompts", done, len(towers) * len(prompts))
        back = order.argsort()
        vectors[name] = {point: torch.cat([part[point] for part in parts])[back] for point in READ_POINTS}
    found = {}
    for name, mine in vectors.items():
        found[name] = _compared(mine, vectors.get("original"))
        yield _progress("structure", len(found), len(towers))
    return found


def _compared(mine: Mapping[str, Tensor], original: Mapping[str, Tensor] | None) -> dict[str, Structure]:
    """Of prompts' vectors by read point; without an original, agreement with it is NaN."""
    found = compare_structure(mine, original or mine)
    if original is not None:
        return found
    return {point: replace(one, cka=math.nan, rank_correlation=math.nan) for point, one in found.items()}


def _drifts(
    towers: Mapping[str, TextTower], ids: Tensor, batch: int = 32
) -> Generator[Event, None, dict[tuple[str, str], dict[str, Drift]]]:
    """Drift as `measure.drift` has it, of every tower from the broken one and from the original; each runs once."""
    others = [name for name in ("broken", "original") if name in towers]
    sums: dict[tuple[str, str], dict[str, Tensor]] = {
        (name, other): {point: torch.zeros(3, dtype=torch.float64) for point in READ_POINTS}
        for name in towers
        for other in others
    }
    done = 0
    for chunk in ids.split(batch):
        states = {name: rows(tower, chunk, batch) for name, tower in towers.items()}
        for (name, other), by_point in sums.items():
            for point, total in by_point.items():
                total += sum_rows(states[name][point], states[other][point])
        done += len(chunk)
        yield _progress("read points", done, len(ids))
    return {pair: {point: as_drift(total) for point, total in by_point.items()} for pair, by_point in sums.items()}


# ---- pictures -------------------------------------------------------------------------------------------------------


def embed(
    vision: VisionTower,
    index: Index,
    stage: str,
    pictures: Pictures = PLAIN,
    boxes: Sequence[Box | None] | None = None,
) -> Generator[Event, None, Tensor]:
    """Features of an index's pictures as a vision tower sees them now: (pictures, E) fp32 on the CPU"""
    return (yield from embed_now(vision, index.paths, f"evidence: {stage}", pictures=pictures, boxes=boxes))


def _recall(seen: Seen) -> Interval:
    return share_interval(seen.retrieval.recall_at_1, seen.recalls, seen.retrieval.images)


def _gain(before: Seen, after: Seen) -> Interval:
    """Both were resampled alike, so that what a picture does to both does not count as chance."""
    return interval(after.retrieval.recall_at_1 - before.retrieval.recall_at_1, after.recalls - before.recalls)


def _changes(
    seen: Mapping[str, Seen], index: Index, images: Mapping[str, Tensor], folder: Path
) -> Generator[Event, None, Changes]:
    """Counts all captions, and shows some of those that changed: evenly spread, not chosen."""
    before, after = (seen[name].places.text_to_image == 0 for name in ("broken", "repaired"))
    kinds = {"right": ~before & after, "wrong": before & ~after}
    owners, captions = index.owners(), index.captions()
    picked = [(kind, place) for kind, those in kinds.items() for place in _spread(those, owners)]
    shown = []
    for kind, place in picked:
        found = {}
        for name in ("broken", "repaired"):
            picture = _first(seen[name], images[name], place, owners[place])
            path = index.pictures[picture].path
            found[name] = Found(path, thumbnail(index.root / path, folder / THUMBNAILS))
        shown.append(Changed(captions[place], kind, found["broken"], found["repaired"]))
        yield _progress("pictures that changed", len(shown), len(picked))
    return Changes(
        kinds["right"].sum().item(),
        kinds["wrong"].sum().item(),
        (before & after).sum().item(),
        (~before & ~after).sum().item(),
        tuple(shown),
    )


def _spread(those: Tensor, owners: Sequence[int]) -> list[int]:
    """At most SHOWN of the captions that are marked, evenly spread, each of another picture."""
    first = {owners[place]: place for place in reversed(those.nonzero()[:, 0].tolist())}
    places = sorted(first.values())
    return [places[i * len(places) // SHOWN] for i in range(SHOWN)] if len(places) > SHOWN else places


def _first(seen: Seen, images: Tensor, place: int, owner: int) -> int:
    """The picture that a caption finds first, ties broken as in `rank_pairs`."""
    if seen.places.text_to_image[place] == 0:
        return owner
    scores = F.normalize(images.double(), dim=-1) @ F.normalize(seen.features[place].double(), dim=-1)
    scores[owner] = -math.inf  # another one is ahead of it
    return scores.nan_to_num(nan=-2.0).argmax().item()


def thumbnail(picture: Path, folder: Path) -> str | None:
    """Writes a small JPEG of a picture, named by its content; its name, None where the picture cannot be read."""
    from PIL import Image

    try:
        image = load_picture(picture)
    except InputError:
        return None
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.BICUBIC)
    content = io.BytesIO()
    image.save(content, format="JPEG", quality=85)
    name = hashlib.sha256(content.getvalue()).hexdigest()[:16] + ".jpg"
    folder.mkdir(exist_ok=True)
    write_bytes(content.getvalue(), folder / name)
    return name


def _not_finite(encoders: Mapping[str, Encoder]) -> list[str]:
    """A warning for every encoder of which something is not a number."""
    found = []
    for name, one in encoders.items():
        cosines = [each.cosine for drifts in (one.to_original, one.to_broken) for each in (drifts or {}).values()]
        if not all(map(math.isfinite, (*cosines, *(each.told_apart for each in one.structure.values())))):
            found.append(f"States of the {name} encoder are not all finite: what depends on them is left open.")
    return found
