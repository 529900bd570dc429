"""One measurement of text encoders against pictures, captioned or sorted into classes, as one JSON document each.

gmp/assets/measurement.schema.json says what a document holds, docs/measurements.md what the numbers mean. There is no
verdict in it: that rests on the original's weights and states too, and is `gmp.diagnose`'s.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PureWindowsPath

import torch
from torch import Tensor

from .alignment import alignment, calibration, spread
from .clip import TextTower, VisionTower
from .data.captions import Index
from .data.classes import Classes
from .errors import InputError
from .events import Event, progress
from .features import embed_index, index_keys
from .join import join, text_tower, unlike
from .layouts import Source, TowerFile
from .measure import (
    CHUNK,
    DIRECTIONS,
    DRIFT_CAPTIONS,
    Seen,
    changes,
    compare_states,
    intervals_json,
    retrieval_json,
    see,
    with_intervals,
)
from .prompts import prompts as shipped_prompts
from .relations import relations as probe
from .structure import LEAST, compare_structure, prompt_vectors
from .tokenizer import Tokenize, Tokens
from .typographic import Attacked, attack, draw_attack, plan_captions, plan_classes
from .unseen import unseen
from .zero_shot import ZeroShot, gain, zero_shot

VERSION = 1
SCHEMA = Path(__file__).parent / "assets" / "measurement.schema.json"
# With 100 pictures, a share of one half has a 95 % interval 0.2 wide. Repairs that matter differ by less.
FEWEST_PICTURES = 100
WIDEST = 0.2

Document = dict[str, object]


@dataclass(frozen=True)
class Evaluation:
    """What is known of one text encoder. The document holds the most frequent confusions of classes, zero_shot all."""

    document: Document
    zero_shot: ZeroShot | None  # None without classes


@dataclass(frozen=True)
class Captioned:
    """Captioned pictures, embedded once."""

    index: Index  # the pictures that decode
    broken: dict[str, str]
    pictures: Tensor  # (I, E) features
    captions: Tokens
    chosen: Tensor  # (C, L) ids of some captions, spread over all pictures


@dataclass(frozen=True)
class Held:
    """What every encoder is held against."""

    captioned: Captioned | None
    prompts: Tensor  # (P, L) ids
    attacked: Attacked | None


@dataclass(frozen=True)
class Measured:
    """What the encoders after the first one are compared with."""

    source: Source
    found: Seen | None
    told: ZeroShot | None


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
    index: Index | None,
    tokenize: Tokenize,
    *,
    cache: Path,
    device: torch.device,
    prompts: Sequence[str] | None = None,
    classes: Classes | None = None,
    templates: Sequence[str] | None = None,
    typographic: bool = False,
    relations: bool = False,
) -> Generator[Event, None, dict[str, Evaluation]]:
    """Text encoders (one; or broken, repaired and original) against the same pictures, which are embedded once.

    Name of `encoders` -> document of kind "measurement", and all of its zero-shot classification. The first one is what
    the others are compared with (`change`).

    original: lends what files lack, and is what drift and structure are held against; None leaves these out. index:
    captioned pictures, of which those that an encoder was trained on are left out (gmp/unseen.py); None leaves out
    retrieval, alignment, calibration and drift, and classes are needed. tokenize: for all encoders. prompts: texts that
    structure is measured on, None takes the shipped ones. classes, templates: zero-shot classification of pictures
    sorted into classes. typographic: words written on pictures of the classes, or else of the index. relations:
    captions against false ones of the same words. Yields progress events. Raises InputError where there is nothing to
    measure on, where towers do not belong together, and where no picture can be read.
    """
    _check(index, classes, relations)
    joined = {name: join(text, vision, original) for name, text in encoders.items()}
    first = next(iter(joined.values()))
    visual = first.build_vision().to(device)
    seen, keys = [], None
    if index is not None:
        keys = yield from index_keys(index, cache)
        index, seen = unseen(index, keys, list(encoders.values()))
    held = yield from _hold(
        visual, index, keys, tokenize, cache, prompts, classes if typographic else None, typographic
    )
    captioned = held.captioned
    alike = original is not None and not all(unlike(text, original) for text in encoders.values())
    reference = text_tower(original, first).to(device) if alike else None
    theirs = None if reference is None else (yield from _vectors(reference, held))
    evaluations: dict[str, Evaluation] = {}
    before: Measured | None = None
    for name, text in encoders.items():
        tower = joined[name].build_text().to(device)
        difference = original and unlike(text, original)
        sections: dict[str, object] = {}
        found = told = None
        if captioned is not None:
            ids, owners = captioned.captions.ids, captioned.index.owners()
            found = yield from see(tower, ids, captioned.pictures, owners, device)
            scale = joined[name].state["logit_scale"].item()
            sections |= {"data": _data(captioned)} | _aligned(found, captioned, scale)
        if classes is not None:
            told = yield from zero_shot(tower, visual, tokenize, classes, cache, templates=templates)
            sections["zero_shot"] = told.as_json()
        if before is not None:
            sections["change"] = _change(found, told, before)
        before = before or Measured(text.source, found, told)
        if held.attacked is not None:
            read = yield from attack(tower, tokenize, held.attacked, templates=templates)
            sections["typographic"] = read.as_json()
        if relations:
            related = yield from probe(tower, tokenize, captioned.index, captioned.pictures)
            sections["relations"] = related.as_json()
        mine = yield from _vectors(tower, held)
        sections |= _structures(mine, None if difference else theirs)
        if captioned is not None and reference is not None and not difference:
            drift = yield from compare_states(tower, reference, captioned.chosen)
            sections["drift"] = {point: asdict(one) for point, one in drift.items()}
        warnings = [
            *joined[name].assumptions,
            *seen,
            *_lacking(original, difference),
            *_doubts(captioned, found, told, sections),
        ]
        source = original and original.source
        made = document("measurement", text.source, source, vision.source, **sections, warnings=warnings)
        evaluations[name] = Evaluation(made, told)
    return evaluations


def _check(index: Index | None, classes: Classes | None, relations: bool) -> None:
    if index is None and classes is None:
        raise InputError(
            "There are no pictures to measure on: give captioned pictures, pictures sorted into classes, or both."
        )
    if index is None and relations:
        raise InputError("Relations are measured on captions, and there are none: give captioned pictures, too.")


def _hold(
    visual: VisionTower,
    index: Index | None,
    keys: Mapping[str, str] | None,
    tokenize: Tokenize,
    cache: Path,
    prompts: Sequence[str] | None,
    classes: Classes | None,
    typographic: bool,
) -> Generator[Event, None, Held]:
    captioned = attacked = None
    if index is not None:
        captioned = yield from _embed(visual, index, keys, tokenize, cache)
    if typographic:
        plan = plan_captions(captioned.index) if classes is None else plan_classes(classes)
        attacked = yield from draw_attack(visual, plan, cache)
    texts = [prompt.text for prompt in shipped_prompts()] if prompts is None else prompts
    return Held(captioned, tokenize(texts).ids, attacked)


def _embed(
    visual: VisionTower, index: Index, keys: Mapping[str, str] | None, tokenize: Tokenize, cache: Path
) -> Generator[Event, None, Captioned]:
    index, pictures, broken = yield from embed_index(visual, index, cache, keys)
    captions = [index.pictures[i].captions[0] for i in spread(len(index), DRIFT_CAPTIONS).tolist()]
    chosen = tokenize(list(dict.fromkeys(captions))).ids
    return Captioned(index, broken, pictures[:], tokenize(index.captions()), chosen)


def _data(captioned: Captioned) -> dict[str, object]:
    captions = sum(captioned.index.caption_counts)
    return {
        "images": len(captioned.index),
        "captions": captions,
        "captions_cut": captioned.captions.truncated,
        "broken": captioned.broken,
    }


def _aligned(found: Seen, captioned: Captioned, logit_scale: float) -> dict[str, object]:
    """Retrieval, alignment and calibration."""
    counts, one = captioned.index.caption_counts, found.retrieval
    sections: dict[str, object] = {
        "retrieval": retrieval_json(one, with_intervals(one, found.samples)),
        "alignment": asdict(alignment(captioned.pictures, found.features, counts)),
    }
    if one.images > 1:
        values = asdict(calibration(captioned.pictures, found.features, counts, logit_scale))
        for direction in DIRECTIONS:
            values[direction]["bins"] = finite(values[direction]["bins"])  # empty ones have no accuracy
        sections["calibration"] = values
    return sections


def _change(found: Seen | None, told: ZeroShot | None, before: Measured) -> dict[str, object]:
    """What differs from the first encoder, on the same pictures."""
    section: dict[str, object] = {"from": named(before.source)}
    if found is not None:
        section |= intervals_json(changes(found.retrieval, found.samples, before.found.retrieval, before.found.samples))
    if told is not None:
        section["zero_shot"] = {"top_1": asdict(gain(told, before.told))}
    return section


def _vectors(tower: TextTower, held: Held) -> Generator[Event, None, dict[str, dict[str, Tensor]]]:
    """Section -> read point -> (N, D), of the prompts and of the captions, where there are enough of them."""
    texts = {"structure": held.prompts}
    if held.captioned is not None:
        texts["structure_of_captions"] = held.captioned.chosen
    found = {}
    for done, (section, ids) in enumerate(texts.items()):
        if len(ids) >= LEAST:
            found[section] = prompt_vectors(tower, ids)
        yield progress("embed prompts", done + 1, len(texts))
    return found


def _structures(
    mine: Mapping[str, Mapping[str, Tensor]], theirs: Mapping[str, Mapping[str, Tensor]] | None
) -> dict[str, object]:
    """Section -> read point -> structure; without an original, there is nothing to agree with."""
    alone = {"cka": None, "rank_correlation": None} if theirs is None else {}
    return {
        section: {
            point: asdict(one) | alone for point, one in compare_structure(vectors, (theirs or mine)[section]).items()
        }
        for section, vectors in mine.items()
    }


# ---- warnings -------------------------------------------------------------------------------------------------------


def _lacking(original: TowerFile | None, difference: str | None) -> list[str]:
    if original is None:
        return ["There is no original text encoder, so drift and agreement of structure were not measured."]
    return [f"Drift and agreement of structure were not measured: {difference}."] if difference else []


def _doubts(
    captioned: Captioned | None, found: Seen | None, told: ZeroShot | None, sections: Mapping[str, object]
) -> list[str]:
    """Why a number may not be what it seems."""
    if captioned is None:
        warnings = ["There are no captions, so retrieval, alignment, calibration and drift were not measured."]
    else:
        warnings = _doubts_of_captions(captioned, found, sections["retrieval"])
    if told is not None and told.pictures < FEWEST_PICTURES:
        warnings.append(
            f"{told.pictures} pictures of classes are too few to judge by: read the intervals, and measure on "
            f"{FEWEST_PICTURES} or more."
        )
    if told is not None and told.loose:
        warnings.append(f"{len(told.loose)} pictures lie beside the folders of classes and were not counted.")
    if names := [name for name, section in sections.items() if not is_finite(section)]:
        warnings.append(f"Numbers that are not finite, or not defined here, stand as null: in {', '.join(names)}.")
    return warnings


def _doubts_of_captions(captioned: Captioned, found: Seen, section: Mapping[str, object]) -> list[str]:
    images, warnings = len(captioned.index), []
    if images < FEWEST_PICTURES:
        warnings.append(
            f"{images} pictures are too few to judge by: read the intervals, and measure on {FEWEST_PICTURES} or more."
        )
    for direction in DIRECTIONS:
        one = section[direction]["recall_at_1"]
        if one["high"] - one["low"] > WIDEST:
            warnings.append(
                f"recall@1 {direction.replace('_', ' ')} is known to {one['low']:.2f} … {one['high']:.2f} only: two "
                "encoders in this range cannot be told apart by it; measure on more pictures."
            )
    owners = {}
    for picture in captioned.index.pictures:
        for caption in picture.captions:
            owners[caption] = owners.get(caption, 0) + 1
    if shared := sum(count for count in owners.values() if count > 1):
        warnings.append(
            f"{shared} of {found.retrieval.captions} captions stand at more than one picture, which no encoder can "
            "tell by them: recall cannot reach 1."
        )
    if captioned.captions.truncated:
        warnings.append(f"{captioned.captions.truncated} captions are longer than the context length and were cut.")
    for what, features in (("captions", found.features), ("pictures", captioned.pictures)):
        if count := sum((~rows.isfinite().all(dim=-1)).sum().item() for rows in features.split(CHUNK)):
            warnings.append(f"{count} of {len(features)} {what} have features that are not finite; they count as lost.")
    return warnings
