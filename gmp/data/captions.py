"""Captioned pictures on disk -> one index, and everything that is wrong with them, counted and named.

How captions may be written down is the matter of `sources`, a page for each kind; this is what all of them become.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from ..errors import InputError
from ..events import progress

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
CAPTION_SUFFIXES = (".txt", ".caption")
_SHOWN = 5  # names that a message lists; the report has all


@dataclass(frozen=True)
class Picture:
    """One picture and what it may be called."""

    path: str  # relative to the index's root, with forward slashes
    captions: tuple[str, ...]  # at least one, stripped, no two the same
    repeats: float = 1.0  # how often an epoch visits it: kohya's `10_name`, and the weight of its source


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
    empty: tuple[str, ...] = ()  # caption files that hold nothing
    garbled: tuple[tuple[str, str], ...] = ()  # caption files beside pictures that can't be read: (path, reason)
    linked: tuple[str, ...] = ()  # left out: links out of the folder, and linked folders, which are not followed
    respelled: tuple[tuple[str, str], ...] = ()  # (as the captions name it, the file): another case or Unicode form
    kind: str = ""  # of captions: a name in `sources.KINDS`, or several of a mix
    notes: tuple[str, ...] = ()  # how it was read: the columns, what became captions

    def __str__(self) -> str:
        broken = [f"{path} ({reason})" for path, reason in self.broken]
        garbled = [f"{path} ({reason})" for path, reason in self.garbled]
        respelled = [f"{name} -> {path}" for name, path in self.respelled]
        lines = [
            f"pictures: {self.listed}",
            f"not found: {len(self.missing)}{_some(self.missing)}",
            f"text files without a picture: {len(self.orphans)}{_some(self.orphans)}",
            f"without captions: {len(self.uncaptioned)}{_some(self.uncaptioned)}",
            f"broken: {len(broken)}{_some(broken)}",
            f"captions repeated at their own picture: {self.repeated}",
            f"captions shared by several pictures: {self.shared}",
            f"caption files that hold nothing: {len(self.empty)}{_some(self.empty)}",
            f"caption files that can't be read: {len(garbled)}{_some(garbled)}",
            f"links that were not followed: {len(self.linked)}{_some(self.linked)}",
            f"found under another spelling: {len(respelled)}{_some(respelled)}",
            *([f"kind of captions: {self.kind}"] if self.kind else ()),
            *map(printable, self.notes),
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

    @cached_property
    def repeats(self) -> tuple[float, ...]:
        """How often an epoch visits each picture."""
        return tuple(picture.repeats for picture in self.pictures)

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

    `captions`: a caption file of any kind in `sources.KINDS`, or None for what lies in the folder: a `metadata.jsonl`,
    a `desc.csv`, or text files beside the pictures (sub-folders included; linked folders and names that start with a
    dot are not). `missing_ok` leaves out pictures that the file names but that are not there (a part of a data
    set), and lists them in the report. Raises InputError with all problems at once.
    """
    from . import sources

    return sources.read(images if captions is None else captions, images=images, missing_ok=missing_ok)


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
    """SHA-256 of an index's names, contents, captions and repeats; `keys` gives each path its picture's `content_key`.

    A picture that is visited once has no repeats in it, so that data sets without any keep their key.
    """
    captions = [(p.path, keys[p.path], p.captions, *((p.repeats,) if p.repeats != 1 else ())) for p in index.pictures]
    return hashlib.sha256(json.dumps(captions).encode()).hexdigest()


def content_key(path: Path | str) -> str:
    """SHA-256 of the file's bytes, in hex: the same picture under any name has the same key."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fault(path: Path) -> str:
    """Why the picture can't be used; empty if it can."""
    from .images import load_picture  # and torch, which reading captions does without

    try:
        load_picture(path)
    except InputError as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


def held_out_order(key: str) -> bytes:
    """A place in an order that has nothing to do with names, dates or earlier splits by the same hash."""
    return hashlib.sha256(f"held out {key}".encode()).digest()


def _some(names: Sequence[str]) -> str:
    """`: a, b, c, d, e, …`, printable whatever the names hold."""
    if not names:
        return ""
    return ": " + printable(", ".join(names[:_SHOWN])) + (", …" if len(names) > _SHOWN else "")


def printable(text: str) -> str:
    r"""One line that a terminal shows and does not obey: a control character of a caption or a name as \x1b.

    So are marks that turn the direction of text, and half characters, which no stream takes. The joiners between
    emoji and letters stay.
    """
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if _controls(c) else c for c in text)


def _controls(character: str) -> bool:
    """By its category in Unicode: control, format, half of a pair, end of a line or of a paragraph."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\u200c\u200d"
