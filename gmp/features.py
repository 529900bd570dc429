"""Picture features of a locked vision tower: computed once, kept on disk by content, read where they lie.

A cache folder holds one folder per tower, precision and preprocessing, with shards of features in fp16 and the hashes
of the files that they belong to, and likewise of salient squares. Nothing in it is needed to continue a run: it can be
deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .clip import DTYPES, VisionTower, precision
from .config import Pictures
from .data.augment import AUGMENTATION, seed_of
from .data.captions import Index, content_key
from .data.crops import Box, salient_box
from .data.images import PLAIN, PREPROCESSING, THREADS, in_batches, load_batches, load_whole, normalize
from .errors import InputError
from .events import Event, progress
from .files import Header, read_header, read_tensors, torch_dtypes, write_json, write_safetensors
from .layouts.canonical import content_hash
from .memory import embedding_batch, free, is_out_of_memory, release
from .saliency import SALIENCY, saliency

SHARD = 2048  # pictures in a shard at the least: what an interrupted embedding keeps
GROWTH = 8  # a shard has an eighth of the pictures before it, so that a million are in few files …
LONGEST = 1 << 15  # … up to this
BATCH = {"cpu": 64}  # pictures in one pass at the most
BATCH_ON_GPU = 256
HASHES = "hashes.json"  # in the cache: SHA-256 of files by path, size and time
EVERY = 500  # pictures between two progress events while hashing


def default_cache() -> Path:
    """The user's cache folder: `$XDG_CACHE_HOME`, `~/.cache`, or `%LOCALAPPDATA%`."""
    home = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "gmp"


# ---- reading --------------------------------------------------------------------------------------------------------


class Features:
    """Features of pictures by position, (n, E): rows of shards, which stay on disk until they are asked for.

    `features[positions]`, for int64 positions (m,) or a slice, gives (m, E) in fp32 on the CPU, in memory of its own.
    Values are rounded to fp16 whatever a shard holds, so that those just computed are those that are read later.
    """

    def __init__(self, shards: Sequence[Tensor], rows: Tensor):
        """shards: (n_i, E) fp16 or fp32, all of one width. rows: (n,) int64, counted through all shards."""
        self.rows = rows  # equal numbers: the same picture
        self._shards = [shard for shard in shards if len(shard)]
        self._ends = torch.tensor([len(shard) for shard in self._shards], dtype=torch.int64).cumsum(0)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self._shards[0].shape[1] if self._shards else 0

    def __getitem__(self, positions: Tensor | slice) -> Tensor:
        rows = self.rows[positions]
        places = torch.searchsorted(self._ends, rows, right=True)  # which shard each row is in
        order = places.argsort(stable=True)
        numbers, counts = places[order].unique_consecutive(return_counts=True)
        found = torch.empty(len(rows), self.shape[1])
        for number, here in zip(numbers.tolist(), order.split(counts.tolist()), strict=True):
            shard = self._shards[number]
            found[here] = shard[rows[here] - (self._ends[number] - len(shard))].half().float()
        return found

    def pick(self, positions: Tensor | Sequence[int]) -> Features:
        """These pictures alone; nothing is read."""
        return Features(self._shards, self.rows[torch.as_tensor(positions, dtype=torch.int64)])


def mapped(header: Header, name: str) -> Tensor:
    """A tensor of a safetensors file, left where it lies: what is used is read then, and is the system's to forget.

    Not to be written to. The file may be deleted meanwhile, but not cut. Raises InputError for a dtype that torch does
    not have, and OSError.
    """
    info = header.tensors[name]
    dtype = torch_dtypes().get(info.dtype)
    if dtype is None or info.start % dtype.itemsize:
        raise InputError(f"{info.file.name}: {name} is {info.dtype} from byte {info.start} on, which cannot be mapped")
    try:
        storage = torch.UntypedStorage.from_file(str(info.file), False, info.start + info.bytes)
    except RuntimeError as error:  # torch has no OSError
        raise OSError(f"{info.file} cannot be mapped: {error}") from error
    flat = torch.empty(0, dtype=dtype).set_(storage, info.start // dtype.itemsize, (info.items,), (1,))
    return flat.view(info.shape)


@dataclass(frozen=True)
class _Shard:
    rows: Tensor  # (n, E) features, or (n, 4) boxes
    keys: Tensor  # (n, 32) bytes, SHA-256 of the pictures' files


def _read_shards(folder: Path, what: str) -> list[_Shard]:
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            header = read_header(path)
            keys = read_tensors(header, ["keys"])["keys"]
            shard = _Shard(mapped(header, what), keys)
            if shard.rows.dim() != 2 or keys.shape != (len(shard.rows), 32) or keys.dtype != torch.uint8:
                raise InputError(f"{path.name} is no shard of {what}")
        except (InputError, KeyError, OSError):  # a torn shard costs its time once more, nothing else
            with contextlib.suppress(OSError):
                path.unlink()
            continue
        found.append(shard)
    return found


def _locate(shards: Sequence[_Shard], wanted: np.ndarray) -> Tensor:
    """The row of each key (n, 32), counted through all shards, or -1; of several the first.

    By the first 8 of the 32 bytes, which are sorted, then by the rest: a million keys take half a second.
    """
    rows = np.full(len(wanted), -1, dtype=np.int64)
    if not shards or not len(wanted):
        return torch.from_numpy(rows)
    known = np.concatenate([shard.keys.numpy() for shard in shards]).view(np.uint64)  # (m, 4)
    wanted = wanted.view(np.uint64)
    heads, asked = known[:, 0], wanted[:, 0]
    order, pending = heads.argsort(), asked.argsort()  # sorted questions are answered out of the processor's cache
    heads = heads[order]
    at = np.searchsorted(heads, asked[pending])
    while len(pending):
        open_ = at < len(heads)
        open_[open_] = heads[at[open_]] == asked[pending[open_]]
        pending, at = pending[open_], at[open_]
        row = order[at]
        same = (known[row] == wanted[pending]).all(axis=1)
        better = same & ((rows[pending] < 0) | (row < rows[pending]))
        rows[pending[better]] = row[better]
        at = at + 1
    return torch.from_numpy(rows)


# ---- keys -----------------------------------------------------------------------------------------------------------


def state_key(state: dict[str, Tensor]) -> str:
    """SHA-256 of tensors: names, shapes, and values in fp32."""
    return content_hash(sorted(state.items()))


def content_keys(root: Path, names: Sequence[str], cache: Path) -> Generator[Event, None, list[str]]:
    """SHA-256 of every picture file; yields progress events. What was hashed before (path, size, time) is not read."""
    known = _known_keys(cache)

    def key(name: str) -> tuple[str | None, str]:
        path = root / name
        try:
            stamp = _stamp(path)
            return stamp, known.get(stamp) or content_key(path)
        except OSError:  # it will not decode either, and is listed then
            return None, hashlib.sha256(f"unreadable {name}".encode("utf-8", "surrogatepass")).hexdigest()

    found = []
    with ThreadPoolExecutor(8) as pool:
        for pair in pool.map(key, names):
            found.append(pair)
            if len(found) % EVERY == 0 or len(found) == len(names):
                yield progress("hash pictures", len(found), len(names))
    _remember(cache, known, {stamp: digest for stamp, digest in found if stamp})
    return [digest for _, digest in found]


def remember_keys(root: Path, keys: Mapping[str, str], cache: Path) -> None:
    """Lets `content_keys` know of files that have just been hashed, by name."""
    fresh = {}
    for name, key in keys.items():
        with contextlib.suppress(OSError):
            fresh[_stamp(root / name)] = key
    _remember(cache, _known_keys(cache), fresh)


def _stamp(path: Path) -> str:
    info = path.stat()
    return f"{path.resolve()}|{info.st_size}|{info.st_mtime_ns}"


def _known_keys(cache: Path) -> dict[str, str]:
    try:
        return json.loads((cache / HASHES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _remember(cache: Path, known: dict[str, str], found: dict[str, str]) -> None:
    if found.keys() <= known.keys():
        return
    with contextlib.suppress(OSError):  # without it they are read once more the next time
        cache.mkdir(parents=True, exist_ok=True)
        write_json(known | found, cache / HASHES)


def _folder(cache: Path, tower: VisionTower, precision: str, pictures: Pictures = PLAIN, view: int = 0) -> Path:
    look = _look(pictures, view)
    name = f"{state_key(tower.state_dict())} {asdict(tower.vision_config)} {PREPROCESSING} {precision}{look}"
    return cache / "features" / hashlib.sha256(name.encode()).hexdigest()[:24]


def _look(pictures: Pictures, view: int) -> str:
    """Names what a view has that CLIP's own crop has not."""
    crop = {"centre": "", "letterbox": " letterbox", "salient": f" salient: {SALIENCY}"}[pictures.crop]
    if not view:
        return crop
    chances = pictures.scale, pictures.flip, pictures.jitter, pictures.jitter_chance, pictures.grey
    return f"{crop} view {view} {chances} {AUGMENTATION}"


def _digests(keys: Sequence[str]) -> np.ndarray:  # hexadecimal -> (n, 32) bytes
    return np.frombuffer(bytes.fromhex("".join(keys)), dtype=np.uint8).reshape(-1, 32)


# ---- computing ------------------------------------------------------------------------------------------------------


def embed_files(
    tower: VisionTower,
    root: Path,
    names: Sequence[str],
    keys: Sequence[str],
    cache: Path,
    *,
    precision: str | None = None,
    batch: int | None = None,
    threads: int = THREADS,
    pictures: Pictures = PLAIN,
    view: int = 0,
) -> Generator[Event, None, tuple[Features, dict[str, str]]]:
    """Features of the pictures that decode, in the order of their names, and the reason for each one that does not.

    `keys` are the pictures' `content_keys`. Only pictures that the cache lacks are opened, each content once: equal
    pictures have one row. precision: what the tower computes in, "fp32", "bf16" or "fp16", each of which has a cache of
    its own; None takes `precision_on` the tower's device.
    batch: pictures in one pass; None takes `pictures_per_pass`, and in any case it is halved where memory is short.
    pictures, view: how they are made square. View 0 is the crop itself, the others vary, each by its picture's content:
    see `augment.seed_of`. Every view has a cache of its own.
    Yields progress events; a consumer that stops listening keeps the shards that were finished.
    """
    precision = precision or precision_on(tower.proj.device)
    boxes: dict[str, Box | None] = {}
    if pictures.crop == "salient":
        found = yield from salient_boxes(tower, root, names, keys, cache, precision=precision, threads=threads)
        boxes = dict(zip(keys, found, strict=True))
    size = batch or pictures_per_pass(tower, precision)

    def embed(of: Sequence[str], paths: Sequence[Path], broken: dict[Path, str]) -> Iterator[Tensor]:
        nonlocal size
        squares = [boxes[key] for key in of] if boxes else None
        seeds = [seed_of(key, view) for key in of] if view else None
        side = tower.vision_config.image_size
        for pixels in load_batches(paths, side, size, threads, broken, pictures, squares, seeds):
            part, size = embed_pixels(tower, pixels, precision, size)
            yield part

    folder = _folder(cache, tower, precision, pictures, view)
    stage = f"embed pictures, view {view + 1}" if view else "embed pictures"
    shards, rows, reasons = yield from _rows(folder, "features", root, names, keys, stage, embed)
    return Features([shard.rows for shard in shards], rows[rows >= 0]), reasons


def salient_boxes(
    tower: VisionTower,
    root: Path,
    names: Sequence[str],
    keys: Sequence[str],
    cache: Path,
    *,
    precision: str | None = None,
    threads: int = THREADS,
) -> Generator[Event, None, list[Box | None]]:
    """Of each picture the square that the tower attends to, None where it does not decode. Arguments: `embed_files`.

    The tower sees all of a picture, squeezed into its square. Squares are kept by content and tower, as features are.
    """
    precision = precision or precision_on(tower.proj.device)
    size = pictures_per_pass(tower, precision)

    def find(of: Sequence[str], paths: Sequence[Path], broken: dict[Path, str]) -> Iterator[Tensor]:
        nonlocal size
        side = tower.vision_config.image_size
        for part in in_batches(lambda i: load_whole(paths[i], side), paths, size, threads, broken):
            maps: Sequence[Tensor] = []
            if part:
                maps, size = _attended(tower, torch.stack([pixels for pixels, _ in part]), precision, size)
            found = [salient_box(each, *shape) for each, (_, shape) in zip(maps, part, strict=True)]
            yield torch.tensor(found, dtype=torch.int32).view(-1, 4)

    name = f"{state_key(tower.state_dict())} {asdict(tower.vision_config)} {SALIENCY} {precision}"
    folder = cache / "salient" / hashlib.sha256(name.encode()).hexdigest()[:24]
    stage = "find salient squares"
    shards, rows, reasons = yield from _rows(folder, "boxes", root, names, keys, stage, find)
    table = torch.cat([shard.rows for shard in shards])[rows].tolist() if shards else []
    return [None if row < 0 else tuple(table[i]) for i, row in enumerate(rows.tolist())]


def _rows(
    folder: Path,
    what: str,
    root: Path,
    names: Sequence[str],
    keys: Sequence[str],
    stage: str,
    compute: Callable[[Sequence[str], Sequence[Path], dict[Path, str]], Iterator[Tensor]],
) -> Generator[Event, None, tuple[list[_Shard], Tensor, dict[str, str]]]:
    """Shards of `what`, the row of each picture in them or -1, and the reasons of those that do not decode, by name.

    compute: of contents that the folder lacks, given as keys, paths and what to tell of broken ones, the rows
    (n, width) of those that decode, in order, part by part; they are kept in the folder.
    """
    shards, wanted = _read_shards(folder, what), _digests(keys)
    rows = _locate(shards, wanted)
    fresh = list({keys[i]: names[i] for i in (rows < 0).nonzero()[:, 0].tolist()}.items())
    done = start = len(names) - len(fresh)
    reasons: dict[str, str] = {}  # by key
    yield progress(stage, done, len(names))
    taken = 0
    while taken < len(fresh):
        chunk = fresh[taken : taken + max(SHARD, min(LONGEST, taken // GROWTH))]
        taken += len(chunk)
        paths = [root / name for _, name in chunk]
        broken: dict[Path, str] = {}
        parts = []
        for part in compute([key for key, _ in chunk], paths, broken):
            parts.append(part)
            done += len(part)
            yield progress(stage, done, len(names))
        reasons |= {key: broken[path] for (key, _), path in zip(chunk, paths, strict=True) if path in broken}
        whole = [key for (key, _), path in zip(chunk, paths, strict=True) if path not in broken]
        if whole:
            shard = _Shard(torch.cat(parts), torch.from_numpy(_digests(whole).copy()))
            try:
                shard = _write_shard(folder, what, shard)
            except (OSError, InputError) as error:  # the latter where someone deletes it at once
                advice = f"{what} are not kept: {error}"
                yield {"type": "alarm", "alarm": "cache", "step": 0, "raised": True, "advice": advice, "value": None}
            shards.append(shard)
    rows = _locate(shards, wanted) if done > start else rows
    return shards, rows, {name: reasons[key] for name, key in zip(names, keys, strict=True) if key in reasons}


def precision_on(device: torch.device) -> str:
    """What pictures are embedded in: fp16 on CUDA, several times as fast; features are kept in fp16 anyhow."""
    return "fp16" if device.type == "cuda" else "fp32"


def pictures_per_pass(tower: VisionTower, precision: str) -> int:
    """As many as suit the device, or fewer, for which its memory suffices now."""
    device = tower.proj.device
    most = BATCH.get(device.type, BATCH_ON_GPU)
    return embedding_batch(tower.vision_config, free(device), precision, device, most)


def embed_pixels(tower: VisionTower, pixels: Tensor, compute: str, size: int) -> tuple[Tensor, int]:
    """Features (B, E) fp16 on the CPU of bytes (B, 3, S, S), and how many pictures one pass has memory for.

    Where `compute` is fp16 and its range did not suffice, pictures are embedded once more in fp32.
    """
    if not len(pixels):
        return torch.empty(0, tower.proj.shape[1], dtype=torch.float16), size

    def embed(part: Tensor) -> Tensor:
        with torch.no_grad(), precision(DTYPES[compute], tower):
            return tower(part).half()

    features, size = _in_passes(embed, pixels, size, tower.proj.device)
    if compute == "fp16" and not features.isfinite().all():
        return embed_pixels(tower, pixels, "fp32", size)
    return features, size


def _attended(tower: VisionTower, pixels: Tensor, compute: str, size: int) -> tuple[Tensor, int]:
    """Saliency (B, side, side) on the CPU of bytes (B, 3, S, S), and how many pictures one pass has memory for."""

    def attended(part: Tensor) -> Tensor:
        with precision(DTYPES[compute], tower):
            return saliency(tower, part)

    return _in_passes(attended, pixels, size, tower.proj.device)


def _in_passes(
    compute: Callable[[Tensor], Tensor], pixels: Tensor, size: int, device: torch.device
) -> tuple[Tensor, int]:
    """What `compute` makes of normalised pixels, `size` of them at once, halved as often as memory is short."""
    while True:
        try:
            return torch.cat([compute(normalize(part.to(device))).cpu() for part in pixels.split(size)]), size
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        size = -(-min(size, len(pixels)) // 2)  # out here the failed pass's tensors are let go of
        release(device)


def embed_now(
    tower: VisionTower,
    paths: Sequence[Path],
    stage: str,
    *,
    pictures: Pictures = PLAIN,
    boxes: Sequence[Box | None] | None = None,
) -> Generator[Event, None, Tensor]:
    """Features (pictures, E) fp32 on the CPU, of a tower that trains, as it sees the pictures now; nothing is kept.

    Yields progress events. Raises InputError naming a picture that does not decode.
    """
    device, found, done = tower.proj.device, [torch.empty(0, tower.proj.shape[1])], 0
    for pixels in load_batches(paths, tower.vision_config.image_size, batch=64, pictures=pictures, boxes=boxes):
        with torch.no_grad():
            found.append(tower(normalize(pixels.to(device))).float().cpu())
        done += len(pixels)
        yield progress(stage, done, len(paths))
    return torch.cat(found)


def _write_shard(folder: Path, what: str, shard: _Shard) -> _Shard:
    """Kept on disk, and read from there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{uuid.uuid4().hex}.safetensors"
    write_safetensors({what: shard.rows, "keys": shard.keys}, path, {})
    return _Shard(mapped(read_header(path), what), shard.keys)


def index_keys(index: Index, cache: Path) -> Generator[Event, None, dict[str, str]]:
    """`content_keys` of an index's pictures, by their paths."""
    names = [picture.path for picture in index.pictures]
    return dict(zip(names, (yield from content_keys(index.root, names, cache)), strict=True))


def embed_index(
    tower: VisionTower,
    index: Index,
    cache: Path,
    keys: Mapping[str, str] | None = None,
    *,
    precision: str | None = None,
    pictures: Pictures = PLAIN,
) -> Generator[Event, None, tuple[Index, Features, dict[str, str]]]:
    """The pictures that decode, their features (pictures, embed_dim), and the reasons of those that do not.

    keys: `index_keys` of these pictures, and maybe more; None computes them. Others: as in `embed_files`.
    """
    if keys is None:
        keys = yield from index_keys(index, cache)
    names = [picture.path for picture in index.pictures]
    keyed = [keys[name] for name in names]
    features, broken = yield from embed_files(
        tower, index.root, names, keyed, cache, precision=precision, pictures=pictures
    )
    return index.without(broken), features, broken
