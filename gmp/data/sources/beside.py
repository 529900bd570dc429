"""Captions beside the pictures: `0001.jpg` with `0001.txt` (or `0001.caption`), each line that isn't empty a caption.

Where both text files are there, the captions of both count. Or `0001.json`, an object with `caption`, a string or a
list of strings, as img2dataset writes it, or with SPRIGHT's `spatial_caption` and `original_caption`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..captions import CAPTION_SUFFIXES, Picture, printable
from .folder import Folder, Listed, fold, is_picture, stem_of, suffix_of
from .found import Found
from .opened import decode, loads

JSON_KEYS = ("spatial_caption", "original_caption", "caption", "captions", "text")


def read_texts(pictures: Folder, texts: Folder, problems: list[str]) -> Found:
    """Text files beside the pictures, or at the same places in another folder."""
    return _read(pictures, texts, CAPTION_SUFFIXES, lambda content: lines(decode(content)), problems)


def read_jsons(pictures: Folder, texts: Folder, keys: Sequence[str] | None, problems: list[str]) -> Found:
    """A JSON file beside each picture; keys: which of its values are captions."""
    return _read(pictures, texts, (".json",), lambda content: _values(content, keys or JSON_KEYS), problems)


def lines(text: str) -> list[str]:
    """Lines, however they end."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def has_texts(texts: Folder, pictures: Folder, suffixes: Sequence[str] = CAPTION_SUFFIXES) -> bool:
    """Whether a file with such a suffix lies beside a picture of its name, or at its place in another folder."""
    places: dict[str, list[Listed]] = {}
    for folder, listed in pictures.walk():
        places.setdefault(fold(folder), []).append(listed)
    return any(
        fold(stem_of(name)) in place.folded_stems
        for folder, listed in texts.walk()
        for place in places.get(fold(folder), ())
        for name in listed.files
        if suffix_of(name) in suffixes and not name.startswith(".")
    )


def write_texts(pictures: Sequence[Picture], out: Path) -> list[str]:
    """Writes out/sub/0001.txt for sub/0001.jpg. Returns what was lost."""
    return _write(pictures, out, ".txt", lambda captions: "\n".join(captions) + "\n")


def write_jsons(pictures: Sequence[Picture], out: Path) -> list[str]:
    """Writes out/sub/0001.json for sub/0001.jpg. Returns what was lost."""
    return _write(pictures, out, ".json", lambda captions: json.dumps({"caption": captions}, ensure_ascii=False) + "\n")


def text_files(pictures: Sequence[Picture]) -> list[str]:
    """What `write_texts` writes."""
    return list(dict.fromkeys(f"{stem_of(picture.path)}.txt" for picture in pictures))


def _write(pictures: Sequence[Picture], out: Path, suffix: str, form: Callable[[list[str]], str]) -> list[str]:
    files: dict[str, list[tuple[str, ...]]] = {}
    for picture in pictures:
        files.setdefault(stem_of(picture.path), []).append(picture.captions)
    for stem, captions in files.items():
        path = out / f"{stem}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = form(list(dict.fromkeys(caption for some in captions for caption in some)))
        path.write_text(text, encoding="utf-8", newline="\n")
    joined = sum(len(set(captions)) > 1 for captions in files.values())
    if not joined:
        return []
    return [f"pictures that differ in their suffix alone share a file: {joined} files hold the captions of several"]


def _read(
    pictures: Folder, texts: Folder, suffixes: Sequence[str], parse: Callable[[bytes], list[str]], problems: list[str]
) -> Found:
    owners: dict[str, list[str]] = {}  # path without suffix -> pictures
    files: dict[str, list[str]] = {}  # path without suffix -> caption files
    linked: list[str] = []
    for folder, listed in pictures.walk():
        for name in listed.files:
            if is_picture(name) and not name.startswith("."):
                owners.setdefault(_join(folder, stem_of(name)), []).append(_join(folder, name))
        linked += [_join(folder, n) for n, is_folder in listed.outside.items() if is_folder or is_picture(n)]
        linked += [_join(folder, n) for n, link in listed.folders.items() if link and not n.startswith(".")]
    for folder, listed in texts.walk():
        for name in listed.files:
            if suffix_of(name) in suffixes and not name.startswith("."):
                files.setdefault(_join(folder, stem_of(name)), []).append(_join(folder, name))
        linked += [_join(folder, name) for name in listed.outside if suffix_of(name) in suffixes]
    respelled = _respell(owners, files)
    captions: dict[str, list[str]] = {stem: [] for stem in owners}
    garbled, empty = [], []
    for stem in owners:
        for path in sorted(files.pop(stem, ())):
            content = _bytes(os.path.join(texts.root, path))
            try:
                found = parse(content) if isinstance(content, bytes) else None
                reason = content
            except ValueError as error:
                found, reason = None, str(error)
            if found is None:
                garbled.append((path, reason))
                continue
            captions[stem] += found
            if not any(caption.strip() for caption in found):
                empty.append(path)
    if garbled and not any(caption.strip() for found in captions.values() for caption in found):
        first, reason = min(garbled)
        problems.append(f"None of the caption files in {texts.root} can be read, such as {printable(first)}: {reason}.")
    # with .json, what belongs to no picture may be anything
    orphans = [path for paths in files.values() for path in paths] if ".json" not in suffixes else []
    return Found(
        {path: captions[stem] for stem, paths in owners.items() for path in paths},
        orphans=orphans,
        empty=empty,
        garbled=sorted(garbled),
        linked=sorted(dict.fromkeys(linked)),
        respelled=respelled,
    )


def _respell(owners: dict[str, list[str]], files: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Gives caption files whose name fits no picture as written to the only one that it fits but for its spelling."""
    lost = [stem for stem in files if stem not in owners]
    if not lost:
        return []
    bare: dict[str, list[str]] = {}
    for stem in owners:
        if stem not in files:
            bare.setdefault(fold(stem), []).append(stem)
    claims: dict[str, list[str]] = {}
    for stem in lost:
        claims.setdefault(fold(stem), []).append(stem)
    found = []
    for folded, stems in sorted(claims.items()):
        others = bare.get(folded, ())
        if len(stems) == len(others) == 1:
            moved = files.pop(stems[0])
            files[others[0]] = moved
            found += [(path, owners[others[0]][0]) for path in moved]
    return found


def _bytes(path: str) -> bytes | str:
    """A file's content, or why it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        return str(error.strerror)


def _values(content: bytes, keys: Sequence[str]) -> list[str]:
    """The captions in a JSON file. Raises ValueError where it has none of them."""
    if not content:
        return []
    try:
        values = loads(decode(content))
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    found: list[str] = []
    named = [(key, value) for key, value in values if key in keys] if isinstance(values, tuple) else []
    if not named:
        raise ValueError(f"no JSON object with {', '.join(keys)}")
    for _, value in sorted(named, key=lambda pair: keys.index(pair[0])):
        value = [value] if isinstance(value, str) else value
        if value is not None and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            raise ValueError("a caption that is neither a string nor a list of strings")
        found += value or []
    return found


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
