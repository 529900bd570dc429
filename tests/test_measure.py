"""Retrieval against a full sort with deterministic ties, and drift against loops."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from gmp import READ_POINTS
from gmp.clip import TextConfig, TextTower
from gmp.measure import drift, measure_tower, retrieval, text_features

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
