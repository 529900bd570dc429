"""The runs of this process: one thread each, found by the run's id."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..gmp.errors import InputError
from ..gmp.events import Event
from ..gmp.run import BEST, RESULT, Status, Worker, is_done, status
from . import host
from .sockets import RunHandle

log = logging.getLogger(__name__)

Viewer = tuple[str, str | None]  # node id, client id
EVERY = 0.2  # seconds between two step events that are sent out

_workers: dict[str, Worker] = {}
_viewers: dict[str, set[Viewer]] = {}
_taken: dict[str, dict[str, str]] = {}  # run -> node -> the run's stamp when the node took its result
_lock = threading.Lock()
_listeners: list[Callable[[str, Event, str, set[Viewer]], None]] = []


def listen(listener: Callable[[str, Event, str, set[Viewer]], None]) -> None:
    """`listener` hears (run, event, text, viewers) in the training threads, five times a second at most."""
    if listener not in _listeners:
        _listeners.append(listener)


def worker(run: str) -> Worker | None:
    return _workers.get(run)


def at_work(run: str) -> Worker | None:
    """The run's thread, if it is training now."""
    mine = _workers.get(run)
    return mine if mine is not None and mine.alive else None


def status_of(run: str) -> Status:
    """As the engine's `status`; a run of this process is not asked for its lock."""
    folder = host.runs_folder() / run
    if mine := at_work(run):
        step = mine.latest.get("step", 0)
        return Status("running", step if isinstance(step, int) else 0)
    return status(folder)


def stamp(run: str) -> str:
    """Changes whenever another result of the run can be had, or the run should be started again."""
    folder = host.runs_folder() / run
    alive = at_work(run) is not None
    saved = sorted((folder / "checkpoints").glob("*.state.json"))
    marks = [folder / name for name in (BEST, RESULT, "result.json", "failure.txt")]
    marks += [] if alive else [folder / "events.jsonl"]
    times = [(mark.name, mark.stat().st_mtime_ns) for mark in marks if mark.exists()]
    return f"{run} {alive} {saved[-1].name if saved else ''} {times}"


def taken(run: str, node: str) -> None:
    """Notes that a node has the newest result of a run."""
    _taken.setdefault(run, {})[node] = stamp(run)


def all_taken(run: str) -> bool:
    """Whether the run is finished and every node that took something from it has the newest."""
    now = stamp(run)
    held = _taken.get(run, {}).values()
    return status_of(run).state == "finished" and bool(held) and all(one == now for one in held)


def attach(handle: RunHandle, events: Callable[[Callable[[], bool]], Iterator[Event]], viewer: Viewer) -> Worker | None:
    """The thread of a run: the one at work, or one started now; None for a run that has finished.

    Raises InputError with the reason of a run that has failed; the next call starts it again.
    """
    with _lock:
        known = _workers.get(handle.id)
        while known is not None and known.stopping and known.alive:  # it saves itself first
            known.wait(0.2)
            host.raise_if_interrupted()
        if known is not None and known.error is not None and not known.alive:
            del _workers[handle.id]
            raise _failure(known)
        _viewers.setdefault(handle.id, set()).add(viewer)
        if known is not None and known.alive:
            return known
        if is_done(handle.folder):
            return None
        handle.folder.mkdir(parents=True, exist_ok=True)
        (handle.folder / "failure.txt").unlink(missing_ok=True)
        fresh = Worker(events, handle.folder, _Announcer(handle))
        _workers[handle.id] = fresh
        fresh.start()
        return fresh


def _failure(worker: Worker) -> InputError:
    reason = str(worker.error).rstrip(".")
    return InputError(f"The run {worker.folder.name} failed: {reason}. Queue again to retry; what was saved is kept.")


def wait(handle: RunHandle, show: Callable[[Event], None]) -> None:
    """Waits until a run's thread is through. A cancelled prompt stops the run, which saves itself; it then resumes.

    Raises InputError when the run fails.
    """
    mine = _workers.get(handle.id)
    if mine is None:
        return
    try:
        while mine.alive:
            show(mine.wait(0.3))
            host.raise_if_interrupted()
    except BaseException:  # the interrupt is one in newer hosts
        mine.stop()
        while mine.alive:
            mine.wait(0.3)
        raise
    if mine.error is not None:
        _workers.pop(handle.id, None)
        raise _failure(mine)


def show_progress(event: Event, progress: host.Progress) -> None:
    """Puts an event on the progress bar of the node that waits."""
    if event["type"] == "progress":
        progress.show(event["done"], event["total"])
    elif event.get("steps"):
        progress.show(event.get("step", 0), event["steps"])


def watch(handle: RunHandle, viewer: Viewer) -> None:
    """Shows a run's texts on one more node."""
    if handle.id in _workers:
        _viewers.setdefault(handle.id, set()).add(viewer)


def tell(event: Event) -> str:
    """An event in a few words."""
    step, steps = event.get("step"), event.get("steps")
    match event["type"]:
        case "progress":
            return f"{event['stage']}: {event['done']} of {event['total']}"
        case "start":
            return f"training on {event['device']}: {steps} steps"
        case "resume":
            return f"resumed at step {step} of {steps}"
        case "step":
            return f"step {step} of {steps} · epoch {event['epoch']} · loss {event['loss']:.4f}"
        case "measure":
            return f"· held-out loss {event['held_out']['loss']:.4f} after step {step}"
        case "checkpoint":
            return f"saved step {step}"
        case "stopped":
            return f"stopped at step {step}; queue again to resume"
        case "done":
            return "finished"
        case "failed":
            return f"failed: {event['error']}"
        case "alarm":
            return str(event["advice"])
        case other:
            return str(other)


def summary(folder: Path) -> str:
    """What a finished run has changed, on pictures that it was not trained on."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    before, after = result["measurements"][0], result["measurements"][-1]
    recall = [f"{100 * one['recall_at_1_image_to_text']:.0f} %" for one in (before, after)]
    lines = [
        f"finished after {result['steps']} steps",
        f"· of {after['images']} held-out pictures, {' → '.join(recall)} find their caption first",
    ]
    points = [point for point in ("penultimate", "last", "pooled") if point in before["drift"]]
    if points:
        cosines = {point: [one["drift"][point]["cosine"] for one in (before, after)] for point in points}
        kept = [f"{point} {' → '.join(_two_digits(c) for c in pair)}" for point, pair in cosines.items()]
        lines.append(f"· cosine to the original: {', '.join(kept)}")
    return "\n".join(lines)


def _two_digits(value: float | None) -> str:
    """None stands for a number that JSON does not have."""
    return "not a number" if value is None else f"{value:.2f}"


class _Announcer:
    """Passes a run's events on, in its thread; steps and progress not more often than `EVERY`.

    A text stands until there is a better one: a step keeps the last measurement below it.
    """

    def __init__(self, handle: RunHandle):
        self._handle = handle
        self._last = 0.0
        self._text = ""

    def __call__(self, event: Event) -> None:
        often = event["type"] in ("step", "progress")
        if often and time.monotonic() - self._last < EVERY and event.get("step", 0) != event.get("steps"):
            return
        self._last = time.monotonic()
        if event["type"] in ("start", "resume", "measure", "alarm", "stopped", "done", "failed"):
            log.info("text encoder repair, run %s: %s", self._handle.id, tell(event))
        if event["type"] == "done":
            self._text = summary(self._handle.folder)
        elif event["type"] == "measure":
            self._text = f"{self._text.partition(chr(10))[0]}\n{tell(event)}"
        elif event["type"] not in ("join", "dataset", "checkpoint"):
            self._text = "\n".join([tell(event), *self._text.split("\n")[1:]])
        for listener in _listeners:
            listener(self._handle.id, event, self._text, set(_viewers.get(self._handle.id, ())))


def folder_of(run: str) -> Path:
    return host.runs_folder() / run
