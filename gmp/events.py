"""Long work is a generator: it yields events, plain dicts with a `type`, and returns its result."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

Event = dict[str, object]
Result = TypeVar("Result")


def finish(events: Generator[Event, None, Result], hear: Callable[[Event], object] = lambda event: None) -> Result:
    """Runs a generator to its end, telling `hear` every event, and returns what it returns."""
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            return end.value
        hear(event)


def progress(stage: str, done: int, total: int) -> Event:
    """How far a stage of the work is."""
    return {"type": "progress", "stage": stage, "done": done, "total": total}


def mapped(events: Generator[Event, None, Result], change: Callable[[Event], Event]) -> Generator[Event, None, Result]:
    """The same work with its events changed."""
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            return end.value
        yield change(event)
