"""Pictures sorted into classes: a folder of class folders (ImageNet, ObjectNet), or a CSV file of picture and label."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import InputError, some
from .captions import PICTURE_SUFFIXES

NAMES_JSON = "classes.json"
NAMES_TXT = "classes.txt"
_WORDNET = re.compile(r"n\d{8}")
_NAMES = f'{NAMES_JSON} ({{"n01440764": "tench"}}) or {NAMES_TXT} (a line each: n01440764 tench)'


@dataclass(frozen=True)
class Classes:
    """Pictures and the class of each, in the order of their paths."""

    root: Path
    names: tuple[str, ...]  # readable, no two the same whatever their case
    pictures: tuple[str, ...]  # paths relative to root, with forward slashes
    labels: tuple[int, ...]  # the position of each picture's class in names
    loose: tuple[str, ...] = ()  # pictures beside the class folders; not used
    repeated: int = 0  # rows of a CSV file that name a picture once more

    def __len__(self) -> int:
        return len(self.pictures)

    def without(self, broken: Mapping[str, str]) -> Classes:
        """The same classes without pictures that do not decode, given as path -> reason.

        Raises InputError if no picture is left.
        """
        kept = [i for i, picture in enumerate(self.pictures) if picture not in broken]
        if not kept:
            shown = "".join(f"\n  {path}: {reason}" for path, reason in list(broken.items())[:5])
            raise InputError(f"None of the {len(self)} pictures in {self.root} can be read:{shown}")
        return self._only(kept)

    def sample(self, per_class: int, seed: int = 0) -> Classes:
        """At most `per_class` pictures of each class, chosen by the hash of their paths and the seed alone."""
        if per_class < 1:
            raise InputError(f"{per_class} pictures of each class can't be taken; at least 1 is needed.")
        order = sorted(range(len(self)), key=lambda i: _draw(seed, self.pictures[i]))
        taken: Counter[int] = Counter()
        kept = []
        for i in order:
            if taken[self.labels[i]] < per_class:
                taken[self.labels[i]] += 1
                kept.append(i)
        return self._only(sorted(kept))

    def _only(self, kept: Sequence[int]) -> Classes:
        pictures, labels = (tuple(values[i] for i in kept) for values in (self.pictures, self.labels))
        return replace(self, pictures=pictures, labels=labels)


def read_classes(root: Path | str) -> Classes:
    """Reads a folder of class folders; no picture is opened.

    Each folder is a class, pictures in its sub-folders included; hidden ones are passed over. A class is called by what
    `classes.json` or `classes.txt` in `root` say for its folder, or else as its folder, underscores read as spaces:
    `alarm_clock` is "alarm clock". Raises InputError with all problems at once.
    """
    root = Path(root)
    if not root.is_dir():
        found = "is a file" if root.exists() else "is not there"
        raise InputError(f"{root} {found}. Give a folder that holds a folder of pictures for each class.")
    folders, loose = _entries(root)
    if not folders:
        beside = f"; the {len(loose)} pictures in it have no class" if loose else ""
        raise InputError(
            f"There are no folders in {root}{beside}. Put the pictures of each class into a folder of its own."
        )
    problems: list[str] = []
    names = _class_names(root, folders, problems)
    found = {folder: _pictures(root, folder) for folder in folders}
    empty = [folder for folder, pictures in found.items() if not pictures]
    if empty:
        problems.append(
            f"{len(empty)} of {len(folders)} class folders hold no pictures: {some(empty, len(empty))}. Add pictures "
            f"({', '.join(PICTURE_SUFFIXES)}) or delete these folders."
        )
    pairs = [(picture, label) for label, pictures in enumerate(found.values()) for picture in pictures]
    return _checked(root, names, pairs, problems, tuple(loose))


def read_labels(table: Path | str, root: Path | str) -> Classes:
    """Reads a CSV file with the columns `image` and `label`; pictures are named relative to `root`.

    ObjectNet's MVT set is such a one: `human_responses.csv`, with a row for each answer and so the same picture many
    times, beside the folder `all`. A picture counts once (`repeated` counts the other rows). Underscores in labels are
    read as spaces. Raises InputError with all problems at once: a picture with two labels, pictures that are not there.
    """
    table, root = Path(table), Path(root)
    if not root.is_dir():
        raise InputError(f"There is no folder {root}. Give the folder that holds the pictures of {table.name}.")
    if not table.is_file():
        found = "is a folder" if table.is_dir() else "is not there"
        raise InputError(f"{table} {found}. Give a CSV file with the columns image and label.")
    rows = _rows(table)
    labels: dict[str, str] = {}
    outside, conflicts, bare = [], [], []
    for picture, label in rows:
        path = PurePosixPath(picture.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or PureWindowsPath(picture).drive:
            outside.append(picture)
        elif not label:
            bare.append(picture)
        elif labels.setdefault(str(path), label) != label:
            conflicts.append(str(path))
    missing = [picture for picture in labels if not os.path.isfile(root / picture)]
    problems = [
        f"{len(wrong)} pictures of {table.name} {words}: {some(wrong)}. {advice}"
        for wrong, words, advice in (
            (outside, f"lie outside {root}", "Write paths relative to that folder, without '..'."),
            (bare, "have no label", "Name their class."),
            (conflicts, "have more than one label", "Keep one of them."),
            (missing, f"are not in {root}", "Give the folder that the paths are relative to."),
        )
        if wrong
    ]
    names = sorted(set(labels.values()))
    pairs = sorted((picture, names.index(label)) for picture, label in labels.items())
    checked = _checked(root, [_readable(name) for name in names], pairs, problems, ())
    return replace(checked, repeated=len(rows) - len(pairs))


def _checked(
    root: Path, names: Sequence[str], pairs: Sequence[tuple[str, int]], problems: list[str], loose: tuple[str, ...]
) -> Classes:
    """The classes, if nothing is wrong with them. Raises InputError with all problems."""
    same = [name for name, count in Counter(name.casefold() for name in names).items() if count > 1]
    if same:
        problems.append(
            f"{len(same)} class names are given more than once: {some(same)}. They can't be told apart: "
            f"rename their folders, or name them in {_NAMES}."
        )
    if "" in names:
        problems.append(f"A class has no name but underscores or spaces. Rename its folder, or name it in {_NAMES}.")
    if len(names) == 1:
        problems.append(f"There is one class only ({some(names)}): nothing can be told apart. Give at least two.")
    if problems:
        raise InputError("\n".join(problems))
    return Classes(root, tuple(names), tuple(p for p, _ in pairs), tuple(label for _, label in pairs), loose)


def _entries(root: Path) -> tuple[list[str], list[str]]:
    """Names of class folders and of loose pictures, sorted. Linked folders count."""
    try:
        entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{root} can't be read: {error.strerror}.") from None
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    return folders, sorted(entry.name for entry in entries if entry.is_file() and _is_picture(entry.name))


def _pictures(root: Path, folder: str) -> list[str]:
    found = []
    for place, subfolders, names in os.walk(root / folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".") and _is_picture(name)]
    return sorted(path.relative_to(root).as_posix() for path in found)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURE_SUFFIXES)


def _readable(name: str) -> str:
    return " ".join(name.replace("_", " ").split())


def _class_names(root: Path, folders: Sequence[str], problems: list[str]) -> list[str]:
    """What each folder's class is called, as the file of names says or else the folder."""
    there = [root / name for name in (NAMES_JSON, NAMES_TXT) if (root / name).is_file()]
    if len(there) == 2:
        problems.append(f"There is {NAMES_JSON} and {NAMES_TXT} in {root}. Keep one of them.")
        return list(folders)
    if not there:
        ids = [folder for folder in folders if _WORDNET.fullmatch(folder)]
        if ids:
            problems.append(
                f"{len(ids)} class folders are called by WordNet ids: {some(ids)}. No text encoder knows these: "
                f"put their names beside them in {_NAMES}."
            )
        return [_readable(folder) for folder in folders]
    known = _read_names(there[0])
    nameless = [folder for folder in folders if not known.get(folder)]
    if nameless:
        problems.append(f"{there[0].name} has no name for {len(nameless)} class folders: {some(nameless)}. Add them.")
    return [known.get(folder) or folder for folder in folders]


def _read_names(path: Path) -> dict[str, str]:
    """Folder -> readable name, of `classes.json` or `classes.txt` (folder, then a tab or else a space)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.name == NAMES_JSON:
            content = json.loads(text)
        else:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            content = {}
            for line in lines:
                folder, name = line.split("\t", 1) if "\t" in line else (line.split(None, 1) + [""])[:2]
                content[folder.strip()] = name
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} can't be read ({type(error).__name__}: {error}). Expected {_NAMES}.") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content.values()):
        raise InputError(f"{path} is not an object of strings. Expected {_NAMES}.")
    return {folder: _readable(name) for folder, name in content.items()}


def _rows(table: Path) -> list[tuple[str, str]]:
    """The columns `image` and `label` of a CSV file."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if lacking := [name for name in ("image", "label") if name not in columns]:
                raise InputError(
                    f"{table.name} has no column {' and '.join(lacking)}; found {some(columns, sort=False) or 'none'}. "
                    "Give a CSV file with the columns image and label."
                )
            rows = [((row["image"] or "").strip(), (row["label"] or "").strip()) for row in reader]
    except InputError:
        raise
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table} can't be read as a CSV file ({type(error).__name__}: {error}).") from None
    rows = [(picture, label) for picture, label in rows if picture]
    if not rows:
        raise InputError(f"{table.name} names no pictures.")
    return rows


def _draw(seed: int, path: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{path}".encode("utf-8", "surrogatepass")).digest()
