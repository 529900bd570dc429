"""Captions of flipped pictures: words of a side are swapped, and words that only look like it are not."""

from __future__ import annotations

import itertools

import pytest

from gmp.data.mirror import PAIRS, mirror


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog on the left of a cat", "a dog on the right of a cat"),
        ("Left: a dog. Right: a cat.", "Right: a dog. Left: a cat."),
        ("LEFT TURN ONLY", "RIGHT TURN ONLY"),
        ("the leftmost of three", "the rightmost of three"),
        ("a left-hand glove", "a right-hand glove"),
        ("Left-Hand drive", "Right-Hand drive"),
        ("a left-handed batter", "a right-handed batter"),
        ("a righthanded pitcher", "a lefthanded pitcher"),
        ("moving rightwards", "moving leftwards"),
        ("the top-left corner", "the top-right corner"),
        ("in the bottomright", "in the bottomleft"),
        ("1girl, left_hand raised, facing right", "1girl, right_hand raised, facing left"),
        ("from left to right", "from right to left"),
        ("a left/right switch", "a right/left switch"),
        ("a clock that runs clockwise", "a clock that runs counterclockwise"),
        ("turning counterclockwise", "turning clockwise"),
        ("turning anti-clockwise, Anticlockwise", "turning clockwise, Clockwise"),
        ("COUNTER-CLOCKWISE", "CLOCKWISE"),
        ("the dog is left of the cat", "the dog is right of the cat"),
        ("the dog's left's", "the dog's right's"),
        ("links und left", "links und right"),
    ],
)
def test_words_of_a_side_are_swapped_with_their_capitals(caption, expected):
    assert mirror(caption) == expected


@pytest.mark.parametrize(
    "caption",
    [
        "leftover pizza on a plate", "a bright light, upright, copyright", "human rights march", "the Bill of Rights",
        "leave right away", "it is all right", "All right!", "that looks just right", "human right to water",
        "food left over from dinner", "a bag left behind at a bench", "a dog left alone", "the door was left open",
        "a right angle", "right triangles", "the right answer", "turn it right side up", "right-wing posters",
        "right now it rains", "a bike right next to a wall", "standing right behind her", "right in front of a house",
        "right in the middle", "a bag was left on a bench", "nothing left", "a man who left the house",
        "they have left", "what is left of the castle", "a right click on the icon", "the right time", "RIGHT AWAY",
        "links und rechts", "",
    ],
)  # fmt: skip
def test_words_that_are_no_side_stay(caption):
    assert mirror(caption) == caption


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("turn left over the bridge", "turn right over the bridge"),
        ("the man on the left behind a desk", "the man on the right behind a desk"),
        ("the one on the right next to the car", "the one on the left next to the car"),
        ("a cat at the far left over a sofa", "a cat at the far right over a sofa"),
        ("looking right under the table", "looking left under the table"),
        ("on the left the sea, right now calm", "on the right the sea, right now calm"),
        ("all right, the left door", "all right, the right door"),
        ("her left hand, left open", "her right hand, left open"),
    ],
)
def test_the_word_before_tells_a_side_from_a_phrase(caption, expected):
    assert mirror(caption) == expected


def test_mirroring_twice_gives_the_caption_back():
    words = [
        "left",
        "right",
        "Left",
        "RIGHT",
        "over",
        "the",
        "turn",
        "was",
        "all",
        "away",
        "on",
        "next",
        "to",
        "what is",
    ]
    for size in (1, 2, 3):
        for chosen in itertools.product(words, repeat=size):
            caption = " ".join(chosen)
            assert mirror(mirror(caption)) == caption
    for pair in PAIRS:
        for word in (*pair, *(one.upper() for one in pair), *(one.title() for one in pair)):
            assert mirror(word) != word and mirror(mirror(word)) == word
