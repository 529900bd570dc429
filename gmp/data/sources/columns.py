"""Which columns of a table hold the pictures' paths and which their captions: as asked for, or as they are called."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...errors import InputError, some

# names in the order in which they are taken: open_clip's own, Hugging Face's, CLIP-Interrogator's, Flickr's
PICTURES = ("filepath", "file_name", "image", "filename", "image_path", "image_file", "image_name", "path", "file")
CAPTIONS = ("title", "text", "caption", "captions", "prompt", "description", "sentence", "comment", "tags", "label")


def choose_columns(names: Sequence[str], asked: Sequence[str] | None = None) -> tuple[int, tuple[int, ...]]:
    """Positions of the pictures' column and of the captions'.

    asked: the pictures' column and one or more of captions, by name or by number from 1. Without: the first of
    `PICTURES` that is there, and the first of `CAPTIONS` with all that are numbered like it (caption_1, caption_2); or
    the one other column. Raises InputError for columns that are not there or cannot be told.
    """
    plain = [name.strip().lower() for name in names]
    if asked is not None:
        if len(asked) < 2:
            raise InputError("name the column of the pictures and one or more of captions, such as filepath,title")
        picture, *captions = (_position(names, plain, name) for name in asked)
        return picture, tuple(dict.fromkeys(captions))
    picture = next((plain.index(name) for name in PICTURES if name in plain), None)
    captions: tuple[int, ...] = ()
    for name in CAPTIONS:
        numbered = re.compile(rf"{name}s?(_?\d+)?")
        captions = tuple(n for n, one in enumerate(plain) if n != picture and numbered.fullmatch(one))
        if captions:
            break
    if picture is not None and not captions and len(names) == 2:
        captions = (1 - picture,)
    if picture is None or not captions:
        lacking = "pictures" if picture is None else "captions"
        raise InputError(
            f"it has the columns {some(names, sort=False)}, of which none is known to hold the {lacking}; name the "
            "column of the pictures and those of captions (--columns filepath,title)"
        )
    return picture, captions


def note(names: Sequence[str], picture: int, captions: Sequence[int]) -> str:
    """The sentence that says which were taken."""
    return f"columns: pictures from {names[picture]!r}, captions from {', '.join(repr(names[n]) for n in captions)}"


def unused(asked: Sequence[str] | None, kind: str) -> tuple[str, ...]:
    """The note on columns that were asked of a kind that has none."""
    return (f"columns {', '.join(asked)}: not used, since captions of the kind {kind} have none",) if asked else ()


def _position(names: Sequence[str], plain: list[str], name: str) -> int:
    if name in names:
        return list(names).index(name)
    if name.strip().lower() in plain:
        return plain.index(name.strip().lower())
    if name.isdecimal() and 1 <= int(name) <= len(names):
        return int(name) - 1
    raise InputError(f"it has no column {name!r}; it has {some(names, sort=False)}")
