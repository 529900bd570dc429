"""Relation probe: is a picture's caption told from the same words put together wrongly?

Retrieval is passed by a bag of words (Yuksekgonul et al. 2023, arXiv 2210.01936), since no other caption has these
words. Here the false caption has the picture's own: left for right, one thing's colour for the other's, two for three,
small for large. The text functions know words and no grammar; each says where that fails. Chance is 1/2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from .bootstrap import Interval, ratio
from .clip import TextTower
from .data.captions import Index
from .events import Event, progress
from .measure import text_features
from .tokenizer import Tokenize

_BATCH = 512  # captions between two progress events

OPPOSITE_SIDES = {
    "left": "right", "right": "left", "above": "below", "below": "above", "on top of": "under", "atop": "under",
    "under": "on top of", "underneath": "on top of", "beneath": "on top of", "in front of": "behind",
    "behind": "in front of",
}  # fmt: skip
OPPOSITE_SIZES = {
    "small": "large", "large": "small", "big": "small", "little": "big", "tiny": "huge", "huge": "tiny",
    "long": "short", "short": "long", "tall": "short", "wide": "narrow", "narrow": "wide", "thick": "thin",
    "thin": "thick", "smaller": "larger", "larger": "smaller", "bigger": "smaller", "longer": "shorter",
    "shorter": "longer", "taller": "shorter", "wider": "narrower", "narrower": "wider",
}  # fmt: skip
COLOURS = (
    "red", "green", "blue", "yellow", "orange", "purple", "cyan", "white", "black", "brown", "grey", "gray", "pink",
    "violet", "turquoise", "beige", "magenta", "golden", "silver",
)  # fmt: skip
# In pairs, so that true and false captions hold the same numbers equally often; "one" is a pronoun too often
_PAIRS = (("two", "three"), ("four", "five"), ("six", "seven"), ("eight", "nine"), ("ten", "eleven"))
OTHER_COUNTS = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
OTHER_COUNTS |= {str(n): str(n + 1 if n % 2 == 0 else n - 1) for n in range(2, 12)}


def _words(words: Sequence[str]) -> str:
    """A pattern of these words as whole ones, the longest first, spaces in them of any length."""
    longest = sorted(words, key=len, reverse=True)
    return r"\b(?:" + "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in longest) + r")\b"


_SIDE = re.compile(_words(list(OPPOSITE_SIDES)), re.IGNORECASE)
_SIZE = re.compile(_words(list(OPPOSITE_SIZES)), re.IGNORECASE)
_COLOUR = re.compile(_words(COLOURS), re.IGNORECASE)
# Numerals that stand alone: not 3D, 2.5, 1/2, 10:30, 3-year-old, #2, 2nd, 5%
_COUNT = re.compile(rf"(?<![\w#./:,$€£-])(?:{_words(list(OTHER_COUNTS))})(?![\w%:/°'’-]|[.,]\d)", re.IGNORECASE)
_BEFORE_SIDE = re.compile(r"\b(?:to|on|the|its|his|her|their|far|top|bottom|upper|lower)[\s-]+$", re.IGNORECASE)
_BEHIND_SIDE = re.compile(r"[\s-]+(?:of|side|sides|hand|corner|half|part|edge|third)\b", re.IGNORECASE)
_JOINED = re.compile(r"[\s,/&-]*(?:\b(?:and|or)\b[\s-]*(?:(?:an?|the|one|some)\s+)?)?", re.IGNORECASE)
_LIST = re.compile(r",\s*and\b|,|;|&|\band\b|\bor\b", re.IGNORECASE)
# Between "red" and "blue" of "a red cup and a blue cup", with the noun, or of "a red and a blue cup", without
_ALIKE = re.compile(
    r"(?:\s+(?P<noun>\w[\w\s-]*?))?\s*(?:,|&|\band\b|\bor\b)\s*(?:(?:an?|the|one|some)\s+)?", re.IGNORECASE
)
_BOTH_SIDES = re.compile(
    "|".join(
        rf"\b{a}(?:\s*[,/&]\s*|[\s-]+(?:and|or)[\s-]+)(?:(?:to|on)\s+)?(?:the\s+)?{b}\b"
        for a, b in (("left", "right"), ("above", "below"), ("in front of", "behind"), ("in front", "behind"))
        for a, b in ((a, b), (b, a))
    ),
    re.IGNORECASE,
)
_VOWELS = "aeiouAEIOU"
_ARTICLE = re.compile(r"^(?:an?|the|one|some|another)\s+", re.IGNORECASE)


def swap_sides(caption: str) -> str | None:
    """The caption with every side, height and depth turned round; None if it has none.

    left / right, above / below, on top of / under, in front of / behind. `left` and `right` count only where they are
    places by their neighbours ("left of", "on the right", "left side", "to his left"): "a man left the room" and "right
    now" do not. "The left one", said of time or politics, is taken for a place; "under a minute", "behind bars" and
    "above all" are, too. What lies on both sides ("left and right") has no false caption of this kind.
    """
    if _BOTH_SIDES.search(caption):
        return None
    found = [match for match in _SIDE.finditer(caption) if _is_place(caption, match)]
    return _changed(caption, [(match, _opposite(match, OPPOSITE_SIDES)) for match in found])


def swap_sizes(caption: str) -> str | None:
    """The caption with every size turned into its opposite; None if it has none.

    With two things of different size that is the exchange of their sizes. "Long ago", "a little bit" and the like are
    taken for sizes.
    """
    return _changed(caption, [(match, _opposite(match, OPPOSITE_SIZES)) for match in _SIZE.finditer(caption)])


def swap_counts(caption: str) -> str | None:
    """The caption with every number from two to eleven, as a word or a numeral, turned into its neighbour; or None.

    two / three, four / five, … so that no number tells the false caption by itself. Numerals count alone: neither 3D,
    2.5, 1/2, 10:30, 3-year-old, #2, 2nd nor 5%. Times ("at five", "5 pm") and names ("route 4") are taken for counts.
    """
    return _changed(caption, [(match, _opposite(match, OTHER_COUNTS)) for match in _COUNT.finditer(caption)])


def swap_colours(caption: str) -> str | None:
    """The caption with the colours of two things exchanged, everywhere; None if no two can be.

    Colours that are joined ("red and white", "black-and-white", "red, green") are of one thing: they are exchanged with
    that of another thing, never with each other. "A red cup and a blue cup" says the same either way round, and has no
    false caption. "Orange" is a colour also where it is a fruit, "white" where it is wine.
    """
    matches = list(_COLOUR.finditer(caption))
    groups: list[list[re.Match]] = []
    for match in matches:
        if groups and _JOINED.fullmatch(caption, groups[-1][-1].end(), match.start()):
            groups[-1].append(match)
        else:
            groups.append([match])
    colours = list(dict.fromkeys(match[0].lower() for match in matches))
    pairs = combinations(colours, 2)
    return next((false for pair in pairs if (false := _exchanged(caption, groups, *pair)) is not None), None)


KINDS: dict[str, Callable[[str], str | None]] = {
    "side": swap_sides, "colour": swap_colours, "count": swap_counts, "size": swap_sizes
}  # fmt: skip


def _exchanged(caption: str, groups: Sequence[Sequence[re.Match]], a: str, b: str) -> str | None:
    """The caption with colour a for b and b for a, unless each thing keeps its colours by that."""
    turn = {a: b, b: a}
    before = [{match[0].lower() for match in group} for group in groups]
    if before == [{turn.get(colour, colour) for colour in group} for group in before]:
        return None
    matches = [match for group in groups for match in group if match[0].lower() in turn]
    return _changed(caption, [(match, _opposite(match, turn)) for match in matches])


def _is_place(caption: str, match: re.Match) -> bool:
    """Whether `left` and `right` are places by their neighbours; the other words always are."""
    if match[0].lower() not in ("left", "right"):
        return True
    before = _BEFORE_SIDE.search(caption[max(0, match.start() - 20) : match.start()])
    return bool(before or _BEHIND_SIDE.match(caption, match.end()))


def _opposite(match: re.Match, opposites: dict[str, str]) -> str:
    """The word to put in place of another one, in capital letters where that is."""
    word = match[0]
    other = opposites[" ".join(word.lower().split())]
    if word.isupper():
        return other.upper()
    return other[0].upper() + other[1:] if word[0].isupper() else other


def _changed(caption: str, changes: Sequence[tuple[re.Match, str]]) -> str | None:
    """The caption with parts replaced; None if it says the same by that: the same things in another order."""
    if _alike(caption, changes):
        return None
    parts, end = [], 0
    for match, word in changes:
        parts += [_with_article(caption[end : match.start()], word), word]
        end = match.end()
    false = "".join(parts) + caption[end:]
    return None if _items(false) == _items(caption) else false


def _with_article(before: str, word: str) -> str:
    """The text before a word, a/an at its end as the word wants it: wrong grammar would tell the false caption."""
    text = before.rstrip()
    article = re.compile(r"\b(an?)$", re.IGNORECASE).search(text, max(0, len(text) - 3))
    if not article or text == before:
        return before
    right = article[1][0] + (
        ("N" if article[1].isupper() and len(article[1]) > 1 else "n") if word[0] in _VOWELS else ""
    )
    return before[: article.start()] + right + before[article.end() :]


def _alike(caption: str, changes: Sequence[tuple[re.Match, str]]) -> bool:
    """Whether two words change places that are of equal things side by side: "a red cup and a blue cup on a table"."""
    if len(changes) != 2 or [m[0].lower() for m, _ in changes] != [word.lower() for _, word in reversed(changes)]:
        return False
    (first, _), (second, _) = changes
    between = _ALIKE.fullmatch(caption, first.end(), second.start())
    noun = between and between["noun"]
    behind = caption[second.end() :].lstrip().lower()
    return between is not None and (noun is None or re.match(re.escape(noun.lower()) + r"\b", behind) is not None)


def _items(caption: str) -> list[str]:
    """What a caption lists, in order of the alphabet: "a red cup and a blue cup" is the same either way round."""
    items = [" ".join(item.lower().strip(" .").split()) for item in _LIST.split(caption)]
    return sorted(_ARTICLE.sub("", item) for item in items)


@dataclass(frozen=True)
class Kind:
    """One kind of false captions."""

    accuracy: Interval | None  # share of captions that score higher than their false one; None without captions
    captions: int  # that have a false one of this kind
    pictures: int  # of these captions
    without: int  # captions that have nothing to swap
    example: tuple[str, str] | None  # the first caption and its false one


@dataclass(frozen=True)
class Relations:
    """The relation probe. Chance is 1/2."""

    kinds: dict[str, Kind]  # side, colour, count, size
    captions: int
    pictures: int

    def as_json(self) -> dict[str, object]:
        kinds = {
            name: vars(kind)
            | {
                "accuracy": kind.accuracy and vars(kind.accuracy),
                "example": kind.example and {"true": kind.example[0], "false": kind.example[1]},
            }
            for name, kind in self.kinds.items()
        }
        return {"kinds": kinds, "captions": self.captions, "pictures": self.pictures}


def false_captions(captions: Sequence[Sequence[str]], kind: str) -> list[tuple[int, str, str]]:
    """(picture, caption, false caption) of all that have one of this kind; captions[i] are those of picture i.

    A false caption that is another caption of the same picture, by words, is none.
    """
    found = []
    for picture, own in enumerate(captions):
        told = {" ".join(caption.lower().split()) for caption in own}
        for caption in own:
            false = KINDS[kind](caption)
            if false is not None and " ".join(false.lower().split()) not in told:
                found.append((picture, caption, false))
    return found


def wins(image_features: Tensor, true_features: Tensor, false_features: Tensor) -> Tensor:
    """1 where a picture is closer to its true caption than to its false one, 0 where not, 1/2 for a tie. -> (N,)

    By cosine; all features (N, E), row by row. A tie is half a win, so that an encoder that does not see the difference
    (the same vector for both) gets chance and neither 0 nor 1. A score that is not a number is lost.
    """
    images = F.normalize(image_features.double(), dim=-1)
    true, false = (
        (images * F.normalize(texts.double(), dim=-1)).sum(dim=-1) for texts in (true_features, false_features)
    )
    return (true > false).double() + 0.5 * (true == false).double()


def relations(
    text: TextTower,
    tokenize: Tokenize,
    index: Index,
    image_features: Tensor,
    *,
    seed: int = 0,
) -> Generator[Event, None, Relations]:
    """How often a caption scores higher than its false one for its picture, for each kind of false caption.

    A caption whose swapped words lie behind the context length is cut to the same as its false one: a tie.
    image_features (pictures, E) of the index's pictures, as `features.embed_index` gives them. Intervals draw pictures,
    each with all its captions. Yields progress events.
    """
    if len(image_features) != len(index):
        raise ValueError(f"{len(image_features)} features for {len(index)} pictures")
    captions = [picture.captions for picture in index.pictures]
    pairs = {kind: false_captions(captions, kind) for kind in KINDS}
    told = sorted({caption for found in pairs.values() for _, *both in found for caption in both}, key=len)
    rows = []
    for start in range(0, len(told), _BATCH):
        chunk = told[start : start + _BATCH]
        rows.append(text_features(text, tokenize(chunk).ids))
        yield progress("embed false captions", start + len(chunk), len(told))
    features = torch.cat(rows) if rows else torch.empty(0, image_features.shape[1])
    place = {caption: i for i, caption in enumerate(told)}
    total = sum(map(len, captions))
    kinds = {}
    for name, found in pairs.items():
        pictures, true, false = ([*column] for column in zip(*found, strict=True)) if found else ([], [], [])
        owner = torch.tensor(pictures, dtype=torch.int64)
        rows_of = [features[[place[caption] for caption in column]] for column in (true, false)]
        sums, counts = torch.zeros(2, len(captions), dtype=torch.float64)
        won = wins(image_features[owner], *rows_of)
        accuracy = ratio(sums.index_add(0, owner, won), counts.index_add(0, owner, torch.ones_like(won)), seed)
        example = (true[0], false[0]) if found else None
        kinds[name] = Kind(accuracy, len(found), len(set(pictures)), total - len(found), example)
    return Relations(kinds, total, len(captions))
