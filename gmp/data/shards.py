"""Feature shards: what training reads of a data set of tars, one memory-mapped file per tar.

`embed_tars` streams every tar once and writes its shard: features of a locked vision tower, token ids of all captions,
content hashes, names and texts. Training opens shards, never tars, and maps a few at a time: a data set may be larger
than memory. Tokens are those of the captions as they are; what a run's policy makes of these is tokenized as they are
taken. Pictures have positions over all shards, in the order of the tars.

    features (n, E) fp16    keys (n, 32) uint8, SHA-256 of the pictures' files
    picture_group, draw (n,) int64: from the key; equal for equal files; the place in the order of being held out
    counts, first (n,) int32: captions of a picture, and the row of the first one
    ids (captions, L) int32    caption_group (captions,) int64: equal for equal tokens
    names, captions uint8: UTF-8, one behind the other    name_ends, caption_ends int64
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import io
import json
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate, chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import Captions, Pictures
from ..contrastive import Gallery
from ..duplicates import alike
from ..errors import InputError
from ..events import Event, progress
from ..features import embed_pixels, mapped, pictures_per_pass, precision_on, state_key
from ..files import read_header, write_bytes, write_safetensors
from ..pairs import Batch, drawn_ids, together
from ..tokenizer import Tokenize, lengths
from .captions import CaptionReport, Index, Picture, held_out_order
from .images import PLAIN, PREPROCESSING, THREADS, load_pixels
from .policy import CUT_AT, chosen, finish, has_draws
from .shard_sampler import ShardSampler
from .tars import Sample, Tar, Tars, read_samples
from .words import Words

if TYPE_CHECKING:
    from ..clip import VisionTower

OPENED = 48  # shards that are mapped at a time
LISTED = 1000  # pictures left out of a tar, or of all, that are named; all are counted
SHOWN = 2000  # small pictures that are kept for reports, of those that will be held out first
PICTURES = "pictures"  # their folder, beside the shards
VERSION = 1  # of what a shard holds
AS_THEY_ARE = Captions(cut="tokens")


@dataclass(frozen=True)
class Row:
    """One picture of a shard."""

    name: str  # in its tar
    key: str  # SHA-256 of its file, hex
    captions: tuple[str, ...]


def write_shard(
    path: Path, rows: Sequence[Row], features: Tensor, tokenize: Tokenize, about: dict[str, object]
) -> None:
    """features (n, E) of the rows; about: what `Shards.report` tells of them. Atomic."""
    captions = [caption for row in rows for caption in row.captions]
    tokens = tokenize(captions)
    counts = [len(row.captions) for row in rows]
    names, name_ends = _texts([row.name for row in rows])
    texts, caption_ends = _texts(captions)
    keys = torch.from_numpy(np.frombuffer(bytes.fromhex("".join(row.key for row in rows)), np.uint8).copy())
    tensors = {
        "features": features.half(),
        "keys": keys.view(len(rows), 32),
        "picture_group": torch.tensor([_number(bytes.fromhex(row.key[:16])) for row in rows], dtype=torch.int64),
        "draw": torch.tensor([_number(held_out_order(row.key)) for row in rows], dtype=torch.int64),
        "counts": torch.tensor(counts, dtype=torch.int32),
        "first": torch.tensor(list(accumulate(counts, initial=0))[:-1], dtype=torch.int32),
        "ids": tokens.ids.int(),
        "caption_group": torch.tensor([_number(_digest(row.tobytes())) for row in tokens.ids.numpy()]).long(),
        "names": names,
        "name_ends": name_ends,
        "captions": texts,
        "caption_ends": caption_ends,
    }
    cut = finish(captions, Captions(), tokenize) if tokens.truncated else None
    about = {"truncated": tokens.truncated, "specials": tokens.specials} | about
    about |= {f"cut at a {at}": cut.count(at) if cut else 0 for at in CUT_AT}  # where a run cuts so
    write_safetensors(tensors, path, {"shard": json.dumps(about)})


def _number(digest: bytes) -> int:
    """62 bits of a hash, which `Gallery` has room for. Among a billion contents, any share one with a chance of 0.1."""
    return int.from_bytes(digest[:8], "big") >> 2


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


def _texts(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """UTF-8 of all, one behind the other, and where each one ends."""
    encoded = [text.encode("utf-8", "backslashreplace") for text in texts]
    ends = torch.tensor(list(accumulate(map(len, encoded))), dtype=torch.int64)
    return torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy()), ends


# ---- reading --------------------------------------------------------------------------------------------------------


class Shards:
    """The pictures of all shards by position, and their captions by position, shard after shard.

    Few shards are mapped at a time: the memory that reading takes does not grow with their number.
    """

    def __init__(self, paths: Sequence[Path], opened: int = OPENED):
        """Reads the headers. Raises InputError for a file that is damaged, or no shard."""
        self.paths = tuple(paths)
        self._opened, self._mapped = opened, OrderedDict()
        self.about: list[dict[str, object]] = []
        pictures, captions = [], []
        for path in self.paths:
            header = read_header(path)
            try:
                self.about.append(json.loads(header.metadata["shard"]))
                shapes = header.tensors["features"].shape, header.tensors["ids"].shape
            except (KeyError, ValueError):
                raise InputError(f"{path} is no feature shard; delete it, and it is made again") from None
            pictures.append(shapes[0][0])
            captions.append(shapes[1][0])
        self.pictures = tuple(pictures)  # of each shard
        self.starts = torch.tensor(
            [0, *accumulate(pictures)]
        )  # (shards + 1,) position of its first picture, and the end
        self.caption_starts = torch.tensor([0, *accumulate(captions)])

    def __len__(self) -> int:
        return self.starts[-1].item()

    def shard(self, number: int) -> dict[str, Tensor]:
        """The tensors of one shard, mapped: nothing is read before it is used. Not to be written to."""
        if number in self._mapped:
            self._mapped.move_to_end(number)
        else:
            header = read_header(self.paths[number])
            self._mapped[number] = {one: mapped(header, one) for one in header.tensors}
            while len(self._mapped) > self._opened:
                self._mapped.popitem(last=False)
        return self._mapped[number]

    def of_pictures(self, name: str, positions: Tensor) -> Tensor:
        """Rows of a tensor that has one per picture: (n,) positions -> (n, …)"""
        return self._rows(name, positions, self.starts)

    def of_captions(self, name: str, positions: Tensor) -> Tensor:
        """Rows of a tensor that has one per caption: (n,) positions -> (n, …)"""
        return self._rows(name, positions, self.caption_starts)

    def first_caption(self, positions: Tensor) -> Tensor:
        """The position of each picture's first caption: (n,) -> (n,) int64"""
        return self.of_pictures("first", positions) + self.caption_starts[_shard_of(positions, self.starts)]

    def _rows(self, name: str, positions: Tensor, starts: Tensor) -> Tensor:
        if len(positions) and not 0 <= positions.min() <= positions.max() < starts[-1]:
            raise IndexError(f"positions {positions.min()} to {positions.max()}; there are {starts[-1]}")
        numbers = _shard_of(positions, starts)
        found = None
        for number in numbers.unique().tolist():
            here = (numbers == number).nonzero()[:, 0]
            rows = self.shard(number)[name][positions[here] - starts[number]]
            if found is None:
                found = rows.new_empty(len(positions), *rows.shape[1:])
            found[here] = rows
        return self.shard(0)[name][:0].clone() if found is None else found

    def index(self, positions: Tensor, root: Path) -> Index:
        """Names and captions of some pictures; their small pictures, where they were kept, lie in `root`."""
        pictures = []
        for position in positions.tolist():
            number = _shard_of(torch.tensor(position), self.starts).item()
            shard, row = self.shard(number), position - self.starts[number].item()
            first = shard["first"][row].item()
            rows = range(first, first + shard["counts"][row].item())
            captions = tuple(_text(shard["captions"], shard["caption_ends"], caption) for caption in rows)
            pictures.append(Picture(picture_name(bytes(shard["keys"][row].tolist()).hex()), captions))
        return Index(root, tuple(pictures), self.report())

    def texts(self, positions: Tensor) -> list[str]:
        """Captions: (n,) positions -> n texts"""
        found = []
        numbers = _shard_of(positions, self.caption_starts)
        for number, row in zip(numbers.tolist(), (positions - self.caption_starts[numbers]).tolist(), strict=True):
            shard = self.shard(number)
            found.append(_text(shard["captions"], shard["caption_ends"], row))
        return found

    def told(self, name: str) -> int:
        """The sum of a number over all tars: `left_out_count`, `truncated`, `specials`, `cut at a sentence`, …"""
        return sum(one.get(name, 0) for one in self.about)

    def report(self) -> CaptionReport:
        """What was found in all tars. `broken` names the first `LISTED` of what was left out."""
        left_out = [(f"{one['tar']}: {name}", reason) for one in self.about for name, reason in one["left_out"]]
        listed = len(self) + self.told("left_out_count")
        return CaptionReport(listed=listed, broken=tuple(left_out[:LISTED]))


def _shard_of(positions: Tensor, starts: Tensor) -> Tensor:
    return torch.bucketize(positions, starts[1:], right=True)


def _text(texts: Tensor, ends: Tensor, row: int) -> str:
    begin = ends[row - 1].item() if row else 0
    return bytes(texts[begin : ends[row]].tolist()).decode()


def picture_name(key: str) -> str:
    """The file of a small picture. Names in tars are a stranger's and become no paths."""
    return f"{key[:32]}.jpg"


# ---- held out, and trained on ---------------------------------------------------------------------------------------


def hold_out(shards: Shards, count: int) -> Tensor:
    """Positions of about `count` pictures that are not trained on, in an order that is theirs: (n,) int64.

    They are chosen by content, as `captions.split` chooses: the same ones from tars as from a folder, whatever the tars
    are called and however the pictures lie in them. Copies of a picture stay together; where they do not fit, fewer are
    held out.
    """
    draws = positions = torch.empty(0, dtype=torch.int64)
    for number, start in enumerate(shards.starts[:-1].tolist()):
        mine = shards.shard(number)["draw"]
        draws = torch.cat([draws, mine])
        positions = torch.cat([positions, torch.arange(start, start + len(mine))])
        distinct = draws.unique()  # sorted
        if len(distinct) > 2 * count:  # some may have more copies than fit
            kept = draws < distinct[2 * count]
            draws, positions = draws[kept], positions[kept]
    held: list[int] = []
    for draw in draws.unique():
        copies = positions[draws == draw].tolist()
        if len(held) + len(copies) <= count:
            held += copies
    return torch.tensor(held, dtype=torch.int64)


class ShardPairs:
    """The training pairs: what `Pairs` offers, read as it is asked for. Positions leave out what is held out."""

    pixels = None  # the vision tower is locked

    def __init__(
        self,
        shards: Shards,
        held: Tensor,
        policy: Captions = AS_THEY_ARE,
        tokenize: Tokenize | None = None,
        seed: int = 0,
    ):
        """held: positions in the shards of pictures that are not trained on.

        tokenize: for what the policy makes of captions; without it they are taken as they are.
        """
        self.shards, self.policy, self.tokenize, self.seed = shards, policy, tokenize, seed
        self.words = None if tokenize is None else Words(tokenize)
        self._held = held.sort().values
        self._before = self._held - torch.arange(len(held))  # training pictures before each one that is held out
        inside = torch.bincount(_shard_of(self._held, shards.starts), minlength=len(shards.pictures))
        self.pictures = tuple((torch.tensor(shards.pictures) - inside).tolist())  # of each shard
        self.features = Rows(self, "features")
        self.counts = Rows(self, "counts", {"first": 1, "first_two": 2}.get(policy.choose))

    def __len__(self) -> int:
        return len(self.shards) - len(self._held)

    def place(self, positions: Tensor) -> Tensor:
        """Positions in the shards: (n,) -> (n,)"""
        return positions + torch.bucketize(positions, self._before, right=True)

    def sampler(self, batch: int, seed: int) -> ShardSampler:
        """Raises InputError when no batch can be filled."""
        return ShardSampler(self.pictures, self.counts, batch, seed, in_turn=self.policy.choose == "in_turn")

    @functools.cached_property
    def gallery(self) -> Gallery:
        """All training pictures. It takes some tens of bytes for each, and so is not made before it is asked for."""
        places, counts = self.place(torch.arange(len(self))), self.counts[:].long()
        within = torch.arange(counts.sum()) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        captions = self.shards.first_caption(places).repeat_interleave(counts) + within
        same_picture = self.shards.of_pictures("picture_group", places)
        return Gallery.of(self.features, same_picture, self.shards.of_captions("caption_group", captions), counts)

    def gallery_at(self, batch: Batch) -> Gallery:
        return self.gallery.at(batch.pictures)

    def image_features(self, batch: Batch, rows: slice | Tensor, device: torch.device) -> Tensor:
        """As of `Pairs`."""
        return self.features[batch.pictures[rows]].to(device)

    def batch(self, pictures: Tensor, choice: Tensor, upcoming: Tensor, step: int = 0) -> Batch:
        """pictures, choice: (B,) positions of pictures, and which of its captions each one has. step: from 0."""
        shards, places = self.shards, self.place(pictures)
        if self.policy.choose == "longest":
            choice = self._longest(places)
        captions = shards.first_caption(places) + choice
        ids = shards.of_captions("ids", captions).long()
        same_picture = shards.of_pictures("picture_group", places)
        if len(anew := self._anew(ids)):
            texts, place = shards.texts(captions[anew]), f"{self.seed} captions {step}"
            ids[anew] = drawn_ids(texts, self.policy, self.words, place)
            if has_draws(self.policy):
                same_picture = together(same_picture, alike(ids))
        same_caption = shards.of_captions("caption_group", captions)
        return Batch(pictures, upcoming, ids, same_picture, same_caption)

    def _anew(self, ids: Tensor) -> Tensor:
        """Rows whose tokens are not those of the caption as it is."""
        policy = self.policy
        if self.tokenize is None:
            return torch.empty(0, dtype=torch.int64)
        if policy.prefix or policy.suffix or has_draws(policy):
            return torch.arange(len(ids))
        full = lengths(ids) == ids.shape[1]  # it may have been cut
        return (full & (policy.cut != "tokens")).nonzero()[:, 0]

    def _longest(self, places: Tensor) -> Tensor:
        """Which of its captions each picture has where the policy is the longest: (n,) places -> (n,)"""
        first, counts = self.shards.first_caption(places), self.shards.of_pictures("counts", places)
        rows = zip(first.tolist(), counts.tolist(), strict=True)
        captions = [tuple(self.shards.texts(torch.arange(start, start + count))) for start, count in rows]
        taken = chosen(captions, self.policy, self.tokenize)
        return torch.tensor([each.index(one[0]) for each, one in zip(captions, taken, strict=True)])


@dataclass(frozen=True)
class Rows:
    """A tensor with a row for each training picture; floats become fp32, numbers `most` at the most."""

    pairs: ShardPairs
    name: str
    most: int | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *self.pairs.shards.shard(0)[self.name].shape[1:]

    def __getitem__(self, positions: Tensor | slice) -> Tensor:
        """(n,) positions -> (n, …) on the CPU"""
        if isinstance(positions, slice):
            positions = torch.arange(*positions.indices(len(self)))
        rows = self.pairs.shards.of_pictures(self.name, self.pairs.place(positions))
        rows = rows if self.most is None else rows.clamp_max(self.most)
        return rows.float() if rows.is_floating_point() else rows


# ---- embedding ------------------------------------------------------------------------------------------------------


def shard_paths(
    tower: VisionTower, tars: Tars, tokenize: Tokenize, cache: Path, precision: str = "fp32", crop: str = "centre"
) -> list[Path]:
    """Where the shards of tars lie. Another tower, precision, preprocessing, crop or tokenizer has other ones."""
    probe = tokenize(["", "a photo of a cat"]).ids.tolist()
    seen = f"{state_key(tower.state_dict())} {asdict(tower.vision_config)} {PREPROCESSING} {precision}"
    seen += "" if crop == "centre" else f" {crop}"
    folder = cache / "shards" / hashlib.sha256(f"{VERSION} {seen} {probe}".encode()).hexdigest()[:24]
    return [folder / f"{tar.key[:32]}.safetensors" for tar in tars.files]


def embed_tars(
    tower: VisionTower,
    tars: Tars,
    tokenize: Tokenize,
    cache: Path,
    *,
    precision: str | None = None,
    batch: int | None = None,
    threads: int = THREADS,
    part: tuple[int, int] = (0, 1),
    pictures: Pictures = PLAIN,
) -> Generator[Event, None, list[Path]]:
    """Embeds the tars that have no shard yet, one after the other; returns `shard_paths`, of all.

    precision: as in `features.embed_files`. batch: pictures in one pass; None takes what suits the device, and in any
    case fewer where memory is short. part: (rank, size): only every size-th tar, from the one at rank on, for processes
    that share the work. pictures: their crop, centre or letterbox. Yields progress events; a consumer that stops
    listening keeps the shards that were finished.
    Raises InputError, when all else is done, with all tars that are damaged or cut.
    """
    precision = precision or precision_on(tower.proj.device)
    paths = shard_paths(tower, tars, tokenize, cache, precision, pictures.crop)
    mine = list(zip(tars.files, paths, strict=True))[part[0] :: part[1]]
    faults = []
    for done, (tar, path) in enumerate(mine):
        yield progress("embed tars", done, len(mine))
        if _is_whole(path):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        shown = _shown(len(tars))
        try:
            for count in _embed_tar(tower, tar, tokenize, path, precision, batch, threads, shown, pictures):
                yield progress("embed tars", done, len(mine)) | {"pictures": count}
        except InputError as error:
            faults.append(str(error))
    yield progress("embed tars", len(mine), len(mine))
    if faults:
        more = f"\n  … {len(faults)} in all" if len(faults) > 6 else ""
        raise InputError("Some tars could not be read; the others are done:\n  " + "\n  ".join(faults[:6]) + more)
    return paths


def _shown(tars: int) -> int:
    """How many small pictures of each tar are kept: enough for those that will be held out, however many tars."""
    return max(32, -(-SHOWN // tars))


def _is_whole(path: Path) -> bool:
    """Whether there is a shard. One that is torn costs its time once more, nothing else."""
    try:
        Shards([path])
    except InputError:
        return False
    return True


def _embed_tar(
    tower: VisionTower,
    tar: Tar,
    tokenize: Tokenize,
    path: Path,
    precision: str,
    batch: int | None,
    threads: int,
    shown: int,
    looks: Pictures,
) -> Iterator[int]:
    """Writes the shard of a tar; yields how many pictures are embedded."""
    size = tower.vision_config.image_size
    batch = batch or pictures_per_pass(tower, precision)
    left_out: list[tuple[str, str]] = []
    rows: list[Row] = []
    features = [torch.empty(0, tower.proj.shape[1], dtype=torch.float16)]
    small: list[tuple[int, str, bytes]] = []  # a heap: the picture that is held out last stands first

    def leave_out(name: str, reason: str) -> None:
        left_out.append((name if name.isprintable() else ascii(name), reason))  # a stranger's, and will be printed

    for decoded in _decoded(read_samples(tar, leave_out), size, batch, threads, leave_out, looks):
        pixels = torch.stack([picture for _, picture in decoded])  # (B, 3, S, S) bytes
        part, batch = embed_pixels(tower, pixels, precision, batch)
        features.append(part)
        rows += [row for row, _ in decoded]
        for row, picture in decoded:
            place = -_number(held_out_order(row.key))
            if len(small) < shown or place > small[0][0]:
                (heapq.heappushpop if len(small) == shown else heapq.heappush)(small, (place, row.key, _jpeg(picture)))
        yield len(rows)
    pictures = path.parent / PICTURES
    pictures.mkdir(exist_ok=True)
    for _, key, content in small:
        write_bytes(content, pictures / picture_name(key))
    about = {"tar": tar.url, "left_out_count": len(left_out), "left_out": left_out[:LISTED]}
    write_shard(path, rows, torch.cat(features), tokenize, about)


def _decoded(
    samples: Iterator[Sample],
    size: int,
    batch: int,
    threads: int,
    leave_out: Callable[[str, str], object],
    looks: Pictures,
) -> Iterator[list[tuple[Row, Tensor]]]:
    """Batches of pictures as bytes (3, size, size); threads decode some ahead while the consumer works."""

    def decode(sample: Sample) -> tuple[Row, Tensor]:
        row = Row(sample.name, sample.key, sample.captions)
        return row, load_pixels(io.BytesIO(sample.picture), size, sample.name, looks)

    queue: deque[tuple[str, Future]] = deque()
    ready: list[tuple[Row, Tensor]] = []
    with ThreadPoolExecutor(threads, thread_name_prefix="gmp-tar") as pool:
        try:
            for sample in chain(samples, repeat(None, batch + threads)):  # None: the queue runs empty
                if sample is not None:
                    queue.append((sample.name, pool.submit(decode, sample)))
                if queue and (sample is None or len(queue) > batch + threads):
                    name, future = queue.popleft()
                    try:
                        ready.append(future.result())
                    except InputError as error:
                        leave_out(name, str(error).removeprefix(f"{name}: "))
                if len(ready) == batch:
                    yield ready
                    ready = []
            if ready:
                yield ready
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _jpeg(picture: Tensor) -> bytes:
    """A picture as the tower sees it, (3, S, S) bytes, as a small file."""
    content = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(content, format="JPEG", quality=85)
    return content.getvalue()
