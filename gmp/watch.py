"""What a run looks like from outside: state, newest figures, time left. For panel, nodes and terminal alike.

Everything comes from the run's folder, whichever process trains in it.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import telemetry
from .checkpoint import CHECKPOINTS, best_of, list_checkpoints
from .errors import InputError
from .files import read_json
from .history import History
from .run import RESULT, Status, status

FOLLOWED = 8  # histories that are kept in memory, a few megabytes each
NEWEST = 50  # steps that rate and time left are taken from


class Watch:
    """Looks at runs again and again, and reads only what is new. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._histories: OrderedDict[Path, tuple[threading.Lock, History]] = OrderedDict()
        self._figures: dict[Path, tuple[object, dict[str, object]]] = {}
        self._lock = threading.Lock()

    def overview(self, folder: Path) -> dict[str, object]:
        """State and newest figures of a run, as JSON values; `Run` in nodes/openapi.json. Folders by their names."""
        now = status(folder)
        figures = self._newest(folder, now)
        left = _seconds_left(figures, now)
        seen = {
            "run": folder.name,
            "state": now.state,
            "step": now.step,
            "device": now.device,
            "ahead": list(now.ahead),
            "error": now.error,
            "eta": left,
            "can": can(now, folder),
        }
        return figures | seen | {"text": sentence(figures | seen)}

    def history(self, folder: Path, since: int) -> dict[str, object]:
        """The whole history, or what came after a step, as docs/telemetry.md describes it."""
        with self._followed(folder) as history:
            return history.since(since) if since else history.whole()

    def alarms(self, folder: Path) -> list[dict[str, object]]:
        """What has been raised and cleared, oldest first."""
        with self._followed(folder) as history:
            return list(history.alarms)

    def measures(self, folder: Path) -> list[dict[str, object]]:
        """The first and the newest measurement."""
        with self._followed(folder) as history:
            return history.measures[:1] + history.measures[1:][-1:]

    def forget(self, folder: Path) -> None:
        with self._lock:
            self._histories.pop(folder, None)
            self._figures.pop(folder, None)

    @contextmanager
    def _followed(self, folder: Path) -> Iterator[History]:
        with self._lock:
            if folder not in self._histories:
                self._histories[folder] = threading.Lock(), History.load(folder)
            self._histories.move_to_end(folder)
            while len(self._histories) > FOLLOWED:
                self._histories.popitem(last=False)
            lock, history = self._histories[folder]
        with lock:
            history.follow()
            yield history

    def _newest(self, folder: Path, now: Status) -> dict[str, object]:
        stamp = _stamp(folder)
        known = self._figures.get(folder)
        if known is None or known[0] != stamp:
            with self._followed(folder) as history:
                known = stamp, _figures(folder, history)
            if not now.at_work:  # nothing more will come
                with self._lock:
                    self._histories.pop(folder, None)
            self._figures[folder] = known
        return known[1]


def can(now: Status, folder: Path) -> list[str]:
    """The commands that make sense now; `continue` is to start the same run again."""
    match now.state:
        case "running" | "paused":
            return ["resume" if now.state == "paused" else "pause", "stop", "save", "measure", "discard"]
        case "preparing":
            return ["pause", "stop", "discard"]
        case "waiting":
            return ["stop", "discard"]
        case "interrupted" | "failed":
            return ["discard", *(["continue"] if (folder / "prompt.json").exists() else [])]
        case _:
            return ["discard"] if now.state == "finished" else []


def checkpoints(folder: Path) -> dict[str, object]:
    """Saved steps, the best one, and whether there is a result."""
    saved = list_checkpoints(folder / CHECKPOINTS)
    return {"checkpoints": [one.step for one in saved], "best": best_of(folder), "result": (folder / RESULT).exists()}


def config(folder: Path) -> dict[str, object]:
    """Settings and identity of the inputs, where tensors came from, and what the data set holds."""
    known = read_json(folder / "run.json")
    inputs = {name: known.get(name) for name in ("text", "vision", "original", "dataset", "gmp_version")}
    return {
        "config": known.get("config", {}),
        "inputs": inputs,
        "join": {"tensors": read_json(folder / "join.json") or None},
        "dataset": read_json(folder / "dataset.json"),
    }


def sentence(seen: dict[str, object]) -> str:
    """A run's state in one line."""
    step, steps = seen["step"], seen.get("steps")
    of = f"step {step} of {steps}" if steps else f"step {step}"
    match seen["state"]:
        case "waiting":
            return f"waiting for {', '.join(seen['ahead'])}"
        case "running":
            loss = f" · loss {seen['loss']:.4f}" if seen.get("loss") is not None else ""
            left = f" · {duration(seen['eta'])} left" if seen.get("eta") is not None else ""
            return of + loss + left
        case "paused":
            why = "while pictures are made" if seen.get("why") == "generating" else "until it is resumed"
            return f"paused at {of}, {why}"
        case "interrupted":
            return f"interrupted, resumable at step {step}"
        case "failed":
            return f"failed: {seen['error']}"
        case "finished":
            early = f", early: nothing was better by then; {steps} were planned" if steps and step < steps else ""
            return f"finished after {step} steps{early}"
        case other:
            return str(other)


def duration(seconds: float) -> str:
    """90 -> "1 min 30 s", in the two largest units."""
    seconds = max(0, round(seconds))
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds % 60, "s")]
    first = next((i for i, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count or first == 3)


def _figures(folder: Path, history: History) -> dict[str, object]:
    newest = history.recent[-1] if history.recent else {}
    measure = history.measures[-1] if history.measures else {}
    marks = [mark for mark in history.marks if mark["type"] in ("paused", "resumed", "start", "resume")]
    mark = marks[-1] if marks else {}
    known = read_json(folder / "run.json")
    settings = known.get("config", {})
    standing = {alarm["alarm"]: alarm["raised"] for alarm in history.alarms}
    rates = [one["pairs_per_second"] for one in list(history.recent)[-NEWEST:] if one.get("pairs_per_second")]
    return {
        "steps": history.steps,
        "epoch": newest.get("epoch"),
        "epochs": settings.get("epochs"),
        "step_pairs": settings.get("batch", 0) * settings.get("accumulate", 1),
        "stage": None,
        "done": None,
        "total": None,
        "loss": newest.get("loss"),
        "recall": measure.get("recall_at_1_text_to_image"),
        "pairs_per_second": statistics.median(rates) if rates else None,
        "memory": newest.get("memory"),
        "started": history.started,
        "t": history.t,
        "why": mark.get("why") if mark.get("type") == "paused" else None,
        "offloaded": bool(mark.get("type") == "paused" and mark.get("offloaded")),
        "alarms": sorted(name for name, raised in standing.items() if raised),
    }


def _seconds_left(figures: dict[str, object], now: Status) -> float | None:
    """Steps that are left times what one has taken lately, measuring and saving not counted."""
    rate, steps = figures["pairs_per_second"], figures["steps"]
    if now.state not in ("running", "paused") or not rate or not steps:
        return None
    left = (steps - now.step) * figures["step_pairs"] / rate
    return round(left, 1) if math.isfinite(left) else None


def _stamp(folder: Path) -> object:
    try:
        state = (folder / telemetry.EVENTS).stat()
    except OSError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns


def find(folder: Path, name: str) -> Path:
    """A run's folder by its path, or by its name below `folder`. Raises InputError where there is none."""
    for path in (Path(name), folder / name):
        if (path / "run.json").exists():
            return path
    raise InputError(f"there is no run {name}, neither as a folder nor in {folder}")
