"""The append-only record of a run: one JSON object per line in `events.jsonl`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .files import write_text

EVENTS = "events.jsonl"


def append(folder: Path, event: dict[str, object]) -> None:
    """Adds one event, a single line, to the run's record. Non-finite numbers are written as null."""
    line = _line(_finite(event))
    with open(folder / EVENTS, "ab+") as file:
        if file.tell():  # a crash may have torn the last line: start on a line of its own
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())


def read(folder: Path) -> list[dict[str, object]]:
    """All whole events; what a crash has torn is left out."""
    path = folder / EVENTS
    if not path.exists():
        return []
    events = []
    for line in path.read_bytes().split(b"\n"):
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return [event for event in events if isinstance(event, dict)]


def rewind(folder: Path, step: int) -> None:
    """Drops what happened after `step`, which a resumed run takes again, and torn lines."""
    kept = [event for event in read(folder) if event.get("step", step) <= step]
    write_text("".join(_line(event) for event in kept), folder / EVENTS)


def _line(event: dict[str, object]) -> str:
    return json.dumps(event, separators=(",", ":"), allow_nan=False) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value
