"""Tokens of words that are looked up, held to the tokenizer's own."""

from __future__ import annotations

import pytest
import torch

from gmp.data import words as module
from gmp.data.words import Words
from gmp.tokenizer import Tokenizer
from tests.small import tokenize

LETTERS = "abé .,'’-!\"7\n\t🦊猫<|>\u0301s"


def texts() -> list[str]:
    """Made of few letters, so that words come again, of all kinds of them."""
    generator = torch.Generator().manual_seed(3)
    found = [
        "".join(LETTERS[i] for i in torch.randint(len(LETTERS), (length,), generator=generator).tolist())
        for length in torch.randint(0, 30, (600,), generator=generator).tolist()
    ]
    specials = ["a <|endoftext|> b c d e f g h i j", "x<|startoftext|>y", "half a \ud83e pair"]
    return [*found, "incomprehensibilities" * 3, "🦊" * 40, "🦊" * 4 + " a", " ".join("abcdefghij"), *specials]


@pytest.mark.parametrize(
    "tokenizer",
    [Tokenizer(12), Tokenizer(12, 0), Tokenizer(77, 0), tokenize],
    ids=["12", "12 padded by 0", "77 padded by 0", "clip"],
)
def test_ids_are_those_of_the_tokenizer_and_what_fits_is_what_it_does_not_cut(tokenizer):
    words = Words(tokenizer)
    given = texts() if tokenizer is not tokenize else [text for text in texts() if "\ud83e" not in text]
    for _ in range(2):
        assert torch.equal(words.ids(given), tokenizer(given).ids)
        assert words.fit(given) == [tokenizer([text]).truncated == 0 for text in given]
    assert words.ids([]).shape == (0, words.room + 2)


def test_words_are_tokenized_once():
    asked = []

    def heard(captions):
        asked.extend(captions)
        return Tokenizer(12)(captions)

    words = Words(heard)
    words.ids(["a cat on a mat", "a dog"])
    words.ids(["a dog on a cat"])
    words.fit(["on a mat"])
    assert asked == ["", "a", "cat", "on", "mat", "dog"]


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED", 50)
    words = Words(Tokenizer(12))
    for n in range(0, 300, 3):
        captions = [f"{n} {n + 1}", f"a {n + 2}"]
        assert torch.equal(words.ids(captions), Tokenizer(12)(captions).ids)
        assert len(words._known) <= 50 + 4
