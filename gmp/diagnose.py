"""Is this text encoder broken, where, and for whom? Told against the original, without any data set.

Weights say what was trained, states after every block say where it shows, and the arrangement of prompts at every read
point says what became of their meaning. Thresholds and words are in gmp/verdict.py.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .clip import TextTower, VisionTower, load
from .compare import check_alike, weight_drift
from .data.captions import Index
from .diagnosis import Diagnosis, Part
from .errors import InputError, some
from .events import Event
from .features import embed_index, index_keys
from .join import UNRELATED
from .layouts import TowerFile
from .layouts.canonical import STACK, block_name, vision_part
from .measure import CPU, embed_captions, rank_pairs, retrieval_json, see, summarize, with_intervals
from .prompts import prompts
from .states import Compared, compare_states
from .structure import Structure, compare_structure, effective_rank, mean_cosine, told_apart
from .tokenizer import VOCABULARY_SIZE, Tokenize, tokenizer_for
from .trained import Trained, what_was_trained
from .unseen import unseen
from .verdict import (
    DAMAGED_ANGLE,
    DAMAGED_LENGTH,
    DAMAGED_VECTORS,
    Reading,
    align,
    judge,
    read,
    target_of,
)

LARGEST = 65504.0  # of fp16, in which many hosts compute text encoders
_PARTS = {"token_embedding": "embeddings", "positional_embedding": "embeddings", "ln_final": "final LayerNorm"}

Structures = tuple[Structure | None, Structure]  # of the encoder, None where states are not finite; of the original


@dataclass(frozen=True)
class Pictures:
    """Captioned pictures and the vision tower that sees them."""

    vision: TowerFile
    index: Index
    cache: Path


def diagnose(
    encoder: TowerFile,
    original: TowerFile,
    *,
    target: str = "sdxl",
    tokenize: Tokenize | None = None,
    pictures: Pictures | None = None,
    device: torch.device = CPU,
) -> Generator[Event, None, Diagnosis]:
    """Holds a text encoder against the original it came from; yields progress events.

    target: whose eyes the verdict is for, one of `verdict.TARGETS`. tokenize: captions -> tokens, CLIP's where None.
    pictures: measures alignment too, on those that the encoder was not trained on. Raises InputError for towers of
    different shapes, an original that ends before its last block, and weights that are not finite.
    """
    reader = target_of(target, encoder.source.member)
    _check(encoder, original)
    encoder, warnings = _with_its_own(encoder, original)
    tokenize = tokenize or tokenizer_for(encoder.config.context_length, encoder.source.member)
    ids = _ids(encoder, tokenize)
    trained = what_was_trained(encoder.state, original.state)
    towers = [tower.to(device) for tower in _towers(encoder, original)]
    compared = yield from compare_states(*towers, ids)
    if not _has_projection(encoder, original):
        del compared["projection"]
    structures = {name: _structures(one) for name, one in compared.items()}
    parts = _parts(encoder, original, trained, compared, structures)
    readings = _readings(parts, compared, structures)
    recognised = _recognised(compared["projection"]) if "projected" in readings else None
    found, recalls, images = None, None, 0
    if pictures is not None:
        found, recalls, images, more = yield from _look(pictures, encoder, *towers, tokenize)
        warnings += more
    alignment, more = align(recognised, recalls, images)
    warnings += [*_overflows(compared), *_unseen(trained, compared), *more]
    verdict = judge(reader, readings, alignment, trained.pattern)
    vision = pictures.vision if pictures else None
    return Diagnosis(
        encoder, original, vision, target, trained, parts, readings, alignment, found, verdict, tuple(warnings)
    )


# ---- what can be compared -------------------------------------------------------------------------------------------


def _check(encoder: TowerFile, original: TowerFile) -> None:
    check_alike(original, [encoder])
    ends_early = f"{STACK['text']}.{original.config.layers}" in original.source.missing
    if ends_early or original.config.layers < encoder.config.layers:  # `penultimate` would be another place
        raise InputError(f"{original.source.path} ends before its last block; give the full original CLIP")
    for file in (encoder, original):
        if broken := [name for name, tensor in file.state.items() if not _is_finite(tensor)]:
            raise InputError(
                f"{file.source.path}: {len(broken)} tensors hold NaN or infinity: {some(broken)}; whatever is drawn "
                "with it is black or noise. No repair starts from that, get another copy of the file"
            )


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # NaN is passed on


def _ids(encoder: TowerFile, tokenize: Tokenize) -> Tensor:
    """The shipped prompts as tokens (N, L)."""
    ids = tokenize([prompt.text for prompt in prompts()]).ids
    if ids.max() >= encoder.config.vocab_size:
        raise InputError(
            f"{encoder.source.path} knows {encoder.config.vocab_size} tokens, CLIP's vocabulary has {VOCABULARY_SIZE}; "
            "give the text encoder of a CLIP"
        )
    return ids


def _has_projection(encoder: TowerFile, original: TowerFile) -> bool:
    return "text_projection" in original.state or "text_projection" in encoder.state


def _with_its_own(encoder: TowerFile, original: TowerFile) -> tuple[TowerFile, list[str]]:
    """The encoder without a projection that is not of this CLIP, and sentences on what limits the diagnosis."""
    found = []
    own, lent = (file.state.get("text_projection") for file in (encoder, original))
    if own is None and lent is None:
        found.append("Neither file has a text projection: nothing is told of `projected`, nor of alignment.")
    elif own is None:
        found.append("The encoder's file has no text projection; the original's is used for `projected`.")
    elif lent is not None and _foreign(own, lent):
        found.append("The encoder's text projection is not of this CLIP; the original's is used for `projected`.")
        encoder = replace(encoder, state={n: t for n, t in encoder.state.items() if n != "text_projection"})
    if encoder.config.layers < original.config.layers:
        found.append("The encoder's file ends before its last block; the original's is used.")
    dtypes = encoder.source.dtypes
    if 2 * sum(count for dtype, count in dtypes.items() if dtype.startswith("F8")) > sum(dtypes.values()):
        found.append("The encoder is stored in fp8, whose rounding alone moves weights and states by some hundredths.")
    if encoder.config.activation != original.config.activation and "activation" not in encoder.config.assumed:
        both = f"{encoder.config.activation} and {original.config.activation}"
        found.append(f"The two files name different activations, {both}: one of them is wrong, or was made so.")
    return encoder, found


def _foreign(projection: Tensor, original: Tensor) -> bool:
    """Whether it cannot be a fine-tune of the original's, as ComfyUI's CLIPSave writes some; as `join` judges."""
    if projection.shape != original.shape:
        return True
    return F.cosine_similarity(projection.flatten(), original.flatten(), dim=0).item() < UNRELATED


def _towers(encoder: TowerFile, original: TowerFile) -> list[TextTower]:
    """Both, frozen, on the files' memory; what the encoder's file lacks, or assumes of its shape, is the original's."""
    lent = dict(original.state)
    lent.setdefault("text_projection", encoder.state.get("text_projection", torch.eye(original.config.width)))
    own = {name: tensor for name, tensor in encoder.state.items() if name in lent}
    config = replace(original.config, embed_dim=lent["text_projection"].shape[1])
    known = {
        name: getattr(encoder.config, name)
        for name in ("heads", "activation", "end_of_text")
        if name not in encoder.config.assumed and getattr(encoder.config, name) is not None
    }
    towers = []
    for state, shape in ((lent | own, replace(config, **known)), (lent, config)):
        state = {name: tensor for name, tensor in state.items() if name != "logit_scale"}
        with torch.device("meta"):
            tower = TextTower(shape)
        tower.load_state_dict(state, assign=True)
        towers.append(tower.requires_grad_(False))
    return towers


# ---- parts and read points ------------------------------------------------------------------------------------------


def part_of(name: str) -> str:
    """The part that a canonical tensor of a text tower belongs to."""
    block = block_name(name)
    return f"block {block[1]}" if block else _PARTS.get(name.partition(".")[0], "projection")


def _parts(
    encoder: TowerFile,
    original: TowerFile,
    trained: Trained,
    compared: Mapping[str, Compared],
    structures: Mapping[str, Structures],
) -> tuple[Part, ...]:
    return tuple(
        _part(name, _tensors(encoder, name), _tensors(original, name), trained, one, structures[name])
        for name, one in compared.items()
        if name != "pooled"
    )


def _tensors(file: TowerFile, part: str) -> dict[str, Tensor]:
    return {name: t for name, t in file.state.items() if name != "logit_scale" and part_of(name) == part}


def _part(
    name: str, now: dict[str, Tensor], then: dict[str, Tensor], trained: Trained, one: Compared, structures: Structures
) -> Part:
    both = [each for each in then if each in now and now[each].shape == then[each].shape]
    moved = sum(each in trained.moved for each in both)
    matrices = [d for d in weight_drift(_some(now, both), _some(then, both)) if "layer_norm" not in d.role]
    r, angle = (max((getattr(d, what) for d in matrices), default=None) for what in ("r", "angle"))
    vectors = [each for each in both if then[each].dim() == 1]
    change, of_vectors = (_change(_some(now, names), _some(then, names)) for names in (both, vectors))
    structure, own = structures
    reading = read(moved == 0, one.cosine, one.error, structure, own)
    # positions are short rows that any training turns: what they do shows in the states
    rows = name != "embeddings" and ((angle or 0) > DAMAGED_ANGLE or (r or 0) > DAMAGED_LENGTH)
    other = rows or (of_vectors or 0) > DAMAGED_VECTORS
    state = "damaged" if moved and other else reading.state
    weights = (len(both), moved, change or 0.0, r, angle, of_vectors)
    return Part(name, state, *weights, one.error, one.cosine, structure, own)


def _some(state: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return {name: state[name] for name in names}


def _change(now: Mapping[str, Tensor], then: Mapping[str, Tensor]) -> float | None:
    """‖now - then‖ / ‖then‖ over all tensors; None without any."""
    if not then:
        return None
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    sums = [torch.stack([norm(now[name] - then[name]), norm(then[name])]) for name in then]
    change, length = torch.stack(sums).norm(dim=0).tolist()
    return change / length if length else (math.inf if change else 0.0)


def _structures(one: Compared) -> Structures:
    """Of the encoder against the original, None where states are not finite; and of the original."""
    mine, theirs = one.prompts()
    own = Structure(1.0, 1.0, mean_cosine(theirs), effective_rank(theirs), told_apart(theirs))
    return (compare_structure({"": mine}, {"": theirs})[""] if mine.isfinite().all() else None), own


def _readings(
    parts: Sequence[Part], compared: Mapping[str, Compared], structures: Mapping[str, Structures]
) -> dict[str, Reading]:
    """By read point, in the order of computation."""
    names = [part.name for part in parts]
    blocks = [name for name in names if name.startswith("block")]
    places = {
        "penultimate": blocks[-2] if len(blocks) > 1 else "embeddings",
        "last": "final LayerNorm",
        "pooled": "pooled",
        "projected": "projection",
    }
    found = {}
    for point, place in places.items():
        if place in compared:
            before = names[: 1 + names.index("final LayerNorm" if place == "pooled" else place)]
            untouched = not any(part.moved for part in parts if part.name in before)
            one = compared[place]
            found[point] = read(untouched, one.cosine, one.error, *structures[place])
    return found


def _recognised(one: Compared) -> float | None:
    """Share of prompts whose vector is nearest, by cosine, to the original's of the same prompt."""
    mine, theirs = (F.normalize(side.double(), dim=1) for side in one.prompts())
    if not mine.isfinite().all():
        return 0.0
    return ((mine @ theirs.T).argmax(dim=1) == torch.arange(len(mine))).double().mean().item()


def _overflows(compared: Mapping[str, Compared]) -> list[str]:
    for name, one in compared.items():
        if one.largest[0] > LARGEST >= one.largest[1]:
            size = f"reach {one.largest[0]:.3g}" if math.isfinite(one.largest[0]) else "are not finite"
            return [f"States after the {name} {size}: in fp16, where hosts compute text encoders, they overflow."]
    return []


def _unseen(trained: Trained, compared: Mapping[str, Compared]) -> list[str]:
    if trained.token_rows and compared["embeddings"].error == 0:
        return ["None of the prompts has a token whose row has moved: what became of these tokens is not seen here."]
    return []


# ---- pictures -------------------------------------------------------------------------------------------------------


def _look(
    pictures: Pictures, encoder: TowerFile, tower: TextTower, other: TextTower, tokenize: Tokenize
) -> Generator[Event, None, tuple[dict[str, object], tuple[float, float], int, list[str]]]:
    """The encoder's retrieval, mean recall@1 of the encoder and of the original, pictures, and warnings.

    Pictures that the encoder was trained on are left out, as far as its file tells (gmp/unseen.py).
    """
    vision, width = pictures.vision, tower.text_config.embed_dim
    if vision.config.embed_dim != width:
        raise InputError(
            f"{vision.source.path} embeds pictures into {vision.config.embed_dim} dimensions, the text into {width}; "
            "give the vision tower of the original CLIP"
        )
    eye = load(VisionTower, vision.config, vision_part(vision.state)).requires_grad_(False)
    keys = yield from index_keys(pictures.index, pictures.cache)
    index, seen = unseen(pictures.index, keys, [encoder])
    device = tower.positional_embedding.device
    index, rows, broken = yield from embed_index(eye.to(device), index, pictures.cache, keys)
    features, ids, owners = rows[:], tokenize(index.captions()).ids, index.owners()
    found = yield from see(tower, ids, features, owners, device)
    texts = yield from embed_captions(other, ids)
    theirs = summarize((yield from rank_pairs(features, texts, owners, device=device)))
    mine = found.retrieval
    section = retrieval_json(mine, with_intervals(mine, found.samples))
    left_out = [f"{len(broken)} pictures do not decode and were left out: {some(broken)}."] if broken else []
    return section, (mine.recall_at_1, theirs.recall_at_1), mine.images, [*seen, *left_out]
