"""Geometry of pictures and captions, and calibration, against the formulas of their papers written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gmp import alignment as module
from gmp.alignment import Calibration, alignment, best_scale, calibration, modality_gap, reliability, uniformity

COUNTS = (1, 3, 2)


def data(pictures=37, seed=0, noise=1.5):
    """Features of any length that half agree; picture i has 1, 3 or 2 captions."""
    generator = torch.Generator().manual_seed(seed)
    counts = [COUNTS[i % 3] for i in range(pictures)]
    owners = [i for i, count in enumerate(counts) for _ in range(count)]
    images = torch.randn(pictures, 12, generator=generator)
    texts = 3 * images[owners] + 3 * noise * torch.randn(len(owners), 12, generator=generator) + 1
    return images, texts, counts, owners


def unit(rows):
    rows = rows.double().numpy()
    return rows / np.sqrt((rows**2).sum(axis=1, keepdims=True))


def naive_uniformity(rows):
    """Wang and Isola 2020, section 4.1: log E exp(-t |x - y|²), t = 2, over pairs, as their `lunif` takes it."""
    found = [math.exp(-2 * ((x - y) ** 2).sum()) for i, x in enumerate(rows) for y in rows[:i]]
    return math.log(sum(found) / len(found))


# ---- geometry -------------------------------------------------------------------------------------------------------


def test_every_number_is_that_of_its_formula():
    images, texts, counts, owners = data()
    found = alignment(images, texts, counts)
    pictures, captions = unit(images), unit(texts)
    firsts = [owners.index(i) for i in range(len(images))]
    gap = np.linalg.norm(pictures.mean(axis=0) - captions.mean(axis=0))
    distances = [((captions[j] - pictures[i]) ** 2).sum() for j, i in enumerate(owners)]
    assert found.modality_gap == pytest.approx(gap, rel=1e-12)
    assert found.matched_cosine == pytest.approx(np.mean([captions[j] @ pictures[i] for j, i in enumerate(owners)]))
    assert found.alignment == pytest.approx(np.mean(distances), rel=1e-12)
    assert found.uniformity_images == pytest.approx(naive_uniformity(pictures), rel=1e-12)
    assert found.uniformity_texts == pytest.approx(naive_uniformity(captions[firsts]), rel=1e-12)
    assert found.uniformity_texts != pytest.approx(naive_uniformity(captions), rel=1e-4)
    assert (found.images, found.captions) == (37, len(owners))


@pytest.mark.parametrize("chunk", [1, 5, 37, 100])
def test_chunks_change_nothing(chunk):
    images, texts, counts, _ = data()
    assert uniformity(images, chunk) == pytest.approx(uniformity(images), rel=1e-12)
    assert modality_gap(images, texts, chunk) == pytest.approx(modality_gap(images, texts), rel=1e-12)


def test_two_points_that_are_opposite():
    one, other = torch.tensor([[2.0, 0.0]] * 3), torch.tensor([[-5.0, 0.0]] * 3)
    found = alignment(one, other, [1, 1, 1])
    assert (found.modality_gap, found.matched_cosine, found.alignment) == pytest.approx((2, -1, 4))
    assert found.uniformity_images == found.uniformity_texts == pytest.approx(0)


def test_a_common_turn_changes_nothing_and_a_shift_of_one_kind_opens_the_gap():
    images, texts, counts, _ = data()
    turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1))).Q
    plain, turned = alignment(images, texts, counts), alignment(images @ turn, texts @ turn, counts)
    assert vars(turned) == pytest.approx(vars(plain), rel=1e-5)
    assert alignment(images + 2, texts - 2, counts).modality_gap > plain.modality_gap + 0.5


def test_uniformity_of_many_pictures_is_taken_of_an_even_sample(monkeypatch):
    images, texts, counts, owners = data()
    monkeypatch.setattr(module, "SAMPLE", 10)
    found = alignment(images, texts, counts)
    chosen = [i * 37 // 10 for i in range(10)]
    assert found.uniformity_images == pytest.approx(naive_uniformity(unit(images)[chosen]), rel=1e-12)
    firsts = [owners.index(i) for i in chosen]
    assert found.uniformity_texts == pytest.approx(naive_uniformity(unit(texts)[firsts]), rel=1e-12)
    assert found.modality_gap == pytest.approx(modality_gap(images, texts), rel=1e-12)


def test_one_picture_has_no_uniformity():
    found = alignment(torch.ones(1, 4), torch.ones(2, 4), [2])
    assert math.isnan(found.uniformity_images) and found.matched_cosine == pytest.approx(1)


# ---- calibration ----------------------------------------------------------------------------------------------------


def softmax(row):
    row = np.exp(row - row.max())
    return row / row.sum()


def naive_reliability(predictions):
    """Guo et al. 2017, equation 3: bins ((m - 1) / 15, m / 15], |accuracy - confidence| by their share."""
    error = 0.0
    for m in range(15):
        inside = [(p, right) for p, right in predictions if m / 15 < p <= (m + 1) / 15]
        if inside:
            error += (
                len(inside) / len(predictions) * abs(np.mean([r for _, r in inside]) - np.mean([p for p, _ in inside]))
            )
    return error


def predictions(logits):
    """(confidence, right) of every row of every group."""
    return [(softmax(row).max(), float(row.argmax() == i)) for group in logits.numpy() for i, row in enumerate(group)]


def naive_groups(images, texts, counts, candidates):
    owners = [i for i, count in enumerate(counts) for _ in range(count)]
    pictures, captions = unit(images), unit(texts)
    groups = len(images) // candidates
    found = []
    for g in range(groups):
        members = [g + k * groups for k in range(candidates)]
        found.append([[captions[owners.index(i)] @ pictures[j] for j in members] for i in members])
    return torch.tensor(np.array(found))


@pytest.mark.parametrize("candidates", [5, 12, 100])
def test_calibration_is_that_of_its_formula(candidates):
    images, texts, counts, _ = data()
    found = calibration(images, texts, counts, math.log(20.0), candidates)
    cosines = naive_groups(images, texts, counts, min(candidates, 37))
    assert found.scale == pytest.approx(20) and found.candidates == min(candidates, 37)
    assert found.images == {5: 35, 12: 36, 100: 37}[candidates]
    for name, logits in (("text_to_image", cosines * 20), ("image_to_text", cosines.transpose(1, 2) * 20)):
        one, wanted = getattr(found, name), predictions(logits)
        assert one.error == pytest.approx(naive_reliability(wanted), rel=1e-9)
        assert one.accuracy == pytest.approx(np.mean([right for _, right in wanted]), rel=1e-12)
        assert one.confidence == pytest.approx(np.mean([p for p, _ in wanted]), rel=1e-9)
        assert sum(b.count for b in one.bins) == found.images
        for b in one.bins:
            inside = [(p, right) for p, right in wanted if b.low < p <= b.high]
            assert b.count == len(inside)
            if inside:
                assert (b.confidence, b.accuracy) == pytest.approx(tuple(np.mean(inside, axis=0)), rel=1e-9)
            else:
                assert math.isnan(b.confidence) and math.isnan(b.accuracy)


def negative_log_likelihood(cosines, scale):
    """Of CLIP's loss: both directions."""
    logits, right = cosines * scale, torch.arange(cosines.shape[-1]).expand(len(cosines), -1)
    both = (torch.nn.functional.cross_entropy(one.flatten(0, 1), right.flatten()) for one in (logits, logits.mT))
    return sum(both).item() / 2


def test_the_best_scale_is_that_of_a_search():
    images, texts, counts, _ = data()
    cosines = naive_groups(images, texts, counts, 12)
    scales = np.exp(np.linspace(0, math.log(100), 2000))
    searched = min(scales, key=lambda scale: negative_log_likelihood(cosines, scale))
    found = calibration(images, texts, counts, math.log(20.0), 12)
    assert 2 < searched < 50
    assert found.best_scale == pytest.approx(searched, rel=0.005)
    assert negative_log_likelihood(cosines, found.best_scale) <= negative_log_likelihood(cosines, searched)
    for name, logits in (("text_to_image", cosines), ("image_to_text", cosines.mT)):
        expected = naive_reliability(predictions(logits * found.best_scale))
        assert found.best_error[name] == pytest.approx(expected, rel=1e-6)


def test_a_scale_that_is_too_high_is_too_sure():
    images, texts, counts, _ = data(400)
    found = calibration(images, texts, counts, math.log(1000.0))
    assert found.text_to_image.confidence > found.text_to_image.accuracy + 0.1
    assert found.best_scale < 100
    for name in ("text_to_image", "image_to_text"):
        assert found.best_error[name] < getattr(found, name).error / 2


def test_choices_drawn_from_their_own_probabilities_are_calibrated():
    """20,000 rows whose right choice is drawn with the softmax's probabilities; it is then moved to its row's place."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2000, 10, 10, generator=generator, dtype=torch.float64)
    drawn = torch.multinomial((4 * scores).softmax(dim=-1).flatten(0, 1), 1, generator=generator).view(2000, 10)
    own = torch.arange(10).expand(2000, 10)
    a, b = (scores.gather(2, place[..., None]) for place in (own, drawn))
    moved = scores.scatter(2, drawn[..., None], a).scatter(2, own[..., None], b)
    assert reliability(4 * moved).error < 0.015
    assert reliability(40 * moved).error > 0.1


def test_without_a_mistake_the_best_scale_is_the_largest():
    cosines = torch.eye(6, dtype=torch.float64)[None]
    assert best_scale(cosines) == module.LARGEST_SCALE


def test_with_nothing_but_mistakes_the_best_scale_is_none():
    cosines = torch.eye(6, dtype=torch.float64)[None].roll(1, dims=1)
    assert best_scale(cosines) == pytest.approx(0, abs=1e-8)


def test_a_collapsed_encoder_is_as_sure_as_chance():
    found = calibration(torch.ones(20, 4), torch.ones(20, 4), [1] * 20, math.log(100.0))
    assert isinstance(found, Calibration)
    assert found.text_to_image.accuracy == found.text_to_image.confidence == pytest.approx(1 / 20)
    assert found.text_to_image.error == pytest.approx(0, abs=1e-9)
    assert math.isnan(found.best_scale)  # no scale is better than another


def test_features_that_are_no_numbers_have_no_calibration():
    images, texts, counts, _ = data()
    images[3] = math.nan
    found = calibration(images, texts, counts, 3.0)
    assert math.isnan(found.text_to_image.error) and math.isnan(found.best_scale)
    assert sum(b.count for b in found.text_to_image.bins) == 37


def test_one_picture_is_no_choice():
    with pytest.raises(ValueError, match="two pictures"):
        calibration(torch.ones(1, 4), torch.ones(1, 4), [1], 3.0)
