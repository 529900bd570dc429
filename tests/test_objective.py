"""The trained objective on held-out pairs, and what two anchors do in the small world."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from gmp.config import Anchor
from gmp.contrastive import contrastive
from gmp.data.images import normalize
from gmp.errors import InputError
from gmp.join import join
from gmp.layouts import read_text, read_vision
from gmp.losses import info_nce, seed_loss, siglip
from gmp.measure import drift, text_features
from gmp.objective import held_out_loss
from gmp.pairs import Pairs
from gmp.step import concept_batch
from gmp.tokenizer import Tokenizer
from gmp.trainer import begin, set_up, train
from gmp.world.models import ASSETS, ORIGINAL, RUINED
from gmp.world.ruin import narrow
from gmp.world.scenes import all_scenes, draw_scenes
from gmp.world.train import CAPTIONS, draw, held_out_retrieval
from tests.small import small_clip
from tests.test_step import CPU, TEXT_ANCHORS, captions, naive_anchor, settings, teachers

PICTURES = 20


def held_out(config, **more):
    features = torch.randn(PICTURES, 16, generator=torch.Generator().manual_seed(1))
    return held_out_loss(small_clip(), features, captions(PICTURES, 0), teachers(), config, **more)


@torch.no_grad()
def pairs_of(rows):
    features = torch.randn(PICTURES, 16, generator=torch.Generator().manual_seed(1))
    return features[rows], text_features(small_clip(), captions(PICTURES, 0))[rows], small_clip().logit_scale


EVERY = slice(None)


@pytest.mark.parametrize("more", [{}, {"negatives": "pass"}, {"negatives": "all"}])
def test_infonce_sees_all_held_out_pairs_at_once(more):
    found = held_out(settings(batch=4, accumulate=2, smoothing=0.1, **more))
    assert found["contrastive"] == pytest.approx(info_nce(*pairs_of(EVERY)).item(), rel=1e-5)
    assert found["loss"] == found["contrastive"]


def test_infonce_holds_no_matrix_of_all_held_out_pairs(monkeypatch):
    asked = []
    monkeypatch.setattr("gmp.step.contrastive", lambda *x, **more: asked.append(len(x[0])) or contrastive(*x, **more))
    held_out(settings(entropy=0.1, smoothing=0.1))
    assert asked == [PICTURES]


def test_a_fixed_temperature_holds_for_held_out_pairs_too():
    images, texts, _ = pairs_of(EVERY)
    expected = info_nce(images, texts, torch.tensor(-math.log(0.3))).item()
    assert held_out(settings(temperature=0.3))["contrastive"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["siglip", "seed"])
@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"batch": 4, "accumulate": 2}, [(0, 7), (7, 14), (14, 20)]),
        ({"batch": 10, "accumulate": 3, "negatives": "pass"}, [(0, 10), (10, 20)]),
        ({"batch": 10, "accumulate": 3}, [(0, 20)]),
    ],
)
def test_losses_that_depend_on_their_number_of_pairs_see_about_as_many_as_when_they_train(loss, more, parts):
    config = settings(loss=loss, **more)
    parts = [slice(*part) for part in parts]
    if loss == "siglip":
        values = [siglip(*pairs_of(part)).item() for part in parts]
    else:
        scale = torch.tensor(-math.log(0.07))
        values = [seed_loss(*pairs_of(part)[:2], scale).item() for part in parts]
        assert held_out(dataclasses.replace(config, smoothing=0.1, entropy=0.1)) == held_out(config)
    expected = sum((part.stop - part.start) * value for part, value in zip(parts, values, strict=True)) / PICTURES
    assert held_out(config)["contrastive"] == pytest.approx(expected, rel=1e-5)


def test_anchors_are_held_to_captions_of_both_sources():
    """Those that move have their first weight, so that a step is comparable with another."""
    clip, others, concepts = small_clip(), teachers(), captions(90, 4)
    config = settings(anchors=TEXT_ANCHORS)
    found = held_out(config, batch=15, concepts=concepts)
    read = {"dataset": captions(PICTURES, 0)[:15], "concepts": concept_batch(concepts, 15, 0, 0)}
    for one in TEXT_ANCHORS:
        with torch.no_grad():
            distance = naive_anchor(one, clip, others[one.teacher], read[one.captions]).item()
        assert found[str(one)] == pytest.approx(one.weight * distance, rel=1e-5)
    assert list(found) == ["contrastive", *map(str, TEXT_ANCHORS), "loss"]
    assert found["loss"] == pytest.approx(sum(value for name, value in found.items() if name != "loss"))
    assert found == held_out(config, batch=15, concepts=concepts)


def test_more_captions_than_one_pass_takes_are_averaged():
    config, concepts = settings(anchors=TEXT_ANCHORS[2:]), captions(90, 4)
    with torch.no_grad():
        distance = naive_anchor(TEXT_ANCHORS[2], small_clip(), teachers()["original"], concepts).item()
    found = held_out(config, concepts=concepts)[str(TEXT_ANCHORS[2])]
    assert found == pytest.approx(TEXT_ANCHORS[2].weight * distance, rel=1e-5)


@pytest.mark.parametrize("concepts", [None, captions(3, 0)[:0]])
def test_an_anchor_without_its_captions_is_refused(concepts):
    with pytest.raises(InputError, match="captions of concepts, and none are given"):
        held_out(settings(anchors=TEXT_ANCHORS), concepts=concepts)


@pytest.mark.parametrize("loss", ["infonce", "siglip", "seed"])
def test_a_broken_encoder_is_never_the_best(loss):
    features = torch.full((PICTURES, 16), math.nan)
    found = held_out_loss(small_clip(), features, captions(PICTURES, 0), teachers(), settings(loss=loss))
    assert found["loss"] == math.inf


# What two anchors do: the shipped world, whose encoder was ruined on red and blue circles and squares


@pytest.fixture(scope="module")
def world():
    text, vision, whole = read_text(ASSETS / RUINED), read_vision(ASSETS / ORIGINAL), read_text(ASSETS / ORIGINAL)
    broken, original = (join(each, vision, whole).build().requires_grad_(False) for each in (text, whole))
    pixels, told = draw(draw_scenes(800, 1))
    features = torch.cat([original.encode_image(normalize(chunk)) for chunk in pixels.split(200)])
    pairs = Pairs(Tokenizer()(told).ids, (CAPTIONS,) * len(pixels), features, None)
    concepts = [caption for scene in all_scenes("train") if narrow(scene) for caption in scene.captions()]
    return pairs, original, broken, Tokenizer()(concepts).ids


def test_a_second_anchor_keeps_what_was_taught_at_equal_recall(world):
    """Held to the original on general captions alone, the encoder forgets how its diffusion model was taught to read
    the concepts; held to the broken one on captions of the concepts as well, it keeps that, for other captions of them
    too, and finds pictures as well."""
    pairs, original, broken, concepts = world
    general = Anchor("original", "penultimate", 0.3)
    pixels, told = draw(draw_scenes(300, 2, "held_out"))
    ids, half = Tokenizer()(told).ids, len(concepts) // 2
    found = {}
    for anchors in ((general,), (general, Anchor("broken", "penultimate", 0.3, "concepts"))):
        config = settings(batch=80, epochs=5, lr=3e-3, anchors=anchors, anchor_captions=24)
        clip = copy.deepcopy(broken).requires_grad_(True)
        training = begin(clip, set_up(clip, config, CPU), pairs.counts, config, CPU)
        both = {"original": original, "broken": broken}
        list(train(training, pairs, both, config, CPU, statistics=False, concepts=concepts[:half]))
        found[len(anchors)] = (
            held_out_retrieval(clip, pixels, ids).recall_at_1,
            drift(clip, broken, concepts[half:])["penultimate"].cosine,
            drift(clip, original, ids[:200])["penultimate"].cosine,
        )
    ruined = held_out_retrieval(broken, pixels, ids).recall_at_1
    (recall, taught, like_original), (recall_of_two, taught_of_two, like_original_of_two) = found[1], found[2]
    assert recall > 0.85 > 0.3 > ruined
    assert abs(recall - recall_of_two) < 0.05
    assert taught < 0.7 and taught_of_two > taught + 0.1
    assert like_original > 0.9 and like_original_of_two > 0.85
