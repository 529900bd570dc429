"""What a run's folder holds, as far as it is there and can be read, without folders of this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import CHECKPOINTS, best_of, list_checkpoints
from ..evidence import EVIDENCE, THUMBNAILS
from ..files import read_json

_THUMBNAIL = re.compile(r"[0-9a-f]{16}\.jpg")
# /home/me/pictures/1.jpg and C:\pictures\1.jpg, in a sentence; not and/or, not https://…
_FOLDERS = re.compile(r"(?<![\w.\\/-])(?<!https:)(?<!http:)(?:[A-Za-z]:)?[/\\]{1,2}(?:[^/\\\s\"'<>|:*?]+[/\\])+")


@dataclass(frozen=True)
class Contents:
    """Everything that a page is made of. Dicts are empty, and `evidence` None, where a file is missing or damaged."""

    folder: Path
    name: str
    state: str  # in words
    finished: bool
    history: Mapping[str, object]
    run: dict[str, object]  # run.json
    join: dict[str, object]
    dataset: dict[str, object]
    result: dict[str, object]
    document: dict[str, object]  # evidence.json
    saved: tuple[int, ...]
    best: dict[str, object] | None
    command: dict[str, object]
    prompt: dict[str, object]

    @property
    def evidence(self) -> dict[str, object] | None:
        section = self.document.get("evidence")
        return section if isinstance(section, dict) else None

    @property
    def config(self) -> dict[str, object]:
        return self.run.get("config") or {}

    def thumbnail(self, name: object) -> bytes | None:
        """A small picture's bytes, by a name that the evidence gives; None where it is not there."""
        if not isinstance(name, str) or not _THUMBNAIL.fullmatch(name):
            return None
        try:
            return (self.folder / THUMBNAILS / name).read_bytes()
        except OSError:
            return None


def read(
    folder: Path,
    history: Mapping[str, object],
    state: str | None = None,
    plain: Callable[[str], str] = lambda text: text,
) -> Contents:
    """state: of a run that has not finished, in words."""

    def clean(text: str) -> str:
        return without_folders(plain(text))

    names = ("run.json", "join.json", "dataset.json", "result.json", "command.json", "prompt.json")
    run, join, dataset, result, command, prompt = (read_json(folder / name) for name in names)
    return Contents(
        folder=folder,
        name=folder.resolve().name,
        state=clean(_finished(result, history) if result else state or "not finished"),
        finished=bool(result),
        history=dict(history) | {"alarms": _cleaned(history["alarms"], clean)},
        run=_cleaned(run, clean),
        join=_cleaned(join, clean),
        dataset=_cleaned(dataset, clean),
        result=result,
        document=read_json(folder / EVIDENCE),  # tells files by name, and pictures by their paths in the data set
        saved=tuple(one.step for one in list_checkpoints(folder / CHECKPOINTS)),
        best=best_of(folder),
        command=command,
        prompt=prompt,
    )


def without_folders(text: str) -> str:
    """A text whose absolute paths are told by their last part."""
    return _FOLDERS.sub("", text)


def _finished(result: Mapping[str, object], history: Mapping[str, object]) -> str:
    words = f"finished after {result.get('steps')} steps"
    if result.get("early"):
        words += f", early: no measurement was better for as long as patience allows; {history['steps']} were planned"
    return words


def _cleaned(value: object, clean: Callable[[str], str]) -> object:
    if isinstance(value, dict):
        return {name: _cleaned(one, clean) for name, one in value.items()}
    if isinstance(value, list):
        return [_cleaned(one, clean) for one in value]
    return clean(value) if isinstance(value, str) else value
