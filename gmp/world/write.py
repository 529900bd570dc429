"""Writes pictures of the world with a caption file, as a data set like any other."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

from ..errors import InputError
from ..events import progress
from ..files import write_json, write_text
from .scenes import SPLITS, draw_scenes, render

CAPTIONS_FILE = "captions.json"
PER_FOLDER = 1000  # pictures


def write_world(out: Path, count: int, seed: int, split: str = "train") -> Generator[dict[str, object], None, Path]:
    """Writes `count` PNG pictures and `captions.json` below `out`; yields progress events, returns the caption file.

    What is there already from the same call is kept, so that it can be repeated and continued. Raises InputError when
    `out` holds something else.
    """
    if split not in SPLITS:
        raise InputError(f"there is no split {split!r}; take {' or '.join(SPLITS)}")
    if count < 1:
        raise InputError(f"cannot draw {count} pictures; at least 1")
    mark = out / "world.json"
    recipe = {"world": 1, "count": count, "seed": seed, "split": split}
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for the pictures")
    if mark.exists():
        try:
            known = json.loads(mark.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(f"{mark} is damaged; delete the folder, or choose another") from None
        if known != recipe:
            told = ", ".join(f"{name} {value}" for name, value in known.items())
            raise InputError(f"{out} holds another world ({told}); choose another folder")
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; choose an empty folder, or one that does not exist")
    out.mkdir(parents=True, exist_ok=True)
    write_json(recipe, mark)
    captions = {}
    for number, (scene, dice) in enumerate(draw_scenes(count, seed, split)):
        name = f"{number // PER_FOLDER:03d}/{number:06d}.png"
        path = out / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(".part")
            render(scene, dice).save(part, format="PNG", compress_level=1)
            part.replace(path)
        captions[name] = list(scene.captions())
        if (number + 1) % 200 == 0 or number + 1 == count:
            yield progress("draw pictures", number + 1, count)
    target = out / CAPTIONS_FILE
    text = json.dumps(captions, indent=0)
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        write_text(text, target)
    return target
