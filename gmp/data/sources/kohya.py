"""kohya's sd-scripts: folders whose names say how often their pictures are visited, and metadata JSON.

Folders: `10_a name/0001.jpg` with `0001.txt` or `0001.caption`: ten visits in an epoch. The folder that counts is the
first below the root, as in sd-scripts' `config_util.generate_dreambooth_subsets_config_by_subdirs`.

Metadata: `{"0001": {"caption": "a cat\\na grey cat", "tags": "cat, grey"}}`, as `merge_captions_to_metadata.py` writes
it. Keys are names with or without suffix, or absolute paths (`--full_path`). Each line of the caption is a caption
(sd-scripts draws one of them under `--enable_wildcard`), and the tags are a further one, where sd-scripts appends
them to the caption.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...errors import some
from ..captions import Picture, _some
from .beside import has_texts, lines, read_texts
from .folder import Folder
from .found import Found, Listing
from .opened import Opened

_REPEATS = re.compile(r"([1-9]\d*)_.")
_PLAUSIBLE = re.compile(r"[1-9]\d{0,2}_.")  # 2023_summer is a year
_SHAPE = 'Expected {"0001": {"caption": "…", "tags": "…"}}.'


def looks_folder(texts: Folder, pictures: Folder) -> bool:
    """No picture at the top, and every folder there that holds any is named as `10_name`."""
    named, others = _split(pictures)
    return bool(named) and not others and has_texts(texts, pictures)


def strays(pictures: Folder) -> tuple[str, ...]:
    """The note on pictures outside kohya's folders where there are some of both: then no folder counts."""
    named, others = _split(pictures)
    if not (named and others):
        return ()
    names = " and ".join(named) if len(named) < 3 else some(named)
    look = "looks like one of" if len(named) == 1 else "look like"
    lie, them = "lies" if len(others) == 1 else "lie", "it" if len(named) == 1 else "them"
    return (
        f"{names} {look} kohya's folders of repeats, but {some(others, shown=3)} {lie} outside of {them}: "
        f"--kind kohya takes {them}",
    )


def _split(pictures: Folder) -> tuple[list[str], list[str]]:
    """Folders at the top that hold pictures and are named as `10_name`, and the pictures outside of them."""
    named: dict[str, None] = {}
    others: list[str] = []
    for place, listed in pictures.walk():
        top = place.partition("/")[0]
        found = [name for names in listed.stems.values() for name in names if not name.startswith(".")]
        if found and _PLAUSIBLE.match(top):
            named[top] = None
        else:
            others += [f"{place}/{name}" if place else name for name in found]
    return list(named), others


def read_folder(pictures: Folder, texts: Folder, problems: list[str]) -> Found:
    """Text files beside the pictures, with repeats."""
    found = read_texts(pictures, texts, problems)
    repeats = {path: float(count) for path in found.captions if (count := repeats_of(path)) != 1}
    seen = sorted({path.partition("/")[0] for path in repeats})
    notes = (f"repeats of folders: {', '.join(seen[:5])}{', …' if len(seen) > 5 else ''}",) if seen else ()
    if not any(_REPEATS.match(path) for path in found.captions if "/" in path):
        notes = (f"no folder in {pictures.root} says how often (10_name): an epoch visits each picture once",)
    return replace(found, repeats=repeats, notes=notes)


def repeats_of(path: str) -> int:
    """How often the name of the first folder in a path says that its pictures are visited."""
    top, slash, _ = path.partition("/")
    match = _REPEATS.match(top) if slash else None
    return int(match[1]) if match and len(match[1]) < 7 else 1


def looks_metadata(opened: Opened) -> bool:
    """An object of objects."""
    if opened.form != "json" or not isinstance(opened.content, tuple) or not opened.content:
        return False
    return 2 * sum(isinstance(value, tuple) for _, value in opened.content) > len(opened.content)


def read_metadata(opened: Opened, problems: list[str]) -> Listing:
    entries, strangers, tagged = [], [], 0
    for key, value in opened.content:
        one = dict(value) if isinstance(value, tuple) else None
        caption, tags = (one.get("caption"), one.get("tags")) if one is not None else (0, 0)
        if not isinstance(caption, (str, type(None))) or not isinstance(tags, (str, type(None))):
            strangers.append(key)
            continue
        tagged += bool(caption and tags)
        entries.append((key, [*lines(caption or ""), tags or ""]))
    if strangers:
        problems.append(
            f"In the kohya metadata {opened.place}, {len(strangers)} of {len(opened.content)} entries have a caption "
            f"or tags that are no string{_some(strangers)}. {_SHAPE}"
        )
    elif not any(caption for _, captions in entries for caption in captions):
        problems.append(f"No entry of {opened.place} has a caption or tags. {_SHAPE}")
    notes = (f"tags taken as a further caption: {tagged}",) if tagged else ()
    return Listing(entries, notes, stems=True)


def write_metadata(pictures: Sequence[Picture]) -> dict[str, Any]:
    """The value of the JSON file. Keys keep their suffix, so that pictures that differ in it alone stay apart."""
    return {picture.path: {"caption": "\n".join(picture.captions)} for picture in pictures}
