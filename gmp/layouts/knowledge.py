"""Head counts and activations, which are in no tensor: who knows them, in order.

The caller; the file's own metadata; the family of the file; at last an assumption, which is put into words.
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import InputError
from ..files import Header
from .detect import Part

TEXT_WIDTHS = (512, 768, 1024, 1280)  # every published CLIP text tower; their heads have 64 channels
OPENAI_WIDTHS = {"text": 768, "vision": 1024}  # OpenAI's largest towers; wider ones are LAION's


def stored_config(metadata: dict[str, str], tower: str) -> dict[str, Any]:
    """The tower's fields in the metadata entry `clip_config`, {} where it has none."""
    try:
        fields = json.loads(metadata.get("clip_config", "{}"))[tower]
    except (ValueError, KeyError, TypeError):
        return {}
    return fields if isinstance(fields, dict) else {}


def settle(part: Part, header: Header, heads: int | None, activation: str | None) -> tuple[int, str, list[str]]:
    """Number of heads, activation, and a sentence for each of them that is an assumption.

    Raises InputError for heads that cannot be told or do not divide the width, and for an unknown activation.
    """
    from ..clip import ACTIVATIONS, VISION_HEADS

    tower, width = part.place.tower, part.sizes["width"]
    stored = stored_config(header.metadata, tower)
    name = header.path.name
    assumptions = []

    known = {text_width: text_width // 64 for text_width in TEXT_WIDTHS} if tower == "text" else VISION_HEADS
    if heads is None:
        heads = stored.get("heads") or known.get(width)
    if heads is None:
        if width % 64:
            raise InputError(
                f"{name}: a {tower} tower of width {width} does not tell its number of heads; pass --heads"
            )
        heads = width // 64
        assumptions.append(
            f"{heads} attention heads assumed for a {tower} tower of width {width}: 64 channels each is "
            "usual, but the file does not say; pass --heads otherwise"
        )
    if type(heads) is not int or heads < 1 or width % heads:
        raise InputError(f"{name}: {heads!r} attention heads do not divide the {tower} tower's width {width}")

    activation = activation or stored.get("activation") or part.place.activation
    if activation is None:
        activation, other, models = "gelu", "quick_gelu", "OpenAI, Apple and MetaCLIP"
        if width <= OPENAI_WIDTHS[tower]:
            activation, other, models = "quick_gelu", "gelu", "LAION"
        assumptions.append(
            f"activation {activation} assumed: a file with these names does not say; "
            f"pass --activation {other} for {models} models"
        )
    if activation not in ACTIVATIONS:
        raise InputError(f"{name}: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    return heads, activation, assumptions
