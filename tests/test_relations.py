"""False captions sentence by sentence, the probe against naive formulas, and the small world."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import pytest
import torch

from gmp.data.captions import CaptionReport, Index, Picture, read_index
from gmp.evaluate import SCHEMA, document
from gmp.events import finish
from gmp.features import embed_index
from gmp.join import join
from gmp.layouts import read_text, read_vision
from gmp.relations import KINDS, false_captions, relations, swap_colours, swap_counts, swap_sides, swap_sizes, wins
from gmp.tokenizer import tokenizer_for
from gmp.world.models import ASSETS, ORIGINAL, RUINED, load_original
from gmp.world.scenes import draw_scenes
from gmp.world.write import write_world
from tests.small import small_clip, tokenize


@pytest.mark.parametrize(
    "caption, false",
    [
        ("a cat left of a dog", "a cat right of a dog"),
        ("a cat to the right of a dog", "a cat to the left of a dog"),
        ("A cat on its left side", "A cat on its right side"),
        ("Left of the house", "Right of the house"),
        ("a bird above a tree", "a bird below a tree"),
        ("BELOW the bridge", "ABOVE the bridge"),
        ("a cup on top of a book", "a cup under a book"),
        ("a cup on  top\tof a book", "a cup under a book"),
        ("On top of the hill", "Under the hill"),
        ("a cat under a chair", "a cat on top of a chair"),
        ("a cat in front of a sofa", "a cat behind a sofa"),
        ("Behind the door", "In front of the door"),
        ("above and to the left of it", "below and to the right of it"),
        ("a man in the top left corner, a dog behind him", "a man in the top right corner, a dog in front of him"),
        ("a left-hand drive", "a right-hand drive"),
    ],
)
def test_sides_are_turned_round(caption, false):
    assert swap_sides(caption) == false


@pytest.mark.parametrize(
    "caption",
    [
        "a man left the room", "leftovers on a plate", "right now", "a bright light", "people holding human rights",
        "thunder and an underdog", "a wonderful view", "trees on the left and right", "left and right of the road",
        "clouds above and below", "people in front of and behind the car", "a man on top", "in front", "", "a cat",
    ],
)  # fmt: skip
def test_no_side_is_found_where_there_is_none(caption):
    assert swap_sides(caption) is None


@pytest.mark.parametrize(
    "caption, false",
    [
        ("a red ball on a blue box", "a blue ball on a red box"),
        ("A Red ball, a blue BOX", "A Blue ball, a red BOX"),
        ("Red shirt and BLUE jeans", "Blue shirt and RED jeans"),
        ("a red ball, a red box and a green hat", "a green ball, a green box and a red hat"),
        ("a black and white cat on a red sofa", "a red and white cat on a black sofa"),
        ("a black-and-white dog near a brown horse", "a brown-and-white dog near a black horse"),
        ("a white dog on a black and white rug", "a black dog on a white and black rug"),
        ("a red cup left of a blue cup", "a blue cup left of a red cup"),
        ("a red car and a blue van", "a blue car and a red van"),
        ("a golden dog, green grass", "a green dog, golden grass"),
        ("An orange cat on a red rug", "A red cat on an orange rug"),
    ],
)
def test_colours_of_two_things_are_exchanged(caption, false):
    assert swap_colours(caption) == false


@pytest.mark.parametrize(
    "caption",
    [
        "a red ball", "a red ball and a red box", "a red and white bus", "black and white photo of a man",
        "a red, white and blue flag", "red/white stripes", "a red cup and a blue cup", "a red and a blue cup",
        "a red cup and a blue cup on a table", "a tired man covered in greenery", "red", "",
        "a red and white bus beside a white and red car", "A Red cup, a blue cup",
    ],
)  # fmt: skip
def test_no_colours_are_exchanged_where_that_would_say_the_same(caption):
    assert swap_colours(caption) is None


@pytest.mark.parametrize(
    "caption, false",
    [
        ("two dogs", "three dogs"),
        ("Three dogs and two cats", "Two dogs and three cats"),
        ("FIVE cars", "FOUR cars"),
        ("2 dogs, 5 cats.", "3 dogs, 4 cats."),
        ("10 people (11 dogs)", "11 people (10 dogs)"),
        ("a group of six", "a group of seven"),
        ("two 3D prints", "three 3D prints"),
    ],
)
def test_counts_become_their_neighbours(caption, false):
    assert swap_counts(caption) == false


@pytest.mark.parametrize(
    "caption",
    [
        "one dog", "a dog", "3D art", "2.5 metres", "1/2 cup", "at 10:30", "a 3-year-old", "#2", "the 2nd", "5% off",
        "in 2010", "1,000 people", "22 dogs", "v2", "tenth", "someone often", "two dogs and three dogs", "$5", "2,5",
    ],
)  # fmt: skip
def test_no_count_is_found_where_there_is_none(caption):
    assert swap_counts(caption) is None


@pytest.mark.parametrize(
    "caption, false",
    [
        ("a small dog", "a large dog"),
        ("A Big dog and a little cat", "A Small dog and a big cat"),
        ("a TINY house beside a huge tree", "a HUGE house beside a tiny tree"),
        ("a tall man on a narrow road", "a short man on a wide road"),
        ("a small red ball and a large blue ball", "a large red ball and a small blue ball"),
    ],
)
def test_sizes_become_their_opposites(caption, false):
    assert swap_sizes(caption) == false


@pytest.mark.parametrize("caption", ["a dog", "a smallish dog", "enlarged", "a small and a large dog", "a belong", ""])
def test_no_size_is_found_where_there_is_none(caption):
    assert swap_sizes(caption) is None


def test_the_worlds_captions_have_sides_colours_and_sizes():
    for scene, _ in draw_scenes(60, 0):
        for caption in scene.captions():
            words = caption.split()
            sizes = {"small": "large", "large": "small"}
            assert swap_sizes(caption) == " ".join(sizes.get(word, word) for word in words)
            sides = {"left": "right", "right": "left", "above": "below", "below": "above"}
            assert swap_sides(caption) == " ".join(sides.get(word, word) for word in words)
            a, b = scene.first.colour, scene.second.colour
            colours = {a: b, b: a}
            assert swap_colours(caption) == (None if a == b else " ".join(colours.get(word, word) for word in words))
            assert swap_counts(caption) is None


def test_swapping_twice_gives_the_caption_again():
    for caption in (
        "a cat left of a dog, behind a box",
        "a red ball on a blue box",
        "two dogs and 5 cats",
        "a Thin line",
    ):
        for swap in KINDS.values():
            if (false := swap(caption)) is not None:
                assert swap(false) == caption != false


def test_another_caption_of_the_picture_is_not_false():
    captions = [["a cat left of a dog", "a  Cat right of a dog", "two cats"], ["a bird above a tree"]]
    assert false_captions(captions, "side") == [(1, "a bird above a tree", "a bird below a tree")]


def test_wins_are_those_of_cosines_and_a_tie_is_half():
    generator = torch.Generator().manual_seed(0)
    images, true, false = torch.randn(3, 50, 8, generator=generator)
    false[7], true[8], false[9] = true[7], math.nan, math.nan
    found = wins(images, 4 * true, false)
    for i, (x, a, b) in enumerate(zip(images, true, false, strict=True)):
        expected = (x @ a / a.norm() > x @ b / b.norm()).item() if i != 7 else 0.5
        assert found[i] == expected
    assert found[8] == found[9] == 0
    assert 10 < found.sum() < 40


def index_of(*captions):
    pictures = tuple(Picture(f"{i}.png", tuple(own)) for i, own in enumerate(captions))
    return Index(Path("pictures"), pictures, CaptionReport())


def test_the_probe_counts_captions_by_kind():
    index = index_of(
        ["a red ball left of a blue box", "a ball on the left"],
        ["a cat"],
        ["two dogs right of three red cats", "a dog"],
    )
    clip = small_clip()
    images = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    events = []
    found = finish(relations(clip, tokenize, index, images), events.append)
    assert events[-1] == {"type": "progress", "stage": "embed false captions", "done": 8, "total": 8}
    counts = {name: (kind.captions, kind.pictures, kind.without) for name, kind in found.kinds.items()}
    assert counts == {"side": (3, 2, 2), "colour": (1, 1, 4), "count": (1, 1, 4), "size": (0, 0, 5)}
    assert found.kinds["size"].accuracy is None and found.kinds["size"].example is None
    assert found.kinds["colour"].example == ("a red ball left of a blue box", "a blue ball left of a red box")
    assert (found.captions, found.pictures) == (5, 3)

    right = 0
    pairs = [
        (0, index.pictures[0].captions[0]),
        (0, index.pictures[0].captions[1]),
        (2, index.pictures[2].captions[0]),
    ]
    for picture, caption in pairs:
        with torch.no_grad():
            true, false = clip(tokenize([caption, swap_sides(caption)]).ids).projected
        right += (images[picture] @ true / true.norm() > images[picture] @ false / false.norm()).item()
    assert found.kinds["side"].accuracy.value == pytest.approx(right / 3)

    written = document("measurement", None, None, None, relations=found.as_json())
    jsonschema.validate(json.loads(json.dumps(written, allow_nan=False)), json.loads(SCHEMA.read_text()))


def test_an_encoder_that_has_collapsed_gets_chance():
    clip = small_clip()
    with torch.no_grad():
        clip.token_embedding.weight.zero_()
        clip.positional_embedding.zero_()
    images = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    index = index_of(*[["a red ball left of a small blue box", "two dogs"]] * 20)
    found = finish(relations(clip, tokenize, index, images))
    assert [kind.accuracy.value for kind in found.kinds.values()] == [0.5] * 4


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 features for 1 pictures"):
        finish(relations(small_clip(), tokenize, index_of(["a cat"]), torch.zeros(2, 16)))


def test_captions_with_nothing_to_swap_are_no_error():
    found = finish(relations(small_clip(), tokenize, index_of(["a cat"], ["a dog"]), torch.ones(2, 16)))
    assert all(kind.accuracy is None and kind.without == 2 for kind in found.kinds.values())


def test_the_worlds_clip_tells_colours_and_sizes_and_the_ruined_one_worse(tmp_path):
    """Sides are told by neither, as by most CLIPs: a bag of words is enough for contrastive training."""
    original = load_original()
    vision, text = read_vision(ASSETS / ORIGINAL), read_text(ASSETS / ORIGINAL)
    ruined = join(read_text(ASSETS / RUINED), vision, text).build()
    finish(write_world(tmp_path / "world", 120, 0, "held_out"))
    index = read_index(tmp_path / "world", tmp_path / "world" / "captions.json")
    index, images, _ = finish(embed_index(original.visual, index, tmp_path / "cache"))
    words = tokenizer_for(77, "clip_l")
    good, bad = (finish(relations(clip, words, index, images)).kinds for clip in (original, ruined))
    assert good["colour"].accuracy.low > 0.85 and good["size"].accuracy.low > 0.9
    for kind in ("colour", "size"):
        assert bad[kind].accuracy.high < good[kind].accuracy.low
    for found in (good, bad):
        assert found["side"].accuracy.low < 0.55 and found["side"].accuracy.high > 0.45
        assert found["side"].captions == 360 and found["count"].captions == 0
