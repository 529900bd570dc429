"""Alarms: raised once on what goes wrong, taken back when it is over, and silent on runs that are well."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmp import telemetry
from gmp.alarms import ALARMS, CLAMP, RECALLS, Alarms, Thresholds
from gmp.clip import MAX_LOGIT_SCALE
from gmp.config import RepairConfig
from gmp.run import repair

T = Thresholds()
ROLES = ("r", "theta", "attention", "layer_norm", "mlp")
LAYERS = [f"text.{block}.{role}" for block in range(4) for role in ROLES]
NAN, INF = math.nan, math.inf


def steps(first=1, **columns):
    """`step` events with the given columns; a column's None is a null."""
    rows = zip(*columns.values(), strict=True)
    return [{"type": "step", "step": first + i} | dict(zip(columns, row, strict=True)) for i, row in enumerate(rows)]


def measures(recalls, every=100, **more):
    """`measure` events after every so many steps, both recalls alike."""
    return [
        {"type": "measure", "step": every * (i + 1)} | dict.fromkeys(RECALLS, recall) | more
        for i, recall in enumerate(recalls)
    ]


def hear(alarms, events):
    return [alarm for event in events for alarm in alarms.hear(event)]


def turns(events, alarms=None):
    """(alarm, raised, step) of all that a fresh `Alarms` says to the events."""
    heard = hear(alarms or Alarms(), events)
    return [(alarm["alarm"], alarm["raised"], alarm["step"]) for alarm in heard]


def noisy(generator, count, spread):
    return np.exp(spread * generator.standard_normal(count))


def healthy(count=1500, seed=0, lowest=0.4):
    """A repair that goes well: 10 % warm-up and cosine, noise on everything, bursts, hiccups, an epoch every 100 steps.

    lowest: what is left of the loss, and of the gradients, in the end.
    """
    generator = np.random.default_rng(seed)
    at = np.arange(1, count + 1)
    rate = np.minimum(at / (0.1 * count), 0.5 * (1 + np.cos(np.pi * at / count)))
    learned = 1 - np.exp(-4 * np.cumsum(rate) / rate.sum())
    loss = (5.0 * (1 - learned) + lowest * learned) * noisy(generator, count, 0.15)
    norm = (30.0 * (1 - learned) + lowest * learned) * noisy(generator, count, 0.5)
    norm[generator.random(count) < 0.01] *= 40
    speed = 500 * noisy(generator, count, 0.1)
    speed[generator.random(count) < 0.02] /= 20
    speed[0] /= 10
    share = generator.dirichlet(np.full(len(LAYERS), 0.5), count) ** 0.5
    events = steps(
        steps=[count] * count,
        epoch=(1 + (at - 1) // 100).tolist(),
        loss=loss.tolist(),
        losses=[{"contrastive": value} for value in loss.tolist()],
        lr=(7e-6 * rate).tolist(),
        logit_scale=(3.5 + 0.9 * learned + 0.001 * generator.standard_normal(count)).tolist(),
        grad_norm=norm.tolist(),
        grad_norms=[dict(zip(LAYERS, row, strict=True)) for row in (norm[:, None] * share).tolist()],
        non_finite=[0.0] * count,
        text_cosine=(0.85 - 0.3 * learned + 0.02 * generator.standard_normal(count)).tolist(),
        skipped=[0] * count,
        pairs_per_second=speed.tolist(),
    )
    told = [{"type": "start", "step": 0, "steps": count, "device": "cpu"}]
    for event in events:
        told.append(event)
        if event["step"] % 100 == 0:
            recall = 0.2 + 0.5 * learned[event["step"] - 1] + 0.005 * generator.standard_normal()
            told += measures([recall], event["step"], images=1000) + [{"type": "checkpoint", "step": event["step"]}]
    return told


# --- what goes wrong: values before, values while it is wrong, values after; the first bad step that raises

WRONG = {
    "non_finite": ("grad_norm", [1.0] * 30, [NAN] * 3, [1.0] * 40, 1),
    "exploding at any time": ("grad_norm", [900.0] * 10, [1001.0] * 9, [400.0] * 40, 5),
    "exploding as never before": ("grad_norm", [2.0] * 60, [41.0] * 9, [2.0] * 40, 5),
    "vanishing at any time": ("grad_norm", [1e-3] * 10, [9e-6] * 30, [1e-3] * 40, 20),
    "vanishing as never before": ("grad_norm", [50.0] * 60, [0.049] * 30, [50.0] * 40, 20),
    "collapsing": ("text_cosine", [0.6] * 20, [0.975] * 15, [0.6] * 40, 10),
    "collapsing from wide apart": ("text_cosine", [0.1] * 20, [0.78] * 15, [0.6] * 40, 10),
    "clamped": ("logit_scale", [4.5] * 10, [CLAMP - 1e-4] * 30, [4.5] * 40, 20),
    "slow": ("pairs_per_second", [100.0] * 60, [45.0] * 60, [100.0] * 60, None),
}


@pytest.mark.parametrize("case", WRONG)
def test_it_is_raised_once_and_taken_back_once(case):
    column, before, during, after, row = WRONG[case]
    alarms, name = Alarms(), case.partition(" ")[0]
    assert turns(steps(**{column: before}), alarms) == []
    raised = turns(steps(len(before) + 1, **{column: during}), alarms)
    assert [one[:2] for one in raised] == [(name, True)] and alarms.standing == (name,)
    if row is not None:
        assert raised[0][2] == len(before) + row
    start = len(before) + len(during)
    cleared = turns(steps(start + 1, **{column: after}), alarms)
    assert [one[:2] for one in cleared] == [(name, False)] and alarms.standing == ()
    if row is not None:
        assert cleared[0][2] == start + T.clear_steps


@pytest.mark.parametrize("case", WRONG)
def test_one_step_less_is_not_enough(case):
    column, before, during, after, row = WRONG[case]
    events = steps(**{column: before + during[: (row or 10) - 1] + after})
    assert turns(events) == []


BETWEEN = {
    "exploding at any time": 510.0,
    "exploding as never before": 25.0,
    "vanishing at any time": 9e-5,
    "vanishing as never before": 0.45,
    "collapsing": 0.855,
    "collapsing from wide apart": 0.67,
    "clamped": CLAMP - 9e-3,
    "slow": 68.0,
}


@pytest.mark.parametrize("case", BETWEEN)
def test_between_its_two_limits_it_stays_as_it_is(case):
    column, before, during, after, _ = WRONG[case]
    name, between = case.partition(" ")[0], [BETWEEN[case]] * 50
    assert turns(steps(**{column: before + between})) == []
    assert [one[:2] for one in turns(steps(**{column: before + during + between}))] == [(name, True)]


@pytest.mark.parametrize("case", WRONG)
def test_it_is_not_taken_back_a_step_too_early(case):
    """Good steps that a bad one interrupts do not add up."""
    column, before, during, after, _ = WRONG[case]
    alarms = Alarms()
    hear(alarms, steps(**{column: before + during}))
    short = after[: T.clear_steps - 1] + during[:1]
    if case != "slow":  # whose median a single step does not move
        assert turns(steps(**{column: short * 5}), alarms) == []
    assert len(turns(steps(**{column: after}), alarms)) == 1


@pytest.mark.parametrize("case", WRONG)
def test_it_is_raised_again_when_it_happens_again(case):
    column, before, during, after, _ = WRONG[case]
    again = turns(steps(**{column: before + during + after + before + during}))
    assert [raised for _, raised, _ in again] == [True, False, True]


def test_an_alarm_says_what_it_saw_and_what_to_do():
    norms = dict.fromkeys(LAYERS, 1.0) | {"text.3.theta": 79.0, "text.0.r": None}
    before = steps(grad_norm=[2.0] * 60)
    alarm = hear(Alarms(), before + steps(61, grad_norm=[80.0] * 5, grad_norms=[norms] * 5))
    assert alarm == [
        {
            "type": "alarm",
            "alarm": "exploding",
            "step": 65,
            "raised": True,
            "advice": "gradients are 40 times their usual size (largest in text.3.theta): if it goes on, stop and "
            "start again with a lower learning rate",
            "value": 80.0,
        }
    ]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (steps(grad_norm=[1500.0] * 5), "gradients are 1500 long, more than 1000: "),
        (steps(non_finite=[0.125], grad_norm=[INF]), "12 % of the gradients are not finite and such steps"),
        (steps(grad_norm=[NAN]), "the norm of the gradients is not finite and"),
        (steps(grad_norm=[INF], grad_norms=[{"text.0.r": 1e30}]), "the norm of the gradients is not finite and"),
        (steps(grad_norm=[NAN], grad_norms=[{"text.0.r": NAN}]), "the norm of the gradients is not finite and"),
        (
            steps(grad_norm=[None], grad_norms=[{"text.0.r": 1.0, "text.1.r": None, "text.embedding": NAN}]),
            "not finite (in text.1.r, text.embedding) and",
        ),
        (steps(grad_norm=[0.0] * 20), "gradients have all but vanished (norm 0) and nothing"),
        (steps(grad_norm=[1.0] * 60 + [1e-6] * 20), "(norm 1e-06, usually 1)"),
        (steps(loss=[1.0] * 50 + [4.0] * 50), r"risen to [23]\.\d+ from 1 at its lowest"),
        (steps(text_cosine=[0.5] * 10 + [0.99] * 10), "(mean cosine 0.990, at the start 0.500, "),
        (steps(logit_scale=[4.0] + [CLAMP] * 20), "from 4.000 to its limit of 4.605"),
        (steps(pairs_per_second=[400.0] * 60 + [100.0] * 40), "to 100 pairs per second from 400 at its best"),
    ],
)
def test_advice_names_the_number_that_was_seen(events, expected):
    alarms = hear(Alarms(), events)
    assert len(alarms) == 1 and alarms[0]["raised"]
    assert expected in alarms[0]["advice"] or re.search(expected, alarms[0]["advice"])
    assert "\n" not in alarms[0]["advice"] and re.search("start again|pause", alarms[0]["advice"])


def test_all_alarms_of_the_contract_and_their_clamp():
    contract = (Path(__file__).parent.parent / "docs" / "telemetry.md").read_text(encoding="utf-8")
    listed = contract.partition("### Alarms")[2].partition(" An alarm")[0]
    assert tuple(re.findall(r"`(\w+)`", listed)) == ALARMS
    assert CLAMP == MAX_LOGIT_SCALE


# --- gradients


@pytest.mark.parametrize(("patience", "raised"), [(1, 1), (3, 3)])
def test_a_scaler_that_looks_for_its_scale_is_given_time(patience, raised):
    assert turns(steps(grad_norm=[INF] * 5), Alarms(patience)) == [("non_finite", True, raised)]
    tries = ([INF] * (patience - 1) + [1.0]) * 10
    assert turns(steps(grad_norm=tries), Alarms(patience)) == []


@pytest.mark.parametrize(
    "event",
    [
        {"grad_norm": None}, {"grad_norm": NAN}, {"grad_norm": -INF}, {"grad_norm": None, "non_finite": 0.0},
        {"grad_norm": 1.0, "non_finite": 1e-9}, {"non_finite": 1.0},
    ],
)  # fmt: skip
def test_every_sign_of_gradients_that_are_not_finite(event):
    assert turns([{"type": "step", "step": 7} | event]) == [("non_finite", True, 7)]


def test_a_step_that_is_not_finite_every_now_and_then_keeps_the_alarm_standing():
    assert turns(steps(grad_norm=([INF] + [1.0] * 10) * 50)) == [("non_finite", True, 1)]


def exploding_naive(norms):
    """Steps at which it is raised or taken back, from the whole past at every step."""
    found, stands, row = [], False, 0
    for i, norm in enumerate(norms):
        past = norms[max(0, i - 200) : i]
        limit = 1000.0
        if len(past) >= 50 and statistics.median(past) > 0:
            limit = min(limit, max(20 * statistics.median(past), 0.1 * statistics.median(norms[:50])))
        row = row + 1 if (norm < limit / 2 if stands else norm > limit) else 0
        if row == (20 if stands else 5):
            stands, row = not stands, 0
            found.append(("exploding", stands, i + 1))
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.sampled_from([4.0, 8.0, 100.0, 200.0, 700.0, 1500.0])),
        max_size=12,
    ),
    st.integers(0, 99),
)
def test_exploding_is_what_the_formula_says(levels, seed):
    norms = np.array([level for count, level in levels for _ in range(count)])
    norms = (norms * noisy(np.random.default_rng(seed), len(norms), 0.2)).tolist()
    found = [turn for turn in turns(steps(grad_norm=norms)) if turn[0] == "exploding"]
    assert found == exploding_naive(norms)


def test_rising_gradients_while_rates_warm_up_are_no_explosion():
    assert turns(steps(grad_norm=(0.1 * 1.1 ** np.arange(49)).tolist())) == []


def test_bursts_on_nearly_finished_gradients_are_no_explosion():
    """Twenty times a thousandth is less than a tenth of what gradients were at the start."""
    norms, losses = [1.0] * 60 + [1e-3] * 300, [4.0] * 60 + [0.01] * 320
    assert turns(steps(grad_norm=norms + [0.09] * 20, loss=losses)) == []
    assert turns(steps(grad_norm=norms + [0.11] * 20, loss=losses)) == [("exploding", True, 365)]


def test_a_level_that_lasts_becomes_the_usual_one():
    found = turns(steps(grad_norm=[1.0] * 100 + [50.0] * 200))
    assert [one[:2] for one in found] == [("exploding", True), ("exploding", False)]


def test_small_gradients_where_little_is_left_to_learn_do_not_vanish():
    norms = [10.0] * 60 + [1e-4] * 100 + [1e-7] * 100 + [0.0] * 100
    assert turns(steps(grad_norm=norms, loss=[4.0] * 10 + [0.1] * 350)) == []
    assert turns(steps(grad_norm=norms, loss=[4.0] * 360))[0][:2] == ("vanishing", True)


def test_what_has_vanished_does_not_become_the_usual():
    assert turns(steps(grad_norm=[50.0] * 60 + [0.02] * 600)) == [("vanishing", True, 80)]


def blocks(silent, size=0.0, **more):
    return {name: size if name.rpartition(".")[0] in silent else 0.5 for name in LAYERS} | more


def test_a_block_that_no_gradient_reaches_is_named():
    norms = [blocks([])] * 30 + [blocks(["text.1", "text.3"], 9e-6)] * 25
    alarm = hear(Alarms(), steps(grad_norm=[2.0] * 55, grad_norms=norms))
    assert [(one["alarm"], one["step"]) for one in alarm] == [("vanishing", 50)]
    assert "no gradient reaches text.1, text.3 (norm below 1e-05 for 20 steps)" in alarm[0]["advice"]


def test_blocks_that_take_turns_are_not_vanishing():
    norms = [blocks([f"text.{i // 15 % 4}"]) for i in range(200)]
    assert turns(steps(grad_norm=[2.0] * 200, grad_norms=norms)) == []


def test_single_roles_with_next_to_no_gradient_are_not_vanishing():
    norms = dict.fromkeys(LAYERS, 0.5) | {"text.0.layer_norm": 1e-9, "text.2.r": 0.0, "text.embedding": 0.0}
    assert turns(steps(grad_norm=[2.0] * 60, grad_norms=[norms] * 60)) == []


def test_a_block_is_held_to_the_norm_of_the_others_where_all_are_small():
    assert turns(steps(grad_norm=[1e-3] * 60, grad_norms=[blocks(["text.1"], 1e-7)] * 60)) == []
    found = turns(steps(grad_norm=[1e-3] * 60, grad_norms=[blocks(["text.1"], 9e-9)] * 60))
    assert found == [("vanishing", True, 20)]


def test_a_block_that_comes_back_is_no_alarm_any_more():
    norms = [blocks(["text.1"])] * 30 + [blocks(["text.1"], 9e-5)] * 30 + [blocks([])] * 30
    assert turns(steps(grad_norm=[2.0] * 90, grad_norms=norms)) == [("vanishing", True, 20), ("vanishing", False, 80)]


def test_norms_that_are_unknown_for_a_while_do_not_hide_a_silent_block():
    norms = [blocks(["text.1"])] * 15 + [{}, None] * 30 + [blocks(["text.1"])] * 15
    assert turns(steps(grad_norm=[2.0] * 90, grad_norms=norms)) == [("vanishing", True, 80)]


# --- the loss


def diverging_naive(losses):
    """The step at which it is raised, and taken back, every figure from the whole past by its definition."""
    found, stands, row, lowest = [], False, 0, math.inf
    for i in range(len(losses)):
        weights = 0.95 ** np.arange(i, -1, -1)
        smoothed = (weights * losses[: i + 1]).sum() / weights.sum()
        if i + 1 >= 5:
            lowest = min(lowest, smoothed)
        if i + 1 <= 20:
            continue
        jumps = np.abs(np.diff(losses[: i + 1]))[-50:]
        rise = 0.5 * lowest + 3 * np.median(jumps) / (0.6745 * np.sqrt(2)) + 0.02 * np.median(losses[:10])
        row = row + 1 if (smoothed < lowest + rise / 2 if stands else smoothed > lowest + rise) else 0
        if row == 20:
            stands, row = not stands, 0
            found.append(("diverging", stands, i + 1))
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0.05, 8)), min_size=1, max_size=8),
    st.sampled_from([0.02, 0.1, 0.4]),
    st.integers(0, 99),
)
def test_diverging_is_what_the_formula_says(levels, spread, seed):
    losses = np.array([level for count, level in levels for _ in range(count)])
    losses *= noisy(np.random.default_rng(seed), len(losses), spread)
    assert turns(steps(loss=losses.tolist())) == diverging_naive(losses)


@pytest.mark.parametrize("after", [5, 20, 300])
def test_a_loss_that_rises_to_that_of_chance_diverges(after):
    """Also where it is ruined in the first steps, before anything is raised."""
    generator = np.random.default_rng(after)
    losses = np.r_[np.full(after, 0.5), np.full(200, math.log(256))] * noisy(generator, after + 200, 0.1)
    found = turns(steps(loss=losses.tolist()))
    assert [one[:2] for one in found] == [("diverging", True)]
    assert max(40, after + 20) <= found[0][2] <= after + 60


def test_a_loss_that_grows_without_end_diverges():
    found = turns(steps(loss=[1.0] * 100 + (1.1 ** np.arange(200)).tolist()))
    assert [one[:2] for one in found] == [("diverging", True)] and found[0][2] < 150


def test_nothing_diverges_in_the_first_steps():
    assert turns(steps(loss=[0.5] * 10 + [8.0] * 29)) == []


def test_noise_and_lone_outliers_are_no_divergence():
    generator = np.random.default_rng(0)
    losses = 0.5 * noisy(generator, 5000, 0.6)
    losses[::97] *= 10
    assert turns(steps(loss=losses.tolist())) == []


def test_a_loss_near_zero_may_double():
    """To within two hundredths of what it was at the start."""
    assert turns(steps(loss=[4.0] * 20 + [0.01] * 300 + [0.09] * 300)) == []
    assert turns(steps(loss=[4.0] * 20 + [0.01] * 300 + [0.1] * 300))[0][:2] == ("diverging", True)


def test_a_loss_that_comes_back_takes_the_alarm_back():
    found = turns(steps(loss=[1.0] * 60 + [4.0] * 60 + [1.0] * 120))
    assert [one[:2] for one in found] == [("diverging", True), ("diverging", False)]


# --- captions, temperature, speed


def test_captions_that_were_near_each_other_may_not_become_all_the_same():
    """From 0.9, a quarter of the room that is left would be 0.975."""
    assert turns(steps(text_cosine=[0.9] * 10 + [0.969] * 100)) == []
    assert turns(steps(text_cosine=[0.9] * 10 + [0.971] * 100)) == [("collapsing", True, 20)]


def test_an_encoder_that_begins_collapsed_is_held_to_its_own_start():
    assert turns(steps(text_cosine=[0.98] * 200 + [0.9] * 100)) == []
    assert turns(steps(text_cosine=[0.98] * 50 + [0.996] * 10)) == [("collapsing", True, 60)]
    assert turns(steps(text_cosine=[1.0, 1.0000001] * 100)) == []


def test_nothing_is_said_of_captions_before_their_start_is_known():
    assert turns(steps(text_cosine=[0.5] * 6 + [0.99] * 12)) == []


@pytest.mark.parametrize("start", [CLAMP, 4.6, 4.56])
def test_a_run_that_begins_at_the_clamp_may_stay_there_and_come_back(start):
    assert turns(steps(logit_scale=[start] * 50 + [4.5] * 50 + [CLAMP] * 100)) == []


def test_a_run_that_begins_a_little_below_the_clamp_is_told_when_it_gets_there():
    assert turns(steps(logit_scale=[CLAMP - 0.051] + [CLAMP - 1.1e-3] * 50)) == []
    assert turns(steps(logit_scale=[CLAMP - 0.051] + [CLAMP - 0.9e-3] * 50)) == [("clamped", True, 21)]


def slow_naive(speeds):
    found, stands, row = [], False, 0
    medians = [statistics.median(speeds[i - 20 : i]) for i in range(20, len(speeds) + 1)]
    for i, median in enumerate(medians, start=20):
        if i <= 40:
            continue
        best = max(medians[: i - 19])
        row = row + 1 if (median > 0.7 * best if stands else median < 0.5 * best) else 0
        if row == 20:
            stands, row = not stands, 0
            found.append(("slow", stands, i))
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 80), st.floats(10, 1000)), min_size=1, max_size=8),
    st.integers(0, 99),
)
def test_slow_is_what_the_formula_says(levels, seed):
    speeds = np.array([level for count, level in levels for _ in range(count)])
    speeds = (speeds * noisy(np.random.default_rng(seed), len(speeds), 0.2)).tolist()
    assert turns(steps(pairs_per_second=speeds)) == slow_naive(speeds)


@pytest.mark.parametrize("mark", ["resumed", "resume", "out_of_memory"])
def test_steps_right_after_a_pause_do_not_count_as_slow(mark):
    usual = steps(pairs_per_second=[100.0] * 60)
    restarts = [{"type": mark, "step": 60}, *steps(pairs_per_second=[1.0] * 3), *steps(pairs_per_second=[100.0])]
    assert turns(usual + restarts * 60) == []
    assert turns(usual + [event for event in restarts * 60 if event["type"] == "step"])[0][:2] == ("slow", True)


def test_a_pause_does_not_forget_how_fast_the_run_was():
    events = steps(pairs_per_second=[100.0] * 60)
    events += [{"type": "paused", "step": 60}, {"type": "resumed", "step": 60}]
    events += steps(61, pairs_per_second=[40.0] * 60)
    # three do not count, eleven of twenty move the median, twenty in a row raise
    assert turns(events) == [("slow", True, 60 + 3 + 11 + 19)]


# --- measurements

FALLING = steps(loss=(5 * 0.98 ** np.arange(600)).tolist())


def told(recalls, trained=FALLING, **more):
    """Hundred steps before each measurement."""
    events = []
    for i, measure in enumerate(measures(recalls, **more)):
        events += [*trained[100 * i : 100 * (i + 1)], measure]
    return events


def test_recall_that_falls_while_the_loss_does_is_overfitting():
    alarms = Alarms()
    heard = hear(alarms, told([0.5, 0.6, 0.57, 0.57, 0.57], images=1000))
    assert [(one["alarm"], one["raised"], one["step"], one["value"]) for one in heard] == [
        ("overfitting", True, 400, pytest.approx(0.57))
    ]
    assert "fallen to 57.0% from 60.0% at step 200" in heard[0]["advice"]
    assert turns(measures([0.588, 0.595, 0.588, 0.595, 0.57], 1000), alarms) == []  # back only once in a row
    assert alarms.standing == ("overfitting",)


def test_a_fall_of_two_points_is_where_overfitting_begins():
    assert turns(told([0.6, 0.5795, 0.5795])) == [("overfitting", True, 300)]


def test_overfitting_is_taken_back_after_two_measurements():
    events = told([0.6, 0.5, 0.5, 0.6, 0.6])
    assert turns(events) == [("overfitting", True, 300), ("overfitting", False, 500)]


@pytest.mark.parametrize(
    "recalls",
    [[0.6, 0.5, 0.6, 0.5, 0.6, 0.5], [0.6, 0.5805, 0.5805, 0.5805], [0.3, 0.4, 0.5, 0.6], [0.6, None, None, None]],
)
def test_recall_that_wavers_a_little_or_only_once_is_not_overfitting(recalls):
    assert turns(told(recalls)) == []


def test_recall_that_falls_with_a_loss_that_does_not_is_not_overfitting():
    flat = steps(loss=[1.0] * 600)
    assert turns(told([0.6, 0.5, 0.5, 0.5], flat)) == []


def test_the_loss_counts_from_the_newest_of_equally_good_measurements():
    trained = steps(loss=[2.0] * 100 + [1.0] * 100 + [1.1] * 300)
    assert turns(told([0.6, 0.6, 0.5, 0.5, 0.5], trained)) == []


def test_recall_is_held_to_what_its_pictures_can_tell():
    """A standard error of 5 points with 100 pictures, 1.6 with 1000; fewer than 20 pictures tell nothing."""
    recalls = [0.5, 0.46, 0.46, 0.46]
    assert turns(told(recalls, images=1000)) == [("overfitting", True, 300)]
    assert turns(told(recalls, images=100)) == []
    assert turns(told([1.0, 0.5, 0.5, 0.5], images=19)) == []
    assert turns(told([1.0, 0.5, 0.5, 0.5], images=20)) == [("overfitting", True, 300)]


def test_a_ruin_that_was_better_than_its_repair_is_noticed():
    assert turns([*measures([0.6], 0), *told([0.5, 0.5])]) == [("overfitting", True, 200)]


def test_the_same_encoder_measured_twice_is_one_measurement():
    events = told([0.6, 0.5])
    assert turns([*events, events[-1], events[-1]]) == []


# --- runs that are well


@pytest.mark.parametrize("lowest", [0.4, 0.001])
@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_sets_off_nothing(seed, lowest):
    assert turns(healthy(seed=seed, lowest=lowest)) == []


def test_a_healthy_run_that_goes_wrong_sets_off_what_it_should():
    """The synthetic run is read at all: each fault, put into it, is found, and nothing else."""
    faults = {
        "non_finite": {"grad_norm": NAN, "non_finite": 0.5},
        "exploding": {"grad_norm": 900.0},
        "vanishing": {"grad_norm": 1e-6},
        "diverging": {"loss": 9.0},
        "collapsing": {"text_cosine": 0.99},
        "clamped": {"logit_scale": CLAMP},
        "slow": {"pairs_per_second": 90.0},
    }
    for name, fault in faults.items():
        events = healthy(800)
        late = [event | fault if event["type"] == "step" and event["step"] > 500 else event for event in events]
        assert {one[0] for one in turns(late)} == {name}
        assert [one[:2] for one in turns(late)][0] == (name, True)


RUNS = {
    "text": RepairConfig(epochs=20, batch=8, lr=1e-3, held_out=0.08, save_every=100),
    "both": RepairConfig(epochs=8, batch=4, accumulate=2, lr=1e-3, held_out=0.08, save_every=100, train="both"),
    "plain": RepairConfig(epochs=20, batch=8, lr=1e-3, held_out=0, anchors=(), geometric=(), save_every=100),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_real_run_sets_off_nothing(inputs, tmp_path, name):
    run = repair(inputs, RUNS[name], tmp_path / "run", cache=tmp_path / "cache", device=torch.device("cpu"))
    # how fast a machine is while others work on it says nothing about alarms
    events = [{key: value for key, value in event.items() if key != "pairs_per_second"} for event in run]
    assert len([event for event in events if event["type"] == "step"]) > 20
    assert turns(events) == []


# --- around a threshold, unknown, and resumed


@pytest.mark.parametrize(
    ("column", "start", "low", "high"),
    [
        ("grad_norm", [900.0] * 60, 900.0, 1100.0),
        ("grad_norm", [1.0] * 60, 15.0, 25.0),
        ("grad_norm", [1e-3] * 60, 5e-6, 2e-5),
        ("loss", [1.0] * 60, 1.4, 1.7),
        ("text_cosine", [0.6] * 60, 0.966, 0.974),
        ("logit_scale", [4.0] * 60, CLAMP - 5e-3, CLAMP),
        ("pairs_per_second", [100.0] * 60, 45.0, 60.0),
    ],
)
@pytest.mark.parametrize("period", [1, 3, 25, 60])
def test_a_series_around_a_threshold_sets_off_one_alarm_at_most(column, start, low, high, period):
    wave = ([low] * period + [high] * period) * (1200 // (2 * period))
    for phase in (0, period):
        raised = [turn for turn in turns(steps(**{column: start + wave[phase:]})) if turn[1]]
        assert len(raised) <= 1
    if period == 60:
        assert len(raised) == 1


COLUMNS = (
    "loss", "losses", "grad_norms", "non_finite", "logit_scale", "text_cosine", "pairs_per_second", "steps", "memory",
)  # fmt: skip


@pytest.mark.parametrize("value", [None, NAN, INF, "7", [], {}, True])
def test_what_is_not_known_sets_off_nothing(value):
    step = {"type": "step", "step": 1} | dict.fromkeys(COLUMNS, value)
    measure = {"type": "measure", "step": 1} | dict.fromkeys((*RECALLS, "images", "held_out"), value)
    others = [{"type": kind} for kind in ("start", "resume", "paused", "resumed", "out_of_memory", "done", None)]
    assert turns([step, measure, {"type": "step"}, {"type": "measure"}, *others, {}] * 100) == []


def test_nulls_only_say_that_gradients_are_not_finite():
    step = {"type": "step", "step": 1} | dict.fromkeys((*COLUMNS, "grad_norm"))
    assert turns([step] * 100) == [("non_finite", True, 1)]


@pytest.mark.parametrize("case", WRONG)
def test_unknown_numbers_in_between_change_nothing(case):
    column, before, during, after, _ = WRONG[case]
    events = steps(**{column: before + during + after})
    # a null norm is a finding, a missing one is not known
    unknown = {"type": "step", "step": 0} | ({} if column == "grad_norm" else {column: None})
    assert turns([one for event in events for one in (unknown, event, unknown)]) == turns(events)


def test_events_are_left_as_they_are():
    events = healthy(200)
    before = copy.deepcopy(events)
    hear(Alarms(), events)
    assert events == before


NUMBERS = {
    "loss": [0.5, 4.0, 9.0],
    "grad_norm": [1e-7, 1.0, 40.0, 5000.0],
    "non_finite": [0.0, 0.3],
    "logit_scale": [4.0, CLAMP],
    "text_cosine": [0.5, 0.99],
    "pairs_per_second": [100.0, 20.0],
}
LEVELS = st.fixed_dictionaries({}, optional={n: st.sampled_from([*values, NAN, INF]) for n, values in NUMBERS.items()})
STRETCH = st.tuples(st.integers(1, 70), LEVELS, st.sampled_from([0.1, 0.6]), st.sampled_from(["", "resumed", "paused"]))


@settings(max_examples=60, deadline=None)
@given(st.lists(STRETCH, min_size=1, max_size=8), st.floats(0, 1), st.integers(0, 99))
def test_a_run_that_goes_on_from_its_record_alarms_as_if_it_had_never_ended(tmp_path_factory, stretches, cut, seed):
    generator = np.random.default_rng(seed)
    events = []
    for count, levels, recall, mark in stretches:
        events += [{"type": mark, "step": len(events)}] if mark else []
        for _ in range(count):
            noise = noisy(generator, 1, 0.01).item()
            event = {"type": "step", "step": len(events)} | {
                n: v if n == "logit_scale" else v * noise for n, v in levels.items()
            }
            events.append(event | {"grad_norms": dict.fromkeys(LAYERS, event.get("grad_norm"))})
        events += measures([recall], len(events), images=500)
    alarms = Alarms()
    whole = [alarms.hear(event) for event in events]

    at = round(cut * len(events))
    folder = tmp_path_factory.mktemp("run")
    for event, set_off in zip(events[:at], whole, strict=False):
        for one in (event, *set_off):
            telemetry.append(folder, one)
    again = Alarms()
    recorded = [json.loads(line) for line in (folder / telemetry.EVENTS).read_text().splitlines()] if at else []
    for event in recorded:
        again.hear(event)
    assert [again.hear(event) for event in events[at:]] == whole[at:]
    assert again.standing == alarms.standing


def test_recorded_alarms_are_not_heard():
    alarm = {"type": "alarm", "alarm": "slow", "step": 3, "raised": True, "advice": "…", "value": 1.0}
    alarms = Alarms()
    assert hear(alarms, [alarm] * 30) == [] and alarms.standing == ()


def test_standing_alarms_are_told_in_the_order_of_the_contract():
    alarms = Alarms()
    step = {"logit_scale": CLAMP, "grad_norm": NAN, "loss": 4.0}
    hear(alarms, [{"type": "step", "step": i} | (step if i else {"logit_scale": 4.0}) for i in range(30)])
    assert alarms.standing == ("non_finite", "clamped")


def test_thresholds_can_be_chosen():
    strict = dataclasses.replace(T, exploding_steps=1, exploding_norm=5.0, clear_steps=2)
    found = turns(steps(grad_norm=[1.0, 6.0, 1.0, 1.0]), Alarms(thresholds=strict))
    assert found == [("exploding", True, 2), ("exploding", False, 4)]
