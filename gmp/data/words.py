"""Tokens of words, each made once: captions that are drawn anew at each step are tokenized by looking them up.

CLIP's tokenizers split at spaces before all else, so that a text has the tokens of its words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tokenizer import Tokenize, lengths

REMEMBERED = 1 << 18  # words; then all are forgotten


class Words:
    """A tokenizer that remembers words. Its tokens are those of `tokenize`, to the last one."""

    def __init__(self, tokenize: Tokenize):
        self.tokenize = tokenize
        (empty,) = tokenize([""]).ids.tolist()
        self.room = len(empty) - 2  # beside start and end
        self._start, self._end, self._pad = empty[:1], empty[1:2], empty[-1:]
        self._known: dict[str, list[int]] = {}  # a word beyond the context has the first room + 1 of its tokens, or so

    def fit(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text is read whole."""
        words = self._words(texts)
        return [sum(len(self._known[word]) for word in each) <= self.room for each in words]

    def ids(self, texts: Sequence[str]) -> Tensor:
        """As `tokenize`: (n, context_length) int64"""
        rows = []
        for words in self._words(texts):
            tokens = [token for word in words for token in self._known[word]][: self.room]
            rows.append(self._start + tokens + self._end + self._pad * (self.room - len(tokens)))
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), self.room + 2)

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        """The words of each text, all of them known."""
        if len(self._known) > REMEMBERED:
            self._known.clear()
        words = [text.split() for text in texts]
        new = list(dict.fromkeys(word for each in words for word in each if word not in self._known))
        if new:
            ids = self.tokenize(new).ids
            for word, row, length in zip(new, ids.tolist(), lengths(ids).tolist(), strict=True):
                self._known[word] = row[1 : length - 1]
                if length == len(row) and self.tokenize([word]).truncated:
                    self._known[word] = row[1:]  # one more, so that it does not fit
        return words
