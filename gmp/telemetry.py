"""The append-only record of a run: a header, then one JSON object per line in `events.jsonl`. See docs/telemetry.md."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from . import __version__
from .errors import InputError
from .events import Event

EVENTS = "events.jsonl"
VERSION = 1
LONGEST = 1 << 24  # bytes of a line; what is longer is no event, and is not held in memory
BLOCK = 1 << 16  # bytes that are read at once from the end of a record
TAKE_BACK = ("start", "resume")  # training begins or goes on at a step: what was recorded of later ones counts no more

_decoder = json.JSONDecoder(parse_constant=lambda name: None)  # NaN and infinity, which JSON does not have


def append(folder: Path, event: Event) -> None:
    """Adds one event, a single line, to the run's record. Non-finite numbers are written as null."""
    text = _line(_finite(event))
    with open(folder / EVENTS, "ab+") as file:
        if file.tell():  # a crash may have torn the last line: start on a line of its own
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        else:
            text = _line(_header(folder)) + text
        file.write(text.encode())


def lines(path: Path, start: int = 0) -> Iterator[tuple[int, Event]]:
    """Whole events from byte `start` on, each with the offset behind its line, from which one can read on later.

    Reads line by line, however long the record is. A last line without its end is left for later; the header and what
    is no event are passed over. Nothing where there is no file. Raises InputError for a record of a newer version.
    """
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return
    with file:
        behind = file.seek(start)
        whole = True  # whether the next piece is the beginning of a line
        while piece := file.readline(LONGEST):
            behind += len(piece)
            ends = piece.endswith(b"\n")
            if not ends and len(piece) < LONGEST:  # torn, or still being written
                return
            event = _event(piece) if whole and ends else None
            whole = ends
            if event is None:
                continue
            if event["type"] == "telemetry":
                _check(event, path)
            else:
                yield behind, event


def read(folder: Path, kinds: Collection[str] | None = None) -> list[Event]:
    """All whole events that stand, in order; of some types only, if `kinds` names them.

    `resume`, and `start`, take back earlier events of later steps than theirs. Raises InputError for a record of a
    newer version.
    """
    wanted = [
        event
        for _, event in lines(folder / EVENTS)
        if kinds is None or event["type"] in kinds or event["type"] in TAKE_BACK
    ]
    standing: list[Event] = []
    limit = math.inf  # backwards, an event meets those that may take it back first
    for event in reversed(wanted):
        step = step_of(event)
        if event["type"] in TAKE_BACK:
            limit = limit if step is None else min(limit, step)
        elif step is not None and step > limit:
            continue
        if kinds is None or event["type"] in kinds:
            standing.append(event)
    return standing[::-1]


def newest(folder: Path) -> Event | None:
    """The last whole event, found from the end of the record. Raises InputError for a record of a newer version."""
    path = folder / EVENTS
    if next(lines(path), None) is None:  # which has looked at the header
        return None
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        block = BLOCK
        while True:
            start = file.seek(max(0, size - block))
            *whole, _ = file.read(size - start).split(b"\n")  # what follows the last newline is torn
            for line in reversed(whole if start == 0 else whole[1:]):
                event = _event(line)
                if event is not None and event["type"] != "telemetry":
                    return event
            if start == 0:
                return None
            block *= 8


def step_of(event: Event) -> int | None:
    """The step that an event tells of; None where it tells of none."""
    step = event.get("step")
    return step if type(step) is int else None


def _header(folder: Path) -> Event:
    t = round(time.time(), 3)
    return {"type": "telemetry", "version": VERSION, "run": folder.resolve().name, "gmp_version": __version__, "t": t}


def _check(header: Event, path: Path) -> None:
    version = header.get("version")
    if type(version) is not int or version > VERSION:
        raise InputError(
            f"{path} was recorded as version {version}, this program reads up to version {VERSION}; "
            "update Text Encoder Repair to open this run"
        )


def _event(line: bytes) -> Event | None:
    """What a line says, None where it is no event."""
    try:
        event = _decoder.decode(line.decode())
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("type"), str) else None


def _line(event: Event) -> str:
    return json.dumps(event, separators=(",", ":"), allow_nan=False) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value
