"""The caption of a flipped picture: left and right change places.

English only. A word of a side is swapped wherever it stands as a word of its own, with its capitals: `Left-hand`,
`left_hand`, `LEFTMOST`; not in `leftover` or `bright`. Phrases in which the word is no side are left alone (`right
away`, `left behind`, `a right angle`), but for the adverbs and verbs among them where the word before says that it is
a side: `turn left over the bridge`, `the one on the right next to the car`. Phrases count for both words, `right over`
as `left over`, so that mirroring twice gives the caption back. It does not for capitals within a word, and for
`anticlockwise` and `counter-clockwise`, whose mirror image, `clockwise`, has `counterclockwise` as its own.
"""

from __future__ import annotations

import re

PAIRS = (
    *(("left" + end, "right" + end) for end in ("", "most", "ward", "wards", "hand", "handed", "hander", "side", "y")),
    *((f"{where}left", f"{where}right") for where in ("top", "bottom", "upper", "lower")),
    ("clockwise", "counterclockwise"),
)
_SWAPPED = {
    **{one: other for pair in PAIRS for one, other in (pair, pair[::-1])},
    **dict.fromkeys(("counter-clockwise", "anticlockwise", "anti-clockwise"), "clockwise"),
}

# A word begins and ends where no letter or digit stands; an underscore, as in tags, is a gap.
_BEGIN, _END = r"(?<![^\W_])", r"(?![^\W_])"
_WORD = re.compile(f"{_BEGIN}(?:{'|'.join(sorted(_SWAPPED, key=len, reverse=True))}){_END}", re.IGNORECASE)
_SIDE = "(?:left|right)"
_GAP = r"[\s_-]+"

# ---- phrases that name no side, whatever stands before them ----------------------------------------------------------

_IDIOM_BEHIND = (
    "angle", "angles", "angled", "triangle", "triangles", "side up", "way up", "of way", "click", "clicks", "clicking",
    "answer", "answers", "choice", "time", "moment", "amount", "size", "track", "to vote", "to remain", "to bear",
    "to work", "to life", "to privacy", "to repair", "to die",
)  # fmt: skip
_IDIOM_BEFORE = ("all", "just", "quite", "exactly", "human", "civil", "legal", "equal", "divine", "what is", "what's")
_POLITICS = r"-(?:wing|winger|wingers|leaning)"

# ---- adverbs and verbs, unless the word before says that it is a side ------------------------------------------------

_LOOSE_BEHIND = (
    # right away
    "away", "now", "here", "there", "then", "next", "beside", "before", "after", "above", "below", "under",
    "underneath", "across", "in the middle", "in the center", "in the centre", "in front", "at the", "up to", "up",
    "down", "through", "as", "where", "when", "off", "out", "into", "onto", "outside", "inside",
    # left over
    "over", "behind", "alone", "open", "unattended", "untouched", "blank", "empty", "abandoned", "without", "for",
    "the", "a", "an", "his", "her", "him", "their", "them", "it", "its", "us", "me", "no", "some", "nothing",
)  # fmt: skip
_LOOSE_BEFORE = (
    "has", "have", "had", "having", "been", "being", "nothing", "anything", "something", "everything", "much",
    "that is", "that's", "who", "they", "he", "she",
)  # fmt: skip
_IS = r"(?:is|are|was|were|be)"
_PLACE = r"(?:in|on|at|by|under|with|to)"  # `was left on a bench`, `is right on the edge`; not `is left of`
_SAYS_SIDE = (
    "the", "to", "at", "on", "in", "far", "upper", "lower", "top", "bottom", "center", "centre", "middle", "front",
    "back", "rear", "my", "his", "her", "their", "its", "your", "our", "from", "facing", "faces", "face", "looking",
    "looks", "look", "pointing", "points", "point", "turning", "turns", "turn", "turned", "going", "goes", "go",
    "heading", "heads", "head", "leaning", "leans", "lean", "leant", "leaned", "moving", "moves", "move", "veering",
    "veers", "veer", "swinging", "swings", "swing", "bending", "bends", "bend", "curving", "curves", "curve", "tilted",
    "tilting", "shifted", "stage", "screen", "camera", "viewer's",
)  # fmt: skip


def _any(words: tuple[str, ...]) -> str:
    """One of the words, or of the phrases, whatever the gaps in them."""
    return "(?:" + "|".join(_GAP.join(map(re.escape, word.split())) for word in words) + ")"


_IDIOM = re.compile(
    f"{_BEGIN}(?:{_SIDE}(?:{_GAP}{_any(_IDIOM_BEHIND)}{_END}|{_POLITICS}{_END})"
    f"|{_any(_IDIOM_BEFORE)}{_GAP}(?P<late>{_SIDE}){_END}(?!{_GAP}hand))",
    re.IGNORECASE,
)
_LOOSE = re.compile(
    f"{_BEGIN}(?:{_SIDE}{_GAP}{_any(_LOOSE_BEHIND)}{_END}"
    f"|(?:{_any(_LOOSE_BEFORE)}{_GAP}(?P<late>{_SIDE})|{_IS}{_GAP}(?P<later>{_SIDE})(?={_GAP}{_PLACE}{_END})){_END}"
    f"(?!{_GAP}(?:hand|handed|of){_END}))",
    re.IGNORECASE,
)
_BEFORE = re.compile(rf"{_BEGIN}{_any(_SAYS_SIDE)}{_GAP}$", re.IGNORECASE)


def mirror(caption: str) -> str:
    """The caption with the words of each side swapped."""
    if not _WORD.search(caption):
        return caption
    kept = _kept(caption)
    return _WORD.sub(lambda found: found[0] if found.start() in kept else _swapped(found[0]), caption)


def _kept(caption: str) -> set[int]:
    """Where words begin that name no side."""
    kept = {_side_in(found) for found in _every(_IDIOM, caption)}
    for found in _every(_LOOSE, caption):
        start = _side_in(found)
        if not _BEFORE.search(caption, 0, start):
            kept.add(start)
    return kept


def _every(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    """All matches, those that overlap among them."""
    found, start = [], 0
    while match := pattern.search(text, start):
        found.append(match)
        start = match.start() + 1
    return found


def _side_in(found: re.Match[str]) -> int:
    """Where the word left or right begins in a phrase."""
    return next((found.start(name) for name, side in found.groupdict().items() if side), found.start())


def _swapped(word: str) -> str:
    other = _SWAPPED[word.lower()]
    if word.isupper():
        return other.upper()
    return other.capitalize() if word[0].isupper() else other
