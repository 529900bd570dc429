"""Pictures of the shipped world in ComfyUI's input folder, with captions of several kinds."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from gmp.events import finish
from gmp.world.write import CAPTIONS_FILE, write_world


def drawn(folder: Path, count: int, seed: int = 0) -> dict[str, list[str]]:
    """So many pictures in a folder; what each may be called, by name. No caption file is left."""
    finish(write_world(folder, count, seed))
    captions = json.loads((folder / CAPTIONS_FILE).read_text(encoding="utf-8"))
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in captions:
            path.unlink()
    return captions


def texts(folder: Path, captions: dict[str, list[str]]) -> None:
    """A text file beside each picture."""
    for name, lines in captions.items():
        (folder / name).with_suffix(".txt").write_text("\n".join(lines), encoding="utf-8")


def coco(path: Path, captions: dict[str, list[str]]) -> None:
    images = [{"id": i, "file_name": name} for i, name in enumerate(captions)]
    said = [(i, caption) for i, lines in enumerate(captions.values()) for caption in lines]
    annotations = [{"id": n, "image_id": i, "caption": caption} for n, (i, caption) in enumerate(said)]
    path.write_text(json.dumps({"images": images, "annotations": annotations}), encoding="utf-8")


def tar(path: Path, folder: Path, captions: dict[str, list[str]]) -> None:
    """A WebDataset tar of a folder's pictures."""
    texts(folder, captions)
    with tarfile.open(path, "w") as out:
        for name in captions:
            for one in (folder / name, (folder / name).with_suffix(".txt")):
                out.add(one, one.name)
