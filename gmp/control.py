"""What is asked of a run at work: commands, by whom ever, and the wishes of its own process.

A command is an empty file in the run's folder, named by time and command, so that panel, node and terminal ask in the
same way, from any process, even on a full disk. The run looks at every step's boundary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path

from .errors import InputError
from .events import Event
from .owner import owner

COMMANDS = ("pause", "resume", "stop", "save", "measure", "discard")
BOX = "commands"
POLL = 0.1  # seconds between two looks of a run that holds


def send(folder: Path, command: str, offload: bool = False) -> None:
    """Asks the run in `folder` for something; it does so at the next step's boundary.

    offload: with `pause`, move weights and optimizer state off the GPU meanwhile. Raises InputError for an unknown
    command, and when nobody is at work in the folder.
    """
    if command not in COMMANDS:
        raise InputError(f"{command!r} is not a command; they are {', '.join(COMMANDS)}")
    if owner(folder) is None:
        raise InputError(f"The run {folder.name} is not at work, so it cannot {command}")
    (folder / BOX).mkdir(exist_ok=True)
    (folder / BOX / f"{time.time_ns():020d}.{command}{'.offload' if offload else ''}").touch()


def receive(folder: Path) -> list[tuple[str, bool]]:
    """Takes the commands that lie in a folder, oldest first: name, and whether to offload."""
    try:
        papers = sorted((folder / BOX).iterdir())
    except FileNotFoundError:
        return []
    commands = []
    for paper in papers:
        _, command, *offload = (*paper.name.split("."), "")[:3]
        paper.unlink(missing_ok=True)
        commands.append((command, offload == ["offload"]))
    return [(command, offload) for command, offload in commands if command in COMMANDS]


class Control:
    """What is asked of one run, as known now."""

    def __init__(self, folder: Path, stop: Callable[[], bool], busy: Callable[[], bool]):
        """stop: whether this process wants the run to stop. busy: whether the device is wanted for something else."""
        self._folder, self._stop, self._busy = folder, stop, busy
        self._asked: set[str] = set()
        self._paused = False
        self.offload = False
        receive(folder)  # what was asked of an owner that is gone

    def look(self) -> None:
        for command, offload in receive(self._folder):
            if command in ("pause", "resume"):
                self._paused, self.offload = command == "pause", offload
            else:
                self._asked.add(command)

    @property
    def ends(self) -> bool:
        return self.discards or "stop" in self._asked or self._stop()

    @property
    def discards(self) -> bool:
        return "discard" in self._asked

    def why_hold(self) -> str | None:
        """`command`, `generating`, or None."""
        if self._paused:
            return "command"
        return "generating" if self._busy() else None

    def take(self, command: str) -> bool:
        """Whether a command was given; it counts as done from now on."""
        given = command in self._asked
        self._asked.discard(command)
        return given

    def obey(
        self,
        step: int,
        actions: Mapping[str, Callable[[], Iterator[Event]]],
        offload: Callable[[bool], None] = lambda away: None,
    ) -> Generator[Event, None, None]:
        """At a boundary: does what was asked, by `actions`, and holds while it is to; returns to go on or to end.

        offload: called with True to move what is large off the device, with False before anything goes on.
        """
        self.look()
        held, away = None, False
        while True:
            did = [event for name, act in actions.items() if self.take(name) for event in self._act(act, offload, away)]
            yield from did
            why = None if self.ends else self.why_hold()
            moves = bool(why) and self.offload and why == "command"
            if moves != away:
                offload(moves)
            if why and (why != held or moves != away or did):
                yield {"type": "paused", "step": step, "why": why, "offloaded": moves}
            if held and not why and not self.ends:
                yield {"type": "resumed", "step": step, "why": held, "offloaded": False}
            held, away = why, moves
            if not why:
                return
            time.sleep(POLL)
            self.look()

    @staticmethod
    def _act(act: Callable[[], Iterator[Event]], offload: Callable[[bool], None], away: bool) -> list[Event]:
        if away:
            offload(False)
        events = list(act())
        if away:
            offload(True)
        return events
