"""Layouts: how programs name, fuse and orient the tensors of a CLIP on disk.

`describe` tells what a file holds from its header; `read_text` and `read_vision` give canonical fp32 tensors;
`write_text` and `write_clip` put them into a layout. Nothing is filled in silently: what a file lacks, what
was left unread and what had to be assumed is in the Source that comes with the tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__, files
from ..errors import InputError
from . import canonical, huggingface, openai
from .canonical import is_vision, some
from .detect import NAMES, Contents, Part, describe
from .gmp import in_radius_and_direction
from .knowledge import settle, stored_config

if TYPE_CHECKING:
    from torch import Tensor

    from ..clip import CLIPConfig, TextConfig, VisionConfig

__all__ = (
    "WRITERS", "Contents", "Part", "Source", "TowerFile",
    "describe", "read_text", "read_vision", "write_clip", "write_text",
)  # fmt: skip

# Layout -> naming. An r or theta keeps its canonical name.
WRITERS = {"huggingface": huggingface.piece, "openai": openai.piece, "gmp": openai.piece}
DTYPES = ("fp32", "fp16", "bf16")
FP16_MAX = 65504.0


@dataclass(frozen=True)
class Source:
    """Where a tower came from and everything that was decided while reading it."""

    path: str  # the file's name without its folder
    sha256: str
    layout: str
    member: str | None
    dtypes: dict[str, int]  # as stored: how many tensors of each
    assumptions: tuple[str, ...]  # sentences
    missing: tuple[str, ...]  # canonical names that another CLIP has to lend
    unexpected: tuple[str, ...]  # tensors of the file that were not read
    notes: tuple[str, ...]  # sentences
    metadata: dict[str, str] = field(default_factory=dict)  # what this program wrote into the file: `gmp_…`


@dataclass(frozen=True)
class TowerFile:
    """One tower in canonical form: fp32 on the CPU, in memory of its own."""

    state: dict[str, Tensor]
    config: TextConfig | VisionConfig
    source: Source


def read_text(
    path: str | os.PathLike[str],
    member: str | None = None,
    heads: int | None = None,
    activation: str | None = None,
    *,
    fold: bool = True,
) -> TowerFile:
    """Read a text encoder: canonical names without `visual.`; `text_projection`, `logit_scale` where there.

    member: "clip_l", "clip_g" or "clip_h"; None takes the only one, or clip_l where there are several.
    heads, activation: not in the tensors; None asks the metadata, then the family of the file, then assumes.
    fold: turn r and theta into weights; False keeps them.
    Raises InputError for files that hold no such text encoder, or a damaged one.
    """
    header = files.read_header(path)
    contents = describe(header)
    if not contents.text:
        raise InputError(f"{header.path.name} {_instead(contents, 'text')}")
    if member is None:
        member = "clip_l" if "clip_l" in contents.text else next(iter(contents.text))
    if member not in contents.text:
        raise InputError(f"{header.path.name} has no text encoder {member!r}; it holds {some(contents.text)}")
    return _read(header, contents.text[member], heads, activation, fold)


def read_vision(
    path: str | os.PathLike[str],
    heads: int | None = None,
    activation: str | None = None,
    *,
    fold: bool = True,
) -> TowerFile:
    """Read a vision tower with its projection, all below `visual.`. Arguments as for `read_text`."""
    header = files.read_header(path)
    contents = describe(header)
    if contents.vision is None:
        raise InputError(f"{header.path.name} {_instead(contents, 'vision')}")
    return _read(header, contents.vision, heads, activation, fold)


def _instead(contents: Contents, wanted: str) -> str:
    """The rest of a sentence that says what a file holds instead of the wanted tower."""
    if wanted == "text" and contents.vision:
        return "holds a vision tower only, no text encoder; give a text encoder or a full CLIP"
    if wanted == "vision" and contents.text:
        return (
            f"holds a text encoder only ({some(contents.text)}), no vision tower; "
            "give a full CLIP or a vision tower's own file"
        )
    return "; ".join(contents.problems)


def _read(header: files.Header, part: Part, heads: int | None, activation: str | None, fold: bool) -> TowerFile:
    import torch

    from ..clip import text_config_from, vision_config_from
    from ..geometric import fold_state

    name = header.path.name
    if part.problems:
        raise InputError(f"{name}: the {NAMES[part.place.tower]} cannot be read: {'; '.join(part.problems)}")
    heads, activation, assumptions = settle(part, header, heads, activation)
    positions = [key for key in part.buffers if key.endswith("position_ids")]
    weights = [key for piece in part.pieces.values() for key in piece.keys]
    stored = files.read_tensors(header, positions + weights)
    notes = [note for key in positions if (note := _damage(key, stored.pop(key)))]
    broken, state = [], {}
    for target, piece in part.pieces.items():
        tensors = {key: stored.pop(key).to(torch.float32) for key in piece.keys}
        if target not in canonical.LENT:  # a bad projection is not used; `join` says so
            broken += [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
        if piece.transposed:
            notes.append(f"{piece.keys[0]} is a Linear's weight and was transposed to {target}")
        state[target] = canonical.assemble(target, piece, tensors)
    if broken:
        raise InputError(
            f"{name}: {len(broken)} tensors hold NaN or infinity: {some(broken)}; the file is damaged, get another copy"
        )
    state = fold_state(state) if fold else state
    if part.place.tower == "text":
        embed_dim = stored_config(header.metadata, "text").get("embed_dim")
        embed_dim = embed_dim if type(embed_dim) is int else None
        config = text_config_from(state, heads=heads, activation=activation, embed_dim=embed_dim)
    else:
        config = vision_config_from(state, heads=heads, activation=activation)
    source = Source(
        path=name,
        sha256=files.sha256(header.path),
        layout=part.layout,
        member=part.member,
        dtypes=part.dtypes,
        assumptions=tuple(assumptions),
        missing=part.missing,
        unexpected=part.unexpected,
        notes=tuple(notes),
        metadata={name: value for name, value in header.metadata.items() if name.startswith("gmp_")},
    )
    return TowerFile(state, config, source)


def _damage(key: str, positions: Tensor) -> str | None:
    """A sentence if position ids are not 0, 1, 2, …: merging tools average them, to 75.9975 for example."""
    import torch

    found = positions.flatten().double()
    wrong = found != torch.arange(len(found), dtype=torch.float64)
    if not wrong.any():
        return None
    at = int(wrong.nonzero()[0])
    return f"{key} is damaged ({found[at]:g} at {at}) and was not used: positions are counted afresh"


def write_text(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    layout: str = "huggingface",
    dtype: str = "fp32",
    config: TextConfig,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a text encoder; `text_projection` and `logit_scale` go with it if the state has them.

    layout: "huggingface" (with the `text_model.` level), "openai", or "gmp", which needs a state with r and
    theta; the others fold these into weights. dtype: "fp32", "fp16" or "bf16"; gmp is always fp32.
    metadata: more entries for the file; format, clip_config and gmp_version are always written.
    Raises InputError for an incomplete state, unknown names, and values that the dtype cannot hold.
    """
    _write(state, ("text",), path, layout, dtype, {"text": asdict(config)}, metadata)


def write_clip(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    layout: str = "huggingface",
    dtype: str = "fp32",
    config: CLIPConfig,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write both towers, their projections and the logit scale. Arguments as for `write_text`."""
    _write(state, canonical.TOWERS, path, layout, dtype, asdict(config), metadata)


def _write(
    state: Mapping[str, Tensor],
    towers: tuple[str, ...],
    path: str | os.PathLike[str],
    layout: str,
    dtype: str,
    config: dict[str, Any],
    metadata: Mapping[str, str] | None,
) -> None:
    from ..geometric import fold_state

    name = Path(path).name
    if layout not in WRITERS:
        raise InputError(f"cannot write {name}: layout {layout!r} is not one of {', '.join(WRITERS)}")
    if dtype not in DTYPES:
        raise InputError(f"cannot write {name}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    geometric = any(key.endswith(".theta") for key in state)
    if layout == "gmp" and (not geometric or dtype != "fp32"):
        raise InputError(
            f"cannot write {name}: layout gmp is for a state with r and theta, in fp32; "
            f"this is {'one' if geometric else 'a state with plain weights'}, in {dtype}"
        )
    if problems := _unwritable(state, towers, config):
        raise InputError(f"cannot write {name}: {'; '.join(problems)}")
    plain = state if layout == "gmp" else fold_state(state)
    tensors: dict[str, Tensor] = {}
    for key, tensor in plain.items():
        tensors |= canonical.take_apart(WRITERS[layout](key), tensor)
    header = {"clip_config": json.dumps(config, sort_keys=True), "gmp_version": __version__}
    files.write_safetensors(_cast(tensors, dtype, name), path, {**(metadata or {}), **header})


def _unwritable(state: Mapping[str, Tensor], towers: tuple[str, ...], config: dict[str, Any]) -> list[str]:
    """What keeps a state from being these towers, whole and nothing else."""
    names: dict[str, tuple] = {}
    problems = []
    for tower in towers:
        inside = [found for key in state if (found := canonical.block_name(key))]
        blocks = {number for stack, number, _ in inside if stack == canonical.STACK[tower]}
        if gaps := set(range(max(blocks, default=0) + 1)) - blocks:
            problems.append(f"blocks are missing from the {NAMES[tower]}: {some(map(str, gaps))}")
        wanted = in_radius_and_direction(canonical.expected(tower, blocks), state.__contains__)
        shapes = {key: tuple(state[key].shape) for key in wanted.keys() & state.keys()}
        sizes, contradictions = canonical.sizes_of(tower, wanted, shapes)
        problems += contradictions
        if (sizes.get("width"), len(blocks)) != (config[tower]["width"], config[tower]["layers"]):
            problems.append(
                f"the config says width {config[tower]['width']} and {config[tower]['layers']} layers, "
                f"the {NAMES[tower]} has width {sizes.get('width')} and {len(blocks)} layers"
            )
        names |= wanted
    lent = canonical.LENT if towers == ("text",) else ()
    if missing := names.keys() - state.keys() - set(lent):
        problems.append(f"tensors are missing: {some(missing)}")
    if extra := state.keys() - names.keys():
        advice = "; write_clip writes both towers" if any(map(is_vision, extra)) else ""
        whole = NAMES["text"] if lent else "CLIP"
        problems.append(f"tensors are not part of a {whole}: {some(extra)}{advice}")
    return problems


def _cast(tensors: Mapping[str, Tensor], dtype: str, name: str) -> dict[str, Tensor]:
    import torch

    target = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    cast = {key: tensor.detach().to(target) for key, tensor in tensors.items()}
    broken = [
        key
        for key, tensor in tensors.items()
        if not cast[key].isfinite().all() or (dtype == "fp16" and tensor.abs().max() > FP16_MAX)
    ]
    if broken:
        over = f", or values over {FP16_MAX:g}, which is where fp16 ends" if dtype == "fp16" else ""
        raise InputError(f"cannot write {name}: NaN or infinity{over}, in {len(broken)} tensors: {some(broken)}")
    return cast
