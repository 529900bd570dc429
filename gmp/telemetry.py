"""The append-only record of a run: one JSON object per line in `events.jsonl`."""

from __future__ import annotations

import json
import os
from pathlib import Path

EVENTS = "events.jsonl"


def append(folder: Path, event: dict[str, object]) -> None:
    """Adds one event, a single line, to the run's record. Non-finite numbers are written as null."""
    line = json.dumps(_finite(event), separators=(",", ":"), allow_nan=False) + "\n"
    with open(folder / EVENTS, "ab") as file:
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
    """Drops the steps and measurements after `step`, which a resumed run takes again, and a torn last line."""
    kept = [e for e in read(folder) if e.get("type") not in ("step", "measure") or e["step"] <= step]
    temporary = folder / (EVENTS + ".tmp")
    with open(temporary, "wb") as file:
        for event in kept:
            file.write((json.dumps(event, separators=(",", ":")) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / EVENTS)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value
