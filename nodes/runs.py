"""The runs of this process: one thread each, found by the run's id; and what others see of every run."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..gmp import control
from ..gmp.errors import InputError
from ..gmp.events import Event
from ..gmp.run import BEST, RESULT, Status, delete, is_done, status
from ..gmp.watch import Watch
from ..gmp.worker import Worker
from . import host
from .sockets import RunHandle

log = logging.getLogger(__name__)

COMMANDS = control.COMMANDS
POLICIES = ("pause", "share")  # what a run does while pictures are made
PROMPT = "prompt.json"  # in a run's folder: the part of the graph that started it

watch = Watch()
_workers: dict[str, Worker] = {}
_policies: dict[str, str] = {}  # run -> what it does while pictures are made
_taken: dict[str, dict[str, str]] = {}  # run -> node -> the run's stamp when the node took its result
_lock = threading.Lock()
_awaited = 0  # nodes of the prompt at work that wait for a run
_listeners: list[Callable[[str, Event], None]] = []
_queue_length: Callable[[], int] | None = None  # none before there is a server


def connect(listener: Callable[[str, Event], None], queue_length: Callable[[], int]) -> None:
    """`listener` hears (run, event) in the training threads; `queue_length` counts prompts at work and waiting."""
    global _queue_length
    _queue_length = queue_length
    if listener not in _listeners:
        _listeners.append(listener)


def folder_of(run: str) -> Path:
    return host.runs_folder() / run


def at_work(run: str) -> Worker | None:
    """The run's thread, if it is training now."""
    mine = _workers.get(run)
    return mine if mine is not None and mine.alive else None


def status_of(run: str) -> Status:
    return status(folder_of(run))


def overview(run: str) -> dict[str, object]:
    """A run as others see it; of one of this process also how far it is before training, and what ended it last."""
    seen = watch.overview(folder_of(run))
    mine = _workers.get(run)
    if mine is None:
        return seen
    if mine.alive and seen["state"] == "preparing" and mine.latest["type"] == "progress":
        return seen | {name: mine.latest[name] for name in ("stage", "done", "total")}
    if not mine.alive and mine.error is not None and seen["state"] != "finished":
        return seen | {"state": "failed", "error": str(mine.error), "text": f"failed: {mine.error}"}
    return seen


def stamp(run: str) -> str:
    """Changes whenever another result of the run can be had, or the run should be started again."""
    folder = folder_of(run)
    if not folder.exists():  # it was discarded: however often, it is to be started anew
        return f"{run} gone at {time.time_ns()}"
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


def busy(run: str) -> bool:
    """Whether a run has to hold: pictures are being made, and nothing of the prompt waits for a run."""
    return _policies.get(run) != "share" and not _awaited and _queue_length is not None and _queue_length() > 0


def attach(
    handle: RunHandle,
    events: Callable[[Callable[[], bool]], Iterator[Event]],
    while_generating: str,
    prompt: dict[str, object],
) -> Worker | None:
    """The thread of a run: the one at work, or one started now; None for a run that has finished.

    prompt: what to queue to go on with the run. Raises InputError with the reason of a run that has failed; the next
    call starts it again.
    """
    with _lock:
        _policies[handle.id] = while_generating
        known = _workers.get(handle.id)
        while known is not None and known.stopping and known.alive:  # it saves itself first
            known.wait(0.2)
            host.raise_if_interrupted()
        if known is not None and known.error is not None and not known.alive:
            del _workers[handle.id]
            raise _failure(known)
        if known is not None and known.alive:
            return known
        if is_done(handle.folder):
            return None
        handle.folder.mkdir(parents=True, exist_ok=True)
        (handle.folder / PROMPT).write_text(json.dumps(prompt), encoding="utf-8")
        fresh = Worker(events, handle.folder, lambda event: _hear(handle.id, event))
        _workers[handle.id] = fresh
        fresh.start()
        return fresh


def send(run: str, command: str, offload: bool) -> None:
    """Asks a run for something. Raises InputError when it cannot do that now."""
    folder = folder_of(run)
    if command == "discard" and not status(folder).at_work:
        delete(folder)
        watch.forget(folder)
    elif command == "stop" and (mine := at_work(run)) is not None:
        mine.stop()  # who queues it again meanwhile is to wait for it
    else:
        control.send(folder, command, offload)


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
        with _awaiting():
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


@contextmanager
def _awaiting() -> Iterator[None]:
    """The prompt at work is a prompt that waits: a run must not wait for it."""
    global _awaited
    with _lock:
        _awaited += 1
    try:
        yield
    finally:
        with _lock:
            _awaited -= 1


def show_progress(event: Event, progress: host.Progress) -> None:
    """Puts an event on the progress bar of the node that waits."""
    if event["type"] == "progress":
        progress.show(event["done"], event["total"])
    elif event.get("steps"):
        progress.show(event.get("step", 0), event["steps"])


def summary(folder: Path) -> str:
    """What a finished run has changed, on pictures that it was not trained on."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    lines = [f"finished after {result['steps']} steps"]
    if not result["measurements"]:
        return lines[0]
    before, after = result["measurements"][0], result["measurements"][-1]
    recall = [f"{100 * one['recall_at_1_image_to_text']:.0f} %" for one in (before, after)]
    lines.append(f"· of {after['images']} held-out pictures, {' → '.join(recall)} find their caption first")
    points = [point for point in ("penultimate", "last", "pooled") if point in before["drift"]]
    if points:
        cosines = {point: [one["drift"][point]["cosine"] for one in (before, after)] for point in points}
        kept = [f"{point} {' → '.join(_two_digits(c) for c in pair)}" for point, pair in cosines.items()]
        lines.append(f"· cosine to the original: {', '.join(kept)}")
    return "\n".join(lines)


def _two_digits(value: float | None) -> str:
    """None stands for a number that JSON does not have."""
    return "not a number" if value is None else f"{value:.2f}"


def _hear(run: str, event: Event) -> None:
    if event["type"] in ("start", "resume", "measure", "alarm", "paused", "resumed", "stopped", "done", "failed"):
        log.info("text encoder repair, run %s: %s", run, _words(event))
    for listener in _listeners:
        listener(run, event)


def _words(event: Event) -> str:
    step = event.get("step")
    match event["type"]:
        case "measure":
            return f"held-out loss {event['held_out']['loss']:.4f} after step {step}"
        case "alarm":
            return f"{event['alarm']} {'raised' if event['raised'] else 'cleared'} at step {step}: {event['advice']}"
        case "failed":
            return f"failed: {event['error']}"
        case other:
            return f"{other} at step {step}" + (f" of {event['steps']}" if event.get("steps") else "")
