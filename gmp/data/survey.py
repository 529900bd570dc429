"""One pass over the files of a data set: what each picture is, whether it can be read, and what it looks like.

What is found is appended to a file in the cache folder as the pass goes on, so that one that was killed goes on where
it was, and the next one reads no picture whose size and time are the same. The file can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..events import Event, progress
from .images import PREPROCESSING, THREADS, load_whole
from .perceptual import SIDE, Looks, looks

VERSION = "looks of the whole picture; version 1"  # of what is kept: change it when rows or hashes change
AT_ONCE = 64  # pictures in one piece of work, and at least kept together
EVERY = 512  # pictures between two progress events, of those that are remembered too


@dataclass(frozen=True)
class Survey:
    """What is known of N pictures, in their order; of those with a fault only name, bytes and key are."""

    names: tuple[str, ...]
    bytes: np.ndarray  # (N,) int64, of the file; 0 where it is not there
    formats: tuple[str, ...]  # such as "JPEG"; "" with a fault
    widths: np.ndarray  # (N,) int32 pixels, turned as EXIF says
    heights: np.ndarray  # (N,) int32
    keys: np.ndarray  # (N, 32) bytes: SHA-256 of the file, as `content_key`; zeros where it could not be read
    looks: Looks  # of the whole picture, squeezed into a square
    faults: dict[str, str]  # name -> why the picture cannot be used
    remembered: int  # pictures that were not read again

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def readable(self) -> np.ndarray:
        """(N,) bool"""
        return np.array([name not in self.faults for name in self.names], dtype=bool)

    def content_keys(self) -> dict[str, str]:
        """`features.index_keys` of these pictures; of a file that could not be read, a key that no other one has."""
        return {
            name: key.tobytes().hex() if key.any() else hashlib.sha256(f"unreadable {name}".encode(*_ANY)).hexdigest()
            for name, key in zip(self.names, self.keys, strict=True)
        }


_ANY = ("utf-8", "surrogatepass")  # names of files need not be text


def survey(root: Path, names: Sequence[str], cache: Path, *, threads: int = THREADS) -> Generator[Event, None, Survey]:
    """Looks at every picture `root / name` once. Yields progress events; a consumer that stops listening ends it.

    An event of type "alarm" says so where nothing can be kept in the cache folder. Raises InputError where the folder
    is gone at the end: then no picture is at fault.
    """
    if threads < 1:
        raise InputError(f"Pictures can't be looked at by {threads} threads; at least 1 is needed.")
    columns = _Columns(names)
    memory = cache / "survey" / f"{_digest(root)}.jsonl"
    stamps = yield from _stamps(root, names, threads)
    known = np.zeros(len(names), dtype=bool)
    _recall(memory, columns, stamps, known)
    remembered = done = int(known.sum())
    yield progress("look at pictures", done, len(names))
    fresh = np.flatnonzero(~known).tolist()
    pieces = [fresh[at : at + AT_ONCE] for at in range(0, len(fresh), AT_ONCE)]
    notes = _Notes(memory)
    try:
        for piece, rows in _ahead(lambda piece: _look_at(root, names, stamps, piece), pieces, threads):
            for place, row in zip(piece, rows, strict=True):
                columns.put(place, row)
            if alarm := notes.add([row for row in rows if row[_STAMP] is not None]):
                yield alarm
            done += len(piece)
            yield progress("look at pictures", done, len(names))
    finally:
        notes.close()
    if names and not root.is_dir():
        raise InputError(
            f"The folder {root} is gone; it was there before. Connect its disk again, and start once more."
        )
    return columns.survey(remembered)


def _ahead(work, pieces: Sequence[list[int]], threads: int) -> Iterator[tuple[list[int], list[list]]]:
    """The results of all pieces in their order, some ahead of the consumer, done by threads."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="gmp-survey")
    try:
        queue = deque((piece, pool.submit(work, piece)) for piece in pieces[: 4 * threads])
        for following in [*pieces[4 * threads :], *[None] * len(queue)]:
            piece, result = queue.popleft()
            yield piece, result.result()
            if following is not None:
                queue.append((following, pool.submit(work, following)))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _stamps(root: Path, names: Sequence[str], threads: int) -> Generator[Event, None, list[tuple[int, int] | None]]:
    """Size and time of every file, None where there is none. By threads, which a folder in a network needs."""

    def stamp(name: str) -> tuple[int, int] | None:
        try:
            info = os.stat(os.path.join(root, name))
        except OSError:
            return None
        return info.st_size, info.st_mtime_ns

    found: list[tuple[int, int] | None] = []
    with ThreadPoolExecutor(threads) as pool:
        for at in range(0, len(names), EVERY * 16):
            part = names[at : at + EVERY * 16]
            pieces = [part[first : first + EVERY] for first in range(0, len(part), EVERY)]
            for piece in pool.map(lambda piece: [stamp(name) for name in piece], pieces):
                found += piece
            yield progress("find pictures", len(found), len(names))
    return found


# ---- one picture ----------------------------------------------------------------------------------------------------

# A row, as it is kept: name, size and time, fault, format, width, height, key, hash, lights, colours, contrast
_STAMP = 1
_STARTS = {b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WebP", b"GIF8": "GIF", b"BM": "BMP"}


def _look_at(root: Path, names: Sequence[str], stamps: Sequence, piece: list[int]) -> list[list]:
    """A row for every picture. A stamp of None is not kept: what failed may be the disk and not the picture."""
    rows, small, places = [], [], []
    for place in piece:
        path = root / names[place]
        row = [names[place], stamps[place], "", "", 0, 0, "", 0, "", "", 0]
        rows.append(row)
        try:
            content = path.read_bytes()
        except OSError as error:
            row[1], row[2] = None, _not_read(error)
            continue
        row[1] = row[1] and list(row[1])
        row[6] = hashlib.sha256(content).hexdigest()
        try:
            pixels, (row[4], row[5]) = load_whole(path, SIDE)
            row[3] = _format(content)
        except InputError as error:
            row[2] = str(error).removeprefix(f"{path}: ")
            continue
        small.append(pixels.numpy())
        places.append(len(rows) - 1)
    if small:
        seen = looks(np.stack(small))
        for at, place in enumerate(places):
            maps = (one[at].tobytes().hex() for one in (seen.lights, seen.colours))
            rows[place][7:] = int(seen.hashes[at]), *maps, int(seen.contrasts[at])
    return rows


def _format(content: bytes) -> str:
    """Of a picture that could be decoded."""
    return next((name for start, name in _STARTS.items() if content.startswith(start)), "another format")


def _not_read(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file."
    return f"the file can't be read ({error.strerror or error})."


class _Columns:
    """Rows by position, as arrays: a million of them take 200 MB."""

    def __init__(self, names: Sequence[str]):
        count = len(names)
        self.names = tuple(names)
        self._bytes = np.zeros(count, np.int64)
        self._formats = [""] * count
        self._sizes = np.zeros((count, 2), np.int32)
        self._keys = np.zeros((count, 32), np.uint8)
        self._hashes = np.zeros(count, np.uint64)
        self._lights = np.zeros((count, 64), np.uint8)
        self._colours = np.zeros((count, 32), np.int8)
        self._contrasts = np.zeros(count, np.uint8)
        self._faults: dict[int, str] = {}
        self._kinds: dict[str, str] = {}  # one string for all pictures of a format

    def put(self, place: int, row: list) -> None:
        """Raises ValueError, TypeError or OverflowError for what is no row; the place is to be filled again then."""
        _, stamp, fault, kind, width, height, key, bits, lights, colours, contrast = row
        if not isinstance(fault, str) or not isinstance(kind, str) or (not fault and not kind):
            raise ValueError("a row that says neither what a picture is nor what is wrong with it")
        if key:
            self._keys[place] = np.frombuffer(bytes.fromhex(key), np.uint8).reshape(32)
        if not fault:
            self._lights[place] = np.frombuffer(bytes.fromhex(lights), np.uint8).reshape(64)
            self._colours[place] = np.frombuffer(bytes.fromhex(colours), np.int8).reshape(32)
            if not self._keys[place].any():
                raise ValueError("a picture without a key")
        self._sizes[place], self._hashes[place], self._contrasts[place] = (width, height), bits, contrast
        self._bytes[place] = stamp[0] if stamp else 0
        self._formats[place] = self._kinds.setdefault(kind, kind)
        self._faults.pop(place, None)  # of a row before this one
        if fault:
            self._faults[place] = fault

    def survey(self, remembered: int) -> Survey:
        faults = {self.names[place]: self._faults[place] for place in sorted(self._faults)}
        return Survey(
            self.names, self._bytes, tuple(self._formats), self._sizes[:, 0], self._sizes[:, 1], self._keys,
            Looks(self._hashes, self._lights, self._colours, self._contrasts), faults, remembered,
        )  # fmt: skip


# ---- what is kept ---------------------------------------------------------------------------------------------------


def _digest(root: Path) -> str:
    return hashlib.sha256(f"{VERSION} {PREPROCESSING} {root.resolve()}".encode(*_ANY)).hexdigest()[:24]


def _recall(memory: Path, columns: _Columns, stamps: Sequence, known: np.ndarray) -> None:
    """Fills in the rows of files that have not changed. Lines that are torn or damaged are passed over."""
    places = {name: place for place, name in enumerate(columns.names)}
    with contextlib.suppress(OSError), memory.open(encoding="ascii", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError, OverflowError, LookupError, RecursionError):
                row = json.loads(line)
                place = places.get(row[0])
                if place is not None and stamps[place] is not None and tuple(row[_STAMP]) == stamps[place]:
                    columns.put(place, row)
                    known[place] = True


class _Notes:
    """The file that rows are appended to; opened with the first one."""

    def __init__(self, path: Path):
        self._path = path
        self._file: io.FileIO | None = None
        self._failed = False

    def add(self, rows: Sequence[list]) -> Event | None:
        """An alarm, once, where they cannot be kept."""
        if self._failed or not rows:
            return None
        text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("ab", buffering=0)
                text = "\n" + text  # a line that was torn ends here
            self._file.write(text.encode("ascii"))
        except OSError as error:
            self._failed = True
            advice = f"what was found is not kept, and the next time takes as long: {error}"
            return {"type": "alarm", "alarm": "cache", "step": 0, "raised": True, "advice": advice, "value": None}
        return None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
