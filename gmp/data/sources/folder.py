"""A picture folder as its listings show it: every folder listed once, no file looked at by itself.

Links are looked at one by one: one that leads out of the folder is as if it were not there, and is listed. Names are
found as they are written, or, where that fails, in another case or Unicode form if only one file fits.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..captions import PICTURE_SUFFIXES

DEEPEST = 200  # folders within each other; a caption file may write any number


_PLAIN = re.compile(r"[^\\/:.][^\\/:]*(/[^\\/:.][^\\/:]*)*")  # nothing in it to be resolved


def suffix_of(name: str) -> str:
    """As `PurePath.suffix`, in lower case; fast enough for millions."""
    dot = name.rfind(".")
    return name[dot:].lower() if 0 < dot < len(name) - 1 else ""


def stem_of(name: str) -> str:
    return name[: len(name) - len(suffix_of(name))]


def fold(name: str) -> str:
    """Equal for names that differ in case, or in Unicode's form (macOS writes é as e and an accent)."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def is_picture(name: str) -> bool:
    return suffix_of(name) in PICTURE_SUFFIXES


@dataclass(frozen=True)
class Listed:
    """The names in one folder."""

    files: frozenset[str]
    folders: dict[str, bool]  # name -> whether it is a link, which is found by name and never walked into
    outside: dict[str, bool]  # links that lead out of the picture folder -> whether they are folders

    @cached_property
    def stems(self) -> dict[str, list[str]]:
        """Names of pictures without suffix -> the pictures."""
        found: dict[str, list[str]] = {}
        for name in sorted(self.files):
            if is_picture(name):
                found.setdefault(stem_of(name), []).append(name)
        return found

    @cached_property
    def folded_files(self) -> dict[str, list[str]]:
        return _folded(self.files)

    @cached_property
    def folded_stems(self) -> dict[str, list[str]]:
        return _folded(self.stems)

    @cached_property
    def folded_folders(self) -> dict[str, list[str]]:
        return _folded(self.folders)


def _folded(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        found.setdefault(fold(name), []).append(name)
    return found


@dataclass(frozen=True)
class Hit:
    """Where a name leads to."""

    paths: tuple[str, ...] = ()  # relative to the root; several where a name without suffix fits several pictures
    respelled: bool = False
    outside: bool = False  # through a link out of the folder
    rivals: tuple[str, ...] = ()  # files that fit in another spelling, where more than one does


class Folder:
    """The picture folder; remembers what it has listed."""

    def __init__(self, root: Path):
        self.root = root
        self.closed: list[str] = []  # folders that cannot be read, with the reason
        self._real = os.path.realpath(root)
        self._bases = {Path(os.path.abspath(root)), Path(self._real)}
        self._listed: dict[str, Listed] = {}
        self._places: dict[str, tuple[str, bool] | None] = {"": ("", False)}

    def relative(self, key: str) -> str | None:
        """A path as a caption file writes it, relative to the root with forward slashes; None if it leads out.

        An absolute path is made relative if it lies in the root.
        """
        if _PLAIN.fullmatch(key):
            return key
        path = PurePosixPath(key.replace("\\", "/"))
        if not (path.is_absolute() or PureWindowsPath(key).drive or PureWindowsPath(key).root):
            return None if ".." in path.parts else str(path)
        native = Path(key)
        if not native.is_absolute() or ".." in native.parts:
            return None
        return next((native.relative_to(base).as_posix() for base in self._bases if native.is_relative_to(base)), None)

    def find(self, path: str, stems: bool = False) -> Hit:
        """The file of that relative path. stems: a name without a picture's suffix fits all pictures of that name."""
        if path.count("/") > DEEPEST:
            return Hit()
        parent, _, name = path.rpartition("/")
        place = self._place(parent)
        if place is None:
            return Hit(outside=self._leads_out(path))
        folder, respelled = place
        listed = self.list(folder)
        if name in listed.outside:
            return Hit(outside=True)
        by_stem = stems and not is_picture(name)
        names = listed.stems.get(name) if by_stem else [name] if name in listed.files else None
        if names is not None:
            return Hit(tuple(_join(folder, one) for one in names), respelled)
        others = (listed.folded_stems if by_stem else listed.folded_files).get(fold(name), [])
        if len(others) > 1:
            return Hit(rivals=tuple(_join(folder, one) for one in others))
        names = listed.stems[others[0]] if others and by_stem else others
        return Hit(tuple(_join(folder, one) for one in names), respelled=bool(names))

    def walk(self) -> Iterator[tuple[str, Listed]]:
        """(folder, its names), the root first, in the order of their names; none that a link or a dot begins."""
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            listed = self.list(folder)
            yield folder, listed
            below = sorted(
                (n for n, link in listed.folders.items() if not link and not n.startswith(".")), reverse=True
            )
            waiting += [_join(folder, name) for name in below]

    def list(self, folder: str) -> Listed:
        """The names in a folder that was found or walked to."""
        if folder in self._listed:
            return self._listed[folder]
        files, folders, outside = [], {}, {}
        try:
            with os.scandir(os.path.join(self.root, folder)) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        if not self._inside(entry.path):
                            outside[entry.name] = entry.is_dir()
                        elif entry.is_dir():
                            folders[entry.name] = True
                        elif entry.is_file():
                            files.append(entry.name)
                    elif entry.is_dir(follow_symlinks=False):
                        folders[entry.name] = False
                    elif entry.is_file(follow_symlinks=False):
                        files.append(entry.name)
        except OSError as error:
            self.closed.append(f"{folder or self.root}: {error.strerror}")
        listed = self._listed[folder] = Listed(frozenset(files), folders, outside)
        return listed

    def _inside(self, path: str) -> bool:
        real = os.path.realpath(path)
        return real == self._real or real.startswith(os.path.join(self._real, ""))

    def _place(self, folder: str) -> tuple[str, bool] | None:
        """(folder as it is spelled on disk, whether that differs); None if it is not there."""
        if folder not in self._places:
            parent, _, name = folder.rpartition("/")
            above = self._place(parent)
            self._places[folder] = None
            if above is not None:
                folders = self.list(above[0])
                others = [name] if name in folders.folders else folders.folded_folders.get(fold(name), [])
                if len(others) == 1:
                    self._places[folder] = _join(above[0], others[0]), above[1] or others[0] != name
        return self._places[folder]

    def _leads_out(self, path: str) -> bool:
        """Whether one of the folders above a path is a link out of the root."""
        parts = path.split("/")[:-1]
        for n, name in enumerate(parts):
            place = self._place("/".join(parts[:n]))
            if place is None:
                return False
            if name in self.list(place[0]).outside:
                return True
        return False


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
