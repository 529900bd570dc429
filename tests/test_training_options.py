"""What settings make of a training: its pace, its optimizer, clipping, and the mean of its weights."""

from __future__ import annotations

import math

import pytest
import torch

from gmp import checkpoint
from gmp.config import Unfreeze
from gmp.errors import InputError
from gmp.optim import MOMENTS, SCHEDULES, counter, momentum, optimized, schedule
from gmp.trainer import train
from tests.test_trainer import COUNTS, CPU, make, make_pairs, prepare, settings, snapshot, start, steps

STEPS = 12  # of six epochs


def long(**changes):
    return settings(**{"epochs": 6, "warmup": 0.3, **changes})


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("length", [1.0, 1.5, 2.0])
def test_rates_follow_the_schedule_from_the_first_step_to_the_last(name, length):
    training, events = start(long(schedule=name, schedule_length=length, rates={"*.theta": 0.5}))
    total = round(length * STEPS)
    for number, event in enumerate(events):
        factor = schedule(name, number, total, 0.3 * total)
        assert event["lr"] == pytest.approx(1e-3 * factor, rel=1e-12)
        assert event["lrs"] == pytest.approx({"1": 1e-3 * factor, "0.5": 5e-4 * factor}, rel=1e-12)
    assert training.step == STEPS == number + 1


def test_a_schedule_as_long_as_the_training_reaches_its_end_and_one_twice_as_long_does_not():
    last = {}
    for length in (1.0, 2.0):
        _, events = start(long(epochs=50, schedule="onecycle", schedule_length=length))
        last[length] = list(events)[-1]["lr"]
    assert last[1.0] == pytest.approx(1e-3 / 25e4, rel=1e-6)
    assert last[2.0] == pytest.approx(0.81e-3, rel=0.02)


@pytest.mark.parametrize("kind", ["adamw", *MOMENTS])
def test_the_first_beta_cycles_where_it_is_asked_to(kind):
    for cycles in (True, False):
        training, events = start(long(schedule="onecycle", cycle_momentum=cycles, optimizer=kind, betas=(0.9, 0.995)))
        for number, _ in enumerate(events):
            expected = momentum("onecycle", number, STEPS, 0.3 * STEPS) if cycles else 0.9
            assert {group["betas"] for group in training.optimizer.param_groups} == {(expected, 0.995)}


@pytest.mark.parametrize(
    ("changes", "name"),
    [({}, "AdamW"), ({"optimizer_state": "bf16"}, "AdamW16"), ({"optimizer": "lion"}, "Lion")]
    + [({"optimizer": "adabelief"}, "AdaBelief")],
)
def test_every_optimizer_learns(changes, name):
    training, events = start(long(epochs=15, schedule="cosine", eps=1e-12, **changes))
    found = [event["loss"] for event in events]
    assert type(training.optimizer).__name__ == name
    assert all(group.get("eps", 1e-12) == 1e-12 for group in training.optimizer.param_groups)
    assert sum(found[-4:]) < 0.9 * sum(found[:4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cycle_momentum": True, "optimizer_state": "8bit"}, "cycle_momentum changes a beta.*bf16"),
        ({"optimizer": "lion", "optimizer_state": "bf16"}, "optimizer_state bf16 is AdamW's"),
    ],
)
def test_what_does_not_work_together_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        settings(**changes)


def test_settings_reach_the_groups():
    training, _ = start(settings(train="both", layer_decay=0.5, decay="all", weight_decay=0.2))
    rates = {name: group["initial_lr"] for name, _, group in optimized(training.optimizer)}
    assert rates["transformer.resblocks.1.ln_1.bias"] == rates["text_projection"] == rates["visual.proj"] == 1e-3
    assert rates["transformer.resblocks.0.ln_1.bias"] == rates["visual.conv1.weight"] == 5e-4
    assert rates["token_embedding.weight"] == 2.5e-4
    assert {group["weight_decay"] for group in training.optimizer.param_groups} == {0.2}


def test_blocks_that_join_later_count_their_own_steps():
    config = long(optimizer="adabelief", unfreeze=Unfreeze(1, 0.5))
    training, events = start(config)
    list(events)
    counted = {name: counter(training.optimizer, group, p) for name, p, group in optimized(training.optimizer)}
    assert counted["text_projection"] == counted["transformer.resblocks.1.ln_1.bias"] == STEPS
    assert counted["transformer.resblocks.0.ln_1.bias"] == counted["token_embedding.weight"] == STEPS / 2


def clipped(**changes):
    training, events = start(settings(**{"clip_norm": 0.0, **changes}))
    before = snapshot(training.clip)
    event = next(events)
    return event, before, {name: p.grad for name, p in training.clip.named_parameters() if p.grad is not None}


def test_adaptive_clipping_bounds_rows_of_weights_and_norms_are_told_before_it():
    plain, before, grads = clipped()
    most = 1e-4
    event, _, found = clipped(clip_adaptive=most)
    assert event["grad_norm"] == plain["grad_norm"] and event["grad_norms"] == plain["grad_norms"]
    shrunk = 0
    for name, grad in found.items():
        rows, weights = (t.reshape(len(t) if t.ndim > 1 else 1, -1) for t in (grad, before[name]))
        limits = most * weights.norm(dim=1).clamp_min(1e-3)
        assert (rows.norm(dim=1) <= limits * (1 + 1e-5)).all(), name
        exact = grads[name].reshape(rows.shape)
        factors = (limits / exact.norm(dim=1).clamp_min(1e-30)).clamp_max(1)
        torch.testing.assert_close(rows, exact * factors[:, None], rtol=1e-4, atol=1e-12, msg=name)
        shrunk += int((factors < 1).sum())
    assert shrunk


def test_both_kinds_of_clipping_hold_together():
    most, common = 1e-4, plain_norm() / 50
    event, before, found = clipped(clip_adaptive=most, clip_norm=common)
    assert event["grad_norm"] == pytest.approx(50 * common)
    assert math.sqrt(sum(grad.square().sum().item() for grad in found.values())) <= common * (1 + 1e-5)
    theta = "transformer.resblocks.0.mlp.c_fc.theta"
    assert (found[theta].norm(dim=1) <= most * before[theta].norm(dim=1) * (1 + 1e-5)).all()


def plain_norm():
    return clipped()[0]["grad_norm"]


# ---- the mean of weights --------------------------------------------------------------------------------------------


def test_the_mean_is_of_the_weights_after_each_step_that_was_taken():
    config = settings(epochs=3, ema=0.8, rates={"ln_final.*": 0.0})
    pairs = make_pairs()
    order = [next(prepare(make(), pairs, config, CPU).sampler)]
    pairs.features[order[0][0][4]] = math.nan  # in one step of each epoch
    training, events = start(config, pairs=pairs)
    seen, skipped = [], 0
    for event in events:
        if event["skipped"] == skipped:
            seen.append(snapshot(training.clip))
        skipped = event["skipped"]
    assert skipped == 3 and len(seen) == training.ema.updates == 3
    for name, mean in training.ema.means.items():
        counts = [0.8 ** (2 - number) for number in range(3)]
        expected = sum(count * one[name].double() for count, one in zip(counts, seen, strict=True)) / sum(counts)
        torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-7, msg=name)
    assert "ln_final.weight" not in training.ema.means


def test_without_it_there_is_none_and_with_it_the_training_is_the_same():
    found = []
    for ema in (0.0, 0.9):
        training, events = start(settings(epochs=2, ema=ema))
        found.append(([event["loss"] for event in events], snapshot(training.clip)))
        assert (training.ema is None) == (ema == 0) == ("averaged" not in training.state())
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][name]) for name, tensor in found[0][1].items())


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adabelief"}, {"optimizer": "lion"}, {"unfreeze": Unfreeze(1)}])
def test_a_training_that_is_resumed_goes_on_to_the_bit(changes, tmp_path):
    options = {"schedule": "onecycle", "cycle_momentum": True, "clip_adaptive": 0.01, "ema": 0.9, "layer_decay": 0.8}
    config = long(**{**options, "optimizer": "adabelief", **changes})
    training, events = start(config)
    for event in events:
        if event["step"] == 5:
            state, mean = training.state(), training.ema.clip()
            found = checkpoint.save(tmp_path, 5, training.clip, training.optimizer, state, 1, {}, mean)
    pairs = make_pairs()
    again = prepare(make(7), pairs, config, CPU)
    means = again.ema.means
    again.restore(checkpoint.restore(found, again.clip, again.optimizer, means=means))
    assert [event["step"] for event in steps(train(again, pairs, {}, config, CPU))] == list(range(6, STEPS + 1))
    assert again.ema.updates == training.ema.updates == STEPS and len(COUNTS) == 24
    ours, theirs = snapshot(again.clip), snapshot(training.clip)
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items() if not name.startswith("visual."))
    assert all(torch.equal(mean, means[name]) for name, mean in training.ema.means.items())
