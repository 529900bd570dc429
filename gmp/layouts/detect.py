"""What is in a file, from its header alone: which towers, where, how large, and what is wrong with them.

Needs no torch and reads no tensor, so that `inspect` answers at once for a checkpoint of any size.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import islice

from ..architectures import DEPTHS, LONG_KEPT, OPENAI_WIDTHS
from ..errors import some
from ..files import Header
from . import huggingface, kinds, open_clip, openai, single_file
from .canonical import LENT, STACK, Piece, Shape, expected, gate_count, registers, sizes_of
from .gmp import in_radius_and_direction
from .place import TEXT_PROJECTIONS, Place

PLACES = (*openai.PLACES, *huggingface.PLACES, *open_clip.PLACES, *single_file.PLACES)
# What quantisers leave beside their weights; the scales themselves are read.
QUANTISED = ("scaled_fp8", "scale_input", "input_scale", "comfy_quant")
BUFFERS = (*openai.BUFFERS, *huggingface.BUFFERS, *QUANTISED)
# What a text encoder is called, by its width; any other is a clip_l too.
MEMBERS = {768: "clip_l", 1024: "clip_h", 1280: "clip_g"}
SCALES = ("scale_weight", "weight_scale")
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
NAMES = {"text": "text encoder", "vision": "vision tower"}

_STACK_KEY = re.compile(r"^(.*?(?:transformer\.resblocks|encoder\.layers))\.(\d{1,6})\.")
_LEFT_SCALE = re.compile(r"(^|\.)(scale_weight|weight_scale|weight_scale_2|scale_weight_2|pre_quant_scale)$")


@dataclass(frozen=True)
class Part:
    """One tower in a file. Names of tensors in the sentences and lists are the file's own."""

    place: Place
    layout: str
    member: str | None  # "clip_l", "clip_g", "clip_h"; None for a vision tower
    layers: int
    sizes: dict[str, int]  # width, mlp, embed; text: vocab, context; vision: patch, rows, some: registers, gates
    parameters: int
    dtypes: dict[str, int]  # how many tensors of each
    pieces: dict[str, Piece]  # canonical name -> tensors of the file
    missing: tuple[str, ...]  # canonical names that another CLIP has to lend
    unexpected: tuple[str, ...]  # not part of a CLIP; not read
    buffers: tuple[str, ...]  # position ids and the like; not weights
    problems: tuple[str, ...]  # reasons not to read this tower


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    kind: "clip", "text_encoder", "vision_tower", "checkpoint" (with or without a text encoder), or one of `kinds`.
    layout: the layouts of the towers, joined by "+"; "" where there is none.
    """

    kind: str
    layout: str
    text: dict[str, Part]
    vision: Part | None
    problems: tuple[str, ...]


def describe(header: Header) -> Contents:
    """Find the towers in a file. Problems are listed and not raised."""
    keys = header.tensors.keys()
    kind = kinds.kind_of(keys)
    if kind in ("lora", "siglip"):  # their names look like a CLIP's
        return Contents(kind, "", {}, None, (kinds.ADVICE[kind],))
    stacks: dict[str, set[int]] = defaultdict(set)
    for key in keys:
        if match := _STACK_KEY.match(key):
            stacks[match[1]].add(int(match[2]))
    places = [place for place in PLACES if place.stack in stacks and _is_at(place, keys)]
    parts = [_part(place, stacks[place.stack], header) for place in places]

    text: dict[str, Part] = {}
    vision: Part | None = None
    problems = []
    for part in parts:
        if part.place.tower == "text":
            text[part.member] = _once(text.get(part.member), part)
        else:
            vision = _once(vision, part)
    if parts:
        whole = kind in ("checkpoint", "diffusion_model") or parts[0].layout == "diffusers"
        alone = "clip" if text and vision else "text_encoder" if text else "vision_tower"
        kind = "checkpoint" if whole else alone
    else:
        problems.append(_nothing_found(kind, some(stacks), keys))
    layout = "+".join(dict.fromkeys(part.layout for part in parts))
    held = [*text.values(), *([vision] if vision else [])]
    problems += [f"{part.member or 'vision'}: {problem}" for part in held for problem in part.problems]
    return Contents(kind, layout, text, vision, tuple(problems))


def _once(first: Part | None, part: Part) -> Part:
    """The part, or the first of its name with a problem: nothing tells which of the two a program would take."""
    if first is None:
        return part
    twice = f"is there twice, at {first.place.stack} and {part.place.stack}; save the one that is meant by itself"
    return replace(first, problems=(*first.problems, twice))


def _is_at(place: Place, keys: Collection[str]) -> bool:
    """Tell text from vision where transformers left out the level that says so."""
    if not place.level:
        return True
    seen = any(place.root + name in keys for name in ("embeddings.class_embedding", "pre_layrnorm.weight"))
    return seen == (place.tower == "vision")


def _part(place: Place, blocks: set[int], header: Header) -> Part:
    keys = {key for key in header.tensors if place.owns(key)}
    names = expected(place.tower, sorted(blocks))
    if place.tower == "vision":
        names |= registers(lambda name: place.keys(place.piece(name)).keys[0] in keys)
    if place.piece is openai.piece:
        names = in_radius_and_direction(names, lambda name: place.key(name) in keys)
    pieces = {name: place.keys(place.piece(name)) for name in names}
    problems = _gaps(place, blocks)
    if place.tower == "text":
        forms = [form for piece in TEXT_PROJECTIONS if (form := place.keys(piece)).keys[0] in keys]
        if len(forms) > 1:
            problems.append("both text_projection and text_projection.weight, its transpose, are there")
        if forms:
            pieces["text_projection"] = forms[0]
        if (rest := place.key("positional_embedding_res")) in keys:
            own = pieces["positional_embedding"].keys
            pieces["positional_embedding"] = Piece((*own, rest), kept=LONG_KEPT)
    pieces = {name: _with_scales(piece, keys) for name, piece in pieces.items()}

    absent = {name: [key for key in piece.keys if key not in keys] for name, piece in pieces.items()}
    missing = tuple(name for name in LENT if absent.get(name))
    if lost := [key for name, gone in absent.items() if name not in LENT for key in gone]:
        problems.append(f"tensors are missing: {some(lost)}")
        if lost == absent.get("visual.proj"):  # transformers' CLIPVisionModel
            problems[-1] += ", its projection; give a vision tower that has it, or the full CLIP"
    known = {key for piece in pieces.values() for key in piece.keys}
    scales = {scale for piece in pieces.values() for scale in piece.scales.values()}
    pieces = {name: piece for name, piece in pieces.items() if not absent[name]}

    used = known & keys
    buffers = {key for key in keys - used - scales if key.rpartition(".")[2] in BUFFERS}
    unexpected = keys - used - scales - buffers
    problems += _unreadable(place, used, unexpected, header) + _odd_scales(pieces, header)
    unlike = {name for name, piece in pieces.items() if len({header.tensors[key].shape for key in piece.keys}) > 1}
    if unlike:
        apart = [key for name in unlike for key in pieces[name].keys]
        problems.append(f"tensors that belong together are not of one shape: {some(apart)}")
    shapes = {name: shape_of(name, piece, header) for name, piece in pieces.items() if name not in unlike}
    sizes, contradictions = sizes_of(place.tower, names, shapes)
    if gates := gate_count(names):
        sizes["gates"] = gates
        if gates > 1 + len(blocks):
            problems.append(f"has {gates} gates, more than its {len(blocks)} blocks and one")
    width = sizes.get("width", 0)
    place = _for_width(place, width)
    member = (place.member or MEMBERS.get(width, "clip_l")) if place.tower == "text" else None
    if member == "clip_h" and blocks == set(range(DEPTHS[1024] - 1)):  # SD2 as diffusers writes it
        missing += (f"{STACK['text']}.{DEPTHS[1024] - 1}",)
    return Part(
        place=place,
        layout="gmp" if any(name.endswith(".theta") for name in names) else place.layout,
        member=member,
        layers=len(blocks),
        sizes=sizes,
        parameters=sum(math.prod(header.tensors[key].shape) for key in used),
        dtypes=dict(sorted(Counter(header.tensors[key].dtype for key in used).items())),
        pieces=pieces,
        missing=missing,
        unexpected=tuple(sorted(unexpected)),
        buffers=tuple(sorted(buffers)),
        problems=(*problems, *contradictions),
    )


def _gaps(place: Place, blocks: set[int]) -> list[str]:
    count = max(blocks) + 1 - len(blocks)
    if not count:
        return []
    first = islice((number for number in range(max(blocks)) if number not in blocks), 6)
    more = " …" if count > 6 else ""
    return [f"blocks are missing from {place.stack}: {', '.join(map(str, first))}{more} ({count} in all)"]


def _inside(place: Place) -> tuple[str, ...]:
    """What the names of a tower's own tensors begin with: whatever else begins so changes what the tower computes."""
    if place.prefix.endswith("text."):
        return (place.prefix,)
    base = place.prefix if place.tower == "text" else place.root
    names = expected(place.tower, (0,)).keys() - {"logit_scale"}
    keys = {key for name in names for key in place.keys(place.piece(name)).keys}
    return tuple({f"{base}{key.removeprefix(base).partition('.')[0]}." for key in keys})


def _unreadable(place: Place, used: set[str], unexpected: set[str], header: Header) -> list[str]:
    """Sentences for tensors that make this another model than the canonical form can hold."""
    problems = []
    foreign = _inside(place)
    if strange := {key for key in used if header.tensors[key].dtype not in DTYPES}:
        types = some({header.tensors[key].dtype for key in strange})
        problems.append(f"tensors are {types}, not a floating point type that is read: {some(strange)}")
    if left := {key for key in unexpected if _LEFT_SCALE.search(key)}:
        problems.append(f"is quantised in a way that is not read; give the fp16 or fp32 edition ({some(left, 2)})")
    if extra := {key for key in unexpected if key.startswith(foreign) and not _LEFT_SCALE.search(key)}:
        problems.append(f"tensors are not those of a CLIP: {some(extra)}")
    return problems


def _with_scales(piece: Piece, keys: Collection[str]) -> Piece:
    """The piece with the scales that a file holds for its weights, under either of ComfyUI's names."""
    scales = {
        key: scale
        for key in piece.keys
        for leaf in SCALES
        if key.endswith(".weight") and (scale := key.removesuffix("weight") + leaf) in keys
    }
    return replace(piece, scales=scales) if scales else piece


def _odd_scales(pieces: dict[str, Piece], header: Header) -> list[str]:
    """A sentence for scales that are neither one number nor one for each row of their weight."""
    odd = set()
    for piece in pieces.values():
        for key, scale in piece.scales.items():
            shape, count = header.tensors[key].shape, math.prod(header.tensors[scale].shape)
            fits = count == 1 or (len(shape) == 2 and count == shape[0])
            if not fits or header.tensors[scale].dtype not in DTYPES:
                odd.add(scale)
    return [f"scales are neither one number nor one for each row: {some(odd)}"] if odd else []


def shape_of(name: str, piece: Piece, header: Header) -> Shape:
    """The shape that `assemble` will give, from the header."""
    shape, *others = (header.tensors[key].shape for key in piece.keys)
    if name == "logit_scale" and shape == (1,):
        return ()
    if piece.kept:
        return shape if shape[:1] > (piece.kept,) else ()
    if others and shape:
        shape = (shape[0] * len(piece.keys), *shape[1:])
    return shape[::-1] if piece.transposed else shape


def _for_width(place: Place, width: int) -> Place:
    """The place for a tower of this width: a few models keep another CLIP where their family has its own.

    zero123 and SD 2.1 unCLIP-L have OpenAI's where Stable Diffusion 2 has LAION's.
    """
    other = place.member and MEMBERS.get(width, place.member) != place.member
    if other or (place.tower == "vision" and width == OPENAI_WIDTHS["vision"]):
        return replace(place, member=None, activation=None)
    return place


def _nothing_found(kind: str, elsewhere: str, keys: Collection[str]) -> str:
    if kind in kinds.ADVICE:
        return kinds.ADVICE[kind]
    if elsewhere:
        return f"holds transformer blocks at {elsewhere}, where no layout that is read keeps a CLIP"
    return f"holds no CLIP in any layout that is read; it begins with {some(keys, 3) or 'no tensors at all'}"
