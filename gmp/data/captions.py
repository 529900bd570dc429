"""Captioned pictures on disk -> one index, and everything that is wrong with them, counted and named.

Two ways to write captions down:
- beside the pictures: `0001.jpg` with `0001.txt` (or `0001.caption`), each line that isn't empty a caption;
- one JSON file: `{"sub/0001.jpg": ["a caption", "another"], …}`, paths relative to the folder of pictures.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import InputError
from ..events import progress
from .images import load_picture

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTION_SUFFIXES = (".txt", ".caption")
_SHOWN = 5  # names that a message lists; the report has all


@dataclass(frozen=True)
class Picture:
    """One picture and what it may be called."""

    path: str  # relative to the index's root, with forward slashes
    captions: tuple[str, ...]  # at least one, stripped, no two the same


@dataclass(frozen=True)
class CaptionReport:
    """What was found while reading, used or not. `str()` gives it as lines of text."""

    listed: int = 0  # pictures in the folder, or named by the caption file
    missing: tuple[str, ...] = ()  # left out: named by the caption file but not there
    orphans: tuple[str, ...] = ()  # text files beside no picture of their name
    uncaptioned: tuple[str, ...] = ()  # left out: nothing to train on
    broken: tuple[tuple[str, str], ...] = ()  # left out: (path, reason), known once `check_pictures` ran
    repeated: int = 0  # captions that their own picture already has; taken once
    shared: int = 0  # different captions that more than one picture has; such pictures are no true negatives

    def __str__(self) -> str:
        broken = [f"{path} ({reason})" for path, reason in self.broken]
        lines = [
            f"pictures: {self.listed}",
            f"not found: {len(self.missing)}{_some(self.missing)}",
            f"text files without a picture: {len(self.orphans)}{_some(self.orphans)}",
            f"without captions: {len(self.uncaptioned)}{_some(self.uncaptioned)}",
            f"broken: {len(broken)}{_some(broken)}",
            f"captions repeated at their own picture: {self.repeated}",
            f"captions shared by several pictures: {self.shared}",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Index:
    """The pictures of a data set in the order of their paths."""

    root: Path
    pictures: tuple[Picture, ...]
    report: CaptionReport  # of the whole data set, also in the parts that `split` makes

    def __len__(self) -> int:
        return len(self.pictures)

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """Where each picture lies."""
        return tuple(self.root / picture.path for picture in self.pictures)

    @cached_property
    def caption_counts(self) -> tuple[int, ...]:
        """Captions per picture, as `Sampler` takes them."""
        return tuple(len(picture.captions) for picture in self.pictures)

    def captions(self) -> list[str]:
        """All captions, those of the first picture first."""
        return [caption for picture in self.pictures for caption in picture.captions]

    def owners(self) -> list[int]:
        """The position of each caption's picture, in the order of `captions`."""
        return [i for i, count in enumerate(self.caption_counts) for _ in range(count)]

    def without(self, broken: Mapping[str, str]) -> Index:
        """The same data set without pictures that do not decode, given as path -> reason; they go into the report.

        Raises InputError if no picture is left.
        """
        if broken and len(broken) == len(self):
            shown = "".join(f"\n  {path}: {reason}" for path, reason in list(broken.items())[:_SHOWN])
            raise InputError(f"None of the {len(self)} pictures in {self.root} can be read:{shown}")
        report = replace(self.report, broken=self.report.broken + tuple(broken.items()))
        return replace(self, pictures=tuple(p for p in self.pictures if p.path not in broken), report=report)


def first_captions(counts: Sequence[int]) -> list[int]:
    """The position of each picture's first caption, in the order of `Index.captions`."""
    return list(accumulate(counts, initial=0))[:-1]


def read_index(images: Path | str, captions: Path | str | None = None, missing_ok: bool = False) -> Index:
    """Read which pictures there are and what they show. No picture is opened: see `check_pictures`.

    `captions`: a JSON file, or None for text files beside the pictures (sub-folders included; linked folders
    and names that start with a dot are not). `missing_ok` leaves out pictures that the JSON file names but
    that are not there (a part of a data set), and lists them in the report. Raises InputError with all
    problems at once.
    """
    root = Path(images)
    problems = []
    if not root.exists():
        problems.append(f"There is no folder {root}. Give the folder that holds the pictures.")
    elif not root.is_dir():
        problems.append(f"{root} is a file. Give the folder that holds the pictures.")
    found: dict[str, list[str]] = {}
    missing: list[str] = []
    orphans: list[str] = []
    if captions is not None:
        entries = _read_json(Path(captions), problems)
        if root.is_dir():
            found, missing = _locate(root, entries, Path(captions), missing_ok, problems)
    elif root.is_dir():
        found, orphans = _read_folder(root, problems)
    if problems:
        raise InputError("\n".join(problems))
    return _build(root, found, missing, orphans)


def check_pictures(index: Index, threads: int = 4) -> Generator[dict[str, object], None, Index]:
    """Decode every picture; leave out those that don't, and list them in the report with the reason.

    Yields a progress event per picture; a consumer that stops listening stops the check. Raises InputError if no
    picture is left.
    """
    if threads < 1:
        raise InputError(f"Pictures can't be checked with {threads} threads; at least 1 is needed.")
    pool = ThreadPoolExecutor(threads, thread_name_prefix="gmp-check")
    broken: dict[str, str] = {}
    try:
        for done, (picture, reason) in enumerate(zip(index.pictures, pool.map(_fault, index.paths), strict=True), 1):
            if reason:
                broken[picture.path] = reason
            yield progress("check pictures", done, len(index))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return index.without(broken)


def split(index: Index, keys: Mapping[str, str], held_out: int) -> tuple[Index, Index]:
    """(training part, held-out part); `keys` gives each path its picture's `content_key`.

    Which pictures are held out depends on their contents only, so that runs with other settings, names or folders are
    measured on the same ones, and most stay held out when pictures are added. Copies of a picture stay together: one
    that was trained on would measure memory. The held-out part is smaller than `held_out` only where copies do
    not fit into it.
    """
    if not 0 <= held_out < len(index):
        raise InputError(
            f"{held_out} of {len(index)} pictures can't be held out; choose 0 to {len(index) - 1}, "
            "so that at least one picture is left to train on."
        )
    copies = Counter(keys[p.path] for p in index.pictures)
    held: set[str] = set()
    count = 0
    for key in sorted(copies, key=held_out_order):
        if count + copies[key] <= held_out:
            held.add(key)
            count += copies[key]
    train = tuple(p for p in index.pictures if keys[p.path] not in held)
    measured = tuple(p for p in index.pictures if keys[p.path] in held)
    return replace(index, pictures=train), replace(index, pictures=measured)


def held_out_count(pictures: int, share: float, most: int) -> int:
    """How many pictures are not trained on: at least 2 unless none are wanted, at the most half, and `most`."""
    return min(max(2, round(share * pictures)), most, pictures // 2) if share else 0


def dataset_key(index: Index, keys: Mapping[str, str]) -> str:
    """SHA-256 of an index's names, contents and captions; `keys` gives each path its picture's `content_key`."""
    captions = [(picture.path, keys[picture.path], picture.captions) for picture in index.pictures]
    return hashlib.sha256(json.dumps(captions).encode()).hexdigest()


def content_key(path: Path | str) -> str:
    """SHA-256 of the file's bytes, in hex: the same picture under any name has the same key."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_json(path: Path, problems: list[str]) -> list[tuple[str, list[str]]]:
    """(path, captions) pairs as written.

    Objects are read as tuples of pairs, so that no repeated key gets lost.
    """
    try:
        # parse_int: no number is a caption, and int() raises its own error for very long ones
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=tuple, parse_int=float)
    except FileNotFoundError:
        problems.append(f"There is no caption file {path}.")
    except IsADirectoryError:
        problems.append(f"The caption file {path} is a folder. Give a JSON file, or none for .txt beside the pictures.")
    except OSError as error:
        problems.append(f"The caption file {path} can't be read: {error.strerror}.")
    except UnicodeDecodeError as error:
        problems.append(f"The caption file {path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.")
    except json.JSONDecodeError as error:
        problems.append(
            f"The caption file {path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}."
        )
    except RecursionError:
        problems.append(f"The caption file {path} is nested too deeply. {_EXPECTED}")
    else:
        return _entries(path, content, problems)
    return []


_EXPECTED = 'Expected an object of lists of strings: {"folder/0001.jpg": ["a caption", "another"]}.'


def _entries(path: Path, content: Any, problems: list[str]) -> list[tuple[str, list[str]]]:
    if not isinstance(content, tuple):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(content), "a number or truth value")
        problems.append(f"The caption file {path} holds {kind}. {_EXPECTED}")
        return []
    if not content:
        problems.append(f"The caption file {path} names no pictures. {_EXPECTED}")
    entries, strangers = [], []
    for key, value in content:
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list) and all(isinstance(caption, str) for caption in value):
            entries.append((key, value))
        else:
            strangers.append(key)
    if strangers:
        problems.append(
            f"In the caption file {path}, {len(strangers)} of {len(content)} pictures have something else "
            f"than a list of strings{_some(strangers)}. {_EXPECTED}"
        )
    return entries


def _locate(
    root: Path, entries: Iterable[tuple[str, list[str]]], source: Path, missing_ok: bool, problems: list[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Captions by picture, and the pictures that are not there."""
    found: dict[str, list[str]] = {}
    outside, strangers, missing = [], [], []
    for key, captions in entries:
        path = PurePosixPath(key.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or PureWindowsPath(key).drive:
            outside.append(key)
        elif path.suffix.lower() not in PICTURE_SUFFIXES:
            strangers.append(key)
        elif str(path) in found:
            found[str(path)].extend(captions)
        elif os.path.isfile(root / path):
            found[str(path)] = list(captions)
        else:
            missing.append(key)
    if outside:
        problems.append(
            f"The caption file {source} names {len(outside)} pictures outside {root}{_some(outside)}. "
            "Write paths relative to that folder, without '..'."
        )
    if strangers:
        problems.append(
            f"The caption file {source} names {len(strangers)} files that are not pictures"
            f"{_some(strangers)}. Pictures end in {', '.join(PICTURE_SUFFIXES)}."
        )
    if missing and not (missing_ok and found):
        problems.append(
            f"{len(missing)} of the pictures that the caption file {source} names are not in {root}"
            f"{_some(missing)}. Paths are relative to that folder: check that it is the right one "
            "and complete, or allow missing pictures to leave these out."
        )
    return found, missing


def _read_folder(root: Path, problems: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Captions by picture, and the caption files that belong to none."""
    pictures: list[Path] = []
    texts: dict[Path, list[str]] = {}  # picture or caption file without suffix -> captions
    files: dict[Path, list[Path]] = {}
    garbled: list[str] = []
    closed: list[OSError] = []
    for folder, subfolders, names in os.walk(root, onerror=closed.append):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(folder, name)
            if path.suffix.lower() in PICTURE_SUFFIXES:
                pictures.append(path)
            elif path.suffix.lower() in CAPTION_SUFFIXES:
                files.setdefault(path.with_suffix(""), []).append(path)
    stems = {picture.with_suffix("") for picture in pictures}
    for stem in stems & files.keys():
        for path in files[stem]:
            try:
                texts.setdefault(stem, []).extend(path.read_text(encoding="utf-8-sig").split("\n"))
            except (OSError, UnicodeDecodeError):
                garbled.append(_relative(path, root))
    if garbled:
        problems.append(
            f"{len(garbled)} caption files in {root} can't be read as UTF-8 text{_some(sorted(garbled))}. "
            "Save them as UTF-8."
        )
    if closed:
        problems.append(
            f"{len(closed)} folders in {root} can't be read{_some([str(error) for error in closed])}. "
            "Allow reading them or move them away."
        )
    found = {_relative(picture, root): texts.get(picture.with_suffix(""), []) for picture in pictures}
    orphans = [_relative(path, root) for stem in files.keys() - stems for path in files[stem]]
    return found, sorted(orphans)


def _build(root: Path, found: dict[str, list[str]], missing: Sequence[str], orphans: Sequence[str]) -> Index:
    if not found:
        raise InputError(f"There are no pictures in {root}. Pictures end in {', '.join(PICTURE_SUFFIXES)}.")
    pictures, uncaptioned = [], []
    repeated = 0
    for path, raw in sorted(found.items()):
        stripped = [caption.strip() for caption in raw if caption.strip()]
        captions = tuple(dict.fromkeys(stripped))
        repeated += len(stripped) - len(captions)
        if captions:
            pictures.append(Picture(path, captions))
        else:
            uncaptioned.append(path)
    if not pictures:
        raise InputError(
            f"None of the {len(found)} pictures in {root} has a caption{_some(uncaptioned)}. Put a text file "
            "of the same name beside each picture (0001.jpg, 0001.txt), or give a JSON file of captions"
            + (f"; {', '.join(listings)} may be one." if (listings := _json_files(root)) else ".")
        )
    carriers = Counter(caption for picture in pictures for caption in picture.captions)
    report = CaptionReport(
        listed=len(found) + len(missing),
        missing=tuple(missing),
        orphans=tuple(orphans),
        uncaptioned=tuple(uncaptioned),
        repeated=repeated,
        shared=sum(count > 1 for count in carriers.values()),
    )
    return Index(root, tuple(pictures), report)


def _json_files(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("*.json"))[:_SHOWN]


def _fault(path: Path) -> str:
    """Why the picture can't be used; empty if it can."""
    try:
        load_picture(path)
    except InputError as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


def held_out_order(key: str) -> bytes:
    """A place in an order that has nothing to do with names, dates or earlier splits by the same hash."""
    return hashlib.sha256(f"held out {key}".encode()).digest()


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _some(names: Sequence[str]) -> str:
    """`: a, b, c, d, e, …`, printable even where a file name is no valid text."""
    if not names:
        return ""
    shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
    return ": " + shown.encode("utf-8", "backslashreplace").decode("utf-8")
