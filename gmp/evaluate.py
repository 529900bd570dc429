"""One measurement of text encoders against captioned pictures: everything that is known of them, as one JSON document.

gmp/assets/measurement.schema.json says what a document holds, docs/measurements.md what the numbers mean. There is no
verdict in it: that rests on the original's weights and states too, and is `gmp.diagnose`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PureWindowsPath

import torch
from torch import Tensor

from .alignment import alignment, calibration, spread
from .clip import TextTower, VisionTower, load
from .data.captions import Index
from .data.classes import Classes
from .events import Event
from .features import embed_index
from .join import Joined, join, text_tower, unlike
from .layouts import Source, TowerFile
from .measure import (
    CHUNK,
    DIRECTIONS,
    DRIFT_CAPTIONS,
    Interval,
    Retrieval,
    changes,
    compare_states,
    embed_captions,
    rank_pairs,
    resample,
    summarize,
    with_intervals,
)
from .prompts import prompts as shipped_prompts
from .relations import relations as probe
from .structure import LEAST, Structure, compare_structure, prompt_vectors
from .tokenizer import Tokens
from .typographic import Attacked, attack, draw_attack, plan_captions, plan_classes
from .zero_shot import zero_shot

VERSION = 1
SCHEMA = Path(__file__).parent / "assets" / "measurement.schema.json"
# With 100 pictures, a share of one half has a 95 % interval 0.2 wide. Repairs that matter differ by less.
FEWEST_PICTURES = 100
WIDEST = 0.2

Document = dict[str, object]
Tokenize = Callable[[Sequence[str]], Tokens]


@dataclass(frozen=True)
class Held:
    """What every encoder is held against: pictures, embedded once, and texts."""

    index: Index  # the pictures that decode
    broken: dict[str, str]
    pictures: Tensor  # (I, E) features
    captions: Tokens
    chosen: Tensor  # (C, L) ids of some captions, spread over all pictures
    prompts: Tensor  # (P, L) ids
    attacked: Attacked | None


@dataclass(frozen=True)
class Measured:
    """One encoder's captions and how they find their pictures."""

    texts: Tensor  # (T, E) features
    retrieval: Retrieval
    samples: dict[str, Tensor]  # of the bootstrap


# ---- documents ------------------------------------------------------------------------------------------------------


def document(
    kind: str, encoder: Source | None, original: Source | None, vision: Source | None, **sections: object
) -> Document:
    """A measurement document of a kind: the head, and the sections that are not None, with numbers JSON has."""
    head = {"version": VERSION, "kind": kind}
    head |= {"encoder": named(encoder), "original": named(original), "vision": named(vision)}
    return head | finite({name: section for name, section in sections.items() if section is not None})


def named(source: Source | None) -> dict[str, object] | None:
    """What a document says of a file: its name without folders, and the hash of its weights."""
    if source is None:
        return None
    return {"path": PureWindowsPath(source.path).name, "sha256": source.sha256, "member": source.member}


def finite(value: object) -> object:
    """The same lists and dicts with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_finite(value: object) -> bool:
    """Whether no number in lists and dicts is NaN or infinity."""
    if isinstance(value, Mapping):
        return all(map(is_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


# ---- measuring ------------------------------------------------------------------------------------------------------


def evaluate(
    encoders: Mapping[str, TowerFile],
    vision: TowerFile,
    original: TowerFile | None,
    index: Index,
    tokenize: Tokenize,
    *,
    cache: Path,
    device: torch.device,
    prompts: Sequence[str] | None = None,
    classes: Classes | None = None,
    templates: Sequence[str] | None = None,
    typographic: bool = False,
    relations: bool = False,
) -> Generator[Event, None, dict[str, Document]]:
    """Text encoders (one; or broken, repaired and original) against the same pictures, which are embedded once.

    Name of `encoders` -> document of kind "measurement". The first one is what the others are compared with (`change`).

    original: lends what files lack, and is what drift and structure are held against; None leaves these out. index:
    captioned pictures. tokenize: for all encoders. prompts: texts that structure is measured on, None takes the shipped
    ones. classes, templates: zero-shot classification of a folder of classes. typographic: words written on pictures of
    the classes, or else of the index. relations: captions against false ones of the same words. Yields progress events.
    Raises InputError where towers do not belong together, and where no picture can be read.
    """
    joined = {name: join(text, vision, original) for name, text in encoders.items()}
    first = next(iter(joined.values()))
    visual = first.build().visual.requires_grad_(False).to(device)
    held = yield from _hold(visual, index, tokenize, cache, prompts, classes if typographic else None, typographic)
    reference = None if original is None else text_tower(original, first).to(device)
    theirs = None if reference is None else (yield from _vectors(reference, held))
    documents: dict[str, Document] = {}
    before: Measured | None = None
    for name, text in encoders.items():
        tower = _text_tower(joined[name]).to(device)
        difference = original and unlike(text, original)
        found = yield from _retrieval(tower, held, device)
        sections = {"data": _data(held)} | _aligned(found, held, joined[name].state["logit_scale"].item())
        if before is not None:
            change = changes(found.retrieval, found.samples, before.retrieval, before.samples)
            sections["change"] = {"from": named(next(iter(encoders.values())).source)} | _intervals(change)
        before = before or found
        if classes is not None:
            told = yield from zero_shot(tower, visual, tokenize, classes, cache, templates=templates)
            sections["zero_shot"] = told.as_json()
        if held.attacked is not None:
            read = yield from attack(tower, tokenize, held.attacked, templates=templates)
            sections["typographic"] = read.as_json()
        if relations:
            told = yield from probe(tower, tokenize, held.index, held.pictures)
            sections["relations"] = told.as_json()
        mine = yield from _vectors(tower, held)
        sections |= _structures(mine, None if difference else theirs)
        if reference is not None and not difference:
            drift = yield from compare_states(tower, reference, held.chosen)
            sections["drift"] = {point: asdict(one) for point, one in drift.items()}
        warnings = [*joined[name].assumptions, *_lacking(original, difference), *_doubts(held, found, sections)]
        source = original and original.source
        documents[name] = document("measurement", text.source, source, vision.source, **sections, warnings=warnings)
    return documents


def _hold(
    visual: VisionTower,
    index: Index,
    tokenize: Tokenize,
    cache: Path,
    prompts: Sequence[str] | None,
    classes: Classes | None,
    typographic: bool,
) -> Generator[Event, None, Held]:
    index, pictures, broken = yield from embed_index(visual, index, cache)
    attacked = None
    if typographic:
        plan = plan_captions(index) if classes is None else plan_classes(classes)
        attacked = yield from draw_attack(visual, plan, cache)
    texts = [prompt.text for prompt in shipped_prompts()] if prompts is None else prompts
    captions = [index.pictures[i].captions[0] for i in spread(len(index), DRIFT_CAPTIONS).tolist()]
    return Held(
        index=index,
        broken=broken,
        pictures=pictures,
        captions=tokenize(index.captions()),
        chosen=tokenize(list(dict.fromkeys(captions))).ids,
        prompts=tokenize(texts).ids,
        attacked=attacked,
    )


def _text_tower(joined: Joined) -> TextTower:
    """The joined CLIP without its pictures' half."""
    state = {n: t for n, t in joined.state.items() if not n.startswith("visual.") and n != "logit_scale"}
    return load(TextTower, joined.config.text, state).requires_grad_(False)


def _retrieval(tower: TextTower, held: Held, device: torch.device) -> Generator[Event, None, Measured]:
    texts = yield from embed_captions(tower, held.captions.ids)
    places = yield from rank_pairs(held.pictures, texts, held.index.owners(), device=device)
    samples = yield from resample(places)
    return Measured(texts, summarize(places), samples)


def _data(held: Held) -> dict[str, object]:
    captions = sum(held.index.caption_counts)
    return {
        "images": len(held.index),
        "captions": captions,
        "captions_cut": held.captions.truncated,
        "broken": held.broken,
    }


def _aligned(found: Measured, held: Held, logit_scale: float) -> dict[str, object]:
    """Retrieval, alignment and calibration."""
    counts, one = held.index.caption_counts, found.retrieval
    sections: dict[str, object] = {
        "retrieval": _intervals(with_intervals(one, found.samples)) | {"images": one.images, "captions": one.captions},
        "alignment": asdict(alignment(held.pictures, found.texts, counts)),
    }
    for direction in DIRECTIONS:
        sections["retrieval"][direction]["queries"] = getattr(one, direction).queries
    if one.images > 1:
        values = asdict(calibration(held.pictures, found.texts, counts, logit_scale))
        for direction in DIRECTIONS:
            values[direction]["bins"] = finite(values[direction]["bins"])  # empty ones have no accuracy
        sections["calibration"] = values
    return sections


def _intervals(found: Mapping[str, Mapping[str, Interval]]) -> dict[str, dict[str, object]]:
    return {direction: {name: asdict(one) for name, one in values.items()} for direction, values in found.items()}


def _vectors(tower: TextTower, held: Held) -> Generator[Event, None, dict[str, dict[str, Tensor]]]:
    """Section -> read point -> (N, D), of the prompts and of the captions, where there are enough of them."""
    found = {}
    for done, (section, ids) in enumerate({"structure": held.prompts, "structure_of_captions": held.chosen}.items()):
        if len(ids) >= LEAST:
            found[section] = prompt_vectors(tower, ids)
        yield {"type": "progress", "stage": "embed prompts", "done": done + 1, "total": 2}
    return found


def _structures(
    mine: Mapping[str, Mapping[str, Tensor]], theirs: Mapping[str, Mapping[str, Tensor]] | None
) -> dict[str, object]:
    """Section -> read point -> structure; without an original, there is nothing to agree with."""
    alone = {"cka": None, "rank_correlation": None} if theirs is None else {}
    return {
        section: {
            point: asdict(_structure(one, (theirs or mine)[section][point])) | alone for point, one in vectors.items()
        }
        for section, vectors in mine.items()
    }


def _structure(vectors: Tensor, others: Tensor) -> Structure:
    if not (vectors.isfinite().all() and others.isfinite().all()):
        return Structure(*[math.nan] * len(fields(Structure)))
    return compare_structure({"": vectors}, {"": others})[""]


# ---- warnings -------------------------------------------------------------------------------------------------------


def _lacking(original: TowerFile | None, difference: str | None) -> list[str]:
    if original is None:
        return ["There is no original text encoder, so drift and agreement of structure were not measured."]
    return [f"Drift and agreement of structure were not measured: {difference}."] if difference else []


def _doubts(held: Held, found: Measured, sections: Mapping[str, object]) -> list[str]:
    """Why a number may not be what it seems."""
    images, warnings = len(held.index), []
    if images < FEWEST_PICTURES:
        warnings.append(
            f"{images} pictures are too few to judge by: read the intervals, and measure on {FEWEST_PICTURES} or more."
        )
    for direction in DIRECTIONS:
        one = sections["retrieval"][direction]["recall_at_1"]
        if one["high"] - one["low"] > WIDEST:
            warnings.append(
                f"recall@1 {direction.replace('_', ' ')} is known to {one['low']:.2f} … {one['high']:.2f} only: two "
                "encoders in this range cannot be told apart by it; measure on more pictures."
            )
    owners = {}
    for picture in held.index.pictures:
        for caption in picture.captions:
            owners[caption] = owners.get(caption, 0) + 1
    if shared := sum(count for count in owners.values() if count > 1):
        warnings.append(
            f"{shared} of {found.retrieval.captions} captions stand at more than one picture, which no encoder can "
            "tell by them: recall cannot reach 1."
        )
    if held.captions.truncated:
        warnings.append(f"{held.captions.truncated} captions are longer than the context length and were cut.")
    for what, features in (("captions", found.texts), ("pictures", held.pictures)):
        if count := sum((~rows.isfinite().all(dim=-1)).sum().item() for rows in features.split(CHUNK)):
            warnings.append(f"{count} of {len(features)} {what} have features that are not finite; they count as lost.")
    if names := [name for name, section in sections.items() if not is_finite(section)]:
        warnings.append(f"Numbers that are not finite, or not defined here, stand as null: in {', '.join(names)}.")
    return warnings
