"""Whole repairs in several processes: the result of one process, one writer, and restarts that change nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gmp import checkpoint, telemetry
from gmp.config import Geometric, Neuron, RepairConfig, Unfreeze
from gmp.data.tars import find_tars
from gmp.files import read_header
from gmp.run import BEST, RESULT, Status, repair, status
from gmp.world.models import ASSETS, ORIGINAL, RUINED
from tests.side_by_side import Started, Torchrun
from tests.test_shards import pack

CPU = torch.device("cpu")
# 26 pictures, 2 held out: 3 steps an epoch, 6 in all
TEXT = RepairConfig(epochs=2, batch=8, lr=1e-3, held_out=0.08, save_every=2)
BOTH = dataclasses.replace(TEXT, batch=4, accumulate=2, train="both")
ALL = dataclasses.replace(TEXT, negatives="all", optimizer_state="bf16")
UNFROZEN = dataclasses.replace(
    BOTH,
    unfreeze=Unfreeze(1, 0.5),
    geometric=(Geometric(("mlp", "qkv", "out", "projection"), sphere=True),),
    neurons=(Neuron("text", 1, 3, 5.0), Neuron("vision", 0, 2, -3.0)),
)
CONFIGS = {"text": TEXT, "both": BOTH, "all": ALL, "unfrozen": UNFROZEN}
CLOCK = ("t", "pairs_per_second", "tokens_per_second", "memory")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("several-cache")


@pytest.fixture(scope="module")
def order(write_order):
    return lambda folder, config=TEXT, **what: write_order(folder, config, **what)


@pytest.fixture(scope="module")
def pair(order, tmp_path_factory):
    """An uninterrupted run in two processes: its folder, and what each process has heard."""
    return go(order(tmp_path_factory.mktemp("pair")), 2)


def go(folder: Path, size: int) -> tuple[Path, list[list[dict]]]:
    with Started("run", size, folder) as started:
        assert started.wait() == [0] * size, started.err
    return folder / "run", [json.loads((folder / f"0.{rank}.json").read_text()) for rank in range(size)]


def of(kind, events):
    return [event for event in events if event["type"] == kind]


def figures(events):
    return [{key: value for key, value in event.items() if key not in CLOCK} for event in of("step", events)]


def assert_near(folder: Path, whole: Path) -> None:
    """Equal to 1e-5. Biases of keys are not: softmax does not see them, and Adam makes steps of what is rounding."""
    for name in (RESULT, BEST):
        ours, theirs = load_file(folder / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            if not key.endswith("k_proj.bias"):
                assert (ours[key] - tensor).norm() <= 1e-5 * tensor.norm(), key
    for mine, one in zip(steps(folder), steps(whole), strict=True):
        assert mine["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert mine["text_cosine"] == pytest.approx(one["text_cosine"], abs=1e-5)
        assert mine["grad_norms"].keys() == one["grad_norms"].keys() and mine["losses"].keys() == one["losses"].keys()


def steps(folder: Path) -> list[dict]:
    return figures(telemetry.read(folder))


def assert_same(folder: Path, whole: Path) -> None:
    for name in (RESULT, BEST):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert steps(folder) == steps(whole)


# --- the result of one process


@pytest.mark.parametrize(("mode", "size"), [("text", 4), ("both", 2), ("all", 2), ("unfrozen", 3)])
def test_several_processes_have_the_result_of_one(order, alone, tmp_path, mode, size):
    folder, heard = go(order(tmp_path, CONFIGS[mode]), size)
    assert_near(folder, alone[mode])
    assert all(figures(events) == figures(heard[0]) for events in heard[1:])


def test_one_process_writes_and_all_hear_the_same(pair, alone):
    folder, heard = pair
    assert_near(folder, alone["text"])
    assert {path.name for path in folder.iterdir()} == {path.name for path in alone["text"].iterdir()}
    assert figures(heard[0]) == figures(heard[1]) and len(figures(heard[0])) == 6
    assert {event["type"] for event in heard[1]} == {"step"}
    kinds = [[event["type"] for event in telemetry.read(run)] for run in (folder, alone["text"])]
    assert kinds[0] == kinds[1]


def test_each_process_keeps_the_moments_of_its_share(pair, alone):
    kept = [int((pair[0].parent / f"{rank}.moments").read_text()) for rank in range(2)]
    saved = checkpoint.list_checkpoints(alone["text"] / "checkpoints")[-1]
    header = read_header(saved.path("optimizer.safetensors"))
    assert 0 < sum(kept) == sum(math.prod(info.shape) for info in header.tensors.values())
    assert max(kept) < 0.52 * sum(kept)


def test_pictures_are_embedded_by_all_processes(order, alone, cache, tmp_path):
    folder, _ = go(order(tmp_path, cache=str(tmp_path / "cache")), 2)
    shared, single = (list((one / "features").rglob("*.safetensors")) for one in (tmp_path / "cache", cache))
    rows = [[read_header(path).tensors["features"].shape[0] for path in paths] for paths in (shared, single)]
    assert sorted(rows[0]) == [13, 13] and sum(rows[1]) == 26
    assert_near(folder, alone["text"])


def test_tars_are_embedded_and_trained_on_by_all_processes(order, inputs, pictures, tmp_path):
    pytest.importorskip("webdataset")
    (tmp_path / "pictures").mkdir()
    for n, (name, captions) in enumerate(json.loads((pictures / "captions.json").read_text()).items()):
        shutil.copy(pictures / name, tmp_path / "pictures" / f"{n:03}{Path(name).suffix}")
        (tmp_path / "pictures" / f"{n:03}.txt").write_text("\n".join(captions))
    tars = find_tars([pack(tmp_path / "pictures", tmp_path / "tars", [9, 10, 7])])
    list(repair(dataclasses.replace(inputs, index=tars), TEXT, tmp_path / "one", cache=tmp_path / "cache", device=CPU))
    folder, heard = go(order(tmp_path, cache=str(tmp_path / "other"), tars=[tar.url for tar in tars.files]), 2)
    assert_near(folder, tmp_path / "one")
    assert figures(heard[0]) == figures(heard[1]) and len(figures(heard[0])) == 6


# --- asked, stopped, killed


def test_what_a_run_is_asked_for_changes_nothing(order, pair, tmp_path):
    folder, heard = go(order(tmp_path, at={"2": ["hold"], "4": ["measure", "save"]}), 2)
    assert_same(folder, pair[0])
    assert [event["offloaded"] for event in of("paused", heard[0])] == [True] and of("resumed", heard[0])
    assert 4 in [event["step"] for event in of("measure", heard[0])]


def test_a_stopped_run_goes_on_exactly_and_in_any_number_of_processes(order, pair, alone, inputs, cache, tmp_path):
    folder, heard = go(order(tmp_path, at={"3": ["stop"]}), 2)
    assert heard[0][-1]["type"] == "stopped" and len(figures(heard[1])) == 3
    assert status(folder) == Status("interrupted", 3)
    for name in "12":  # before it goes on
        shutil.copytree(folder, tmp_path / name / "run")
    again, heard = go(order(tmp_path), 2)
    assert [event["step"] for event in of("step", heard[1])] == [4, 5, 6]
    assert_same(again, pair[0])
    list(repair(inputs, TEXT, tmp_path / "1" / "run", cache=cache, device=CPU))
    assert_near(tmp_path / "1" / "run", alone["text"])
    three, heard = go(order(tmp_path / "2"), 3)
    assert len(heard) == 3
    assert_near(three, alone["text"])


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_a_killed_run_and_nothing_changes(order, pair, tmp_path, rank):
    order(tmp_path, kills={f"0.{rank}": 5})
    with Torchrun(2, "tests.processes", "run", tmp_path, restarts=1) as started:
        code, _, err = started.wait()
    assert code == 0, err
    assert_same(tmp_path / "run", pair[0])
    lives = [json.loads((tmp_path / f"1.{one}.json").read_text()) for one in (0, 1)]
    assert [event["step"] for event in of("step", lives[1])] == [5, 6]  # the last checkpoint is of step 4
    assert of("resume", lives[0])[0]["step"] == 4


# --- what goes wrong


def test_processes_with_other_settings_are_refused(order, tmp_path):
    order(tmp_path, other="1")
    with Started("run", 2, tmp_path) as started:
        assert started.wait() == [1, 1]
    assert "process 1 has another config than process 0" in (tmp_path / "1.txt").read_text()
    assert "do not work at the same run" in (tmp_path / "run" / "failure.txt").read_text()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_step_must_have_a_pair_for_every_process(order, tmp_path):
    order(tmp_path, dataclasses.replace(TEXT, batch=2))
    with Started("run", 3, tmp_path) as started:
        assert started.wait() == [1, 1, 1]
    assert "2 pairs cannot be shared by 3 processes" in (tmp_path / "2.txt").read_text()
    assert not (tmp_path / "run").exists()


# --- the command line


@pytest.fixture
def command(pictures, cache, tmp_path):
    towers = ("--text", ASSETS / RUINED, "--vision", ASSETS / ORIGINAL)
    data = ("--images", pictures, "--captions", pictures / "captions.json", "--cache", cache, "--device", "cpu")
    return ("gmp", "repair", *towers, *data, "--out", tmp_path / "run", "--batch", "8", "--held-out", "0.08", "--json")


def test_torchrun_starts_the_command_and_one_process_answers(command, tmp_path):
    with Torchrun(2, *command, "--epochs", "1") as started:
        code, out, err = started.wait()
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith("{")]
    assert len(lines) == 1 and json.loads(lines[0])["state"] == "done" and json.loads(lines[0])["steps"] == 3
    assert out.count("text encoder:") == 1
    assert status(tmp_path / "run") == Status("finished", 3)


@pytest.mark.skipif(os.name == "nt", reason="signals to a group of processes are POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_processes_where_they_can_go_on(command, tmp_path, number):
    with Torchrun(2, *command, "--epochs", "3000") as started:
        until = time.monotonic() + 100
        while len(of("step", telemetry.read(tmp_path / "run"))) < 3:
            assert time.monotonic() < until and started.process.poll() is None
            time.sleep(0.1)
        if number == signal.SIGINT:  # Ctrl-C reaches all that a terminal has started
            os.killpg(started.process.pid, number)
        else:
            started.process.send_signal(number)
        _, out, err = started.wait()
    assert "Traceback" not in out and '"state": "stopped"' in out, err
    found = status(tmp_path / "run")
    assert found.state == "interrupted" and found.step >= 3
    assert telemetry.newest(tmp_path / "run")["type"] == "stopped"
    assert (tmp_path / "run" / RESULT).exists()
