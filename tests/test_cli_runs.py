"""`python -m gmp runs`: seen, asked and deleted from another terminal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gmp.cli import main
from gmp.run import Status, status
from gmp.world.models import ASSETS, ORIGINAL, RUINED
from gmp.world.write import write_world

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "pictures"
    for _ in write_world(folder, 64, 0):
        pass
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def start(world: Path, name: str, epochs: int = 1000) -> subprocess.Popen:
    """A repair in a terminal of its own."""
    command = [
        sys.executable,
        "-m",
        "gmp",
        "repair",
        "--text",
        str(ASSETS / RUINED),
        "--vision",
        str(ASSETS / ORIGINAL),
    ]
    command += ["--images", str(world), "--captions", str(world / "captions.json"), "--out", f"runs/{name}"]
    command += ["--batch", "16", "--epochs", str(epochs), "--cache", "cache", "--held-out", "0.1", "--device", "cpu"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def until(condition, seconds: float = 90):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def at(name: str) -> Status:
    return status(Path("runs") / name)


def runs(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    assert main(["runs", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_run_of_another_terminal_from_start_to_end(world, here, capsys):
    first = start(world, "first")
    until(lambda: at("first").state == "running" and at("first").step >= 2)

    runs(capsys, "pause", "first")
    until(lambda: at("first").state == "paused")
    held = at("first").step
    seen = runs(capsys, "list")["runs"]
    assert [(one["run"], one["state"], one["step"]) for one in seen] == [("first", "paused", held)]

    second = start(world, "second", epochs=1)
    until(lambda: at("second").state == "waiting")
    assert at("second").ahead == ("first",)
    runs(capsys, "save", "first")
    until(lambda: held in runs(capsys, "show", "first")["checkpoints"])

    runs(capsys, "resume", "first")
    until(lambda: at("first").step > held)
    runs(capsys, "stop", "first")
    text, _ = first.communicate(timeout=60)
    assert first.returncode == 0 and "the same command goes on from there" in text
    stopped = at("first")
    assert stopped.state == "interrupted" and stopped.step > held

    assert runs(capsys, "watch", "second", "--every", "0.05")["state"] == "finished"
    second.communicate(timeout=60)

    again = subprocess.Popen([sys.executable, "-m", "gmp", "runs", "resume", "first"], stderr=subprocess.DEVNULL)
    until(lambda: at("first").state == "running" and at("first").step > stopped.step)
    again.send_signal(signal.SIGINT)  # Ctrl-C is stop
    assert again.wait(60) == 0 and at("first").state == "interrupted"

    assert main(["runs", "delete", "first"]) == 2 and Path("runs/first").exists()
    assert runs(capsys, "delete", "first", "--yes")["left"] == []
    assert not Path("runs/first").exists()


def test_a_second_ctrl_c_aborts(world, here):
    process = start(world, "run")
    until(lambda: at("run").state == "running" and at("run").step >= 1)
    process.send_signal(signal.SIGSTOP)  # so that both come within one step
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert at("run").state == "interrupted"
    assert process.returncode in (0, 130)


@pytest.mark.parametrize("ask", ["pause", "stop", "save", "measure"])
def test_who_is_not_at_work_cannot_be_asked(here, capsys, ask):
    Path("runs/old").mkdir(parents=True)
    Path("runs/old/run.json").write_text('{"config": {}}')
    assert main(["runs", ask, "old"]) == 2
    assert f"old is not at work, so it cannot {ask}" in capsys.readouterr().err


def test_a_run_of_a_graph_is_resumed_there(here, capsys):
    Path("runs/old").mkdir(parents=True)
    Path("runs/old/run.json").write_text('{"config": {}}')
    assert main(["runs", "resume", "old"]) == 2
    assert "queue its graph again in ComfyUI" in capsys.readouterr().err


def test_a_run_is_resumed_where_it_was_started(here, capsys):
    Path("runs/old").mkdir(parents=True)
    Path("runs/old/run.json").write_text('{"config": {}}')
    Path("runs/old/command.json").write_text(json.dumps({"arguments": ["--out", "runs/old"], "folder": "/elsewhere"}))
    assert main(["runs", "resume", "old"]) == 2
    assert "was started in /elsewhere; ask again there" in capsys.readouterr().err


def test_what_is_not_there_is_named(here, capsys):
    assert main(["runs", "show", "nothing"]) == 2
    assert "there is no run nothing" in capsys.readouterr().err
    assert main(["runs", "list"]) == 2
    assert "name the one that holds your runs with --folder" in capsys.readouterr().err
    Path("runs").mkdir()
    assert main(["runs", "list"]) == 0
    assert "there are no runs in runs" in capsys.readouterr().out
