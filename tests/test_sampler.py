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
