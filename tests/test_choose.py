"""Which step of a run is taken: measured in turn, the best kept by a chosen measure, ended when nothing gets better."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys

import pytest
import torch

from gmp.config import BEST_BY, Anchor, RepairConfig
from gmp.control import send
from gmp.errors import InputError
from gmp.files import read_header
from gmp.run import BEST, RESULT, repair
from gmp.session import goodness
from gmp.watch import Watch

CONFIG = RepairConfig(epochs=2, batch=8, lr=1e-3, held_out=0.2, save_every=2)  # 4 steps
WORSE = dataclasses.replace(  # every step makes it worse
    CONFIG, epochs=6, lr=0.9, schedule="constant", warmup=0.0, measure_every=1, patience=3
)


@pytest.fixture
def start(inputs, tmp_path):
    return functools.partial(repair, inputs, cache=tmp_path / "cache", device=torch.device("cpu"))


def steps(kind, events):
    return [event["step"] for event in events if event["type"] == kind]


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_it_is_measured_every_so_many_steps_and_at_the_end_of_each_epoch(start, tmp_path):
    events = list(start(dataclasses.replace(CONFIG, epochs=3, measure_every=4, save_every=100), tmp_path / "run"))
    assert steps("step", events) == list(range(1, 7))
    assert steps("measure", events) == [0, 2, 4, 6]
    events = list(start(dataclasses.replace(CONFIG, measure_every=3, save_every=100), tmp_path / "other"))
    assert steps("measure", events) == [0, 2, 3, 4]


@pytest.mark.parametrize("by", BEST_BY)
def test_the_best_is_chosen_by_the_measure_that_was_asked_for(start, tmp_path, by):
    config = dataclasses.replace(CONFIG, epochs=4, lr=0.02, schedule="constant", measure_every=1, best_by=by)
    measured = [event for event in start(config, tmp_path / "run") if event["type"] == "measure"]
    worth = {
        "objective": lambda one: -one["held_out"]["loss"],
        "recall": lambda one: one["recall_at_1_text_to_image"] + one["recall_at_1_image_to_text"],
    }.get(by, lambda one: one["drift"][by]["cosine"])
    best = max(measured, key=worth)  # the first of equals
    known = result(tmp_path / "run")["best"]
    assert (known["step"], known["by"], known["loss"]) == (best["step"], by, best["held_out"]["loss"])
    if best["step"]:
        assert read_header(tmp_path / "run" / BEST).metadata["step"] == str(best["step"])
    else:
        assert not (tmp_path / "run" / BEST).exists()


def test_what_is_not_a_number_is_the_least():
    finite = {"loss": 9.0}
    for losses, cosine in (({"loss": float("inf")}, 0.0), (finite, float("nan"))):
        by = "objective" if losses is not finite else "pooled"
        assert goodness(by, losses, {"drift": {"pooled": {"cosine": cosine}}}) < goodness("objective", finite, {})


def test_a_run_whose_start_cannot_be_measured_keeps_that_as_the_worst(start, tmp_path, monkeypatch):
    unknown = {"loss": float("nan"), "contrastive": float("nan")}
    monkeypatch.setattr("gmp.session.held_out_loss", lambda *_, **__: unknown)
    events = list(start(CONFIG, tmp_path / "run"))
    assert events[-1]["type"] == "done"
    best = result(tmp_path / "run")["best"]
    assert best["step"] == 0 and best["loss"] == -best["worth"] == sys.float_info.max


def test_where_nothing_could_be_held_out_patience_ends_nothing(start, tmp_path, monkeypatch):
    monkeypatch.setattr("gmp.training_data.held_out_count", lambda *_: 0)  # as copies of one picture may have it
    events = list(start(dataclasses.replace(CONFIG, measure_every=1, patience=1), tmp_path / "run"))
    assert not steps("measure", events)
    assert steps("step", events)[-1] == events[-1]["step"] and not events[-1]["early"]


def test_it_ends_early_when_nothing_gets_better(start, tmp_path):
    events = list(start(WORSE, tmp_path / "run"))
    assert steps("step", events) == [1, 2, 3]
    assert steps("checkpoint", events)[-1] == 3
    assert events[-1]["type"] == "done" and events[-1]["early"]
    assert result(tmp_path / "run")["early"] and (tmp_path / "run" / RESULT).exists()
    seen = Watch().overview(tmp_path / "run")
    assert seen["state"] == "finished" and "3 steps, early" in seen["text"] and "12 were planned" in seen["text"]
    again = list(start(WORSE, tmp_path / "run"))
    assert again[-1]["resumed"] and not steps("step", again)


def test_it_does_not_end_early_while_something_gets_better(start, tmp_path):
    events = list(start(dataclasses.replace(CONFIG, measure_every=1, patience=1), tmp_path / "run"))
    losses = [event["held_out"]["loss"] for event in events if event["type"] == "measure"]
    assert losses == sorted(losses, reverse=True)  # or this test shows nothing
    assert steps("step", events) == [1, 2, 3, 4] and not events[-1]["early"]


def test_patience_goes_on_counting_after_a_stop(start, tmp_path):
    events = []
    for event in start(WORSE, tmp_path / "run", stop=lambda: any(e["type"] == "step" for e in events)):
        events.append(event)
    assert events[-1]["type"] == "stopped" and events[-1]["step"] == 1
    events = list(start(WORSE, tmp_path / "run"))
    assert steps("step", events)[-1] == 3 and events[-1]["early"]


def test_a_run_that_was_killed_after_it_had_decided_to_end_trains_no_further(start, tmp_path):
    list(start(WORSE, tmp_path / "run"))
    before = (tmp_path / "run" / RESULT).read_bytes()
    for name in ("result.json", RESULT):
        (tmp_path / "run" / name).unlink()
    events = list(start(WORSE, tmp_path / "run"))
    assert not steps("step", events) and events[-1]["early"]
    assert (tmp_path / "run" / RESULT).read_bytes() == before


def test_measuring_by_hand_does_not_use_up_patience(start, tmp_path):
    events = []
    for event in start(WORSE, tmp_path / "run"):
        events.append(event)
        if event["type"] == "step":
            send(tmp_path / "run", "measure")
    assert len(steps("measure", events)) > 4 and steps("step", events) == [1, 2, 3]


def test_patience_needs_something_to_measure():
    with pytest.raises(InputError, match="patience is 2 and no pictures are held out"):
        RepairConfig(held_out=0.0, patience=2)
    with pytest.raises(InputError, match="best_by is 'luck'"):
        RepairConfig(best_by="luck")


def test_a_best_by_closeness_needs_an_original(start, inputs, tmp_path):
    config = dataclasses.replace(CONFIG, anchors=(), best_by="pooled")
    alone = dataclasses.replace(inputs, original=None)
    with pytest.raises(InputError, match="cannot be judged by pooled: .* set best_by to objective"):
        list(repair(alone, config, tmp_path / "run", cache=tmp_path / "c", device=torch.device("cpu")))
    both = dataclasses.replace(config, anchors=(Anchor("original", "pooled", 0.1),))
    with pytest.raises(InputError, match="anchored or judged by pooled: .* the anchors to none and best_by"):
        list(repair(alone, both, tmp_path / "run", cache=tmp_path / "c", device=torch.device("cpu")))
