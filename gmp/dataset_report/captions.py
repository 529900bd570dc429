"""Findings about captions, from their text alone, and about files that make no pair."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.captions import PICTURE_SUFFIXES, Index
from ..data.language import NAMES, UNKNOWN, language
from ..data.sources.folder import Folder
from ..data.survey import Survey
from ..events import Event, progress
from .findings import Case, Finding, Limits, found

LONGEST = 1024  # tokens that are counted; longer captions count as this long
CHUNK = 2048  # captions at once


@dataclass(frozen=True)
class Texts:
    """What is known of C captions, those of the first picture first, as `Index.captions` has them."""

    lengths: np.ndarray  # (C,) int64 tokens, start and end of text among them; LONGEST at the most
    languages: tuple[str, ...]  # codes, as in `data.language.NAMES`

    @property
    def counts(self) -> dict[str, int]:
        """How many captions are in which language, the most frequent first."""
        return dict(Counter(self.languages).most_common())

    @property
    def foreign(self) -> float:
        """The share of captions that do not look English, of those whose language can be told; NaN for none."""
        told = len(self.languages) - self.counts.get(UNKNOWN, 0)
        return (told - self.counts.get("en", 0)) / told if told else float("nan")


def read_texts(captions: Sequence[str], context: int) -> Generator[Event, None, Texts]:
    """Lengths and languages. Yields progress events."""
    from ..tokenizer import Tokenizer, lengths

    short, long = Tokenizer(context), Tokenizer(max(LONGEST, context))
    counts = np.zeros(len(captions), np.int64)
    codes: list[str] = []
    for start in range(0, len(captions), CHUNK):
        chunk = captions[start : start + CHUNK]
        here = counts[start : start + CHUNK]
        here[:] = lengths(short(chunk).ids).numpy()
        full = np.flatnonzero(here == context)  # whole, or cut: only then is it worth a longer table
        if len(full):
            here[full] = lengths(long([chunk[i] for i in full.tolist()]).ids).numpy()
        codes += map(language, chunk)
        yield progress("read captions", start + len(chunk), len(captions))
    return Texts(counts, tuple(codes))


def caption_findings(index: Index, survey: Survey, texts: Texts, limits: Limits) -> tuple[Finding, ...]:
    """All that captions alone tell, and what the reader of the data set has left out."""
    from ..tokenizer import has_special

    report, captions, owners = index.report, index.captions(), index.owners()

    def cases(places: Iterable[int], detail: Callable[[int], str]) -> list[Case]:
        return [Case(index.pictures[owners[i]].path, detail(i), captions[i]) for i in places]

    too_long = np.flatnonzero(texts.lengths > limits.context).tolist()
    foreign = [i for i, code in enumerate(texts.languages) if code not in ("en", UNKNOWN)]
    return (
        found("not_found", [Case(name, "there is no such file") for name in report.missing]),
        found("uncaptioned", [Case(name, "no caption") for name in report.uncaptioned]),
        found("unlisted", [Case(name, "no caption names it") for name in _unlisted(index)]),
        found("garbled", [Case(name, reason) for name, reason in report.garbled]),
        found("empty", [Case(name, "holds nothing") for name in report.empty]),
        found("orphans", [Case(name, "no picture has its name") for name in report.orphans]),
        found("linked", [Case(name, "a link") for name in report.linked]),
        found("repeated", count=report.repeated),
        found("shared", _shared(index, survey)),
        found("truncated", cases(too_long, lambda i: _too_long(int(texts.lengths[i]), limits.context))),
        found("commands", cases((i for i, one in enumerate(captions) if has_special(one)), lambda i: "holds a mark")),
        found("language", cases(foreign, lambda i: NAMES[texts.languages[i]])),
    )


def _unlisted(index: Index) -> Iterator[str]:
    """Pictures in the folders of the index's own that it does not have. No other folder is looked into.

    Only files that a data set is read from: no folders, named pipes, and links that lead nowhere or out of the folder.
    """
    known = {picture.path for picture in index.pictures}
    known |= {*index.report.uncaptioned, *index.report.linked, *(path for path, _ in index.report.broken)}
    listing = Folder(index.root)
    for folder in sorted({path.rpartition("/")[0] for path in known}):
        for name in sorted(listing.list(folder).files):
            path = f"{folder}/{name}" if folder else name
            if path not in known and not name.startswith(".") and name.lower().endswith(PICTURE_SUFFIXES):
                yield path


def _too_long(tokens: int, context: int) -> str:
    count = f"{LONGEST} tokens or more" if tokens >= LONGEST else f"{tokens} tokens"
    return f"{count}; {context} are read"


def _shared(index: Index, survey: Survey) -> Iterator[Case]:
    """Captions of pictures that differ: copies of one picture may well have the same."""
    keys = dict(zip(survey.names, (key.tobytes() for key in survey.keys), strict=True))
    carriers: dict[str, list[str]] = defaultdict(list)
    for picture in index.pictures:
        for caption in picture.captions:
            carriers[caption].append(picture.path)
    for caption, paths in carriers.items():
        if len(paths) < 2:
            continue
        # a file that could not be read has no key, and is a picture of its own
        others = len({keys[path] if any(keys[path]) else path for path in paths}) - 1
        if others:
            detail = f"{others} other pictures have it" if others > 1 else "another picture has it"
            yield from (Case(path, detail, caption) for path in paths)
