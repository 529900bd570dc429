"""Several sources as one data set."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import InputError
from ..captions import CaptionReport, Index, Picture
from .opened import is_tars

HEAVIEST = 1_000_000  # visits in an epoch that a weight may ask for


_KIND = re.compile(r"([\w-]{2,}):(?!//)")  # C: is a drive, s3:// a store


@dataclass(frozen=True)
class Source:
    """A place to read captions from, and how often its pictures are visited."""

    place: str
    kind: str | None = None  # the one that it looks like
    images: str | None = None  # the folder of the pictures; without, that of the captions
    weight: float = 1.0


def parse(text: str, kinds: Collection[str]) -> Source:
    """`[KIND:]PLACE[@IMAGES][=WEIGHT]`: `coco:annotations/captions_train2017.json@train2017=0.5`, or a folder alone.

    What exists under a name with =, @ or : in it is that. Raises InputError for a weight that is no positive number
    or above `HEAVIEST`, and for a kind that is none; a drive has one letter.
    """
    kind, colon, rest = text.partition(":")
    kind, rest = (kind, rest) if colon and kind in kinds else (None, text)
    weight, images = 1.0, None
    place, equals, number = rest.rpartition("=")
    if equals and not os.path.lexists(rest):
        try:
            weight = float(number)
        except ValueError:
            raise InputError(f"{text}: {number!r} is no weight, and there is no {rest}; write PLACE=0.5") from None
        if not (math.isfinite(weight) and weight > 0):
            raise InputError(f"{text}: the weight {number} is not above 0")
        if weight > HEAVIEST:
            raise InputError(f"{text}: the weight {number} is above {HEAVIEST:,}; write PLACE=2 for two visits")
        rest = place
    place, at, folder = rest.rpartition("@")
    if at and not os.path.lexists(rest) and (os.path.isdir(folder) or os.path.lexists(place)):
        if not folder:
            raise InputError(f"{text} names no folder of pictures after the @; write PLACE@IMAGES, or PLACE alone")
        rest, images = place, folder
    if not rest:
        raise InputError(f"{text!r} names no place; write [KIND:]PLACE[@IMAGES][=WEIGHT]")
    other = _KIND.match(rest)
    if kind is None and other and not os.path.lexists(rest) and not is_tars(rest):
        raise InputError(
            f"{text}: {other[1]} is no kind of captions, and there is no {rest}; choose one of {', '.join(kinds)}"
        )
    return Source(rest, kind, images, weight)


def mix(sources: Sequence[tuple[Index, float]]) -> Index:
    """One index of several, below the deepest folder that holds them all.

    An epoch visits a picture its repeats × its source's weight times. A picture in two sources has the captions of
    both and the larger number. Raises InputError for weights that are not in 0 to `HEAVIEST`, and for folders
    that share none (two drives).
    """
    if not sources:
        raise InputError("No source was given; name one or more.")
    if wrong := [weight for _, weight in sources if not 0 < weight <= HEAVIEST]:
        raise InputError(
            f"A source has the weight {wrong[0]}; give a positive number up to {HEAVIEST:,}, such as 0.5 or 2."
        )
    if len(sources) == 1:
        index, weight = sources[0]
        return replace(index, pictures=tuple(replace(p, repeats=p.repeats * weight) for p in index.pictures))
    roots = [os.path.realpath(index.root) for index, _ in sources]
    try:
        common = Path(os.path.commonpath(roots))
    except ValueError:
        raise InputError(f"{', '.join(roots)} share no folder; put the pictures on one drive.") from None
    found: dict[str, Picture] = {}
    for root, (index, weight) in zip(roots, sources, strict=True):
        above = _above(root, common)
        for picture in index.pictures:
            path = above + picture.path
            repeats = picture.repeats * weight
            if path in found:
                captions = tuple(dict.fromkeys((*found[path].captions, *picture.captions)))
                found[path] = Picture(path, captions, max(repeats, found[path].repeats))
            else:
                found[path] = Picture(path, picture.captions, repeats)
    pictures = tuple(found[path] for path in sorted(found))
    reports = [(_above(root, common), index.report) for root, (index, _) in zip(roots, sources, strict=True)]
    return Index(common, pictures, _join([(above, report) for above, report in reports], pictures))


def _above(root: str, common: Path) -> str:
    """What goes before the paths of a source; empty for the common folder itself."""
    relative = Path(root).relative_to(common).as_posix()
    return "" if relative == "." else f"{relative}/"


def _join(reports: Sequence[tuple[str, CaptionReport]], pictures: Sequence[Picture]) -> CaptionReport:
    def names(field: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(above + name for above, report in reports for name in getattr(report, field)))

    carriers = Counter(caption for picture in pictures for caption in picture.captions)
    captioned = {picture.path for picture in pictures}
    return CaptionReport(
        listed=sum(report.listed for _, report in reports),
        missing=names("missing"),
        orphans=names("orphans"),
        uncaptioned=tuple(name for name in names("uncaptioned") if name not in captioned),
        broken=tuple((above + path, reason) for above, report in reports for path, reason in report.broken),
        repeated=sum(report.repeated for _, report in reports),
        shared=sum(count > 1 for count in carriers.values()),
        empty=names("empty"),
        garbled=tuple((above + path, reason) for above, report in reports for path, reason in report.garbled),
        linked=names("linked"),
        respelled=tuple((above + a, above + b) for above, report in reports for a, b in report.respelled),
        kind=" and ".join(dict.fromkeys(report.kind for _, report in reports if report.kind)),
        notes=tuple(f"{above}: {note}" if above else note for above, report in reports for note in report.notes),
    )
