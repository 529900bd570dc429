"""What a file in a menu is, told before anything is queued: from its header, without its tensors."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from ..gmp.errors import InputError
from ..gmp.inspection import Inspection, inspect, lines, sentence
from . import host

_LACKS = {"text": "no text encoder in it", "vision": "no vision tower in it"}


def look(role: str, name: str) -> dict[str, object]:
    """A file of a menu in one sentence, in several lines, and whether it can be taken there.

    role: one of `host.MENUS`. Raises InputError for a name that the menu does not list. A file that cannot be read
    is told as that.
    """
    path = host.model_path(role, name)
    try:
        return _look(role, name, path, host.stamp(path))
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}.") from error


@lru_cache(maxsize=512)
def _look(role: str, name: str, path: Path, stamp: str) -> dict[str, object]:
    """`stamp` changes with the file, so that what was told of an older one is not told again."""
    try:
        seen = replace(inspect(path), file=name)
    except InputError as error:
        words = host.without_folders(str(error))
        return {"sentence": words, "lines": [words], "fits": False}
    words, fits = sentence(seen), _fits(role, seen)
    if seen.towers and not fits and all(tower.tower != role for tower in seen.towers):
        words += f" · {_LACKS[role]}"
    return {
        "sentence": host.without_folders(words),
        "lines": [host.without_folders(line) for line in lines(seen)],
        "fits": fits,
    }


def _fits(role: str, seen: Inspection) -> bool:
    return role == "any" or any(tower.tower == role and not tower.problems for tower in seen.towers)
