"""What a repair has done, in words that keep three things apart: alignment with pictures, agreement with the original
where the target model reads, and coherence in itself. gmp/verdict.py has the thresholds.

No finding rests on recall or on closeness to the original alone, and none is called better: what the diffusion model
draws is not in these numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import READ_POINTS
from .verdict import LEAST_PAIRS, LEAST_RECALL, ORDER_KEPT, ORDER_LOST, has_collapsed

if TYPE_CHECKING:
    from .bootstrap import Interval
    from .evidence import Encoder

# Pictures by which two recalls must differ, beside an interval of the difference without 0: with fewer that all changed
# to one side, a coin would do as well (sign test, 6 of 6: 0.03).
LEAST_CHANGED = 6

# Who reads what
READERS = {
    "penultimate": "SDXL, SD2 and SD3 read",
    "last": "SD1 reads",
    "pooled": "Flux reads",
    "projected": "contrastive training sees, and SDXL and SD3 read of clip_g",
}
UNKNOWN = (
    "These numbers cannot say what the diffusion model draws. It may have been trained together with the encoder as it "
    "was, and then one that is closer to the original is not always better for it: compare pictures of both, with the "
    "same prompts and seeds."
)


@dataclass(frozen=True)
class Outcome:
    """The finding on alignment, sentences on all three, and what cannot be known."""

    alignment: str  # risen, fallen, unclear; too_few, not_measured: no verdict
    text: tuple[str, ...]
    unknown: str
    warnings: tuple[str, ...]


def judge(encoders: Mapping[str, Encoder], gain: Interval | None, target: Sequence[str], pictures: int) -> Outcome:
    """encoders: `broken`, `repaired`, and `original` if there is one; gain: of recall@1; target: read points."""
    finding, text, warnings = _alignment(encoders, gain, pictures)
    return Outcome(finding, (text, *_agreement(encoders, target)), UNKNOWN, warnings)


def _alignment(
    encoders: Mapping[str, Encoder], gain: Interval | None, pictures: int
) -> tuple[str, str, tuple[str, ...]]:
    before, after = (encoders[name].recall for name in ("broken", "repaired"))
    if before is None or after is None or gain is None:
        text = "No pairs were held out, so nothing can be said of its alignment with pictures."
        return "not_measured", text, ("No pictures were held out: raise held_out to learn whether captions find them.",)
    numbers = f"recall@1 went from {_share(before)} to {_share(after)} on {pictures} held-out pictures"
    if pictures < LEAST_PAIRS:
        text = f"Alignment with pictures: {numbers}, too few for a verdict."
        warning = f"{pictures} held-out pictures are too few to judge alignment by; at least {LEAST_PAIRS} are needed."
        return "too_few", text, (warning,)
    original = encoders["original"].recall if "original" in encoders else None
    if original is not None:
        numbers += f" (the original: {_percent(original.value)})"
        if original.value < LEAST_RECALL / pictures:
            text = f"Alignment with pictures: {numbers}. The original finds next to none of them, so they do not tell."
            return "unclear", text, ("The original finds next to none of the held-out pictures: do the captions fit?",)
    certain = (gain.low > 0 or gain.high < 0) and abs(gain.value) * pictures >= LEAST_CHANGED
    finding = "unclear" if not certain else "risen" if gain.value > 0 else "fallen"
    words = "not clearly changed" if finding == "unclear" else finding
    text = f"Alignment with pictures has {words}: {numbers}; the same pictures are {_points(gain)} points apart."
    return finding, text, ()


def _share(one: Interval) -> str:
    return f"{_percent(one.value)} ({100 * one.low:.1f}–{100 * one.high:.1f})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "not known"


def _points(one: Interval) -> str:
    return f"{100 * one.value:+.1f} ({100 * one.low:+.1f} to {100 * one.high:+.1f})"


# ---- read points ----------------------------------------------------------------------------------------------------


def _agreement(encoders: Mapping[str, Encoder], target: Sequence[str]) -> list[str]:
    """Sentences on agreement and coherence, at the target's read points."""
    if "original" not in encoders:
        return [
            "There is no original that it can be compared with, so nothing is said of agreement with it.",
            _coherence(encoders, target or READ_POINTS[:3]),
        ]
    if not target:
        cosines = [
            f"{point} {_cosine(encoders['broken'], point)} → {_cosine(encoders['repaired'], point)}"
            for point in READ_POINTS[:3]
        ]
        return [
            "No anchor names a read point that was to be restored, and contrastive training sees only `projected`. "
            f"Cosines to the original where diffusion models read: {', '.join(cosines)}.",
            _coherence(encoders, READ_POINTS[:3]),
        ]
    return [*(_at(encoders, point) for point in target), _coherence(encoders, target)]


def _cosine(one: Encoder, point: str) -> str:
    return _number(one.to_original[point].cosine)


def _at(encoders: Mapping[str, Encoder], point: str) -> str:
    before, after = (_arranged(encoders[name], point) for name in ("broken", "repaired"))
    kept = encoders["repaired"].to_broken[point].cosine
    return (
        f"At {point}, which {READERS[point]}, prompts were arranged {before}; they are now arranged {after}, and "
        f"{_number(kept)} to the encoder as it was."
    )


def _arranged(one: Encoder, point: str) -> str:
    """How close an encoder is to the original, in arrangement and in place: two things."""
    structure, cosine = one.structure[point], one.to_original[point].cosine
    agreement = structure.agreement
    if not math.isfinite(agreement):
        return "in no order that can be computed, since states are not finite"
    how = "like" if agreement >= ORDER_KEPT else "unlike" if agreement < ORDER_LOST else "partly like"
    numbers = f"CKA {_number(structure.cka)}, rank correlation {_number(structure.rank_correlation)}"
    return f"{how} the original's ({numbers}), at cosine {_number(cosine)} to it"


def _coherence(encoders: Mapping[str, Encoder], points: Sequence[str]) -> str:
    """Whether the encoder keeps prompts apart, which it may do in any order and any place."""
    names = {"broken": "before", "repaired": "after", "original": "original"}
    told = [
        f"{point} ({', '.join(f'{w} {_told(encoders[n], point)}' for n, w in names.items() if n in encoders)})"
        for point in points
    ]
    words = f"Prompts told apart at {', '.join(told)}."
    now = encoders["repaired"].structure
    if not all(math.isfinite(now[point].told_apart) for point in points):
        words += " States of the repaired encoder are not finite: it cannot be used."
    elif "original" in encoders:
        own = encoders["original"].structure
        fallen = [point for point in points if has_collapsed(now[point], own[point])]
        words += f" They have run together at {' and '.join(fallen)}." if fallen else " They have not run together."
    return words


def _told(one: Encoder, point: str) -> str:
    return _percent(one.structure[point].told_apart)


def _number(value: float) -> str:
    return f"{value:.2f}"
