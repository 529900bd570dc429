"""What others see of a run, and the page about it."""

from __future__ import annotations

import json
import re
import time

import pytest
import torch

from gmp import telemetry
from gmp.compare import moved
from gmp.config import RepairConfig
from gmp.control import send
from gmp.errors import InputError
from gmp.geometric import to_geometric
from gmp.gradients import layer_and_role
from gmp.run import repair
from gmp.watch import Watch, can, checkpoints, config, duration, find, sentence
from gmp.worker import Worker
from tests.small import disturbed, small_clip

CPU = torch.device("cpu")
CONFIG = RepairConfig(epochs=2, batch=8, lr=1e-3, held_out=0.08, save_every=2)  # 6 steps


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched") / "run"
    list(repair(inputs, CONFIG, folder, cache=tmp_path_factory.mktemp("cache"), device=CPU))
    return folder


def test_a_finished_run(finished):
    seen = Watch().overview(finished)
    steps = [event for event in telemetry.read(finished) if event["type"] == "step"]
    measures = telemetry.read(finished, kinds=("measure",))
    assert (seen["state"], seen["step"], seen["steps"], seen["epoch"], seen["epochs"]) == ("finished", 6, 6, 2, 2)
    assert seen["loss"] == pytest.approx(steps[-1]["loss"], rel=1e-4) and seen["eta"] is None
    assert seen["recall"] == pytest.approx(measures[-1]["recall_at_1_text_to_image"], rel=1e-4)
    assert seen["text"] == "finished after 6 steps" and seen["can"] == ["discard"] and seen["alarms"] == []
    assert json.loads(json.dumps(seen, allow_nan=False)) == seen


def test_a_run_at_work_is_followed(inputs, tmp_path):
    folder, watch = tmp_path / "run", Watch()
    seen = []

    def look(event):
        if event["type"] == "step":
            seen.append(watch.overview(folder))
            if event["step"] == 4:
                send(folder, "pause", offload=True)

    worker = Worker(
        lambda stop: repair(inputs, CONFIG, folder, cache=tmp_path / "cache", device=CPU, stop=stop), folder, look
    )
    worker.start()
    end = time.monotonic() + 60
    while (now := watch.overview(folder))["state"] != "paused":
        assert time.monotonic() < end
        time.sleep(0.02)
    assert (now["why"], now["offloaded"], now["step"]) == ("command", True, 4)
    assert now["text"] == "paused at step 4 of 6, until it is resumed" and "resume" in now["can"]
    send(folder, "resume")
    worker._thread.join(60)
    assert [one["step"] for one in seen] == [1, 2, 3, 4, 5, 6]
    assert {one["state"] for one in seen} == {"running"} and all(one["device"] == "cpu" for one in seen)
    rate = seen[3]["pairs_per_second"]
    assert seen[3]["eta"] == pytest.approx(2 * 8 / rate, abs=0.1)
    assert watch.overview(folder)["state"] == "finished" and watch.overview(folder)["why"] is None


def test_what_stands_is_told_and_what_was_cleared_is_not(finished, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"config": CONFIG.to_json()}))
    for name, raised in (("exploding", True), ("slow", True), ("exploding", False)):
        alarm = {"type": "alarm", "alarm": name, "step": 3, "raised": raised, "advice": "…", "value": 1.0, "t": 1.0}
        telemetry.append(folder, alarm)
    watch = Watch()
    assert watch.overview(folder)["alarms"] == ["slow"] and len(watch.alarms(folder)) == 3
    telemetry.append(folder, {"type": "alarm", "alarm": "slow", "step": 9, "raised": False, "advice": "", "t": 2.0})
    assert watch.overview(folder)["alarms"] == []


def test_a_run_that_is_gone_is_empty(tmp_path):
    assert Watch().overview(tmp_path / "nothing")["state"] == "empty"


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"state": "waiting", "ahead": ["a", "b"]}, "waiting for a, b"),
        ({"state": "running", "steps": 9, "loss": 0.25, "eta": 90.0}, "step 3 of 9 · loss 0.2500 · 1 min 30 s left"),
        ({"state": "paused", "steps": 9, "why": "generating"}, "paused at step 3 of 9, while pictures are made"),
        ({"state": "interrupted"}, "interrupted, resumable at step 3"),
        ({"state": "failed", "error": "no space"}, "failed: no space"),
        ({"state": "preparing"}, "preparing"),
    ],
)
def test_states_in_words(state, words):
    assert sentence({"step": 3} | state) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (59.6, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (3725, "1 h 2 min"),
        (90061, "1 d 1 h"),
        (-5, "0 s"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_only_what_makes_sense_may_be_asked(finished, tmp_path):
    from gmp.run import Status

    assert can(Status("waiting", 0), tmp_path) == ["stop", "discard"]
    assert can(Status("empty", 0), tmp_path) == []
    assert can(Status("interrupted", 4), tmp_path) == ["discard"]
    (tmp_path / "prompt.json").touch()
    assert can(Status("failed", 4), tmp_path) == ["discard", "continue"]


def test_what_was_saved_and_what_it_was_given(finished):
    saved = checkpoints(finished)
    assert (
        saved["checkpoints"] == [3, 4, 6] and saved["result"] and set(saved["best"]) == {"step", "by", "worth", "loss"}
    )
    known = config(finished)
    assert known["config"]["epochs"] == 2 and known["inputs"]["text"]["sha256"]
    assert known["dataset"]["training pictures"] > 0 and known["join"]["tensors"]


def test_runs_are_found_by_folder_and_by_name(finished, tmp_path):
    assert find(tmp_path, str(finished)) == finished == find(finished.parent, finished.name)
    with pytest.raises(InputError, match="there is no run nothing"):
        find(tmp_path, "nothing")


# --- how far weights have moved


@pytest.mark.parametrize("geometric", [True, False])
def test_moved_is_the_naive_ratio(geometric):
    clip = small_clip()
    start = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    other = disturbed(clip)
    now = dict(other.named_parameters())
    sums: dict[str, list[float]] = {}
    for name, then in start.items():
        pairs = {name: (now[name].detach(), then)}
        if geometric and re.search(r"mlp\.c_(fc|proj)\.weight$", name):
            stem = name.removesuffix("weight")
            norms = [tensor.norm(dim=1, keepdim=True) for tensor in (now[name].detach(), then)]
            pairs = {f"{stem}r": tuple(norms), f"{stem}theta": (now[name].detach() / norms[0], then / norms[1])}
        for key, (a, b) in pairs.items():
            total = sums.setdefault(layer_and_role(key), [0.0, 0.0])
            total[0] += (a - b).double().square().sum().item()
            total[1] += b.double().square().sum().item()
    if geometric:
        to_geometric(other)
    found = moved(other, start)
    naive = {key: (change / length) ** 0.5 for key, (change, length) in sums.items() if length}
    assert found == pytest.approx(naive, rel=1e-4, abs=1e-7)


def test_what_does_not_train_has_not_moved():
    clip = small_clip()
    start = dict(clip.state_dict())
    clip.visual.requires_grad_(False)
    assert not [name for name in moved(clip, start) if name.startswith("vision")]
    assert max(moved(clip, start).values()) < 1e-6


def test_a_start_that_lacks_a_tensor_says_nothing_of_it():
    clip = small_clip()
    start = {name: tensor for name, tensor in clip.state_dict().items() if name != "text_projection"}
    assert "text.projection" not in moved(clip, start)
