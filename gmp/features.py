"""Picture features of a locked vision tower: computed once, kept on disk by content.

A cache folder holds one folder per tower and preprocessing, with shards of features and the hashes of the files that
they belong to. Nothing in it is needed to continue a run: it can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import uuid
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from .clip import VisionTower
from .data.captions import Index, content_key
from .data.images import PREPROCESSING, load_batches
from .errors import InputError
from .events import Event, progress
from .files import read_header, read_tensors, write_json, write_safetensors
from .layouts.canonical import content_hash

SHARD = 2048  # pictures; what an interrupted embedding keeps
EVERY = 500  # pictures between two progress events while hashing


def default_cache() -> Path:
    """The user's cache folder: `$XDG_CACHE_HOME`, `~/.cache`, or `%LOCALAPPDATA%`."""
    home = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "gmp"


def state_key(state: dict[str, Tensor]) -> str:
    """SHA-256 of tensors: names, shapes, and values in fp32."""
    return content_hash(sorted(state.items()))


def content_keys(root: Path, names: Sequence[str], cache: Path) -> Generator[Event, None, list[str]]:
    """SHA-256 of every picture file; yields progress events. What was hashed before (path, size, time) is not read."""
    memory = cache / "hashes.json"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}

    def key(name: str) -> tuple[str | None, str]:
        path = root / name
        try:
            info = path.stat()
            stamp = f"{path.resolve()}|{info.st_size}|{info.st_mtime_ns}"
            return stamp, known.get(stamp) or content_key(path)
        except OSError:  # it will not decode either, and is listed then
            return None, hashlib.sha256(f"unreadable {name}".encode("utf-8", "surrogatepass")).hexdigest()

    found = []
    with ThreadPoolExecutor(8) as pool:
        for pair in pool.map(key, names):
            found.append(pair)
            if len(found) % EVERY == 0 or len(found) == len(names):
                yield progress("hash pictures", len(found), len(names))
    fresh = {stamp: digest for stamp, digest in found if stamp and stamp not in known}
    if fresh:
        with contextlib.suppress(OSError):  # without it they are read once more the next time
            cache.mkdir(parents=True, exist_ok=True)
            write_json(known | fresh, memory)
    return [digest for _, digest in found]


def _folder(cache: Path, tower: VisionTower) -> Path:
    name = f"{state_key(tower.state_dict())} {asdict(tower.vision_config)} {PREPROCESSING}"
    return cache / "features" / hashlib.sha256(name.encode()).hexdigest()[:24]


def _read_shards(folder: Path) -> dict[str, Tensor]:
    known: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            header = read_header(path)
            tensors = read_tensors(header, ["features", "keys"])
        except (InputError, OSError):  # a torn shard costs its time once more, nothing else
            path.unlink(missing_ok=True)
            continue
        keys = (bytes(row).hex() for row in tensors["keys"].numpy())
        known.update(zip(keys, tensors["features"], strict=True))
    return known


def _write_shard(folder: Path, keys: Sequence[str], features: Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = torch.tensor([list(bytes.fromhex(key)) for key in keys], dtype=torch.uint8)
    write_safetensors({"features": features, "keys": rows}, folder / f"{uuid.uuid4().hex}.safetensors", {})


def embed_pictures(
    tower: VisionTower,
    root: Path,
    names: Sequence[str],
    keys: Sequence[str],
    cache: Path,
    *,
    batch: int = 64,
    threads: int = 4,
) -> Generator[Event, None, tuple[dict[str, Tensor], dict[str, str]]]:
    """Features (embed_dim,) in fp32 on the CPU by picture name, and the reason for each picture that does not decode.

    `keys` are the pictures' `content_keys`. Only pictures that the cache lacks are opened, each content once. Yields
    progress events; a consumer that stops listening keeps the shards that were finished.
    """
    folder = _folder(cache, tower)
    known = _read_shards(folder)
    missing = {key: name for name, key in zip(names, keys, strict=True) if key not in known}
    device = tower.proj.device
    fresh = list(missing)
    done = len(names) - len(fresh)
    broken: dict[Path, str] = {}
    yield progress("embed pictures", done, len(names))
    for start in range(0, len(fresh), SHARD):
        shard = fresh[start : start + SHARD]
        paths = [root / missing[key] for key in shard]
        rows = []
        for pixels in load_batches(paths, tower.vision_config.image_size, batch, threads, broken):
            with torch.no_grad():
                rows.append(tower(pixels.to(device)).float().cpu())
            done += len(pixels)
            yield progress("embed pictures", done, len(names))
        whole = [key for key, path in zip(shard, paths, strict=True) if path not in broken]
        if whole:
            features = torch.cat(rows)
            try:
                _write_shard(folder, whole, features)
            except OSError as error:
                advice = f"features are not kept: {error}"
                yield {"type": "alarm", "alarm": "cache", "step": 0, "raised": True, "advice": advice, "value": None}
            known.update(zip(whole, features, strict=True))
    found = {name: known[key] for name, key in zip(names, keys, strict=True) if key in known}
    reasons = {missing[key]: broken[root / missing[key]] for key in fresh if key not in known}
    return found, {name: reasons[missing[key]] for name, key in zip(names, keys, strict=True) if key not in known}


def index_keys(index: Index, cache: Path) -> Generator[Event, None, dict[str, str]]:
    """`content_keys` of an index's pictures, by their paths."""
    names = [picture.path for picture in index.pictures]
    return dict(zip(names, (yield from content_keys(index.root, names, cache)), strict=True))


def embed_index(
    tower: VisionTower, index: Index, cache: Path, keys: Mapping[str, str] | None = None
) -> Generator[Event, None, tuple[Index, Tensor, dict[str, str]]]:
    """The pictures that decode, their features (pictures, embed_dim), and the reasons of those that do not.

    keys: `index_keys` of these pictures, and maybe more; None computes them.
    """
    if keys is None:
        keys = yield from index_keys(index, cache)
    names = [picture.path for picture in index.pictures]
    found, broken = yield from embed_pictures(tower, index.root, names, [keys[name] for name in names], cache)
    index = index.without(broken)
    return index, torch.stack([found[picture.path] for picture in index.pictures]), broken
