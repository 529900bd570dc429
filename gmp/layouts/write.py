"""Writing a text encoder, or a whole CLIP, in a layout: one file, or a folder with the config beside the weights.

Tensors are checked first and written one by one afterwards, so that a large encoder needs the memory of its largest
tensor where they come from a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__, files
from ..errors import InputError, some
from . import canonical, configs, huggingface, openai
from .canonical import is_vision
from .detect import NAMES
from .gmp import in_radius_and_direction

if TYPE_CHECKING:
    from torch import Tensor

    from ..clip import CLIPConfig, TextConfig

# Layout -> naming. An r or theta keeps its canonical name.
WRITERS = {
    "huggingface": huggingface.piece,
    "huggingface_folder": huggingface.piece,
    "openai": openai.piece,
    "open_clip": openai.piece,
    "open_clip_folder": openai.piece,
    "gmp": openai.piece,
}
# Layouts that are a folder: the weights' name, the config's name, and what makes the config.
FOLDERS = {
    "huggingface_folder": ("model.safetensors", "config.json", configs.huggingface),
    "open_clip_folder": ("open_clip_model.safetensors", "open_clip_config.json", configs.open_clip),
}
WITH_REGISTERS = ("openai", "gmp")  # layouts whose programs know a vision tower's registers and gates
DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "keep": None}


def write_text(
    state: Mapping[str, Tensor | files.Pending],
    path: str | os.PathLike[str],
    *,
    layout: str = "huggingface",
    dtype: str = "fp32",
    config: TextConfig,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a text encoder; `text_projection` and `logit_scale` go with it if the state has them.

    path: a .safetensors file, or for the layouts that end in `_folder` a folder, which also gets a config.
    layout: "huggingface" (with the `text_model.` level), "openai", "open_clip", or "gmp", which needs a state with
    r and theta; the others fold these into weights. dtype: "fp32", "fp16", "bf16", or "keep", every tensor as it is;
    gmp is always fp32. metadata: more entries for the file; format, clip_config and gmp_version are always written.
    Raises InputError for an incomplete state, unknown names, and values that the dtype cannot hold.
    """
    _write(state, ("text",), path, layout, dtype, {"text": asdict(config)}, metadata)


def write_clip(
    state: Mapping[str, Tensor | files.Pending],
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
    state: Mapping[str, Tensor | files.Pending],
    towers: tuple[str, ...],
    path: str | os.PathLike[str],
    layout: str,
    dtype: str,
    config: dict[str, Any],
    metadata: Mapping[str, str] | None,
) -> None:
    from ..geometric import fold_state

    path = Path(path)
    name = path.name
    if layout not in WRITERS:
        raise InputError(f"cannot write {name}: layout {layout!r} is not one of {', '.join(WRITERS)}")
    if dtype not in DTYPES:
        raise InputError(f"cannot write {name}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    geometric = any(key.endswith(".theta") for key in state)
    if layout == "gmp" and (not geometric or dtype != "fp32"):
        raise InputError(
            f"cannot write {name}: layout gmp takes a state with r and theta, and fp32; "
            f"this is a state with {'r and theta' if geometric else 'plain weights'}, and {dtype}"
        )
    if layout == "open_clip_folder":
        if len(towers) < 2:
            raise InputError(f"cannot write {name}: OpenCLIP's folder is of both towers; write the whole CLIP")
        activations = {config[tower]["activation"] for tower in towers}
        if len(activations) > 1:
            raise InputError(
                f"cannot write {name}: OpenCLIP has one activation for both towers, not {some(activations)}"
            )
    if layout == "huggingface_folder" and config["text"]["end_of_text"] == 2:
        raise InputError(
            f"cannot write {name}: for an end-of-text of 2, transformers takes the largest id of a caption"
        )
    if canonical.REGISTERS in state and layout not in WITH_REGISTERS:
        raise InputError(
            f"cannot write {name}: layout {layout} has no place for a vision tower's registers; write the whole CLIP "
            f"as {' or '.join(WITH_REGISTERS)}, or the text encoder alone"
        )
    if problems := _unwritable(state, towers, config):
        raise InputError(f"cannot write {name}: {'; '.join(problems)}")
    plain = fold_state(state) if geometric and layout != "gmp" else state
    pieces = {each: WRITERS[layout](each) for each in plain}
    tensors = parts(plain, pieces, lambda key, tensor: DTYPES[dtype] or files.dtype_and_shape(tensor)[0], name)
    header = {"clip_config": json.dumps(config, sort_keys=True), "gmp_version": __version__}
    header = {**(metadata or {}), **header}
    if layout not in FOLDERS:
        return files.write_safetensors(tensors, path, header)
    weights, config_name, make = FOLDERS[layout]
    projected = "text_projection" in plain
    if others := _other_weights(path, weights):
        raise InputError(
            f"cannot write {name}: it holds {some(others)}, which programs may read instead; remove it first"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror}; choose another place") from error
    files.write_safetensors(tensors, path / weights, header)
    files.write_json(make(config, projected), path / config_name)


def _other_weights(folder: Path, name: str) -> list[str]:
    """Files of a folder that programs take for its model's weights, beside the one of this name."""
    if not folder.is_dir():
        return []
    return [each.name for each in folder.iterdir() if each.name != name and files.is_weights(each.name)]


def targets(path: str | os.PathLike[str], layout: str) -> list[Path]:
    """The files that writing to this path in this layout makes or replaces."""
    path = Path(path)
    if layout not in FOLDERS:
        return [path]
    weights, config, _ = FOLDERS[layout]
    return [path / weights, path / config]


def parts(
    state: Mapping[str, Tensor | files.Pending],
    pieces: Mapping[str, canonical.Piece],
    dtype_of: Callable[[str, Tensor | files.Pending], str],
    name: str,
) -> dict[str, files.Pending]:
    """The tensors of a file from canonical ones, checked now and made once more when they are written.

    dtype_of: from a tensor's name in the file and its canonical tensor. name: the file's, for the message.
    Raises InputError for NaN, infinity, and values that a dtype cannot hold.
    """
    import torch

    result, broken, limits = {}, [], set()
    for each, piece in pieces.items():
        tensor = state[each]
        for key, part in canonical.take_apart(piece, _made(tensor)).items():
            dtype = dtype_of(key, tensor)
            limit = torch.finfo(files.torch_dtypes()[dtype]).max
            if not all(bool((values.abs() <= limit).all()) for values in canonical.chunks(part)):  # NaN is not either
                broken.append(key)
                limits |= {f"{limit:g}, which is where {dtype} ends"} if limit < 1e30 else set()
            result[key] = files.Pending(dtype, tuple(part.shape), partial(_part, tensor, piece, key, dtype))
    if broken:
        over = f", or values over {some(limits)}," if limits else ""
        raise InputError(f"cannot write {name}: NaN or infinity{over}, in {len(broken)} tensors: {some(broken)}")
    return result


def _part(tensor: Tensor | files.Pending, piece: canonical.Piece, key: str, dtype: str) -> Tensor:
    return canonical.take_apart(piece, _made(tensor))[key].to(files.torch_dtypes()[dtype])


def _made(tensor: Tensor | files.Pending) -> Tensor:
    return tensor.make() if isinstance(tensor, files.Pending) else tensor.detach()


def _unwritable(
    state: Mapping[str, Tensor | files.Pending], towers: tuple[str, ...], config: dict[str, Any]
) -> list[str]:
    """What keeps a state from being these towers, whole and nothing else."""
    names: dict[str, tuple] = {}
    problems = []
    for tower in towers:
        inside = [found for key in state if (found := canonical.block_name(key))]
        blocks = {number for stack, number, _ in inside if stack == canonical.STACK[tower]}
        if gaps := set(range(max(blocks, default=0) + 1)) - blocks:
            problems.append(f"blocks are missing from the {NAMES[tower]}: {some(map(str, gaps))}")
        wanted = canonical.expected(tower, blocks)
        if tower == "vision":
            wanted |= canonical.registers(state.__contains__)
        wanted = in_radius_and_direction(wanted, state.__contains__)
        shapes = {key: tuple(state[key].shape) for key in wanted.keys() & state.keys()}
        sizes, contradictions = canonical.sizes_of(tower, wanted, shapes)
        problems += contradictions
        if (sizes.get("width"), len(blocks)) != (config[tower]["width"], config[tower]["layers"]):
            problems.append(
                f"the config says width {config[tower]['width']} and {config[tower]['layers']} layers, "
                f"the {NAMES[tower]} has width {sizes.get('width')} and {len(blocks)} layers"
            )
        given = sizes.get("registers", 0), canonical.gate_count(wanted)
        if tower == "vision" and given != (config[tower]["registers"], config[tower]["gates"]):
            problems.append(
                f"the config says {config[tower]['registers']} registers and {config[tower]['gates']} gates, the "
                f"{NAMES[tower]} has {given[0]} and {given[1]}"
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
