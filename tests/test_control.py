"""What is asked of a run, and when it obeys."""

from __future__ import annotations

import threading
import time

import pytest

from gmp.control import BOX, COMMANDS, Control, receive, send
from gmp.errors import InputError
from gmp.owner import own


@pytest.fixture
def folder(tmp_path):
    with own(tmp_path, "cpu"):
        yield tmp_path


@pytest.fixture
def control(folder):
    return Control(folder, stop=lambda: False, busy=lambda: False)


def test_commands_come_in_the_order_in_which_they_were_given(folder):
    for command in COMMANDS:
        send(folder, command)
    assert [name for name, _ in receive(folder)] == list(COMMANDS)
    assert receive(folder) == []


def test_a_pause_may_ask_for_the_memory(folder):
    send(folder, "pause", offload=True)
    send(folder, "pause")
    assert receive(folder) == [("pause", True), ("pause", False)]


def test_nobody_is_asked_where_nobody_is_at_work(tmp_path):
    with pytest.raises(InputError, match="not at work, so it cannot stop"):
        send(tmp_path, "stop")
    assert not (tmp_path / BOX).exists()


def test_an_unknown_command_is_refused(folder):
    with pytest.raises(InputError, match="'jump' is not a command; they are pause, resume"):
        send(folder, "jump")


def test_what_was_asked_of_an_owner_before_does_not_count(folder):
    send(folder, "stop")
    control = Control(folder, stop=lambda: False, busy=lambda: False)
    control.look()
    assert not control.ends


def test_saving_and_measuring_are_done_once_and_in_place(folder, control):
    done = []
    actions = {name: lambda name=name: done.append(name) or iter([{"type": name}]) for name in ("measure", "save")}
    send(folder, "save")
    send(folder, "measure")
    send(folder, "save")
    assert list(control.obey(3, actions)) == [{"type": "measure"}, {"type": "save"}]
    assert list(control.obey(4, actions)) == [] and done == ["measure", "save"]


def held(control, actions=None, offload=lambda away: None):
    """obey() in a thread, and the events that it gives."""
    events = []
    thread = threading.Thread(target=lambda: events.extend(_live(control, actions or {}, offload, events)))
    thread.start()
    return thread, events


def _live(control, actions, offload, events):
    for event in control.obey(7, actions, offload):
        events.append(event)
    return ()


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_pause_holds_until_it_is_resumed(folder, control):
    send(folder, "pause")
    thread, events = held(control)
    until(lambda: events)
    assert events == [{"type": "paused", "step": 7, "why": "command", "offloaded": False}]
    thread.join(0.3)
    assert thread.is_alive()
    send(folder, "resume")
    thread.join(5)
    assert not thread.is_alive()
    assert events[1:] == [{"type": "resumed", "step": 7, "why": "command", "offloaded": False}]


@pytest.mark.parametrize("command", ["stop", "discard"])
def test_a_run_that_holds_ends_when_it_is_asked_to(folder, control, command):
    send(folder, "pause")
    thread, events = held(control)
    until(lambda: events)
    send(folder, command)
    thread.join(5)
    assert control.ends and control.discards == (command == "discard")
    assert [event["type"] for event in events] == ["paused"]


def test_a_paused_run_still_saves_and_measures_with_everything_in_place(folder, control):
    places = []
    actions = {"save": lambda: iter([{"type": "checkpoint", "away": places[-1]}])}
    send(folder, "pause", offload=True)
    thread, events = held(control, actions, places.append)
    until(lambda: events)
    assert places == [True] and events[0]["offloaded"]
    send(folder, "save")
    until(lambda: len(events) == 3)
    assert places == [True, False, True] and events[1] == {"type": "checkpoint", "away": False}
    assert events[2]["type"] == "paused"  # still
    send(folder, "resume")
    thread.join(5)
    assert places == [True, False, True, False] and events[-1]["type"] == "resumed"


def test_a_stop_brings_back_what_was_moved_away_before_anything_is_saved(folder, control):
    places = []
    send(folder, "pause", offload=True)
    thread, events = held(control, offload=places.append)
    until(lambda: events)
    send(folder, "stop")
    thread.join(5)
    assert places == [True, False]


def test_a_run_waits_while_the_device_is_wanted(folder):
    wanted = threading.Event()
    wanted.set()
    control = Control(folder, stop=lambda: False, busy=wanted.is_set)
    thread, events = held(control)
    until(lambda: events)
    assert events[0]["why"] == "generating"
    wanted.clear()
    thread.join(5)
    assert [event["type"] for event in events] == ["paused", "resumed"]


def test_a_pause_by_command_outlasts_one_for_the_device(folder):
    wanted = threading.Event()
    wanted.set()
    control = Control(folder, stop=lambda: False, busy=wanted.is_set)
    thread, events = held(control)
    until(lambda: events)
    send(folder, "pause")
    until(lambda: len(events) == 2)
    wanted.clear()
    thread.join(0.3)
    assert thread.is_alive() and [event["why"] for event in events] == ["generating", "command"]
    send(folder, "resume")
    thread.join(5)
    assert events[-1]["type"] == "resumed"


def test_the_process_itself_may_want_a_stop(folder):
    control = Control(folder, stop=lambda: True, busy=lambda: True)
    assert list(control.obey(1, {})) == [] and control.ends and not control.discards


def test_strange_files_in_the_box_are_no_commands(folder, control):
    (folder / BOX).mkdir(exist_ok=True)
    (folder / BOX / "notes.txt").touch()
    (folder / BOX / ".DS_Store").touch()
    assert list(control.obey(1, {})) == [] and not control.ends
