"""Captions before they are tokens: which one is taken, how tags are drawn, and where captions that are too long end."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from gmp.config import Captions
from gmp.data.policy import canonical, check, chosen, drawn, finish, finished_ids, has_draws, tags_of
from gmp.data.sampler import seeded
from gmp.data.words import Words
from gmp.errors import InputError
from gmp.tokenizer import Tokenizer

CLIP = Tokenizer()
SHORT = Tokenizer(12, pad_id=0)  # ten tokens beside start and end
TAGS = "1girl, solo, red hair, blue eyes, smile"


def draw(caption, number=0, **policy):
    return drawn(caption, Captions(**policy), seeded(f"{number}"))


# ---- which caption --------------------------------------------------------------------------------------------------

THREE = ("a cat", "a cat on a mat", "a cat")


@pytest.mark.parametrize(
    ("choose", "expected"),
    [
        ("first", ("a cat",)),
        ("first_two", ("a cat", "a cat on a mat")),
        ("random", THREE),
        ("in_turn", THREE),
        ("longest", ("a cat on a mat",)),
    ],
)
def test_what_is_left_to_take_from(choose, expected):
    found = chosen([THREE, ("one",)], Captions(choose=choose), CLIP)
    assert found == [expected, ("one",)]


def test_the_longest_that_fits_is_counted_in_tokens_and_not_in_letters():
    one, other = "photography of a mountain", "a b c d e"  # more letters, fewer tokens
    assert chosen([(one, other)], Captions(choose="longest"), CLIP) == [(other,)]


def test_the_longest_does_not_count_beyond_the_context_nor_without_prefix_and_suffix():
    fits, just, beyond = "a b c", " ".join("abcdefgh") + " i", " ".join("abcdefghijkl")
    pictures = [(beyond, fits, just)]
    assert chosen(pictures, Captions(choose="longest"), SHORT) == [(just,)]  # nine tokens
    assert chosen(pictures, Captions(choose="longest", prefix="x"), SHORT) == [(just,)]  # ten
    assert chosen(pictures, Captions(choose="longest", prefix="x", suffix="y"), SHORT) == [(fits,)]


def test_where_no_caption_fits_the_longest_after_its_cut_is_taken():
    short = "a cat. " + " ".join("cdefghijklm")
    long = "a b c d e fox. " + " ".join("ghijklmnop")
    assert chosen([(short, long)], Captions(choose="longest"), SHORT) == [(long,)]


# ---- tags -----------------------------------------------------------------------------------------------------------


def test_tags_are_what_stands_between_separators():
    assert tags_of(" a , b c,, d,", ",") == ["a", "b c", "d"]
    assert tags_of("a|b", "|") == ["a", "b"]


def test_shuffled_tags_are_the_same_ones_in_orders_that_are_all_as_likely():
    orders = Counter(draw("a, b, c", n, shuffle=True) for n in range(1200))
    assert len(orders) == 6
    assert max(abs(count - 200) for count in orders.values()) < 5 * 200**0.5
    assert all(sorted(tags_of(order, ",")) == ["a", "b", "c"] for order in orders)


def test_a_draw_is_told_by_its_generator_alone():
    assert draw(TAGS, 3, shuffle=True, dropout=0.3) == draw(TAGS, 3, shuffle=True, dropout=0.3)
    assert len({draw(TAGS, n, shuffle=True, dropout=0.3) for n in range(50)}) > 20


def test_tags_are_left_out_as_often_as_asked_and_stay_in_order():
    count, kept = 2000, Counter()
    for n in range(count):
        tags = tags_of(draw(TAGS, n, dropout=0.3), ",")
        assert tags == [tag for tag in tags_of(TAGS, ",") if tag in tags]
        kept.update(tags)
    for tag in tags_of(TAGS, ","):
        assert abs(kept[tag] - 0.7 * count) < 5 * (0.21 * count) ** 0.5 + 0.3**5 * count


def test_the_first_tags_stay_where_they_are():
    for n in range(200):
        tags = tags_of(draw(TAGS, n, shuffle=True, dropout=0.9, keep_first=2), ",")
        assert tags[:2] == ["1girl", "solo"]
    assert draw("a, b", shuffle=True, dropout=0.9, keep_first=5) == "a, b"


def test_a_caption_is_never_left_empty():
    found = Counter(draw("a, b, c", n, dropout=0.999) for n in range(600))
    assert set(found) >= {"a", "b", "c"} and "" not in found  # the last one is any of them
    assert draw("one sentence", dropout=0.999, shuffle=True) == "one sentence"
    assert draw(" , ", dropout=0.999) == " , "


def test_another_separator_is_kept():
    assert sorted(draw("a|b", shuffle=True, separator="|")) == sorted("a| b")
    assert draw("a b", 0, dropout=0.001, separator=" ") == "a b"


def test_captions_that_may_be_drawn_alike_have_one_name():
    policy = Captions(shuffle=True, keep_first=1)
    assert canonical("a, c, B", policy) == canonical("A, b, c", policy) != canonical("b, a, c", policy)
    assert canonical("a, b", Captions(dropout=0.5)) != canonical("b, a", Captions(dropout=0.5))
    assert has_draws(policy) and has_draws(Captions(dropout=0.1)) and not has_draws(Captions())


# ---- prefix and suffix ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "suffix", "expected"),
    [
        ("", "", "a cat"),
        ("photo:", "by night", "photo: a cat by night"),
        ("photo ", ", by night", "photo a cat, by night"),
        ("", " .", "a cat ."),
    ],
)
def test_prefix_and_suffix_stand_around_every_caption_with_a_space(prefix, suffix, expected):
    finished = finish(["a cat"], Captions(prefix=prefix, suffix=suffix), CLIP)
    assert finished.texts == [expected]
    assert torch.equal(finished.ids, CLIP([expected]).ids)


def test_prefix_and_suffix_that_leave_no_room_are_refused():
    check(Captions(prefix="a b c d e", suffix="f g h i"), SHORT)
    with pytest.raises(
        InputError, match=r"prefix and captions.suffix together leave no room .*'a b c d e … f g h i j'"
    ):
        check(Captions(prefix="a b c d e", suffix="f g h i j"), SHORT)
    check(Captions(separator=""), SHORT)


# ---- the cut --------------------------------------------------------------------------------------------------------


def cut(caption, tokenize=SHORT, **policy):
    finished = finish([caption], Captions(**policy), tokenize)
    (text,) = finished.texts
    return text, finished.cut.get(0)


@pytest.mark.parametrize(
    ("caption", "expected", "at"),
    [
        ("a b cat. d e fox. g h i j k", "a b cat. d e fox.", "sentence"),
        ("a b c! d e, f g, h i j k l", "a b c!", "sentence"),
        ('he said "a b." c d e f g h i', 'he said "a b."', "sentence"),
        ("a b c, d e f, g h i j k l", "a b c, d e f", "comma"),
        ("a b; c d e f g h i j k l", "a b", "comma"),
        ("Mr. a b, c d e f g h i j k", "Mr. a b", "comma"),
        ("by J. Smith, c d e f g h i j k", "by J. Smith", "comma"),
        ("2.5 m, c d e f g h i j k l", "2.5 m", "comma"),
        ("a b,c,d,e,f,g,h", "a b,c,d,e,f", "comma"),
        ("a 1,5 c d e f g h i j k l", "a 1,5 c d e f g h i j k l", "token"),
        ("eine Katze\nauf a b c d e f g h i", "eine Katze", "sentence"),
        ("猫がいる。犬がいる。鳥がいる。", "猫がいる。", "sentence"),
        ("a b c d e f g h i j k l", "a b c d e f g h i j k l", "token"),
        ("a b c, d e f.", "a b c, d e f.", None),
    ],
)
def test_captions_beyond_the_context_end_at_a_sentence_or_else_a_comma(caption, expected, at):
    assert cut(caption) == (expected, at)


def test_a_caption_that_just_fits_is_not_cut():
    assert cut("a b c d e, f g h i") == ("a b c d e, f g h i", None)  # ten tokens
    assert cut("a b c d e, f g h i j") == ("a b c d e", "comma")


def test_a_comma_of_tags_may_be_another_one():
    assert cut("a b|c d|e f g h i j k l", separator="|") == ("a b|c d", "comma")


def test_at_a_token_where_that_is_asked_for():
    caption = "a b c. d e f. g h i j k"
    text, at = cut(caption, cut="tokens")
    finished = finish([caption], Captions(cut="tokens"), SHORT)
    assert (text, at) == (caption, "token")
    assert torch.equal(finished.ids, SHORT([caption]).ids)


@pytest.mark.parametrize(
    ("caption", "policy", "expected", "at"),
    [
        ("a b cat. d e fox. g h i j k", {}, "x a b cat. y z", "sentence"),
        ("a b c, d e f g, h i j k", {}, "x a b c y z", "comma"),
        ("a b c d e f g h i j k l", {}, "x a b c d e f g y z", "token"),
        ("a b c. d e f g h i j k", {"cut": "tokens"}, "x a b c. d e f y z", "token"),
        ("🦊" * 40, {}, None, "token"),  # one word
    ],
)
def test_prefix_and_suffix_survive_a_cut(caption, policy, expected, at):
    text, found = cut(caption, prefix="x", suffix="y z", **policy)
    assert found == at and text.startswith("x ") and text.endswith(" y z")
    assert SHORT([text]).truncated == 0
    if expected is not None:
        assert text == expected


def test_a_cut_keeps_as_much_as_a_naive_search_over_all_places():
    generator = torch.Generator().manual_seed(0)
    words = "a cat dog incomprehensibilities , . , . the 7".split()
    captions = []
    for length in torch.randint(1, 40, (300,), generator=generator).tolist():
        chosen = torch.randint(len(words), (length,), generator=generator).tolist()
        captions.append(" ".join(words[i] for i in chosen).replace(" ,", ",").replace(" .", "."))
    finished = finish(captions, Captions(prefix="my", suffix="end"), SHORT)
    for caption, text in zip(captions, finished.texts, strict=True):
        assert text == naive(caption)
    rows = torch.cat([SHORT([text]).ids for text in finished.texts])
    assert torch.equal(finished.ids, rows)
    assert torch.equal(finished_ids(captions, Captions(prefix="my", suffix="end"), Words(SHORT)), rows)
    assert {at: finished.count(at) for at in ("sentence", "comma", "token")} == Counter(finished.cut.values())
    assert all(finished.count(at) for at in ("sentence", "comma", "token"))


def naive(caption: str) -> str:
    def fits(text):
        return SHORT([f"my {text} end"]).truncated == 0

    if fits(caption):
        return f"my {caption} end"
    places = {
        "sentence": [i + 1 for i in range(len(caption)) if caption[i : i + 2] == ". "],
        "comma": [i for i in range(len(caption)) if caption[i] == ","],
        "word": [i for i in range(len(caption)) if caption[i] == " "],
        "letter": range(1, len(caption)),
    }
    for ends in places.values():
        texts = [caption[:end].rstrip() for end in ends if caption[:end].strip()]
        fitting = [text for text in texts if fits(text)]
        if fitting:
            return f"my {max(fitting, key=len)} end"
    raise AssertionError(caption)


def test_long_captions_are_cut_with_few_tokenizations():
    calls = []

    def counting(captions):
        calls.append(len(captions))
        return CLIP(captions)

    captions = ["a cat"] * 500 + ["a cat on a mat, " * 40] * 500
    finished = finish(captions, Captions(), counting)
    assert finished.count("comma") == 500
    assert [count for count in calls if count > 10] == [1000, 500]  # all captions, and those that were cut
    words = Words(counting)
    assert torch.equal(finished_ids(captions, Captions(), words), finished.ids)
    calls.clear()
    assert torch.equal(finished_ids(captions, Captions(), words), finished.ids) and not calls


def test_special_tokens_are_counted_once():
    caption = "a <|endoftext|> b c, d e f g h i j k l"
    assert finish([caption, "a"], Captions(), SHORT).specials == 1
