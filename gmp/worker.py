"""The thread that drives a repair in the background."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from .events import Event

log = logging.getLogger(__name__)


class Worker:
    """Drives a repair in a thread of its own and keeps its newest event."""

    def __init__(
        self, events: Callable[[Callable[[], bool]], Iterator[Event]], folder: Path, listen: Callable[[Event], None]
    ):
        """`events` takes the stop function and gives the generator; `listen` hears every event, in the thread.

        The last one that it hears is `failed`, or `ended`: the run's folder is then free.
        """
        self.folder = folder
        self.latest: Event = {"type": "queued"}
        self.error: Exception | None = None
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._events = events
        self._listen = listen
        self._thread = threading.Thread(target=self._work, name=f"gmp {folder.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Asks for a stop at the next step's boundary, where the run saves itself."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def wait(self, seconds: float) -> Event:
        """Waits for an event, `seconds` at most, and returns the newest one."""
        with self._changed:
            if self.alive:
                self._changed.wait(seconds)
        return self.latest

    def _work(self) -> None:
        try:
            events, self._events = self._events, None  # what the run holds is freed when it is through
            for event in events(self._stop.is_set):
                self._hear(event)
            self._tell({"type": "ended"})
        except Exception as error:  # the thread's last stand; the run's folder tells more
            traceback.clear_frames(error.__traceback__)  # their variables hold the model, on the card even
            self.error = error.with_traceback(None)
            self._hear({"type": "failed", "error": str(error), "t": round(time.time(), 3)})

    def _hear(self, event: Event) -> None:
        self.latest = event
        self._tell(event)
        with self._changed:
            self._changed.notify_all()

    def _tell(self, event: Event) -> None:
        try:
            self._listen(event)
        except Exception:  # whoever listens must not end the training
            log.exception("a listener of run %s failed", self.folder.name)
