"""The history is what `telemetry.read` finds, condensed by a formula, however the record grew and was looked at."""

from __future__ import annotations

import json
import math
import os
import random
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmp import history as history_module
from gmp import telemetry
from gmp.errors import InputError
from gmp.history import SNAPSHOT, History

LAYERS = ["text.embedding", "text.0.r", "text.0.theta", "text.1.attention", "logit_scale"]
SMALL = {"BUCKETS": 8, "RECENT": 5, "LISTED": 6, "MOVED": 9, "COLUMNS": 4}


@pytest.fixture
def small(monkeypatch):
    """Limits that a short record reaches."""
    for name, value in SMALL.items():
        monkeypatch.setattr(history_module, name, value)


# --- records


def eighths(dice: random.Random) -> float:
    """Numbers whose sums are exact in any order."""
    return dice.randint(-4000, 8000) / 8


def step(number: int, dice: random.Random, **more) -> dict[str, object]:
    def value() -> float | None:
        return dice.choice([eighths(dice), eighths(dice), eighths(dice), None])

    event = {
        "type": "step",
        "step": number,
        "steps": 10_000,
        "epoch": 1 + number // 100,
        "loss": value(),
        "losses": {"contrastive": value(), "original:penultimate=0.3": eighths(dice)},
        "lr": eighths(dice),
        "lrs": {"1": eighths(dice), "0.1": value()},
        "grad_norm": value(),
        "grad_norms": {name: value() for name in LAYERS},
        "skipped": 0,
        "memory": dice.randrange(2**33),
        "t": 100.0 + number,
    }
    if number % 10 == 1:
        event["update_ratios"] = {name: value() for name in LAYERS[1:]}
    return event | more


def measure(number: int, dice: random.Random) -> dict[str, object]:
    return {
        "type": "measure",
        "step": number,
        "held_out": {"contrastive": eighths(dice), "loss": eighths(dice)},
        "recall_at_1_text_to_image": dice.random(),
        "recall_at_1_image_to_text": None,
        "recall_at_5_text_to_image": 1.0,
        "drift": {"penultimate": {"cosine": dice.random(), "relative_norm": 1.0}, "pooled": {"cosine": dice.random()}},
        "moved": {name: dice.random() for name in dice.sample(LAYERS, 3)},
        "t": 200.0 + number,
    }


def line(event: dict[str, object]) -> bytes:
    return json.dumps(event).encode() + b"\n"


def write(folder: Path, events: list[dict[str, object]]) -> None:
    (folder / telemetry.EVENTS).write_bytes(b"".join(map(line, events)))


def add(folder: Path, *events: dict[str, object]) -> None:
    with open(folder / telemetry.EVENTS, "ab") as file:
        file.write(b"".join(map(line, events)))


def steps(first: int, last: int, seed: int = 0) -> list[dict[str, object]]:
    dice = random.Random(seed)
    return [step(number, dice) for number in range(first, last + 1)]


def resume(at: int) -> dict[str, object]:
    return {"type": "resume", "step": at, "steps": 10_000, "device": "cpu", "t": 7.5}


def followed(folder: Path) -> History:
    history = History(folder)
    history.follow()
    return history


# --- what a history has to be, from the events that stand


def five(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def finite(values) -> list[float]:
    return [value for value in values if value is not None]


def flat(event: dict[str, object]) -> dict[str, float | None]:
    plain = ["loss", "lr", "logit_scale", "grad_norm", "non_finite", "text_cosine"]
    plain += ["pairs_per_second", "tokens_per_second", "memory"]
    values = {name: event[name] for name in plain if name in event}
    return values | {f"{group}.{n}": v for group in ("losses", "lrs") for n, v in event.get(group, {}).items()}


def stride_of(last: int, buckets: int) -> int:
    stride = 1
    while last > buckets * stride:
        stride *= 2
    return stride


def thinned(things: list, most: int) -> list:
    width = 1
    while True:
        places = [place for place in range(len(things)) if place % width == 0 or place == len(things) - 1]
        if len(places) <= most:
            return [things[place] for place in places]
        width *= 2


def grouped(events: list, width: int) -> list[list]:
    """Events by the bucket of `width` steps that they fall into; no empty ones."""
    groups: dict[int, list] = {}
    for event in events:
        groups.setdefault((event["step"] - 1) // width, []).append(event)
    return [groups[key] for key in sorted(groups)]


def layers_of(all_events: list, groups: list[list]) -> dict[str, object]:
    kinds = {"grad_norm": "grad_norms", "update_ratio": "update_ratios"}

    def known(name):
        return any(event.get(kind, {}).get(name) is not None for event in all_events for kind in kinds.values())

    names = [name for name in LAYERS if known(name)]
    rows = {
        answered: [
            [five(max(finite(event.get(kind, {}).get(name) for event in group), default=None)) for group in groups]
            for name in names
        ]
        for answered, kind in kinds.items()
    }
    return {"at": [group[-1]["step"] for group in groups], "names": names} | rows


def told(folder: Path, since: int | None, listed: int, moved: int) -> dict[str, object]:
    """Measures, alarms and marks. What has no step of its own is where the run was, or where it went back to."""
    events = [event for _, event in telemetry.lines(folder / telemetry.EVENTS)]
    standing = telemetry.read(folder)
    kinds = ("start", "resume", "checkpoint", "paused", "resumed", "out_of_memory", "stopped", "done", "failed")
    measures, alarms, marks, now = [], [], [], 0
    for place, event in enumerate(events):
        now = event["step"] if event["type"] in ("step", "start", "resume") else now
        if event["type"] == "step" or event not in standing:
            continue
        later = [one["step"] for one in events[place:] if one["type"] in ("start", "resume")]
        at = event.get("step", max(0, min([now, *later])))
        if event["type"] == "measure":
            brief = {
                "step": at,
                "loss": five(event["held_out"]["loss"]),
                "contrastive": five(event["held_out"]["contrastive"]),
                "recall_at_1_text_to_image": five(event["recall_at_1_text_to_image"]),
                "recall_at_1_image_to_text": None,
                "recall_at_5_text_to_image": five(event["recall_at_5_text_to_image"]),
                **{point: five(agreement["cosine"]) for point, agreement in event["drift"].items()},
                "moved": {name: five(value) for name, value in event["moved"].items()},
            }
            measures.append(brief)
        elif event["type"] == "alarm":
            alarms.append({key: event[key] for key in ("alarm", "raised", "advice", "t")} | {"step": at})
        elif event["type"] in kinds:
            extra = {key: event[key] for key in ("why", "offloaded", "batch") if key in event}
            marks.append({"type": event["type"], "step": at, "t": event["t"]} | extra)
    if since is not None:
        measures, alarms, marks = ([o for o in all_ if o["step"] >= since] for all_ in (measures, alarms, marks))
    widest = max((len(one["moved"]) for one in measures), default=1)
    telling = [id(one) for one in thinned(measures, max(2, moved // widest))]
    measures = [one if id(one) in telling else one | {"moved": {}} for one in thinned(measures, listed)]
    return {"measures": measures, "alarms": alarms[-listed:], "marks": thinned(marks, listed)}


def limits() -> dict[str, int]:
    return {name: getattr(history_module, name) for name in SMALL}


def whole(folder: Path) -> dict[str, object]:
    most = limits()
    events = telemetry.read(folder)
    taken = [event for event in events if event["type"] == "step"]
    stride = stride_of(max((event["step"] for event in taken), default=0), most["BUCKETS"])
    groups = grouped(taken, stride)
    series: dict[str, dict[str, list]] = {}
    for name in {name for event in taken for name, value in flat(event).items() if value is not None}:
        values = [finite(flat(event).get(name) for event in group) for group in groups]
        series[name] = {"mean": [five(math.fsum(v) / len(v)) if v else None for v in values]}
        if stride > 1:
            series[name] |= {k: [five(f(v)) if v else None for v in values] for k, f in (("min", min), ("max", max))}
    used = (groups[-1][-1]["step"] - 1) // stride + 1 if groups else 0
    width = stride
    while math.ceil(used * stride / width) > most["COLUMNS"]:
        width *= 2
    return head(folder, events, None, stride) | {
        "at": [group[-1]["step"] for group in groups],
        "series": series,
        "layers": layers_of(taken, grouped(taken, width)),
        **told(folder, None, most["LISTED"], most["MOVED"]),
    }


def head(folder: Path, events: list, since: int | None, stride: int) -> dict[str, object]:
    last = [event for event in events if event["type"] in ("step", "start", "resume")][-1:]
    return {
        "version": 1,
        "run": folder.name,
        "step": max(0, last[0]["step"]) if last else 0,
        "steps": last[0]["steps"] if last else None,
        "stride": stride,
        "since": since or 0,
        "reset": since is None,
    }


def taken_back(folder: Path) -> set[int]:
    """Steps that a resume has taken back at some time."""
    now, found = 0, set()
    for _, event in telemetry.lines(folder / telemetry.EVENTS):
        if event["type"] in ("resume", "start"):
            found |= set(range(event["step"] + 1, now + 1))
        if event["type"] in ("resume", "start", "step"):
            now = max(0, event["step"])
    return found


def since(folder: Path, at: int) -> dict[str, object]:
    most = limits()
    events = telemetry.read(folder)
    known = head(folder, events, at, 1)
    if at <= 0 or at > known["step"] or known["step"] - at > most["RECENT"] or at in taken_back(folder):
        return whole(folder)
    taken = [event for event in events if event["type"] == "step"]
    after = [event for event in taken if event["step"] > at]
    names = {name for event in taken for name, value in flat(event).items() if value is not None}
    return known | {
        "at": [event["step"] for event in after],
        "series": {name: {"mean": [five(flat(event).get(name)) for event in after]} for name in names},
        "layers": layers_of(taken, [[event] for event in after]),
        **told(folder, at, most["LISTED"], most["MOVED"]),
    }


def check(history: History, folder: Path, *sinces: int) -> None:
    pairs = [(history.whole(), whole(folder)), *((history.since(at), since(folder, at)) for at in sinces)]
    for found, expected in pairs:
        json.dumps(found, allow_nan=False)
        assert by_name(found) == expected


def by_name(answer: dict[str, object]) -> dict[str, object]:
    """Layers in the order of `LAYERS`; they may have come in another one."""
    layers = answer["layers"]
    order = sorted(range(len(layers["names"])), key=lambda place: LAYERS.index(layers["names"][place]))
    ordered = {kind: [layers[kind][place] for place in order] for kind in ("names", "grad_norm", "update_ratio")}
    return answer | {"layers": layers | ordered}


# --- condensing


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 15, 16, 17, 32, 33, 64, 65, 100, 257])
def test_buckets_are_what_the_formula_says_at_any_length(tmp_path, small, length):
    write(tmp_path, steps(1, length))
    check(followed(tmp_path), tmp_path, -1, 0, *range(max(1, length - 7), length + 3))


@pytest.mark.parametrize("length", [1000, 1024, 1025, 2049, 5000])
def test_buckets_are_what_the_formula_says_at_real_limits(tmp_path, length):
    write(tmp_path, [event | {"grad_norms": {"text.0.r": event["lr"]}} for event in steps(1, length)])
    check(followed(tmp_path), tmp_path, length, length - 1, length - 512, length - 513)


def test_a_spike_in_one_step_is_seen_at_any_length(tmp_path, small):
    dice = random.Random(1)
    for at in (1, 2, 63, 64, 65, 127, 128, 200):
        events = [step(number, dice, loss=1.0, grad_norms={"text.0.r": 1.0}) for number in range(1, 201)]
        events[at - 1]["loss"], events[at - 1]["grad_norms"]["text.0.r"] = 1e30, 1e30
        write(tmp_path, events)
        found = followed(tmp_path).whole()
        bucket = (at - 1) // 32
        assert found["stride"] == 32 and found["at"][bucket] >= at > bucket * 32
        assert [value == 1e30 for value in found["series"]["loss"]["max"]] == [b == bucket for b in range(7)]
        assert found["series"]["loss"]["min"] == [1.0] * 7
        spiked = [1e30 in row for row in found["layers"]["grad_norm"]]
        assert spiked == [name == "text.0.r" for name in found["layers"]["names"]]


def test_following_step_by_step_is_reading_at_once(tmp_path, small):
    history = History(tmp_path)
    for event in steps(1, 70):
        add(tmp_path, event)
        history.follow()
        assert history.whole() == followed(tmp_path).whole()
    check(history, tmp_path, 66, 69, 70)


def test_minimum_and_maximum_are_left_out_where_they_are_the_mean(tmp_path, small):
    write(tmp_path, steps(1, 8))
    assert all(list(lines) == ["mean"] for lines in followed(tmp_path).whole()["series"].values())
    write(tmp_path, steps(1, 9))
    assert all(sorted(lines) == ["max", "mean", "min"] for lines in followed(tmp_path).whole()["series"].values())


def test_steps_that_are_not_there_leave_no_bucket(tmp_path, small):
    dice = random.Random(2)
    write(tmp_path, [step(number, dice) for number in (3, 4, 20, 21, 40, 100, 101, 102)])
    history = followed(tmp_path)
    assert history.whole()["at"] == [4, 21, 40, 102]
    check(history, tmp_path, *range(95, 105))


def test_series_and_layers_may_appear_late_and_go(tmp_path, small):
    dice = random.Random(3)
    events = [step(number, dice) for number in range(1, 30)]
    for event in events[:12]:
        del event["losses"]["original:penultimate=0.3"], event["grad_norms"]["text.0.r"], event["memory"]
    for event in events[20:]:
        del event["lrs"], event["grad_norm"]
        event["grad_norms"] = {}
        event.pop("update_ratios", None)
    write(tmp_path, events)
    check(followed(tmp_path), tmp_path, 24, 25, 28)


def test_layers_become_fewer_buckets_where_there_are_many_names(tmp_path, monkeypatch):
    names = [f"text.{number}.r" for number in range(64)]
    dice = random.Random(4)
    for number in range(1, 257):
        add(tmp_path, step(number, dice, grad_norms=dict.fromkeys(names, float(number)), update_ratios={}))
    monkeypatch.setattr(history_module, "CELLS", 64 * 40)
    layers = followed(tmp_path).whole()["layers"]
    assert layers["at"] == list(range(8, 257, 8))
    assert layers["grad_norm"] == [[float(at) for at in layers["at"]]] * len(names)


# --- values


def test_numbers_have_five_digits_and_what_is_no_number_is_null(tmp_path):
    first = {"loss": 1.23456789, "lr": 1.23456789e-30, "grad_norm": 1e999, "memory": 12345678901}
    second = {"loss": None, "lr": 10**400, "grad_norm": 1.7976931348623157e308, "memory": 1}
    text = line({"type": "step", "step": 1} | first) + line({"type": "step", "step": 2} | second)
    (tmp_path / telemetry.EVENTS).write_bytes(text.replace(b"Infinity", b"1e999"))
    found = followed(tmp_path)
    series = found.whole()["series"]
    assert {name: lines["mean"] for name, lines in series.items()} == {
        "loss": [1.2346, None],
        "lr": [1.2346e-30, None],
        "grad_norm": [None, None],  # it would round to infinity
        "memory": [12346000000.0, 1.0],
    }
    json.dumps(found.since(1), allow_nan=False)


def test_a_value_that_is_not_finite_does_not_hide_those_of_other_steps(tmp_path, small):
    dice = random.Random(10)
    events = [step(number, dice, loss=1.0, grad_norms={"text.0.r": 2.0}) for number in range(1, 17)]
    events[3] |= {"loss": math.inf, "grad_norms": {"text.0.r": math.inf}, "update_ratios": {}}
    text = b"".join(map(line, events))
    (tmp_path / telemetry.EVENTS).write_bytes(text.replace(b"Infinity", b"1e999"))
    found = followed(tmp_path).whole()
    assert found["series"]["loss"] == {kind: [1.0] * 8 for kind in ("mean", "min", "max")}
    assert found["layers"]["grad_norm"][found["layers"]["names"].index("text.0.r")] == [2.0] * 4


STRANGE = [None, True, "1", [1, 2], {"a": {"b": 1}}, {"a": [1]}, -1, 1.5, 10**30, {}, {"a": None}, {"a": "b"}]


@pytest.mark.parametrize("strange", STRANGE, ids=repr)
def test_a_fault_in_the_record_costs_its_own_value_only(tmp_path, strange):
    fields = ["step", "steps", "epoch", "loss", "losses", "lrs", "grad_norms", "update_ratios", "memory", "t"]
    fields += ["held_out", "drift", "moved", "alarm", "raised", "advice", "why", "recall_at_1_text_to_image"]
    dice = random.Random(5)
    events = [step(1, dice)]
    for kind in ("step", "measure", "alarm", "paused", "failed", "checkpoint", "start", "nothing"):
        events += [{"type": kind, "step": 1, name: strange} for name in fields if name != "step" or kind != "start"]
    write(tmp_path, [*events, step(2, dice, loss=0.5)])
    history = followed(tmp_path)
    found = history.whole()
    json.dumps([found, history.since(1)], allow_nan=False)
    assert found["at"] == [1, 2] and found["series"]["loss"]["mean"][1] == 0.5
    history.save(tmp_path / SNAPSHOT)
    assert History.load(tmp_path).whole() == found


def test_what_a_recent_step_says_is_there_for_others(tmp_path, small):
    events = steps(1, 9)
    write(tmp_path, [*events[:-1], events[-1] | {"loss": None, "grad_norm": 0.1 + 0.2}])
    newest = followed(tmp_path).recent[-1]
    assert (newest["step"], newest["epoch"], newest["loss"], newest["grad_norm"]) == (9, 1, None, 0.1 + 0.2)
    assert newest["lrs.1"] == events[-1]["lrs"]["1"] and len(followed(tmp_path).recent) == 5


def test_times_are_those_of_the_first_and_the_newest_event(tmp_path):
    assert (followed(tmp_path).started, followed(tmp_path).t) == (None, None)
    header = {"type": "telemetry", "version": 1, "t": 1.0}
    write(tmp_path, [header, {"type": "join", "t": 1785000000.123}, *steps(1, 2)])
    history = followed(tmp_path)
    assert (history.started, history.t, history.step, history.steps) == (1785000000.123, 102.0, 2, 10_000)


# --- measures, alarms, marks


@pytest.mark.parametrize("count", range(1, 30))
def test_measures_and_marks_are_thinned_evenly_and_the_newest_alarms_kept(tmp_path, small, count):
    dice = random.Random(6)
    events = []
    for number in range(1, count + 1):
        events += [step(number, dice), measure(number, dice), {"type": "checkpoint", "step": number, "t": 1.0}]
        events.append({"type": "alarm", "alarm": "slow", "step": number, "raised": True, "advice": "a", "t": 1.0})
    write(tmp_path, events)
    history = followed(tmp_path)
    check(history, tmp_path, *range(count - 6, count + 1))
    found = history.whole()
    assert [m["step"] for m in found["marks"]] == [m["step"] for m in found["measures"]]
    assert found["marks"][0]["step"] == 1 and found["marks"][-1]["step"] == count and len(found["marks"]) <= 6
    assert [alarm["step"] for alarm in found["alarms"]] == list(range(max(1, count - 5), count + 1))
    telling = [place for place, one in enumerate(found["measures"]) if one["moved"]]
    assert len(telling) <= 3 and {0, len(found["measures"]) - 1} <= set(telling)
    assert len(history.alarms) == len(history.marks) == len(history.measures) == count


def test_events_without_a_step_are_where_the_run_was(tmp_path):
    write(tmp_path, [*steps(1, 3), {"type": "failed", "error": "x", "t": 1.5}])
    assert [mark["step"] for mark in followed(tmp_path).marks] == [3]
    add(tmp_path, resume(2), *steps(3, 4))
    marks = followed(tmp_path).whole()["marks"]
    assert [(mark["type"], mark["step"]) for mark in marks] == [("failed", 2), ("resume", 2)]


def test_alarms_of_before_are_raised_ones(tmp_path):
    write(tmp_path, [{"type": "alarm", "alarm": "non_finite", "step": 4, "advice": "lower the rate", "t": 1.25}])
    assert followed(tmp_path).whole()["alarms"] == [
        {"alarm": "non_finite", "step": 4, "raised": True, "advice": "lower the rate", "t": 1.25}
    ]


def test_a_pause_says_why(tmp_path):
    write(tmp_path, [{"type": "paused", "step": 4, "why": "generating", "offloaded": False, "t": 1.25}])
    assert followed(tmp_path).marks == [
        {"type": "paused", "step": 4, "t": 1.25, "why": "generating", "offloaded": False}
    ]


# --- since: a client that appends


class Client:
    """Keeps every entry once and appends what is behind."""

    def __init__(self):
        self.has: dict[str, object] = {}

    def ask(self, history: History) -> None:
        answer = json.loads(json.dumps(history.since(self.has["step"] if self.has else 0)))
        if answer["reset"]:
            self.has = answer
            return
        before = len(self.has["at"])
        for key in ("step", "steps"):
            self.has[key] = answer[key]
        self.has["at"] += answer["at"]
        for name in {*self.has["series"], *answer["series"]}:
            lines = self.has["series"].setdefault(name, {"mean": [None] * before})
            lines["mean"] += answer["series"][name]["mean"]
        ours, theirs = self.has["layers"], answer["layers"]
        for kind in ("grad_norm", "update_ratio"):
            rows = {name: [None] * len(ours["at"]) for name in theirs["names"]} | dict(
                zip(ours["names"], ours[kind], strict=True)
            )
            rows = {name: rows[name] + row for name, row in zip(theirs["names"], theirs[kind], strict=True)}
            ours[kind] = list(rows.values())
        ours["names"] = theirs["names"]
        ours["at"] += theirs["at"]
        for key in ("measures", "alarms", "marks"):
            self.has[key] += [one for one in answer[key] if one not in self.has[key]]


@pytest.mark.parametrize("seed", range(20))
def test_the_whole_and_what_came_since_are_the_whole(tmp_path, seed, monkeypatch):
    monkeypatch.setattr(history_module, "RECENT", 20)
    dice = random.Random(seed)
    history, client, now = History(tmp_path), Client(), 0
    write(tmp_path, [{"type": "start", "step": 0, "steps": 9, "t": 1.0}])
    for _ in range(120):
        choice = dice.random()
        if choice < 0.6:
            now += 1
            add(tmp_path, step(now, dice))
        elif choice < 0.7:
            add(tmp_path, measure(now, dice) | {"t": dice.random()})
        elif choice < 0.75:
            add(tmp_path, {"type": "checkpoint", "step": now, "t": dice.random()})
        elif choice < 0.8:
            alarm = {"alarm": "slow", "step": now, "raised": False, "advice": "", "t": dice.random()}
            add(tmp_path, {"type": "alarm"} | alarm)
        elif choice < 0.83:
            now = dice.randint(max(0, now - 8), now)
            add(tmp_path, resume(now))
        else:
            history.follow()
            client.ask(history)
            found = json.loads(json.dumps(history.whole()))  # up to 256 steps it tells them one by one, too
            how = ("since", "reset")
            assert {k: v for k, v in client.has.items() if k not in how} == {
                k: v for k, v in found.items() if k not in how
            }


def test_what_is_told_after_its_step_is_not_missed(tmp_path):
    dice = random.Random(7)
    write(tmp_path, steps(1, 4))
    history, client = followed(tmp_path), Client()
    client.ask(history)
    add(tmp_path, measure(4, dice), {"type": "checkpoint", "step": 4, "t": 1.0})
    history.follow()
    client.ask(history)
    client.ask(history)
    assert [one["step"] for one in client.has["measures"]] == [one["step"] for one in client.has["marks"]] == [4]


def test_a_client_that_is_far_behind_or_ahead_gets_the_whole(tmp_path):
    write(tmp_path, steps(1, 600))
    history = followed(tmp_path)
    resets = {at: history.since(at)["reset"] for at in (0, 1, 87, 88, 599, 600, 601, 10**9)}
    assert resets == {0: True, 1: True, 87: True, 88: False, 599: False, 600: False, 601: True, 10**9: True}
    assert len(history.since(88)["at"]) == 512


def test_a_step_that_was_taken_twice_is_told_with_the_whole(tmp_path):
    write(tmp_path, [*steps(1, 50), resume(30), *steps(31, 60, seed=1)])
    history = followed(tmp_path)
    assert [at for at in range(1, 61) if history.since(at)["reset"]] == list(range(31, 51))
    add(tmp_path, resume(55), *steps(56, 57), resume(20), *steps(21, 80))
    history.follow()
    assert [at for at in range(1, 81) if history.since(at)["reset"]] == list(range(21, 61))


# --- taking back


@pytest.mark.parametrize("last", [5, 8, 9, 16, 31, 32, 33, 64, 100])
def test_a_resume_anywhere_is_as_if_later_steps_had_never_been(tmp_path, small, last):
    edges = {edge + near for edge in (0, 8, 16, 24, 32, 40, 64, 96, last) for near in (-1, 0, 1)}
    for at in (edge for edge in edges if edge <= last + 1):
        write(tmp_path, steps(1, last))
        history = followed(tmp_path)
        add(tmp_path, resume(at))
        history.follow()
        check(history, tmp_path, at - 7, at - 5, at - 1, at, at + 1)
        add(tmp_path, *steps(max(1, at + 1), last + 10, seed=1))
        history.follow()
        check(history, tmp_path, last - 1, last, last + 5, last + 10)


def test_resumes_within_what_another_resume_reads_again(tmp_path, small):
    history, now = History(tmp_path), 0
    dice = random.Random(8)
    for last, at in [(30, 27), (40, 22), (29, 25), (30, 25), (25, 24), (60, 59), (90, 33), (34, 10), (12, 0), (9, 9)]:
        add(tmp_path, *(step(number, dice) for number in range(now + 1, last + 1)), resume(at))
        history.follow()
        check(history, tmp_path, *range(max(0, at - 6), at + 3))
        now = at
    add(tmp_path, *(step(number, dice) for number in range(now + 1, 40)))
    history.follow()
    check(history, tmp_path, *range(30, 42))


def test_an_attempt_that_has_saved_nothing_is_taken_back_by_the_next_start(tmp_path, small):
    start = {"type": "start", "step": 0, "steps": 10_000, "t": 1.0}
    write(tmp_path, [start, *steps(1, 40), start, *steps(1, 20, seed=1)])
    history = followed(tmp_path)
    assert history.whole()["stride"] == 4 and history.whole()["at"] == [4, 8, 12, 16, 20]
    check(history, tmp_path, *range(14, 22))


def test_a_resume_at_real_limits(tmp_path):
    lean = [event | {"grad_norms": {"text.0.r": event["lr"]}} for event in steps(1, 2060)]
    for at in (2050, 2048, 2047, 1024, 1023, 600):
        write(tmp_path, lean)
        history = followed(tmp_path)
        add(tmp_path, resume(at))
        history.follow()
        check(history, tmp_path, at, at - 1, at - 512, at - 513)


# --- records as they grow


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("steps"), st.integers(1, 25)),
        st.tuples(st.just("steps"), st.integers(1, 3)),
        st.tuples(st.just("lost"), st.integers(1, 3)),
        st.tuples(st.just("resume"), st.integers(0, 12)),
        st.tuples(st.sampled_from(["start", "measure", "alarm", "paused", "failed", "torn", "garbage"]), st.just(0)),
    ),
    max_size=25,
)


def played(actions: list[tuple[str, int]], dice: random.Random) -> bytes:
    """A record, with its header or without."""
    content, now = b"" if dice.random() < 0.3 else line({"type": "telemetry", "version": 1}), 0
    for action, count in actions:
        t = dice.random()
        if action == "steps":
            content += b"".join(line(step(now + number, dice)) for number in range(1, count + 1))
            now += count
        elif action == "lost":
            now += count
        elif action in ("resume", "start"):
            now = 0 if action == "start" else max(0, now - count)
            content += line({"type": action, "step": now, "steps": 50, "t": t})
        elif action == "measure":
            content += line(measure(now, dice))
        elif action == "alarm":
            content += line({"type": action, "alarm": "slow", "step": now, "raised": True, "advice": "", "t": t})
        elif action == "paused":
            content += line({"type": action, "step": now, "why": "command", "offloaded": True, "t": t})
        elif action == "failed":
            content += line({"type": action, "error": "full", "t": t})
        else:
            content += b'{"type":"step","st\n' if action == "torn" else b"\x00\xff\n\n"
    return content


@settings(max_examples=80, deadline=None)
@given(actions=ACTIONS, seed=st.integers(0, 2**16))
def test_a_record_that_grows_in_pieces_gives_what_it_gives_at_once(actions, seed):
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        for limit, value in SMALL.items():
            patch.setattr(history_module, limit, value)
        folder = Path(name)
        content = played(actions, dice)
        cuts = sorted({0, len(content), *(dice.randrange(len(content) + 1) for _ in range(8))})
        history = History(folder)
        for cut in cuts:
            (folder / telemetry.EVENTS).write_bytes(content[:cut])
            if dice.random() < 0.3:
                history.save(folder / SNAPSHOT)
            if dice.random() < 0.3:
                history = History.load(folder)
            if dice.random() < 0.8 or cut == len(content):
                history.follow()
                check(history, folder, *dice.sample(range(max(0, history.step - 7), history.step + 3), 3))


def test_a_record_that_became_another_one_is_read_from_its_beginning(tmp_path, small):
    history = History(tmp_path)
    lengths = [0, 20, 15, 15, 30, 3, 0, 40]
    for seed, length in enumerate(lengths):
        write(tmp_path, steps(1, length, seed))
        history.follow()
        check(history, tmp_path, length, length - 1)
    (tmp_path / telemetry.EVENTS).unlink()
    history.follow()
    check(history, tmp_path)


def test_only_what_was_appended_is_read(tmp_path, monkeypatch):
    write(tmp_path, steps(1, 50))
    history, lines, starts = followed(tmp_path), telemetry.lines, []
    size = os.path.getsize(tmp_path / telemetry.EVENTS)
    monkeypatch.setattr(telemetry, "lines", lambda path, start=0: starts.append(start) or lines(path, start))
    add(tmp_path, *steps(51, 52))
    history.follow()
    history.follow()
    assert starts == [size, os.path.getsize(tmp_path / telemetry.EVENTS)] and history.step == 52


def test_a_record_of_a_newer_version_says_to_update(tmp_path):
    write(tmp_path, [{"type": "telemetry", "version": 2}, *steps(1, 3)])
    history = History(tmp_path)
    for _ in range(2):
        with pytest.raises(InputError, match="version 2.*update"):
            history.follow()


# --- the snapshot


def saved(folder: Path, last: int = 60, seed: int = 0) -> History:
    dice = random.Random(seed)
    failed = {"type": "failed", "error": "full", "t": 1.0}
    write(folder, [*steps(1, last, seed), measure(last, dice), failed, resume(last)])
    history = followed(folder)
    history.save(folder / SNAPSHOT)
    return history


def same(one: History, other: History) -> bool:
    sinces = range(other.step + 1)
    return one.whole() == other.whole() and all(one.since(at) == other.since(at) for at in sinces)


def test_a_snapshot_is_the_history_that_it_was_taken_of(tmp_path, small):
    history = saved(tmp_path)
    loaded = History.load(tmp_path)
    assert same(loaded, history)
    assert [*loaded.recent][-1]["loss"] == [*history.recent][-1]["loss"]
    assert (loaded.started, loaded.t, loaded.marks) == (history.started, history.t, history.marks)


def test_what_a_snapshot_has_is_not_read_again(tmp_path, small, monkeypatch):
    saved(tmp_path)
    size, lines, starts = os.path.getsize(tmp_path / telemetry.EVENTS), telemetry.lines, []
    monkeypatch.setattr(telemetry, "lines", lambda path, start=0: starts.append(start) or lines(path, start))
    History.load(tmp_path).follow()
    assert starts == [size]


@pytest.mark.parametrize("more", [1, 5, 40, 300])
def test_a_stale_snapshot_goes_on_with_what_was_appended(tmp_path, small, more):
    saved(tmp_path)
    add(tmp_path, *steps(61, 60 + more), resume(58), *steps(59, 62, seed=1))
    history = History.load(tmp_path)
    assert history.step == 60
    history.follow()
    check(history, tmp_path, *range(55, 64))
    assert same(history, followed(tmp_path))


def test_a_snapshot_goes_with_its_folder(tmp_path, small):
    (tmp_path / "a").mkdir()
    history = saved(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    loaded = History.load(tmp_path / "b")
    assert loaded.whole() == history.whole() | {"run": "b"}


def test_a_snapshot_of_another_record_is_not_taken(tmp_path, small):
    saved(tmp_path)
    for events in (steps(1, 60, seed=1), steps(1, 10), [], steps(2, 300)):
        write(tmp_path, events)
        history = History.load(tmp_path)
        assert history.step == 0
        history.follow()
        check(history, tmp_path)
    (tmp_path / telemetry.EVENTS).unlink()
    assert History.load(tmp_path).whole()["at"] == []


def test_a_snapshot_that_is_missing_costs_time_only(tmp_path, small):
    history = saved(tmp_path)
    (tmp_path / SNAPSHOT).unlink()
    again = History.load(tmp_path)
    again.follow()
    assert same(again, history)


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_snapshot_costs_time_only(tmp_path, small, seed):
    dice = random.Random(seed)
    history = saved(tmp_path, 20)
    content = bytearray((tmp_path / SNAPSHOT).read_bytes())
    if seed % 3 == 0:
        del content[dice.randrange(len(content)) :]
    else:
        for _ in range(dice.choice([1, 1, 5, 200])):
            content[dice.randrange(len(content))] = dice.randrange(256)
    (tmp_path / SNAPSHOT).write_bytes(content)
    again = History.load(tmp_path)
    again.follow()
    assert same(again, history)


@pytest.mark.parametrize("what", ["empty", "pickle", "version", "shape", "names", "lacking", "array"])
def test_a_snapshot_of_another_form_costs_time_only(tmp_path, small, what):
    history = saved(tmp_path)
    path = tmp_path / SNAPSHOT
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    rest = json.loads(arrays["rest"].tobytes())
    if what == "version":
        rest["version"] = 2
    elif what == "names":
        rest["layers"].append("text.9.r")
    elif what == "shape":
        arrays["series.max"] = arrays["series.max"][:, :-1]
    elif what == "lacking":
        del arrays["last"]
    elif what == "pickle":
        arrays["last"] = np.array([{"a": 1}], dtype=object)
    arrays["rest"] = np.frombuffer(json.dumps(rest).encode(), np.uint8)
    with open(path, "wb") as file:
        if what == "array":
            np.save(file, np.zeros(3))
        elif what != "empty":
            np.savez(file, **arrays)
    again = History.load(tmp_path)
    assert again.step == 0
    again.follow()
    assert same(again, history)


def test_a_snapshot_is_written_whole_or_not_at_all(tmp_path, small, monkeypatch):
    saved(tmp_path)
    before = (tmp_path / SNAPSHOT).read_bytes()
    add(tmp_path, *steps(61, 70))
    history = followed(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left to write"):
        history.save(tmp_path / SNAPSHOT)
    assert (tmp_path / SNAPSHOT).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [telemetry.EVENTS, SNAPSHOT]


def test_a_snapshot_holds_no_code(tmp_path, small):
    saved(tmp_path)
    with zipfile.ZipFile(tmp_path / SNAPSHOT) as file:
        assert all(name.endswith(".npy") for name in file.namelist())
    with np.load(tmp_path / SNAPSHOT, allow_pickle=False) as file:
        assert all(file[name].dtype.kind in "fiu" for name in file.files)


# --- size


def test_twenty_thousand_steps_of_the_largest_text_encoder_fit_into_two_megabytes(tmp_path):
    """clip_g: 32 blocks of five roles, and four others, in every figure as many digits as there may be."""
    roles = ("r", "theta", "attention", "layer_norm", "mlp")
    names = [f"text.{block}.{role}" for block in range(32) for role in roles]
    names += ["text.embedding", "text.layer_norm", "text.projection", "logit_scale"]
    generator = np.random.default_rng(0)
    norms = [dict(zip(names, row, strict=True)) for row in generator.lognormal(-12, 3, (50, len(names))).tolist()]
    dice = random.Random(9)
    with open(tmp_path / telemetry.EVENTS, "wb") as file:
        for number in range(1, 20_001):
            event = step(number, dice, loss=dice.random(), grad_norms={}, tokens_per_second=1e5 * dice.random())
            if number % 7 == 1:
                event["grad_norms"] = event["update_ratios"] = norms[number % 50]
            file.write(line(event))
            if number % 30 == 0:
                file.write(line(measure(number, dice) | {"moved": norms[number % 50]}))
                file.write(line({"type": "checkpoint", "step": number, "t": 1785000000.123}))
                alarm = {"alarm": "exploding", "raised": True, "advice": "x" * 200, "t": 1785000000.123}
                file.write(line({"type": "alarm", "step": number} | alarm))
    found = followed(tmp_path).whole()
    assert found["stride"] == 32 and len(found["at"]) == 625 and len(found["layers"]["at"]) == 157
    assert len(found["layers"]["names"]) == 164 and len(found["measures"]) > 256
    assert len(json.dumps(found, allow_nan=False, separators=(",", ":"))) < 2_000_000
