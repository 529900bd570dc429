"""What becomes of captions before they are tokens: which one is taken, tags drawn anew, words around it, its end cut.

Pure functions on text. In their order: `chosen` once for a data set; at each step where a picture varies, `mirror` and
`drawn`; then `finish`. Tags are as kohya's scripts have them (`shuffle_caption`, `caption_tag_dropout_rate`,
`keep_tokens`, `caption_prefix`, `caption_suffix`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import Captions
from ..errors import InputError
from ..tokenizer import Tokenize, lengths
from .words import Words

CUT_AT = ("sentence", "comma", "token")
_NO_END = ("mr", "mrs", "ms", "dr", "prof", "st", "no", "vs", "jr", "sr", "e.g", "i.e", "ca", "approx", "inc", "ltd")
_SENTENCE = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+[」』”’]*|\n+")
_WORD = re.compile(r"\s+")


def check(policy: Captions, tokenize: Tokenize) -> None:
    """Raises InputError for what cannot be done to any caption."""
    if tokenize([_around(policy, "a")]).truncated:
        raise InputError(
            f"captions.prefix and captions.suffix together leave no room for a caption: {_around(policy, '…')!r}; "
            "make them shorter"
        )


def has_draws(policy: Captions) -> bool:
    """Whether captions are drawn anew each time they are taken."""
    return policy.shuffle or policy.dropout > 0


# ---- which caption --------------------------------------------------------------------------------------------------


def chosen(captions: Sequence[tuple[str, ...]], policy: Captions, tokenize: Tokenize) -> list[tuple[str, ...]]:
    """What is left of each picture's captions to take from, by `policy.choose`; never none.

    `longest` is the one with the most tokens, prefix and suffix counted, among those that fit the context; where none
    does, among all as they are cut. `random` and `in_turn` keep all: the sampler takes from them.
    """
    if policy.choose == "first":
        return [each[:1] for each in captions]
    if policy.choose == "first_two":
        return [each[:2] for each in captions]
    if policy.choose == "longest":
        return _longest(captions, policy, tokenize)
    return list(captions)


def _longest(captions: Sequence[tuple[str, ...]], policy: Captions, tokenize: Tokenize) -> list[tuple[str, ...]]:
    several = [caption for each in captions if len(each) > 1 for caption in each]
    if not several:
        return list(captions)
    finished = finish(several, policy, tokenize)
    sizes = lengths(finished.ids).tolist()
    found, row = [], 0
    for each in captions:
        if len(each) > 1:
            rows = range(row, row + len(each))
            best = max(rows, key=lambda i: (i not in finished.cut, sizes[i]))  # of equals the first
            found.append((each[best - row],))
            row = rows.stop
        else:
            found.append(tuple(each))
    return found


# ---- tags -----------------------------------------------------------------------------------------------------------


def tags_of(caption: str, separator: str) -> list[str]:
    """The parts between separators, stripped, without empty ones."""
    return [tag for part in caption.split(separator) if (tag := part.strip())]


def drawn(caption: str, policy: Captions, generator: torch.Generator) -> str:
    """The caption with its tags in another order, some left out; the first `keep_first` stay, and at least one does."""
    tags = tags_of(caption, policy.separator)
    kept, rest = tags[: policy.keep_first], tags[policy.keep_first :]
    if not rest:
        return caption
    draws = torch.rand(2 * len(rest) + 1, generator=generator, dtype=torch.float64).tolist()
    stays = [i for i in range(len(rest)) if draws[i] >= policy.dropout]
    if not kept and not stays:
        stays = [int(draws[-1] * len(rest))]
    if policy.shuffle:
        stays.sort(key=lambda i: draws[len(rest) + i])
    rest = [rest[i] for i in stays]
    between = policy.separator if policy.separator[-1].isspace() else f"{policy.separator} "
    return between.join(kept + rest)


def canonical(caption: str, policy: Captions) -> str:
    """A name of all that `drawn` may make of the caption: equal for captions that it may make the same lists of."""
    if not has_draws(policy):
        return caption
    tags = [tag.lower() for tag in tags_of(caption, policy.separator)]
    first = policy.keep_first
    return "\n".join(tags[:first] + (sorted(tags[first:]) if policy.shuffle else tags[first:]))


# ---- around a caption, and its end ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """Captions as they are read by the text tower."""

    texts: list[str]
    ids: Tensor  # (captions, context_length)
    cut: dict[int, str]  # those that were too long, by their position: at what of `CUT_AT`
    specials: int  # captions from which a literal special token was taken out

    def count(self, at: str) -> int:
        """How many were cut at a `sentence`, a `comma`, or a `token`."""
        return sum(one == at for one in self.cut.values())


def finish(captions: Sequence[str], policy: Captions, tokenize: Tokenize) -> Finished:
    """Prefix and suffix around each caption, those beyond the context cut, and their tokens.

    A caption ends behind the last sentence that fits, else before the last comma (or separator of tags), else within
    its text at the last token that does; prefix and suffix are kept. With `policy.cut == "tokens"` always the latter.
    """
    texts = [_around(policy, caption) for caption in captions]
    tokens = tokenize(texts)
    if not tokens.truncated:
        return Finished(texts, tokens.ids, {}, tokens.specials)
    full = (lengths(tokens.ids) == tokens.ids.shape[1]).nonzero()[:, 0].tolist()  # some just fit
    ends = _ends([captions[i] for i in full], policy, Words(tokenize))
    cut = {full[i]: at for i, (at, _) in ends.items()}
    kept = {full[i]: text for i, (_, text) in ends.items()}
    for i, text in kept.items():
        texts[i] = text
    ids = tokens.ids.clone()
    if kept:
        ids[list(kept)] = tokenize(list(kept.values())).ids
    return Finished(texts, ids, cut, tokens.specials)


def finished_ids(captions: Sequence[str], policy: Captions, words: Words) -> Tensor:
    """The tokens that `finish` makes, in a tenth of the time where the words are known. n -> (n, context_length)"""
    texts = [_around(policy, caption) for caption in captions]
    for i, (_, text) in _ends(captions, policy, words).items():
        texts[i] = text
    return words.ids(texts)


def _around(policy: Captions, caption: str) -> str:
    """With prefix and suffix, a space between where neither side has one; none before punctuation."""
    prefix, suffix = policy.prefix, policy.suffix
    if prefix and not prefix[-1].isspace():
        prefix += " "
    if suffix and not suffix[0].isspace() and suffix[0] not in ",.;:!?":
        suffix = f" {suffix}"
    return f"{prefix}{caption}{suffix}"


def _ends(captions: Sequence[str], policy: Captions, words: Words) -> dict[int, tuple[str, str]]:
    """Of the captions that are too long, by position: at what of `CUT_AT` they are cut, and what is left of them.

    Where the tokenizer's own cut is as good, all is left.
    """
    places = [("sentence", _sentences), ("comma", lambda text: _commas(text, policy.separator))]
    places = places if policy.cut == "sentence" else []
    if policy.suffix:  # the tokenizer would cut that
        places += [("token", _words), ("token", lambda text: list(range(1, len(text))))]
    texts = [_around(policy, caption) for caption in captions]
    long = [i for i, fits in enumerate(words.fit(texts)) if not fits]
    found = {i: ("token", texts[i]) for i in long}
    for at, find in places:
        ends = _last_that_fit([captions[i] for i in long], find, policy, words)
        for i, end in zip(long, ends, strict=True):
            if end is not None:
                found[i] = at, _around(policy, captions[i][:end].rstrip())
        long = [i for i, end in zip(long, ends, strict=True) if end is None]
    return found


def _last_that_fit(
    captions: list[str], find: Callable[[str], list[int]], policy: Captions, words: Words
) -> list[int | None]:
    """Each caption's last place up to which it fits, by halving, for all captions at once."""
    places = [[end for end in find(caption) if caption[:end].strip()] for caption in captions]
    low = [-1] * len(captions)  # the last one that is known to fit
    high = [len(each) for each in places]  # the first one that is known not to
    while open_ := [i for i in range(len(captions)) if high[i] - low[i] > 1]:
        middles = [(low[i] + high[i]) // 2 for i in open_]
        texts = [_around(policy, captions[i][: places[i][m]].rstrip()) for i, m in zip(open_, middles, strict=True)]
        for i, middle, fits in zip(open_, middles, words.fit(texts), strict=True):
            (low if fits else high)[i] = middle
    return [each[i] if i >= 0 else None for each, i in zip(places, low, strict=True)]


def _sentences(text: str) -> list[int]:
    """Where sentences end within the text."""
    return [found.end() for found in _SENTENCE.finditer(text) if not _abbreviates(text[: found.start()], found[0])]


def _abbreviates(before: str, mark: str) -> bool:
    """Whether a full stop belongs to its word: `Mr. Smith`, `J. Smith`."""
    word = before.rsplit(maxsplit=1)[-1].lower().lstrip("([\"'“‘") if before.strip() else ""
    return mark == "." and (word in _NO_END or (len(word) == 1 and word.isalpha() and word not in "ai"))


def _commas(text: str, separator: str) -> list[int]:
    """Before commas, but for those within numbers, semicolons, and the separator of tags."""
    own = separator.strip()
    more = f"|{re.escape(own)}" if own not in ("", ",", ";") else ""
    return [found.start() for found in re.finditer(rf"[,;](?!\d)|(?<!\d)[,;]|[，、；]{more}", text)]


def _words(text: str) -> list[int]:
    return [found.start() for found in _WORD.finditer(text)]
