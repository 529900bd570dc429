"""The shipped prompts: enough of every kind, no two the same to a text encoder, and many that differ in one word."""

from __future__ import annotations

import itertools

from gmp.prompts import prompts
from gmp.tokenizer import Tokenizer, lengths

TEXTS = [prompt.text for prompt in prompts()]


def test_there_are_hundreds_of_every_kind():
    kinds = {prompt.kind for prompt in prompts()}
    assert len(TEXTS) >= 300
    wanted = {"object", "attribute", "relation", "counting", "style", "tags", "negation", "short", "pair", "long"}
    assert kinds == wanted
    assert all(sum(prompt.kind == kind for prompt in prompts()) >= 20 for kind in kinds)


def test_texts_are_written_cleanly():
    assert all(text == " ".join(text.split()) and text for text in TEXTS)


def test_no_two_are_the_same_tokens_even_where_they_are_cut():
    rows = {tuple(row) for row in Tokenizer()(TEXTS).ids.tolist()}
    assert len(rows) == len(TEXTS)


def test_long_ones_fill_the_context_and_some_are_cut():
    long = [prompt.text for prompt in prompts() if prompt.kind == "long"]
    tokens = Tokenizer()(long)
    sizes = lengths(tokens.ids)
    assert ((sizes >= 40) & (sizes <= 75)).sum() > 0.75 * len(long)
    assert 3 <= tokens.truncated < len(long) / 4
    assert Tokenizer()(TEXTS).truncated == tokens.truncated


def test_many_differ_from_another_in_one_word():
    words = [text.split() for text in TEXTS]
    close = set()
    for (i, one), (j, other) in itertools.combinations(enumerate(words), 2):
        if len(one) == len(other) and sum(a != b for a, b in zip(one, other, strict=True)) == 1:
            close |= {i, j}
    assert len(close) > 100


def test_many_have_the_same_words_in_another_order():
    bags = [tuple(sorted(text.split())) for text in TEXTS]
    assert sum(bags.count(bag) > 1 for bag in bags) >= 20
