"""Retrieval against a full sort with deterministic ties, and drift against loops."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gmp import READ_POINTS, bootstrap
from gmp import measure as module
from gmp.clip import TextConfig, TextTower
from gmp.events import finish
from gmp.measure import (
    DIRECTIONS,
    SUMMARY,
    Interval,
    Places,
    drift,
    interval,
    measure_tower,
    rank_pairs,
    resample,
    retrieval,
    share_interval,
    summarize,
    text_features,
    with_intervals,
)

TEXT = TextConfig(32, 3, 2, 64, 12, 50, 16)


def unit(tensor):
    return torch.nn.functional.normalize(tensor, dim=-1)


def naive_ranks(scores, positive):
    """A stable sort by falling score, the first index first; then where the best positive stands."""
    ranks = []
    for row, mask in zip(scores.tolist(), positive.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))
        ranks.append(next(place for place, item in enumerate(order) if mask[item]))
    return np.array(ranks)


def check(found, ranks):
    """open_clip's `get_clip_metrics`, word for word."""
    assert found.mean_rank == pytest.approx(ranks.mean() + 1, rel=1e-12)
    assert found.median_rank == np.floor(np.median(ranks)) + 1
    for k in (1, 5, 10):
        assert getattr(found, f"recall_at_{k}") == pytest.approx(np.mean(ranks < k), rel=1e-12)
    assert found.queries == len(ranks)


def naive(images, texts, owners):
    scores = unit(texts.double()) @ unit(images.double()).T
    positive = torch.tensor(owners)[:, None] == torch.arange(len(images))[None]
    return naive_ranks(scores, positive), naive_ranks(scores.T, positive.T)


def data(pictures=23, counts=(1, 3, 2), seed=0):
    """Features that half agree; picture i has counts[i % 3] captions."""
    generator = torch.Generator().manual_seed(seed)
    owners = [i for i in range(pictures) for _ in range(counts[i % len(counts)])]
    images = torch.randn(pictures, 16, generator=generator)
    texts = images[owners] + 1.5 * torch.randn(len(owners), 16, generator=generator)
    return images, texts, owners


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("counts", [(1,), (1, 3, 2), (5,)])
def test_ranks(counts, chunk):
    images, texts, owners = data(counts=counts)
    found = retrieval(images, texts, owners, chunk=chunk)
    to_image, to_text = naive(images, texts, owners)
    assert 0 < to_image.max() and len(set(to_image)) > 3
    check(found.text_to_image, to_image)
    check(found.image_to_text, to_text)
    assert (found.images, found.captions) == (len(images), len(texts))


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_ties(chunk):
    """Few directions, whose scores are exact in fp32, so that most captions and pictures have doubles."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 2, (40, 4), generator=generator) * 2.0 - 1  # length 2 each
    owners = [i for i in range(40) for _ in range(1 + i % 2)]
    texts = torch.randint(0, 2, (len(owners), 4), generator=generator) * 2.0 - 1
    assert len(torch.unique(images, dim=0)) < 20
    found = retrieval(images, texts, owners, chunk=chunk)
    to_image, to_text = naive(images, texts, owners)
    check(found.text_to_image, to_image)
    check(found.image_to_text, to_text)


def test_collapsed_features_are_no_success():
    """All scores equal: caption i finds i others ahead of its picture."""
    found = retrieval(torch.ones(10, 4), torch.ones(10, 4), range(10))
    for direction in (found.text_to_image, found.image_to_text):
        assert direction.recall_at_1 == 0.1 and direction.mean_rank == 5.5 and direction.median_rank == 5


@pytest.mark.parametrize("part", ["pictures", "captions", "both", "one caption"])
def test_features_that_are_no_numbers_are_no_success(part):
    images, texts, owners = data(counts=(1,))
    if part in ("pictures", "both"):
        images = images * math.nan
    if part in ("captions", "both"):
        texts = texts * math.nan
    if part == "one caption":
        texts = images.clone()
        texts[3] = math.inf
    found = retrieval(images, texts, owners)
    expected = 22 / 23 if part == "one caption" else 1 / 23  # chance
    for direction in (found.text_to_image, found.image_to_text):
        assert direction.recall_at_1 == pytest.approx(expected)


def test_a_perfect_model():
    images, _, _ = data()
    found = retrieval(images, images, range(len(images)))
    for direction in (found.text_to_image, found.image_to_text):
        assert direction.recall_at_1 == direction.recall_at_5 == direction.recall_at_10 == 1
        assert direction.mean_rank == direction.median_rank == 1


def test_a_random_model():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 400, 32, generator=generator)
    found = retrieval(images, texts, range(400))
    for direction in (found.text_to_image, found.image_to_text):
        assert direction.recall_at_1 < 0.03 and direction.recall_at_10 < 0.08
        assert 150 < direction.mean_rank < 250 and 140 < direction.median_rank < 260


def test_median_of_an_even_number_is_rounded_down():
    """0-based ranks 0 and 3: the median is 1.5, its floor 1, and 2 counted from 1."""
    images = torch.eye(4)
    texts = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.1, 0.5, 0.6]])
    found = retrieval(images[[0, 1, 2, 3]], torch.cat([texts, images[2:]]), [0, 1, 2, 3]).text_to_image
    assert (found.median_rank, found.mean_rank) == (1, 1 + 3 / 4)
    two = retrieval(torch.eye(2), torch.tensor([[1.0, 0], [1.0, 0]]), [0, 1]).text_to_image
    assert (two.median_rank, two.mean_rank) == (1, 1.5)


def test_captions_may_come_in_any_order():
    images, texts, owners = data()
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(1))
    mixed = retrieval(images, texts[order], [owners[i] for i in order])
    assert mixed == retrieval(images, texts, owners)


@pytest.mark.parametrize("owners", [[0, 1], [0, 0, 1, 1]])
def test_owners_that_do_not_fit_are_refused(owners):
    with pytest.raises(ValueError, match="for 3 pictures"):
        retrieval(torch.eye(3), torch.eye(3)[[0, 1, 2, 0]][: max(3, len(owners))], owners)


def test_flat_names():
    images, texts, owners = data()
    found = retrieval(images, texts, owners)
    flat = found.flat()
    assert flat["recall_at_5_text_to_image"] == found.text_to_image.recall_at_5
    assert flat["median_rank_image_to_text"] == found.image_to_text.median_rank
    assert len(flat) == 10


def ranked(images, texts, owners, **settings):
    return finish(rank_pairs(images, texts, owners, **settings))


@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
def test_every_rank_is_that_of_the_full_computation(chunk):
    """With doubles, whose scores are equal, at both ends and on both sides of a block's border."""
    images, texts, owners = data(pictures=33, counts=(1, 4, 2))
    images[[5, 17, 32]] = images[2].clone()
    texts[[3, 30, 31, 76]] = texts[12].clone()
    found = ranked(images, texts, owners, chunk=chunk)
    to_image, to_text = naive_fixed(images, texts, owners)
    assert found.text_to_image.tolist() == to_image.tolist()
    assert found.image_to_text.tolist() == to_text.tolist()


def naive_fixed(images, texts, owners):
    """Scores in exact integers, of unit vectors in steps of 2^-26."""
    rows, columns = (
        [[round(value * 2**26) for value in row] for row in unit(one.double()).tolist()] for one in (texts, images)
    )
    scores = torch.tensor([[sum(a * b for a, b in zip(x, y, strict=True)) for y in columns] for x in rows])
    positive = torch.tensor(owners)[:, None] == torch.arange(len(images))[None]
    return naive_ranks(scores, positive), naive_ranks(scores.T, positive.T)


def test_scores_do_not_depend_on_the_shape_of_the_product():
    """Ones that fp32 rounds differently: a caption and its picture are equal, and every other picture nearly is."""
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(768, generator=generator)
    images = one + 1e-3 * torch.randn(300, 768, generator=generator)
    exact = ranked(images, images, range(300), chunk=300)
    assert exact.text_to_image.max() == 0
    texts = images[torch.randperm(300, generator=generator)]
    whole = ranked(images, texts, range(300))
    assert whole.text_to_image.max() > 100
    for chunk in (17, 64, 299):
        other = ranked(images, texts, range(300), chunk=chunk)
        assert torch.equal(whole.text_to_image, other.text_to_image)
        assert torch.equal(whole.image_to_text, other.image_to_text)


def test_scores_are_exact():
    """Against Python's fractions: no product, and no sum in any order, is rounded."""
    generator = torch.Generator().manual_seed(0)
    one, other = (module._units(torch.randn(2, 1024, generator=generator), module.CPU) for _ in range(2))
    other[0] = one[0]  # the largest score there is
    wanted = sum(Fraction(a) * Fraction(b) for a, b in zip(one[0].tolist(), other[0].tolist(), strict=True))
    assert Fraction((one @ other.T)[0, 0].item()) == wanted == Fraction((one[0] * other[0]).flip(0).sum().item())
    wanted = sum(Fraction(a) * Fraction(b) for a, b in zip(one[1].tolist(), other[0].tolist(), strict=True))
    assert Fraction((one @ other.T)[1, 0].item()) == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_features_of_any_kind_and_length(dtype):
    """A common factor changes nothing, also where squares of fp16 would leave their range."""
    images, texts, owners = data()
    images, texts = images.to(dtype), texts.to(dtype)
    expected = ranked(images.double(), texts.double(), owners)
    found = ranked(images * 1024, texts / 1024 if dtype != torch.float16 else texts, owners)
    assert torch.equal(found.text_to_image, expected.text_to_image)
    assert torch.equal(found.image_to_text, expected.image_to_text)


def test_a_score_that_is_no_number_is_behind_all_others():
    """Caption 0 is no number: its picture finds it behind everything; it finds pictures in their order."""
    images, texts, _ = data(pictures=10, counts=(1,))
    texts[0], images[7] = math.nan, math.inf
    found = ranked(images, texts, range(10), chunk=3)
    assert found.text_to_image[0] == 0 and found.image_to_text[0] == 9
    assert found.text_to_image[7] == 9 and found.image_to_text[7] == 7


def test_ranking_tells_how_far_it_is_and_may_be_left():
    images, texts, owners = data(pictures=20, counts=(2,))
    events = list(rank_pairs(images, texts, owners, chunk=16))
    assert [event["done"] for event in events] == [1, 2, 3, 4, 5, 6]
    assert {event["total"] for event in events} == {6} and {event["type"] for event in events} == {"progress"}
    begun = rank_pairs(images, texts, owners, chunk=16)
    next(begun)
    begun.close()


def test_ranking_holds_no_table_of_all_scores(monkeypatch):
    """The largest tensor that is made is a block of scores, or a block of features."""
    images, texts, owners = data(pictures=300, counts=(3,))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest
            made = function(*arguments, **(keywords or {}))
            if isinstance(made, torch.Tensor):
                largest = max(largest, made.numel())
            return made

    with Watch():
        ranked(images, texts, owners, chunk=64)
    assert largest == 64 * 64  # of 270,000 scores, 14,400 numbers in the captions' features


# ---- confidence -----------------------------------------------------------------------------------------------------


def naive_samples(places, resamples, seed):
    """Resamples written out as lists of queries, one by one."""
    images, generator = len(places.image_to_text), torch.Generator().manual_seed(seed)
    drawn = torch.randint(images, (resamples, images), generator=generator).tolist()
    captions = [[j for j, owner in enumerate(places.image_of.tolist()) if owner == i] for i in range(images)]
    rows = {name: [] for name in DIRECTIONS}
    for pictures in drawn:
        to_image = np.array([places.text_to_image[j].item() for i in pictures for j in captions[i]])
        to_text = places.image_to_text[pictures].numpy()
        for name, ranks in (("text_to_image", to_image), ("image_to_text", to_text)):
            recalls = [np.mean(ranks < k) for k in (1, 5, 10)]
            rows[name].append([*recalls, ranks.mean() + 1, np.floor(np.median(ranks)) + 1])
    return {name: torch.tensor(np.array(found)) for name, found in rows.items()}


@pytest.mark.parametrize("drawn", [1, 100, 2**22])
@pytest.mark.parametrize("counts", [(1,), (1, 3, 2)])
def test_resampling_draws_pictures_with_all_their_captions(counts, drawn, monkeypatch):
    monkeypatch.setattr(bootstrap, "DRAWN", drawn)
    places = ranked(*data(counts=counts))
    found = finish(resample(places, resamples=40, seed=3))
    for name, wanted in naive_samples(places, 40, 3).items():
        assert len(wanted.unique(dim=0)) > 10
        torch.testing.assert_close(found[name], wanted, rtol=1e-12, atol=0)


def test_captions_in_any_order_have_the_same_intervals():
    images, texts, owners = data()
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(1))
    one = finish(resample(ranked(images, texts, owners), 20))
    other = finish(resample(ranked(images, texts[order], [owners[i] for i in order]), 20))
    for name in DIRECTIONS:
        torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=0)


def test_an_interval_is_that_of_percentiles():
    samples = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = interval(0.5, samples)
    assert found.value == 0.5
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(samples.numpy(), [2.5, 97.5])), rel=1e-12)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """100 data sets of 60 pictures with 3 captions that fail together, of which 70 % are found."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(100):
        lost = (torch.rand(60, generator=generator) < 0.3).long() * 20
        owner = torch.arange(60).repeat_interleave(3)
        places = Places(lost[owner], lost, owner)
        found = with_intervals(summarize(places), finish(resample(places, 200)))["text_to_image"]["recall_at_1"]
        held += found.low <= 0.7 <= found.high
    assert 88 <= held <= 99  # 39 to 79 where captions are drawn one by one


def test_every_number_has_an_interval_around_it():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 40, 16, generator=generator)
    places = ranked(images, 2 * texts + images, range(40))
    found = summarize(places)
    for direction, values in with_intervals(found, finish(resample(places))).items():
        assert tuple(values) == SUMMARY
        for name, value in values.items():
            assert isinstance(value, Interval) and value.low <= value.value <= value.high
            assert value.value == getattr(getattr(found, direction), name)
            assert value.low < value.high


def test_the_same_pictures_have_the_same_intervals():
    places = ranked(*data())
    assert with_intervals(summarize(places), finish(resample(places))) == with_intervals(
        summarize(places), finish(resample(places))
    )


# ---- text towers ----------------------------------------------------------------------------------------------------


def tower(seed=0):
    made = TextTower(TEXT)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            middle = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            parameter.normal_(middle, 0.3, generator=generator)
    return made


def captions(count=9):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 48, (count, 12), generator=generator)
    ids[:, 0] = 48
    for row in range(count):
        ids[row, 2 + row % 9 :] = 49
    return ids


@pytest.mark.parametrize("batch", [2, 64])
def test_text_features(batch):
    one, ids = tower(), captions()
    with torch.no_grad():
        expected = one(ids).projected
    found = text_features(one, ids, batch=batch)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert not found.requires_grad


def test_no_drift_from_itself():
    one = tower()
    found = drift(one, copy.deepcopy(one), captions())
    assert tuple(found) == READ_POINTS
    for value in found.values():
        assert value.cosine == pytest.approx(1, abs=1e-12)
        assert value.one_minus_cosine == pytest.approx(0, abs=1e-12)
        assert value.relative_norm == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("batch", [2, 64])
def test_drift(batch):
    one, other, ids = tower(), tower(1), captions()
    found = drift(one, other, ids, batch=batch)
    with torch.no_grad():
        a, b = one(ids), other(ids)
    for point in READ_POINTS:
        cosines, norms = [], []
        for x, y in zip(getattr(a, point).flatten(0, -2), getattr(b, point).flatten(0, -2), strict=True):
            x, y = x.double().numpy(), y.double().numpy()
            cosines.append(x @ y / math.sqrt(x @ x) / math.sqrt(y @ y))
            norms.append(math.sqrt(x @ x) / math.sqrt(y @ y))
        assert len(cosines) == (9 * 12 if point in ("penultimate", "last") else 9)
        assert found[point].cosine == pytest.approx(np.mean(cosines), rel=1e-5)
        assert found[point].one_minus_cosine == pytest.approx(1 - np.mean(cosines), rel=1e-5)
        assert found[point].relative_norm == pytest.approx(np.mean(norms), rel=1e-5)


def test_drift_says_which_tower_is_longer():
    one = tower()
    other = copy.deepcopy(one)
    with torch.no_grad():
        one.text_projection.mul_(2)
    found = drift(one, other, captions())
    assert found["projected"].relative_norm == pytest.approx(2, rel=1e-6)
    assert found["projected"].cosine == pytest.approx(1, abs=1e-9)
    assert found["pooled"].relative_norm == pytest.approx(1, rel=1e-9)


def test_measure_tower_is_json_without_and_with_a_reference():
    one, ids = tower(), captions()
    images = text_features(one, ids)
    found = measure_tower(one, images, ids, range(9), None)
    assert found["recall_at_1_text_to_image"] == 1 and found["drift"] == {}
    assert (found["images"], found["captions"]) == (9, 9)
    found = measure_tower(one, images, ids, range(9), tower(1))
    assert set(found["drift"]) == set(READ_POINTS)
    assert set(found["drift"]["pooled"]) == {"cosine", "one_minus_cosine", "relative_norm"}


# ---- shares near 0 and 1


def test_a_share_of_few_misses_has_wilsons_interval():
    samples = torch.full((1000,), 1.0, dtype=torch.float64)
    found = share_interval(1.0, samples, 30)
    assert found.low == pytest.approx(30 / (30 + 1.959964**2)) and found.high == 1.0  # n / (n + z²)
    assert share_interval(0.0, samples * 0, 30).high == pytest.approx(1.959964**2 / (30 + 1.959964**2))


def test_a_share_of_many_misses_has_the_bootstraps():
    samples = torch.linspace(0.4, 0.6, 1001, dtype=torch.float64)
    assert share_interval(0.5, samples, 100) == interval(0.5, samples)


@pytest.mark.parametrize(("share", "pictures"), [(0.97, 30), (0.98, 100), (0.9, 100), (0.5, 100)])
def test_intervals_of_shares_hold_the_true_value(share, pictures):
    generator = torch.Generator().manual_seed(0)
    held = 0
    for seed in range(200):
        hits = (torch.rand(pictures, generator=generator, dtype=torch.float64) < share).double()
        found = bootstrap.share(hits, seed)
        held += found.low <= share <= found.high
    assert held >= 0.9 * 200
