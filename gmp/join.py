"""Puts a text encoder and a vision tower together as one CLIP, and says for every tensor where it came from.

Most text-encoder files lack `text_projection` and `logit_scale`: clip_l's are in no SDXL, SD1 or Flux file. The
original CLIP lends them. ComfyUI's CLIPSave writes a projection of zeros, an identity or noise for clip_l; such ones
are not used. SD2's clip_h often comes without its last block, which SD2 does not read; the original lends that too.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from .architectures import LONG_CONTEXT
from .clip import CLIP, CLIPConfig, TextTower, VisionTower, load
from .errors import InputError
from .layouts import Source, TowerFile, projection_fault
from .layouts.canonical import STACK, block_name, text_part, vision_part

UNRELATED = 0.2  # cosine of two projections below which one is not a fine-tune of the other
START_LOGIT_SCALE = math.log(1 / 0.07)  # what CLIP's training starts with


@dataclass(frozen=True)
class Origin:
    """Where a group of the joined CLIP's tensors came from."""

    name: str
    tensors: int
    source: str
    reason: str
    names: tuple[str, ...]  # canonical, every tensor


@dataclass(frozen=True)
class Joined:
    """A canonical state dict of a whole CLIP, its shape, and the report."""

    state: dict[str, Tensor]
    config: CLIPConfig
    report: tuple[Origin, ...]
    assumptions: tuple[str, ...]
    sources: dict[str, Source]  # of "text", "vision" and, where there is one, "original"

    def as_json(self) -> dict[str, object]:
        """Every tensor's origin, and all that was decided, left unread or missing while the files were read."""
        return {
            "tensors": [asdict(origin) for origin in self.report],
            "assumptions": self.assumptions,
            "sources": {role: asdict(source) for role, source in self.sources.items()},
        }

    def summary(self) -> list[dict[str, object]]:
        """The report without every tensor's name."""
        return [{"name": o.name, "tensors": o.tensors, "source": o.source, "reason": o.reason} for o in self.report]

    def build(self) -> CLIP:
        """A CLIP with these weights, in memory of its own."""
        return load(CLIP, self.config, self.state)

    def build_text(self) -> TextTower:
        """Its text tower alone, frozen."""
        return load(TextTower, self.config.text, text_part(self.state)).requires_grad_(False)

    def build_vision(self) -> VisionTower:
        """Its vision tower alone, frozen."""
        return load(VisionTower, self.config.vision, vision_part(self.state)).requires_grad_(False)


def join(text: TowerFile, vision: TowerFile, original: TowerFile | None = None) -> Joined:
    """text tower + vision tower + the original's text tower, which lends what the text encoder's file lacks.

    Raises InputError when the towers do not belong together, naming the widths, or when nothing lends a projection.
    """
    lent = {} if original is None else original.state
    state = {n: t for n, t in text.state.items() if n not in ("text_projection", "logit_scale")}
    report = [Origin("text tower", len(state), text.source.path, "the encoder to repair", tuple(state))]
    width, embed_dim, layers = text.config.width, vision.config.embed_dim, text.config.layers
    if block := _lent_block(text, original):
        state |= block
        layers += 1
        reason = "lent by the original: the text encoder's file ends before it"
        report.append(Origin("last block of the text tower", len(block), original.source.path, reason, tuple(block)))

    own, foreign = text.state.get("text_projection"), lent.get("text_projection")
    fault = None if own is None else _fault(own, foreign)
    if own is not None and fault is None:
        projection, source, reason = own, text.source.path, "its own"
    elif foreign is not None:
        projection, source = foreign, original.source.path
        reason = f"lent by the original: the text encoder's {fault or 'file has none'}"
    else:
        raise InputError(
            f"{text.source.path} has no usable text_projection ({fault or 'its file lacks it'}) and "
            f"{(original or vision).source.path} lends none; give the full original CLIP, text tower included"
        )
    if projection.shape != (width, embed_dim):
        raise InputError(
            f"{text.source.path} and {vision.source.path} do not belong together: the text tower is {width} wide, the "
            f"vision tower embeds into {embed_dim} dimensions, and the projection from {source} is "
            f"{projection.shape[0]} × {projection.shape[1]}; give the CLIP that this text encoder was part of"
        )
    state["text_projection"] = projection
    report.append(Origin("text_projection", 1, source, reason, ("text_projection",)))

    if "logit_scale" in lent:
        scale, source, reason = lent["logit_scale"], original.source.path, "lent by the original"
    elif "logit_scale" in text.state:
        scale, source, reason = text.state["logit_scale"], text.source.path, "the original lends none"
    else:
        scale, source, reason = torch.tensor(START_LOGIT_SCALE), "CLIP's starting value 1/0.07", "no file has it"
    state["logit_scale"] = scale
    report.append(Origin("logit_scale", 1, source, reason, ("logit_scale",)))

    state |= vision.state
    reason = "what the text is aligned with"
    report.append(Origin("vision tower", len(vision.state), vision.source.path, reason, tuple(vision.state)))
    config = CLIPConfig(replace(text.config, embed_dim=embed_dim, layers=layers), vision.config)
    sources = {"text": text.source, "vision": vision.source} | ({"original": original.source} if original else {})
    if text.config.activation != vision.config.activation:
        both = f"{text.config.activation} in the text tower and {vision.config.activation} in the vision tower"
        mixed = [f"activation {both}: a CLIP has one for both; set it where it was assumed (--activation)"]
    else:
        mixed = []
    assumed = [f"{source.path}: {sentence}" for source in sources.values() for sentence in source.assumptions]
    return Joined(state, config, tuple(report), tuple(dict.fromkeys((*assumed, *mixed))), sources)


def _lent_block(text: TowerFile, original: TowerFile | None) -> dict[str, Tensor]:
    """The original's last block where the text encoder is the original up to there, as SD2's clip_h is."""
    last = f"{STACK['text']}.{text.config.layers}"
    if original is None or last not in text.source.missing or original.config.layers != text.config.layers + 1:
        return {}
    number = text.config.layers
    return {n: t for n, t in original.state.items() if (at := block_name(n)) and at[1] == number}


def unlike(one: TowerFile, other: TowerFile) -> str | None:
    """Why two text towers cannot be compared state by state; None if they can."""
    sizes = [
        f"{what} {mine} against {theirs}"
        for what, mine, theirs in (
            ("width", one.config.width, other.config.width),
            ("context length", one.config.context_length, other.config.context_length),
            ("vocabulary", one.config.vocab_size, other.config.vocab_size),
        )
        if mine != theirs
    ]
    if not sizes:
        return None
    why = f"{one.source.path} and the text tower of {other.source.path} differ: {', '.join(sizes)}"
    contexts = {one.config.context_length, other.config.context_length}
    if LONG_CONTEXT in contexts and len(contexts) > 1:
        why += f" (a Long-CLIP's original is a Long-CLIP of {LONG_CONTEXT}: blocks and table were trained together)"
    return why


def text_tower(file: TowerFile, joined: Joined) -> TextTower:
    """A frozen text tower with a file's weights; joined ones where it has no projection that fits, or no last block.

    Raises InputError for a file that ends before its last block where none was lent: its read points are other places.
    """
    own = file.state.get("text_projection")
    fits = own is not None and own.shape[1] == joined.config.text.embed_dim and _fault(own) is None
    state = text_part(file.state)
    state["text_projection"] = own if fits else joined.state["text_projection"]
    layers = file.config.layers
    if f"{STACK['text']}.{layers}" in file.source.missing:
        at = (STACK["text"], layers)
        lent = {n: t for n, t in joined.state.items() if (block_name(n) or ())[:2] == at}
        if not lent or file.source != joined.sources["text"]:
            raise InputError(f"{file.source.path} ends before its last block; give the full original CLIP")
        state, layers = state | lent, layers + 1
    config = replace(file.config, embed_dim=joined.config.text.embed_dim, layers=layers)
    return load(TextTower, config, state).requires_grad_(False)


def _fault(projection: Tensor, foreign: Tensor | None = None) -> str | None:
    """Why a projection cannot be a trained one, or not of this CLIP; None if it may be."""
    if fault := projection_fault(projection):
        return f"projection {fault}"
    if foreign is not None and foreign.shape == projection.shape:
        # a fine-tune of it stays above 0.9, unrelated ones of this size are below 0.01
        alike = torch.nn.functional.cosine_similarity(projection.flatten(), foreign.flatten(), dim=0).item()
        if alike < UNRELATED:
            return f"projection has nothing in common with the original's (cosine {alike:.2f})"
    return None
