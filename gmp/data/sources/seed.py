"""One JSON file: `{"sub/0001.jpg": ["a caption", "another"], …}`, the format of the original fine-tuning scripts.

One string in place of a list is one caption. Where all values name text files (`"labels/0001.txt"`), as the input of
the original scripts' converter to kohya's metadata does, the captions are the lines of those files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..captions import CAPTION_SUFFIXES, Picture, _some
from .beside import lines
from .folder import Folder, suffix_of
from .found import Listing
from .opened import EXPECTED, Opened, decode


def looks(opened: Opened) -> bool:
    """An object in which strings and lists are not outnumbered by objects."""
    if opened.form != "json" or not isinstance(opened.content, tuple):
        return False
    objects = sum(isinstance(value, tuple) for _, value in opened.content)
    return 2 * objects <= len(opened.content)


def read(opened: Opened, problems: list[str]) -> Listing:
    path, content = opened.path, opened.content
    if not isinstance(content, tuple):
        problems.append(f"The caption file {path} holds {_name(content)}. {EXPECTED}")
        return Listing(())
    if not content:
        problems.append(f"The caption file {path} names no pictures. {EXPECTED}")
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
            f"than a list of strings{_some(strangers)}. {EXPECTED}"
        )
    if entries and all(isinstance(value, str) and suffix_of(value) in CAPTION_SUFFIXES for _, value in content):
        return _follow(path, entries, problems)
    return Listing(entries)


def write(pictures: Sequence[Picture]) -> dict[str, list[str]]:
    """The value of the JSON file."""
    return {picture.path: list(picture.captions) for picture in pictures}


def _follow(path: Path, entries: Sequence[tuple[str, list[str]]], problems: list[str]) -> Listing:
    """The captions in the text files that take the place of captions; they lie where the JSON file lies, or below."""
    folder = Folder(path.parent)
    found, faults = [], []
    for key, (name,) in entries:
        place = folder.relative(name)
        hit = folder.find(place) if place is not None else None
        if hit is None or not hit.paths:
            faults.append(name)
            continue
        try:
            found.append((key, lines(decode((path.parent / hit.paths[0]).read_bytes()))))
        except (OSError, ValueError) as error:
            faults.append(f"{name} ({error})")
    if faults:
        problems.append(
            f"The values of the caption file {path} are names of text files, and {len(faults)} of {len(entries)} are "
            f"not in {path.parent} or cannot be read{_some(faults)}. Put the JSON file where their paths begin."
        )
    return Listing(found, (f"captions from the text files that {path.name} names",))


def _name(content: Any) -> str:
    return {list: "a list", str: "a string", type(None): "null"}.get(type(content), "a number or truth value")
