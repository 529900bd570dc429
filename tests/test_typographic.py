"""Words on pictures: where and how they are written, which words, and who wins, a reader or a looker."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gmp.data.captions import CaptionReport, Index, Picture, read_index
from gmp.data.classes import Classes, read_classes
from gmp.data.images import load_picture, preprocess
from gmp.errors import InputError
from gmp.evaluate import SCHEMA, document
from gmp.events import finish
from gmp.tokenizer import tokenizer_for
from gmp.typographic import (
    HEIGHT,
    STYLES,
    WIDTH,
    Attacked,
    Plan,
    Target,
    attack,
    draw_attack,
    plan_captions,
    plan_classes,
    write_word,
)  # fmt: skip
from gmp.world.models import load_original
from gmp.world.write import write_world
from tests.small import small_clip, tokenize


def grey(width=300, height=300, value=128):
    return Image.new("RGB", (width, height), (value,) * 3)


def box(image):
    """(left, top, right, bottom) of what is not grey."""
    rows, columns = np.nonzero((np.asarray(image) != 128).any(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


# ---- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("word", ["fox", "alarm clock", "rapid transit railway station", "supercalifragilistic"])
def test_a_word_lies_within_the_square_and_is_no_larger_than_it_may_be(word, style):
    for key in "abcdefgh":
        written = write_word(grey(500, 300), word, key, style)
        assert written.size == (300, 300)
        left, top, right, bottom = box(written)
        assert 0 <= left < right <= 300 and 0 <= top < bottom <= 300
        assert 0.4 * WIDTH * 300 < right - left <= WIDTH * 300 * 1.2
        assert bottom - top <= HEIGHT * 300 * 1.35


def test_the_place_depends_on_the_key_alone():
    places = [box(write_word(grey(), "fox", f"key {n}")) for n in range(40)]
    assert places == [box(write_word(grey(), "fox", f"key {n}")) for n in range(40)]
    assert len(set(places)) > 30
    assert min(left for left, *_ in places) < 40 and max(right for _, _, right, _ in places) > 260
    assert min(top for _, top, *_ in places) < 40 and max(bottom for *_, bottom in places) > 260


def test_a_box_is_black_on_white_and_an_outline_white_on_black():
    left, top, right, bottom = box(write_word(grey(), "fox", "a", "box"))
    label = np.asarray(write_word(grey(), "fox", "a", "box"))[top:bottom, left:right]
    assert (label[0] == 0).all() and (label[2, 2:-2] == 255).all()
    assert (label == 128).all(axis=2).mean() < 0.01  # in the edges of letters
    assert 0.05 < (label < 64).mean() < 0.5
    outline = np.asarray(write_word(grey(), "fox", "a", "outline"))
    assert (outline == 255).all(axis=2).sum() > 500 and (outline == 0).all(axis=2).sum() > 500
    assert (outline == 128).all(axis=2).mean() > 0.8


def test_other_words_are_written_otherwise():
    pictures = [np.asarray(write_word(grey(), word, "a")) for word in ("fox", "fix", "fox")]
    assert (pictures[0] == pictures[2]).all() and (pictures[0] != pictures[1]).any()


@pytest.mark.parametrize("side", [1, 8, 64])
def test_small_pictures_are_written_on_as_far_as_they_reach(side):
    written = write_word(grey(side, 2 * side), "supercalifragilistic", "a")
    assert written.size == (side, side)


def test_all_that_is_written_is_left_by_preprocessing():
    """A wide picture is cropped to its middle: the word lies there."""
    wide = np.asarray(write_word(grey(900, 300), "fox", "a"))
    whole = preprocess(Image.fromarray(wide), 300)
    assert whole.shape == (3, 300, 300)
    assert ((whole - preprocess(grey(), 300)).abs() > 0.1).float().mean() > 0.02


def test_a_style_that_is_none_is_refused():
    with pytest.raises(InputError, match="no style 'neon'; take box or outline"):
        write_word(grey(), "fox", "a", "neon")


# ---- words ----------------------------------------------------------------------------------------------------------


def classes(*names, each=30):
    pictures = tuple(f"{label}/{n}.png" for label in range(len(names)) for n in range(each))
    return Classes(Path("root"), names, pictures, tuple(i // each for i in range(len(pictures))))


def test_every_wrong_class_is_written_about_equally_often_and_the_right_one_never():
    plan = plan_classes(classes("fox", "hen", "cow", "cat", each=300))
    assert len(plan.targets) == 1000 and plan.without == 0
    assert all(target.word == target.false != target.true for target in plan.targets)
    counts = Counter((target.true, target.word) for target in plan.targets)
    assert len(counts) == 12 and 50 < min(counts.values()) and max(counts.values()) < 120


def test_which_pictures_and_words_depends_on_paths_and_seed_alone():
    whole = {target.picture: target for target in plan_classes(classes("fox", "hen", "cow"), most=None).targets}
    part = plan_classes(classes("fox", "hen", "cow"), most=20)
    assert len(whole) == 90 and len(part.targets) == 20
    assert all(whole[target.picture] == target for target in part.targets)
    assert part == plan_classes(classes("fox", "hen", "cow"), most=20)
    assert part != plan_classes(classes("fox", "hen", "cow"), most=20, seed=1)


def test_names_are_written_without_accents_and_never_in_letters_that_the_font_lacks():
    plan = plan_classes(classes("café", "лиса", "hen"))
    assert {(target.word, target.false) for target in plan.targets} == {("cafe", "café"), ("hen", "hen")}
    assert {target.true for target in plan.targets} == {"café", "лиса", "hen"}
    plan = plan_classes(classes("лиса", "hen", each=5))
    assert {target.true for target in plan.targets} == {"лиса"} and plan.without == 5
    with pytest.raises(InputError, match="none is in Latin letters"):
        plan_classes(classes("лиса", "кот"))


def index_of(*captions):
    pictures = tuple(Picture(f"{i}.png", tuple(own)) for i, own in enumerate(captions))
    return Index(Path("root"), pictures, CaptionReport())


def test_the_word_is_of_the_other_caption_alone_and_the_rarest_there():
    captions = [["a red fox in the snow"], ["a red hen in the grass"], ["a red cow in the grass and a barn", "a cow"]]
    plan = plan_captions(index_of(*captions))
    rarest = {captions[0][0]: {"snow"}, captions[1][0]: {"hen"}, captions[2][0]: {"barn", "cow", "and"}}
    for target, own in zip(plan.targets, captions, strict=True):
        assert target.true == own[0] and target.false != own[0]
        assert target.word in target.false.split() and target.word not in " ".join(own).split()
        assert target.word in rarest[target.false]
    assert any(target.word == "barn" for target in plan.targets if target.false == captions[2][0])


def test_pictures_without_a_word_are_counted():
    plan = plan_captions(index_of(["a fox"], ["a fox "], ["a hen and a fox"]))
    assert {target.picture for target in plan.targets} == {"0.png", "1.png"} and plan.without == 1
    assert {target.word for target in plan.targets} == {"and"} or {target.word for target in plan.targets} == {"hen"}
    with pytest.raises(InputError, match="on any of the 2 pictures"):
        plan_captions(index_of(["лиса"], ["кот"]))


# ---- who wins -------------------------------------------------------------------------------------------------------


class Looker(nn.Module):
    """A vision tower that sees a picture's colour; a reader takes a white label for the other class's name."""

    def __init__(self, reads: bool):
        super().__init__()
        self.proj = nn.Parameter(torch.zeros(3, 2))
        self.reads = reads
        self.vision_config = small_clip().visual.vision_config

    def forward(self, pixels):
        red = pixels[:, 0].flatten(1).median(dim=1).values > pixels[:, 2].flatten(1).median(dim=1).values
        labelled = (pixels > 1.5).all(dim=1).float().flatten(1).mean(dim=1) > 0.02
        return nn.functional.one_hot((red ^ (labelled & self.reads)).long(), 2).float()


class Names:
    """A text tower for the classes "blue" and "red", told by their first letter."""

    positional_embedding = torch.zeros(1)
    text_projection = torch.zeros(1, 2)

    def encode_text(self, ids):
        return nn.functional.one_hot(ids[:, 0], 2).float()


def names(prompts):
    return SimpleNamespace(ids=torch.tensor([[int("red" in prompt)] * 3 for prompt in prompts]))


@pytest.fixture
def colours(tmp_path):
    for name, colour in (("red", (150, 20, 20)), ("blue", (20, 20, 150))):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (90 + number, 80), colour).save(tmp_path / "pictures" / name / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("reads", [False, True])
def test_who_reads_is_told_from_who_looks(colours, reads):
    plan = plan_classes(read_classes(colours / "pictures"))
    events = []
    drawn = finish(draw_attack(Looker(reads), plan, colours / str(reads), batch=5), events.append)
    assert [event["done"] for event in events if event["stage"] == "write on pictures"] == [5, 10, 12]
    found = finish(attack(Names(), names, drawn))
    assert found.pictures == 12 and found.clean_accuracy.value == 1
    assert found.attacked_accuracy.value == (0 if reads else 1)
    assert found.word_wins.value == found.turned.value == (1 if reads else 0)
    written = document("measurement", None, None, None, typographic=found.as_json())
    jsonschema.validate(json.loads(json.dumps(written, allow_nan=False)), json.loads(SCHEMA.read_text()))


def test_what_does_not_decode_is_listed(colours):
    (colours / "pictures" / "red" / "3.png").write_bytes(b"no picture")
    plan = plan_classes(read_classes(colours / "pictures"))
    found = finish(attack(Names(), names, finish(draw_attack(Looker(True), plan, colours / "cache"))))
    assert found.pictures == 11 and list(found.broken) == ["red/3.png"]
    for path in colours.rglob("*.png"):
        path.write_bytes(b"none")
    with pytest.raises(InputError, match="None of the 12 pictures"):
        finish(draw_attack(Looker(True), plan, colours / "cache"))


def test_shares_are_those_of_a_loop_over_pictures():
    generator = torch.Generator().manual_seed(0)
    clip = small_clip()
    texts = [f"text {i}" for i in range(30)]
    targets = tuple(Target(f"{i}.png", "word", texts[i % 30], texts[(i * 7 + 1) % 30]) for i in range(200))
    targets = tuple(target for target in targets if target.true != target.false)
    with torch.no_grad():
        features = dict(zip(texts, nn.functional.normalize(clip(tokenize(texts).ids).projected, dim=-1), strict=True))
    clean, written = torch.randn(2, len(targets), 16, generator=generator)
    clean += torch.stack([2 * features[target.true] for target in targets])
    found = finish(attack(clip, tokenize, Attacked(Plan(Path(), "captions", targets), clean, written, "box", {})))
    right = [(a @ features[t.true] > a @ features[t.false]).item() for a, t in zip(clean, targets, strict=True)]
    wins = [(a @ features[t.true] < a @ features[t.false]).item() for a, t in zip(written, targets, strict=True)]
    assert found.clean_accuracy.value == pytest.approx(sum(right) / len(right)) and 0.6 < found.clean_accuracy.value < 1
    assert found.word_wins.value == pytest.approx(sum(wins) / len(wins))
    assert found.attacked_accuracy.value == pytest.approx(1 - found.word_wins.value)
    turned = sum(a and b for a, b in zip(right, wins, strict=True)) / sum(right)
    assert found.turned.value == pytest.approx(turned)
    assert found.word_wins.low < found.word_wins.value < found.word_wins.high


def test_an_encoder_that_is_no_number_wins_nothing():
    clip = small_clip()
    with torch.no_grad():
        clip.text_projection.fill_(math.nan)
    plan = Plan(Path(), "captions", (Target("0.png", "word", "a", "b"),) * 3)
    found = finish(attack(clip, tokenize, Attacked(plan, torch.ones(3, 16), torch.ones(3, 16), "box", {})))
    assert found.clean_accuracy.value == found.attacked_accuracy.value == found.word_wins.value == 0
    assert found.turned is None
    written = document("measurement", None, None, None, typographic=found.as_json())
    jsonschema.validate(json.loads(json.dumps(written, allow_nan=False)), json.loads(SCHEMA.read_text()))


def test_written_pictures_are_those_that_write_word_draws(colours):
    clip = small_clip()
    plan = plan_classes(read_classes(colours / "pictures"), most=3)
    drawn = finish(draw_attack(clip.visual, plan, colours / "cache", style="outline", batch=2))
    assert drawn.plan.targets == plan.targets and drawn.style == "outline"
    for target, clean, written in zip(plan.targets, drawn.clean, drawn.written, strict=True):
        path = colours / "pictures" / target.picture
        key = hashlib.sha256(path.read_bytes()).hexdigest()
        image = load_picture(path)
        with torch.no_grad():
            expected = clip.visual(preprocess(write_word(image, target.word, key, "outline"), 32)[None])[0]
            bare = clip.visual(preprocess(image, 32)[None])[0]
        assert torch.allclose(written, expected, atol=1e-5) and torch.allclose(clean, bare, rtol=2**-10)  # fp16
        assert not torch.allclose(written, clean, atol=1e-2)


def test_the_worlds_clip_cannot_read_and_loses_only_what_is_covered(tmp_path):
    original = load_original()
    finish(write_world(tmp_path / "world", 80, 0, "held_out"))
    index = read_index(tmp_path / "world", tmp_path / "world" / "captions.json")
    drawn = finish(draw_attack(original.visual, plan_captions(index), tmp_path / "cache", style="outline"))
    found = finish(attack(original, tokenizer_for(77, "clip_l"), drawn))
    assert found.kind == "captions" and found.pictures == 80
    assert found.clean_accuracy.value > 0.97 and found.attacked_accuracy.value > 0.85
    assert found.attacked_accuracy.value < found.clean_accuracy.value
