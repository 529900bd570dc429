"""A run that is paused, stopped, saved, measured, discarded, queued and killed: nothing of it changes the result."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from gmp import memory, session, telemetry
from gmp.config import RepairConfig
from gmp.control import send
from gmp.errors import InputError
from gmp.run import BEST, RESULT, Status, delete, repair, status
from gmp.worker import Worker

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
CONFIG = RepairConfig(epochs=3, batch=8, lr=1e-3, held_out=0.08, save_every=2)  # 9 steps
CLOCK = ("t", "pairs_per_second", "tokens_per_second", "memory")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("control-cache")


@pytest.fixture
def start(inputs, cache):
    def go(folder, config=CONFIG, **options):
        return repair(inputs, config, folder, **{"cache": cache, "device": CPU} | options)

    return go


@pytest.fixture(scope="session")
def whole(inputs, cache, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole-control") / "run"
    list(repair(inputs, CONFIG, folder, cache=cache, device=CPU))
    return folder


def of(kind, events):
    return [event for event in events if event["type"] == kind]


def steps(folder):
    kept = of("step", telemetry.read(folder))
    return [{name: value for name, value in event.items() if name not in CLOCK} for event in kept]


def assert_same(folder, whole):
    for name in (RESULT, BEST):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert steps(folder) == steps(whole)


class Run:
    """A run in a thread, that is asked for things when certain events come."""

    def __init__(self, start, folder, when=lambda event: None, **options):
        self.folder, self.events = folder, []

        def hear(event):
            self.events.append(event)
            when(event)

        self.worker = Worker(lambda stop: start(folder, stop=stop, **options), folder, hear)
        self.worker.start()

    def until(self, condition):
        end = time.monotonic() + 60
        while not (found := condition()):
            assert time.monotonic() < end and (self.worker.alive or condition()), self.events[-3:]
            time.sleep(0.01)
        return found

    def kinds(self):
        return [event["type"] for event in self.events]

    def finish(self):
        self.worker._thread.join(60)
        assert not self.worker.alive
        return self.worker.latest


def asks(folder, at, *commands, **options):
    """Sends commands when a step is reached."""

    def when(event):
        if event["type"] == "step" and event["step"] == at:
            for command in commands:
                send(folder, command, **options)

    return when


# --- pause


@pytest.mark.parametrize("offload", [False, True])
def test_a_paused_run_takes_no_step_and_goes_on_as_if_nothing_was(start, whole, tmp_path, monkeypatch, offload):
    moves = []
    move = memory.move
    monkeypatch.setattr(memory, "move", lambda *a: moves.append(str(a[2])) or move(*a))
    folder = tmp_path / "run"
    run = Run(start, folder, asks(folder, 4, "pause", offload=offload))
    run.until(lambda: "paused" in run.kinds())
    time.sleep(0.3)
    assert of("step", run.events)[-1]["step"] == 4 and run.events[-1]["type"] == "paused"
    assert status(folder) == Status("paused", 4, "cpu")
    send(folder, "resume")
    assert run.finish()["type"] == "done"
    assert_same(folder, whole)
    assert moves == (["cpu", "cpu"] if offload else [])
    resumed = of("resumed", telemetry.read(folder))[0]
    assert (resumed["step"], resumed["why"]) == (4, "command")


def test_a_pause_is_honoured_at_the_next_boundary(start, tmp_path):
    folder = tmp_path / "run"
    run = Run(start, folder, asks(folder, 2, "pause"))
    run.until(lambda: "paused" in run.kinds())
    assert run.events[-1]["step"] == 2
    send(folder, "stop")
    assert run.finish()["type"] == "stopped"


def test_a_paused_run_may_be_stopped_and_resumed_later(start, whole, tmp_path):
    folder = tmp_path / "run"
    run = Run(start, folder, asks(folder, 5, "pause", offload=True))
    run.until(lambda: "paused" in run.kinds())
    send(folder, "stop")
    assert run.finish()["step"] == 5 and status(folder) == Status("interrupted", 5)
    list(start(folder))
    assert_same(folder, whole)


def test_it_holds_while_pictures_are_made(start, whole, tmp_path):
    folder, generating = tmp_path / "run", threading.Event()

    def when(event):
        if event["type"] == "step" and event["step"] == 3:
            generating.set()

    run = Run(start, folder, when, busy=generating.is_set)
    run.until(lambda: "paused" in run.kinds())
    assert (run.events[-1]["why"], run.events[-1]["step"]) == ("generating", 3)
    generating.clear()
    run.finish()
    assert_same(folder, whole)


def test_a_pause_before_training_holds_the_preparation(start, inputs, tmp_path):
    """While pictures are hashed and embedded nothing has been recorded yet, and commands count already."""
    folder = tmp_path / "run"
    seen = []

    def when(event):
        if event["type"] == "progress" and not seen:
            seen.append(event)
            send(folder, "pause")

    run = Run(start, folder, when, cache=tmp_path / "cache")
    run.until(lambda: "paused" in run.kinds())
    assert not of("step", run.events) and status(folder).at_work
    send(folder, "resume")
    assert run.finish()["type"] == "done"


# --- save, measure, stop, discard


def test_saving_and_measuring_now_change_nothing_but_what_is_recorded(start, whole, tmp_path):
    folder = tmp_path / "run"
    run = Run(start, folder, asks(folder, 5, "save", "measure"))
    run.finish()
    assert steps(folder) == steps(whole)
    assert (folder / RESULT).read_bytes() == (whole / RESULT).read_bytes()
    assert 5 in [event["step"] for event in of("checkpoint", run.events)]
    assert 5 in [event["step"] for event in of("measure", run.events)]
    assert not of("checkpoint", [e for e in telemetry.read(whole) if e.get("step") == 5])


def test_what_was_saved_on_request_is_what_a_stop_would_have_saved(start, tmp_path):
    for name, command in (("saved", "save"), ("stopped", "stop")):
        folder = tmp_path / name
        config = dataclasses.replace(CONFIG, keep=99)
        Run(start, folder, asks(folder, 5, command), config=config).finish()
    one, other = (tmp_path / name / "checkpoints" / "step_00000005.model.safetensors" for name in ("saved", "stopped"))
    tensors = [path.read_bytes()[8:][int.from_bytes(path.read_bytes()[:8], "little") :] for path in (one, other)]
    assert tensors[0] == tensors[1]


def test_a_discarded_run_is_gone(start, tmp_path):
    folder = tmp_path / "run"
    run = Run(start, folder, asks(folder, 3, "discard"))
    assert run.finish()["type"] == "discarded"
    assert not folder.exists()
    assert status(folder) == Status("empty", 0)


def test_deleting_leaves_what_no_run_has_made(start, whole, tmp_path):
    folder = tmp_path / "run"
    list(start(folder))
    (folder / "my notes.txt").write_text("keep me")
    (folder / "checkpoints" / "inside.txt").touch()
    assert delete(folder) == ["my notes.txt"]
    assert [path.name for path in folder.iterdir()] == ["my notes.txt"]


def test_what_is_no_run_is_not_deleted(tmp_path):
    (tmp_path / "text_encoder.safetensors").touch()
    with pytest.raises(InputError, match="not a run's folder; nothing was deleted"):
        delete(tmp_path)
    assert (tmp_path / "text_encoder.safetensors").exists()


def test_a_run_at_work_is_not_deleted(start, tmp_path):
    folder = tmp_path / "run"
    events = start(folder)
    next(event for event in events if event["type"] == "step")
    with pytest.raises(InputError, match="being trained by process"):
        delete(folder)
    assert (folder / "run.json").exists()
    events.close()
    assert delete(folder) == [] and not folder.exists()


# --- several runs


def test_one_trains_and_the_others_wait_in_order(start, tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    configs = [dataclasses.replace(CONFIG, seed=seed) for seed in range(3)]
    first = Run(start, folders[0], asks(folders[0], 1, "pause"), config=configs[0])
    first.until(lambda: "paused" in first.kinds())
    second = Run(start, folders[1], config=configs[1])
    second.until(lambda: "waiting" in second.kinds())
    third = Run(start, folders[2], config=configs[2])
    third.until(lambda: "waiting" in third.kinds())
    assert status(folders[1]) == Status("waiting", 0, "cpu", ("a",))
    assert status(folders[2]) == Status("waiting", 0, "cpu", ("a", "b"))
    send(folders[0], "resume")
    last = [run.finish() for run in (first, second, third)]
    assert [event["type"] for event in last] == ["done"] * 3
    ends = [of("done", run.events)[0]["t"] for run in (first, second)]
    starts = [of("start", run.events)[0]["t"] for run in (second, third)]
    assert ends[0] <= starts[0] and ends[1] <= starts[1]
    assert [event["ahead"] for event in of("waiting", third.events)][0] == ["a", "b"]


@pytest.mark.parametrize("command", ["stop", "discard"])
def test_a_waiting_run_can_be_cancelled(start, tmp_path, command):
    one, other = tmp_path / "a", tmp_path / "b"
    first = Run(start, one, asks(one, 1, "pause"))
    first.until(lambda: "paused" in first.kinds())
    second = Run(start, other, config=dataclasses.replace(CONFIG, seed=1))
    second.until(lambda: "waiting" in second.kinds())
    send(other, command)
    assert second.finish()["type"] == {"stop": "stopped", "discard": "discarded"}[command]
    assert other.exists() == (command == "stop")
    send(one, "resume")
    assert first.finish()["type"] == "done"


# --- kill -9


KILLED = """
import sys, torch
from pathlib import Path
from gmp.data.captions import read_index
from gmp.layouts import read_text, read_vision
from gmp.run import Inputs, repair
from gmp.config import RepairConfig
from tests.small import tokenize
torch.set_num_threads(1)
original, ruined, pictures, folder, cache = map(Path, sys.argv[1:])
inputs = Inputs(read_text(ruined), read_vision(original), read_text(original),
                read_index(pictures, pictures / "captions.json"), tokenize)
config = RepairConfig(epochs=3, batch=8, lr=1e-3, held_out=0.08, save_every=2)
for event in repair(inputs, config, folder, cache=cache, device=torch.device("cpu")):
    if event["type"] == "step":
        print(event["step"], flush=True)
        sys.stdin.readline()
"""


def test_a_killed_process_leaves_an_interrupted_run_that_goes_on_bit_for_bit(
    start, whole, small_files, pictures, cache, tmp_path
):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, *map(str, (*small_files, pictures, folder, cache))]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for step in range(1, 6):
        assert process.stdout.readline() == f"{step}\n"
        assert status(folder) == Status("running", step, "cpu")
        if step < 5:
            process.stdin.write("\n")
            process.stdin.flush()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert status(folder) == Status("interrupted", 4)
    assert str(status(folder)) == "interrupted, resumable at step 4"
    assert of("resume", list(start(folder)))[0]["step"] == 4
    assert_same(folder, whole)


def test_another_process_can_be_asked(start, small_files, pictures, cache, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, *map(str, (*small_files, pictures, folder, cache))]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "1\n"
    send(folder, "stop")
    process.communicate("\n")
    assert status(folder) == Status("interrupted", 1)


# --- failures


def test_a_failed_run_says_why_and_where_it_can_go_on(start, whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(session, "export_text", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(start(folder, dataclasses.replace(CONFIG, held_out=0.0)))
    seen = status(folder)
    assert (seen.state, seen.step, seen.error) == ("failed", 9, "division by zero")
    assert telemetry.read(folder)[-1]["type"] == "failed"
    assert "ZeroDivisionError" in (folder / "failure.txt").read_text()
    assert list(start(folder, dataclasses.replace(CONFIG, held_out=0.0)))[-1]["type"] == "done"
    assert status(folder).state == "finished" and not (folder / "failure.txt").exists()


def test_other_settings_leave_no_mark_on_a_run(start, whole, tmp_path):
    before = {path.name for path in whole.iterdir()}
    with pytest.raises(InputError, match="holds another run"):
        list(start(whole, dataclasses.replace(CONFIG, batch=4)))
    assert {path.name for path in whole.iterdir()} == before and status(whole).state == "finished"


def test_too_little_memory_is_told_before_training_with_what_would_fit(start, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "free", lambda device: 1000)
    with pytest.raises(InputError, match="(?i)memory"):
        list(start(tmp_path / "run", make_room=asked.append))
    assert asked and asked[0] > 1000
    assert not of("start", telemetry.read(tmp_path / "run"))


def test_the_record_has_all_that_is_documented(whole):
    events = telemetry.read(whole)
    step = of("step", events)[0]
    documented = {
        "type", "t", "step", "steps", "epoch", "loss", "losses", "lr", "lrs", "logit_scale", "grad_norm", "grad_norms",
        "non_finite", "update_ratios", "text_cosine", "skipped", "masked", "pairs_per_second", "tokens_per_second",
        "memory",
    }  # fmt: skip
    assert set(step) == documented
    roles = {name.rpartition(".")[2] for name in step["grad_norms"]}
    assert {"r", "theta", "attention", "layer_norm", "mlp", "embedding", "projection", "logit_scale"} <= roles
    moved = [event["moved"] for event in of("measure", events)]
    assert all(value < 1e-6 for value in moved[0].values()) and moved[-1]["text.0.theta"] > moved[0]["text.0.theta"]
    table = (ROOT / "docs" / "telemetry.md").read_text()
    assert not [name for event in events for name in event if f"`{name}`" not in table and event["type"] == "step"]
    assert not [event["type"] for event in events if f"`{event['type']}`" not in table]
    header = json.loads((whole / telemetry.EVENTS).read_text().splitlines()[0])
    assert (header["type"], header["version"]) == ("telemetry", 1)
