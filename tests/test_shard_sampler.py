"""The order of training over shards: complete epochs, mixed windows, exact resumption, memory of one window."""

from __future__ import annotations

import copy
import json
from itertools import islice

import numpy as np
import pytest
import torch

from gmp.data.shard_sampler import ShardSampler
from gmp.errors import InputError

SIZES = [7, 3, 0, 11, 5, 2, 9]  # 37 pictures
COUNTS = torch.arange(37) % 4 + 1


def sampler(batch=5, seed=3, window=2, sizes=SIZES, counts=COUNTS) -> ShardSampler:
    return ShardSampler(sizes, counts, batch, seed, window)


def take(one: ShardSampler, count: int) -> list[tuple[list[int], list[int]]]:
    return [(pictures.tolist(), captions.tolist()) for pictures, captions in islice(one, count)]


def shard_of(picture: int) -> int:
    return int(np.searchsorted(np.cumsum(SIZES), picture, side="right"))


def test_shapes_and_counts():
    one = sampler(batch=5)
    assert (one.batches_per_epoch, one.dropped_per_epoch, one.batch_size) == (7, 2, 5)
    pictures, captions = next(one)
    assert pictures.shape == captions.shape == (5,)
    assert pictures.dtype == captions.dtype == torch.int64


@pytest.mark.parametrize("window", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("batch", [1, 4, 12, 37])
def test_every_picture_comes_once_in_an_epoch_but_for_what_is_dropped(batch, window):
    one = sampler(batch, window=window)
    for _ in range(10):
        seen = [p for pictures, _ in take(one, one.batches_per_epoch) for p in pictures]
        assert len(seen) == len(set(seen)) == 37 - one.dropped_per_epoch
        assert set(seen) <= set(range(37))


def test_captions_lie_within_their_picture():
    for pictures, captions in take(sampler(), 100):
        assert all(0 <= c < COUNTS[p] for p, c in zip(pictures, captions, strict=True))


@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_pictures_of_a_window_come_before_those_of_the_next(window):
    one = sampler(batch=1, window=window)
    for _ in range(5):
        shards = [shard_of(pictures[0]) for pictures, _ in take(one, 37)]
        first = list(dict.fromkeys(shards))  # in the order in which they begin
        last = [len(shards) - 1 - shards[::-1].index(shard) for shard in first]
        open_at_once = [sum(shards.index(s) <= i <= end for s, end in zip(first, last, strict=True)) for i in range(37)]
        assert max(open_at_once) <= window
        assert window == 1 or max(open_at_once) > 1


def test_captions_and_places_are_uniform():
    one = sampler(batch=6, window=2, sizes=[4, 2, 6], counts=torch.full((12,), 3))
    hits, firsts = np.zeros((12, 3)), np.zeros(3)  # firsts: the shard of an epoch's first picture
    for number, (pictures, captions) in enumerate(islice(one, 2 * 3000)):
        np.add.at(hits, (pictures.numpy(), captions.numpy()), 1)
        if number % 2 == 0:
            firsts[np.searchsorted([4, 6, 12], pictures[0].item(), side="right")] += 1
    assert np.abs(hits - 1000).max() < 5 * np.sqrt(1000)  # 36 cells of 1000 expected draws: 5 sigma of a binomial
    # the first window is one of three pairs of shards, and begins with a shard by its share of the pair's pictures
    shares = np.array([4 / 6 + 4 / 10, 2 / 6 + 2 / 8, 6 / 10 + 6 / 8]) / 3
    assert np.abs(firsts / 3000 - shares).max() < 5 * 0.5 / np.sqrt(3000)


def test_a_window_of_all_shards_mixes_all_pictures_evenly():
    one = sampler(batch=37, window=7, counts=torch.ones(37, dtype=torch.int64))
    places = np.stack([next(one)[0].argsort().numpy() for _ in range(2000)])  # (epochs, pictures)
    sigma = 37 / np.sqrt(12) / np.sqrt(2000)
    assert np.abs(places.mean(0) - 18).max() < 5 * sigma


def test_epochs_and_seeds_differ():
    first, second = take(sampler(37), 2)
    other = take(sampler(37, seed=4), 1)[0]
    assert first != second and first != other and second != other


def test_shards_share_windows_with_others_in_other_epochs():
    one, pairs = sampler(batch=1, sizes=[1] * 6, counts=torch.ones(6, dtype=torch.int64)), set()
    for _ in range(20):
        order = [pictures[0] for pictures, _ in take(one, 6)]
        pairs |= {frozenset(order[i : i + 2]) for i in (0, 2, 4)}
    assert len(pairs) == 15


@pytest.mark.parametrize("taken", [0, 1, 2, 6, 7, 8, 20, 33])
def test_resumes_exactly(taken):
    one = sampler()
    take(one, taken)
    state = json.loads(json.dumps(one.state()))
    rest = take(one, 20)
    fresh = sampler()
    take(fresh, 5)
    fresh.restore(state)
    assert fresh.state() == state
    assert take(fresh, 20) == rest


def test_a_copy_looks_ahead_without_moving_the_original():
    one, other = sampler(), sampler()
    for _ in range(30):
        ahead = next(copy.copy(one))[0].tolist()
        assert ahead == next(one)[0].tolist() == next(other)[0].tolist()


def test_batches_are_not_views_of_the_plan():
    one, two = sampler(), sampler()
    pictures, captions = next(one)
    pictures.zero_(), captions.zero_()
    next(two)
    one.restore({**one.state(), "batch": 0})
    two.restore({**two.state(), "batch": 0})
    assert take(one, 6) == take(two, 6)


def test_counts_are_asked_for_one_window_at_a_time():
    asked = []

    class Asked:
        def __getitem__(self, positions):
            asked.append(len(positions))
            return COUNTS[positions]

    take(sampler(window=2, counts=Asked()), 7)
    assert sum(asked) == 37 and max(asked) <= 20


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seed": 1}, "seed 1, this run has seed 3"),
        ({"window": 1}, "window 1, this run has window 2"),
        ({"batch": 7}, "7 batches"),
        ({"epoch": -1}, "epoch is -1"),
        ({"batch": None, "window": "2"}, "lacks the whole numbers batch, window"),
    ],
)
def test_states_that_do_not_fit(change, reason):
    one = sampler()
    with pytest.raises(InputError, match=reason):
        one.restore(one.state() | change)
    assert one.state() == sampler().state()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"batch": 38}, "37 pictures don't fill a batch of 38: lower the batch size to at most 37"),
        ({"sizes": [0, 0]}, "add pictures"),
        ({"sizes": []}, "add pictures"),
        ({"batch": 0}, "batch size is 0"),
        ({"window": 0}, "window is 0 shards"),
    ],
)
def test_impossible_settings(given, reason):
    with pytest.raises(InputError, match=reason):
        sampler(**given)


def test_global_random_numbers_are_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    expected = take(sampler(), 10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert take(sampler(), 10) == expected
