"""Head counts, activations and end-of-text, which are in no tensor: who knows them, in order.

The caller; what this program wrote into the file; the config beside the file; the family of the file; at last an
assumption, which is put into words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..architectures import ACTIVATIONS, OPENAI_WIDTHS, TEXT_HEADS, VISION_HEADS
from ..errors import InputError
from ..files import Header
from .detect import Part
from .place import Place

# OpenCLIP's settings that change what a tower of the same tensors computes, with the values that are CLIP's.
_OPEN_CLIP = {
    "text": {
        "pool_type": ("argmax", "eos"), "no_causal_mask": (False,), "embed_cls": (False,), "norm_kwargs": (None, {}),
        "act_kwargs": (None, {}), "hf_model_name": (None,), "ls_init_value": (None,),
    },
    "vision": {
        "pool_type": ("tok",), "norm_kwargs": (None, {}), "act_kwargs": (None, {}), "timm_model_name": (None,),
        "attentional_pool": (False,), "ls_init_value": (None,), "no_ln_pre": (False,),
    },
}  # fmt: skip
VOCABULARY = 49408  # ids of CLIP's own tokenizer
_LEGACY_END = 2  # in practically all of the hub's configs; transformers then takes the largest id


@dataclass(frozen=True)
class Settled:
    """What the tensors do not say of one tower, and a sentence for each of it that is an assumption."""

    heads: int
    activation: str
    end_of_text: int | None
    embed_dim: int | None
    assumptions: tuple[str, ...]
    assumed: tuple[str, ...]  # the fields that they speak of


def settle(
    part: Part, header: Header, heads: int | None, activation: str | None, end_of_text: int | None = None
) -> Settled:
    """Heads, activation and end-of-text of a tower.

    Raises InputError for heads that cannot be told or do not divide the width, and for an unknown activation.
    """
    tower, width = part.place.tower, part.sizes["width"]
    name = header.path.name
    stored = stored_config(header.metadata, tower)
    doubtful = {name: stored[name] for name in stored.pop("assumed", ()) if name in stored}
    firm = {name: value for name, value in stored.items() if name not in doubtful}
    known = _config(header, part.place) | firm
    if other := known.get("other"):
        raise InputError(f"{name}: its config asks for {', '.join(other)}, which is not CLIP's {tower} tower")
    assumptions, assumed = [], []

    if heads is None:
        heads = known.get("heads") or (TEXT_HEADS if tower == "text" else VISION_HEADS).get(width)
    option = "--heads" if tower == "text" else "--vision-heads"
    if heads is None:
        if width % 64:
            raise InputError(
                f"{name}: a {tower} tower of width {width} does not tell its number of heads; set heads ({option})"
            )
        heads = doubtful.get("heads") or width // 64
        assumed.append("heads")
        assumptions.append(
            f"{heads} attention heads assumed for a {tower} tower of width {width}: 64 channels each is "
            f"usual, but the file does not say; set heads otherwise ({option})"
        )
    if type(heads) is not int or heads < 1 or width % heads:
        raise InputError(f"{name}: {heads!r} attention heads do not divide the {tower} tower's width {width}")

    activation = activation or known.get("activation") or part.place.activation
    if activation is None:
        activation, other, models = "gelu", "quick_gelu", "OpenAI, Apple and MetaCLIP"
        if doubtful.get("activation", "quick_gelu" if width <= OPENAI_WIDTHS[tower] else "gelu") == "quick_gelu":
            activation, other, models = "quick_gelu", "gelu", "LAION"
        assumed.append("activation")
        assumptions.append(
            f"activation {activation} assumed: a file with these names does not say; "
            f"for {models} models set {other} (--activation)"
        )
    if activation not in ACTIVATIONS:
        raise InputError(f"{name}: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    end = end_of_text or _whole(known.get("end_of_text"))
    if tower == "text" and end is None and part.sizes["vocab"] > VOCABULARY and "end_of_text" not in known:
        assumed.append("end_of_text")
        assumptions.append(
            f"end-of-text assumed to be the largest id of a caption; with {part.sizes['vocab']} ids, more than CLIP's "
            f"{VOCABULARY}, it may be another: set it (--end-of-text)"
        )
    return Settled(heads, activation, end, _whole(known.get("embed_dim")), tuple(assumptions), tuple(assumed))


def stored_config(metadata: Mapping[str, str], tower: str) -> dict[str, Any]:
    """The tower's fields in the metadata entry `clip_config`, {} where it has none."""
    try:
        fields = _mapping(json.loads(metadata.get("clip_config", "{}"))[tower])
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    kept = {name: fields[name] for name in ("heads", "activation", "end_of_text", "embed_dim") if name in fields}
    assumed = fields.get("assumed")
    return kept | {"assumed": [name for name in kept if isinstance(assumed, list) and name in assumed]}


def _config(header: Header, place: Place) -> dict[str, Any]:
    """What the config.json or open_clip_config.json of a model folder says of one tower, in our words."""
    prefixes = [prefix for prefix in header.configs if (place.prefix or place.root).startswith(prefix)]
    config = header.configs[max(prefixes, key=len)] if prefixes else {}
    if "model_cfg" in config:
        return _open_clip(_mapping(config["model_cfg"]), place.tower)
    kind = config.get("model_type")
    if kind in ("clip", "clip_text_model", "clip_vision_model"):
        return _huggingface(config, place.tower)
    return {"other": [f"a model of type {kind!r}"]} if isinstance(kind, str) else {}


def _huggingface(config: dict[str, Any], tower: str) -> dict[str, Any]:
    """transformers leaves out of a nested config what equals its own defaults."""
    fields = config
    if nested := config.get(f"{tower}_config") or config.get(f"{tower}_config_dict"):
        fields = _mapping(nested) | _mapping(config.get(f"{tower}_config_dict"))
    end = fields.get("eos_token_id", 49407)
    usual = {"layer_norm_eps": (1e-5,)}
    return {
        "other": _unusual(fields, usual),
        "heads": fields.get("num_attention_heads", 8 if tower == "text" else 12),
        "activation": fields.get("hidden_act", "quick_gelu"),
        "end_of_text": None if end == _LEGACY_END else end,
        "embed_dim": fields.get("projection_dim", 512),
    }


def _open_clip(config: dict[str, Any], tower: str) -> dict[str, Any]:
    fields = _mapping(config.get(f"{tower}_cfg"))
    other = _unusual(fields, _OPEN_CLIP[tower])
    heads, end = fields.get("heads", 8), None
    if tower == "vision":
        width, head_width = fields.get("width", 768), fields.get("head_width", 64)
        heads = width // head_width if _whole(width) and _whole(head_width) else None
    elif fields.get("pool_type") == "eos":
        end = fields.get("eos_id", 2)  # OpenCLIP's own default; it means the id 2 by it
    return {
        "other": other,
        "heads": heads,
        "end_of_text": end,
        "activation": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "embed_dim": config.get("embed_dim"),
    }


def _unusual(fields: dict[str, Any], usual: Mapping[str, tuple]) -> list[str]:
    """Settings with another value than CLIP's: no tensor shows them, and the tower would compute something else."""
    return [f"{key} {fields[key]!r}" for key, values in usual.items() if key in fields and fields[key] not in values]


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _whole(value: object) -> int | None:
    return value if type(value) is int and 0 < value < 1 << 31 else None
