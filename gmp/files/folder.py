"""Model folders: Hugging Face's and OpenCLIP's with their config, sharded ones, and diffusers' pipelines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InputError, some
from .header import Header, TensorInfo

CONFIGS = ("config.json", "open_clip_config.json")
CONFIG_LIMIT = 1_000_000  # bytes; a config of CLIP has 5,000
INDEX_LIMIT = 50_000_000
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")
_STEMS = ("model", "open_clip_model", "pytorch_model", "open_clip_pytorch_model")
# What to read, in transformers' order of preference: whole before shards, safetensors before pickles, and variants such
# as model.fp16.safetensors last.
_ORDER = tuple(
    re.compile(pattern)
    for middle in ("", r"\.\w+")
    for suffix in ("safetensors", "bin")
    for pattern in (
        *(rf"{stem}{middle}\.{suffix}" for stem in _STEMS),
        *(rf"{stem}\.{suffix}\.index{middle}\.json" for stem in _STEMS),
    )
)


def is_weights(name: str) -> bool:
    """True for the names of weights, and of lists of their parts, that programs look for in a model folder."""
    return any(pattern.fullmatch(name) for pattern in _ORDER)


def has_config(name: str) -> bool:
    """True for the names of weights that a config in the same folder speaks of."""
    return is_weights(name) and not name.endswith(".json")


def read(path: Path, read_header: Callable[[Path], Header]) -> Header:
    """The tensors of a model folder. Raises InputError for a folder without a model in it."""
    if (path / "model_index.json").is_file():
        return _pipeline(path, read_header)
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    found = list(dict.fromkeys(name for pattern in _ORDER for name in names if pattern.fullmatch(name)))
    if found:
        sharded = found[0].endswith(".json")
        header = _sharded(path, path / found[0], read_header) if sharded else read_header(path / found[0])
        shards = {info.file.name for info in header.tensors.values()}
        others = [f"{path.name} holds {name} too, which was not read" for name in found[1:] if name not in shards]
        return replace(header, path=path, container="folder", notes=(*header.notes, *others))
    models = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".ckpt", ".pth"))]
    if models:
        raise InputError(
            f"{path.name} is a folder, and not one of a single model; give one of its files: {some(models)}"
        )
    raise InputError(f"{path.name} is a folder without a model in it; give a .safetensors file, or a model's folder")


def with_config(header: Header) -> Header:
    """A file that has a model folder's usual name, with the config that lies beside it."""
    if not has_config(header.path.name):
        return header
    configs = [_json(header.path.with_name(name), CONFIG_LIMIT) for name in CONFIGS]
    merged = {name: value for config in configs if config for name, value in config.items()}
    return replace(header, configs={"": merged}) if merged else header


def _sharded(path: Path, index: Path, read_header: Callable[[Path], Header]) -> Header:
    listed = (_json(index, INDEX_LIMIT) or {}).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise InputError(f"{index.name} in {path.name} has no weight_map that names a file for each tensor")
    shards = sorted(set(listed.values()))
    if outside := [name for name in shards if Path(name).name != name or name in (".", "..")]:
        raise InputError(f"{index.name} in {path.name} names files outside of the folder: {some(outside)}")
    if absent := [name for name in shards if not (path / name).is_file()]:
        raise InputError(f"{path.name} lacks {len(absent)} of {len(shards)} files of its model: {some(absent)}")
    headers = {name: read_header(path / name) for name in shards}
    tensors: dict[str, TensorInfo] = {}
    notes, stamps = [], {}
    for name, header in headers.items():
        tensors |= {key: info for key, info in header.tensors.items() if listed.get(key) == name}
        if unlisted := [key for key in header.tensors if listed.get(key) != name]:
            notes.append(
                f"{name} holds tensors that {index.name} does not list there, which were not read: {some(unlisted)}"
            )
        notes += header.notes
        stamps |= header.stamps
    if lost := listed.keys() - tensors.keys():
        raise InputError(f"{path.name}: tensors are not in the files that {index.name} names: {some(lost)}")
    first = next(iter(headers.values()))
    config = with_config(replace(first, path=path / "model.safetensors")).configs
    return Header(path, tensors, first.metadata, "folder", config, tuple(notes), stamps)


def _pipeline(path: Path, read_header: Callable[[Path], Header]) -> Header:
    """diffusers: a folder per component; its tensors go by the component's name and a slash."""
    tensors: dict[str, TensorInfo] = {}
    configs: dict[str, dict[str, Any]] = {}
    notes, stamps, lacking = [], {}, []
    for name in (name for name in ENCODERS if (path / name).is_dir()):
        try:
            header = read_header(path / name)
        except InputError as error:  # T5 is often left out of a download
            lacking.append(str(error))
            continue
        tensors |= {f"{name}/{key}": info for key, info in header.tensors.items()}
        configs[f"{name}/"] = header.configs.get("", {})
        notes += header.notes
        stamps |= header.stamps
    if not tensors:
        told = f" ({'; '.join(lacking)})" if lacking else ""
        raise InputError(
            f"{path.name} is a diffusers folder without a text encoder{told}; give one with {ENCODERS[0]}/"
        )
    return Header(path, tensors, {}, "folder", configs, (*notes, *lacking), stamps)


def _json(path: Path, limit: int) -> dict[str, Any] | None:
    """A JSON object, None where the file is not there."""
    if not path.is_file():
        return None
    if path.stat().st_size > limit:
        raise InputError(f"{path.name} is {path.stat().st_size:,} bytes, too large for what it should say")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name} in {path.parent.name} is not JSON: {error}") from error
    return value if isinstance(value, dict) else None
