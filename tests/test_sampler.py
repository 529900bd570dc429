"""The order of training: complete epochs, uniform captions, exact resumption, no global random numbers."""

from __future__ import annotations

import json
import random
from itertools import islice

import numpy as np
import pytest
import torch

from gmp.data.sampler import Sampler
from gmp.errors import InputError

COUNTS = [1, 2, 3, 5, 1, 4, 2, 2, 7, 1, 3]  # 11 pictures


def take(sampler, count) -> list[tuple[list[int], list[int]]]:
    return [(pictures.tolist(), captions.tolist()) for pictures, captions in islice(sampler, count)]


def test_shapes_and_counts():
    sampler = Sampler(COUNTS, batch=4, seed=0)
    assert (sampler.batches_per_epoch, sampler.dropped_per_epoch, sampler.batch_size) == (2, 3, 4)
    pictures, captions = next(sampler)
    assert pictures.shape == captions.shape == (4,)
    assert pictures.dtype == captions.dtype == torch.int64


@pytest.mark.parametrize("batch", [1, 3, 4, 11])
def test_no_picture_comes_twice_in_an_epoch(batch):
    sampler = Sampler(COUNTS, batch, seed=5)
    for _ in range(20):
        seen = [p for pictures, _ in take(sampler, sampler.batches_per_epoch) for p in pictures]
        assert len(seen) == len(set(seen)) == len(COUNTS) - sampler.dropped_per_epoch
        assert set(seen) <= set(range(len(COUNTS)))


def test_captions_lie_within_their_picture():
    for pictures, captions in take(Sampler(COUNTS, 5, seed=1), 200):
        assert all(0 <= c < COUNTS[p] for p, c in zip(pictures, captions, strict=True))


def test_captions_and_dropped_pictures_are_uniform():
    sampler = Sampler([3] * 10, batch=4, seed=2)
    hits = np.zeros((10, 3))
    for pictures, captions in islice(sampler, 2 * 3000):
        np.add.at(hits, (pictures.numpy(), captions.numpy()), 1)
    # 24000 draws over 30 cells, 800 expected each; 5 sigma of a binomial
    assert np.abs(hits - 800).max() < 5 * np.sqrt(800)


def test_epochs_and_seeds_differ():
    sampler = Sampler([1] * 100, 100, seed=0)
    first, second = take(sampler, 2)
    other = take(Sampler([1] * 100, 100, seed=1), 1)[0]
    assert first != second and first != other
    # epoch e+1 of seed s is not epoch e of seed s+1
    assert second != other


def test_same_seed_same_order():
    assert take(Sampler(COUNTS, 3, seed=7), 50) == take(Sampler(tuple(COUNTS), 3, seed=7), 50)


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 4, 10, 33])
def test_resumes_exactly(taken):
    sampler = Sampler(COUNTS, 3, seed=3)
    take(sampler, taken)
    state = json.loads(json.dumps(sampler.state()))
    assert set(state) == {"seed", "epoch", "batch"}
    rest = take(sampler, 20)
    fresh = Sampler(COUNTS, 3, seed=3)
    take(fresh, 5)
    fresh.restore(state)
    assert fresh.state() == state
    assert take(fresh, 20) == rest


def test_state_counts_finished_epochs():
    sampler = Sampler(COUNTS, 5, seed=0)
    states = []
    for _ in range(4):
        next(sampler)
        states.append((sampler.state()["epoch"], sampler.state()["batch"], sampler.epoch))
    assert states == [(0, 1, 0), (1, 0, 1), (1, 1, 1), (2, 0, 2)]


def test_batches_are_not_views_of_the_plan():
    one, two = Sampler(COUNTS, 4, seed=0), Sampler(COUNTS, 4, seed=0)
    pictures, captions = next(one)
    pictures.zero_(), captions.zero_()
    next(two)
    one.restore(two.state())
    assert take(one, 6) == take(two, 6)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"seed": 1, "epoch": 0, "batch": 0}, "seed 1, this run has seed 0"),
        ({"seed": 0, "epoch": 0, "batch": 2}, "2 batches"),
        ({"seed": 0, "epoch": -1, "batch": 0}, "epoch is -1"),
        ({"seed": 0, "epoch": 0}, "lacks the whole numbers batch"),
        ({"seed": 0, "epoch": 0.5, "batch": None}, "epoch, batch"),
    ],
)
def test_states_that_do_not_fit(state, reason):
    sampler = Sampler(COUNTS, 4, seed=0)
    with pytest.raises(InputError, match=reason):
        sampler.restore(state)
    assert sampler.state() == {"seed": 0, "epoch": 0, "batch": 0}


@pytest.mark.parametrize(
    ("counts", "batch", "reason"),
    [
        (COUNTS, 12, "11 pictures don't fill a batch of 12: lower the batch size to at most 11"),
        ([], 1, "add pictures"),
        (COUNTS, 0, "batch size is 0"),
        ([1, 0, 2, -1], 2, r"2 of 4 pictures have no caption \(positions 1, 3\)"),
        ([0], 2, r"fill a batch of 2.*no caption"),
    ],
)
def test_impossible_settings(counts, batch, reason):
    with pytest.raises(InputError, match=reason):
        Sampler(counts, batch, seed=0)


def test_global_random_numbers_are_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    sampler = Sampler(COUNTS, 3, seed=0)
    expected = take(sampler, 10)
    sampler.restore({"seed": 0, "epoch": 0, "batch": 0})
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1]) and random.getstate() == before[2]
    torch.manual_seed(99)
    assert take(sampler, 10) == expected


# ---- repeats --------------------------------------------------------------------------------------------------------

REPEATS = [1, 2.5, 0.3, 4, 1, 1.75, 0, 10, 0.5, 3, 1]  # 25.05


def epochs_of(sampler, count) -> list[list[int]]:
    return [[p for pictures, _ in take(sampler, sampler.batches_per_epoch) for p in pictures] for _ in range(count)]


def test_repeats_of_one_change_nothing():
    plain = take(Sampler(COUNTS, 3, seed=3), 40)
    assert take(Sampler(COUNTS, 3, seed=3, repeats=[1.0] * 11), 40) == plain
    assert take(Sampler(COUNTS, 3, seed=3, repeats=(1,) * 11), 40) == plain


@pytest.mark.parametrize("repeats", [REPEATS, [2] * 11, [0.5] * 11, [0.9, 0.7, *[1] * 9], [2.5, *[1] * 10], [1.3] * 11])
def test_every_picture_is_visited_its_repeats_rounded_down_or_up_and_all_together_the_rounded_sum(repeats):
    sampler = Sampler(COUNTS, 1, seed=0, repeats=repeats)
    assert sampler.visits == sampler.batches_per_epoch == round(sum(repeats))
    for seen in epochs_of(sampler, 50):
        visits = np.bincount(seen, minlength=11)
        assert visits.sum() == round(sum(repeats))
        assert (np.floor(repeats) <= visits).all() and (visits <= np.ceil(repeats)).all()


def test_on_average_a_picture_is_visited_its_repeats():
    repeats = np.random.default_rng(0).uniform(0, 3, 200)
    repeats[-1] += np.ceil(repeats.sum()) - repeats.sum()  # whole in all: no rounding
    sampler = Sampler([1] * 200, 1, seed=1, repeats=repeats.tolist())
    seen = np.stack([np.bincount(epoch, minlength=200) for epoch in epochs_of(sampler, 400)])
    fractions = repeats % 1
    sigma = np.sqrt(fractions * (1 - fractions) / 400)
    assert np.abs(seen.mean(0) - repeats).max() < 5 * sigma.max()
    assert seen.std(0).max() < 0.51


def test_two_visits_of_a_picture_lie_far_apart():
    repeats = [1] * 600 + [2] * 300 + [5] * 100 + [10] * 20  # 1900
    sampler = Sampler([1] * len(repeats), 1, seed=2, repeats=repeats)
    for seen in epochs_of(sampler, 5):
        places = [np.flatnonzero(np.array(seen) == p) for p in range(len(repeats))]
        for times, each in zip(repeats, places, strict=True):
            if times > 1:
                assert np.diff(each).min() > 0.3 * 1900 / times  # half a round, but for chance between them
        # rounds have other orders: of pictures with as many visits, other ones stand first in each
        firsts = [np.argsort([each[k] for each in places[900:1000]]).tolist() for k in range(5)]
        assert all(one != other for one, other in zip(firsts, firsts[1:], strict=False))


def test_a_picture_with_many_repeats_stands_anywhere_in_an_epoch():
    repeats = [1] * 50 + [3] * 10
    sampler = Sampler([1] * 60, 1, seed=0, repeats=repeats)
    hits = np.zeros(80)
    for seen in epochs_of(sampler, 600):
        hits += np.isin(seen, range(50, 60))
    expected = 600 * 30 / 80
    assert np.abs(hits - expected).max() < 5 * np.sqrt(expected)


def test_captions_of_repeated_pictures_are_uniform_and_drawn_for_each_visit():
    sampler = Sampler([3] * 8, 4, seed=2, repeats=[2] * 8)
    hits, alike = np.zeros((8, 3)), 0
    for _ in range(1000):
        visits = {}
        for pictures, captions in take(sampler, sampler.batches_per_epoch):
            for picture, caption in zip(pictures, captions, strict=True):
                hits[picture, caption] += 1
                visits.setdefault(picture, []).append(caption)
        alike += sum(one == other for one, other in visits.values())
    assert np.abs(hits - 2000 / 3).max() < 5 * np.sqrt(2000 / 3)
    assert abs(alike - 8000 / 3) < 5 * np.sqrt(8000 * 2 / 9)


@pytest.mark.parametrize("taken", [0, 1, 5, 6, 7, 20])
@pytest.mark.parametrize("in_turn", [False, True])
def test_resumes_exactly_with_repeats(taken, in_turn):
    sampler = Sampler(COUNTS, 4, 3, REPEATS, in_turn)
    take(sampler, taken)
    state = json.loads(json.dumps(sampler.state()))
    fresh = Sampler(COUNTS, 4, 3, REPEATS, in_turn)
    fresh.restore(state)
    assert take(fresh, 20) == take(sampler, 20)


def test_captions_in_turn_go_from_epoch_to_epoch_in_the_order_of_random_ones():
    turned, plain = Sampler(COUNTS, 11, seed=3, in_turn=True), Sampler(COUNTS, 11, seed=3)
    for epoch in range(8):
        (pictures, captions), (others, _) = next(turned), next(plain)
        assert torch.equal(pictures, others)
        assert captions.tolist() == [epoch % COUNTS[p] for p in pictures.tolist()]


def test_captions_in_turn_follow_each_other_within_an_epoch_too():
    sampler = Sampler([5, 2], 5, seed=0, repeats=[3, 2], in_turn=True)
    seen = {0: [], 1: []}
    for pictures, captions in take(sampler, 6):
        for picture, caption in zip(pictures, captions, strict=True):
            seen[picture].append(caption)
    assert seen == {0: [n % 5 for n in range(18)], 1: [n % 2 for n in range(12)]}


@pytest.mark.parametrize(
    ("repeats", "reason"),
    [
        (
            [1, -1, float("nan"), float("inf")],
            r"3 of 4 pictures have repeats .* between 0 and .* \(positions 1, 2, 3\)",
        ),
        ([1, 1], "2 numbers of repeats were given for 4 pictures"),
        ([0.1] * 4, "0 visits of pictures don't fill a batch of 2: add pictures"),
        ([0.4] * 4, "2 visits of pictures don't fill a batch of 3: lower the batch size to at most 2"),
    ],
)
def test_impossible_repeats(repeats, reason):
    with pytest.raises(InputError, match=reason):
        Sampler([1] * 4, 2 if "of 2" in reason else 3, 0, repeats)
