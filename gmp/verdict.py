"""What the numbers of a diagnosis mean, in words: three damages that are told apart, and which repair fits.

An encoder can be *no longer aligned with vision* (seen at `projected` only), *far from the original* at the place that
a diffusion model reads, in where its states lie or in how it arranges prompts, and *incoherent in itself*: prompts no
longer told apart. Each comes without the others. None says that pictures are bad: a diffusion model that was trained
together with an encoder reads it where it went.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import presets
from .errors import InputError
from .presets import Preset
from .structure import Structure

# ---- thresholds: those of the structure lie between what a repair of the small world leaves and what its ruin does ---

# Agreement is the lower one of CKA and rank correlation. Noise of a tenth of the weights' size keeps 0.97, the repair
# 0.75 to 0.93 from `projected` to `penultimate`; the ruin has 0.22 to 0.56, shuffled tokens 0.16 to 0.44.
ORDER_KEPT = 0.9
ORDER_LOST = 0.7
# Root of the mean squared distance of states to the original's, over the spread of the original's own states: from 1
# on, the original's mean state, the same for every prompt, would be nearer to it than what is found. The small world's
# repair leaves 0.5, its ruin 1.9. A cosine would not do: states of one encoder have large parts in common, so that
# those of different prompts have cosines of 0.5 to 0.9.
FAR = 1.0
# Collapse, each against the original's own number: nothing absolute holds for all encoders, whose cosines between
# prompts range from 0 to 0.9. A fifth of the spread is below what the ruin leaves (0.29) and above a collapse (0.00).
COLLAPSED_SPREAD = 0.2  # of 1 - mean cosine
COLLAPSED_RANK = 1 / 3  # of the effective rank; the ruin keeps 0.7
LOST_PROMPTS = 0.1  # of all prompts, told apart by the original and no longer
# Share of prompts whose projected vector is nearest to the original's of the same prompt, among all of them. Noise of
# a hundredth of the weights' size costs none; many of these prompts differ in one word, and a repair with full recall
# on its own captions has lost a fifth. The ruin has 0.01.
ALIGNED = 0.9
UNALIGNED = 0.5
# The same with pictures: mean recall@1 of both directions over the original's.
ALIGNED_RECALL = 0.9
UNALIGNED_RECALL = 0.5
LEAST_PAIRS = 100  # pictures; with fewer the standard error of a recall is above 0.05, and chance above 0.01
LEAST_RECALL = 5  # times chance, that the original must reach for its recall to be a measure
# Weights alone say little: ruin and repair of the small world both turn rows by 3 to 10 degrees. What turned twice as
# far is another matrix.
DAMAGED_ANGLE = 20.0  # degrees, mean over the rows of a part's matrices
DAMAGED_LENGTH = 0.25  # of the lengths of rows
DAMAGED_VECTORS = 0.5  # relative change of biases and LayerNorms


# GmP Repair's choices of `target`, by the read point that its anchors hold.
REPAIR_TARGETS = {
    "penultimate": "SDXL, SD2, SD3 (penultimate)",
    "pooled": "Flux (pooled)",
    "last": "SD1 (last)",
}


@dataclass(frozen=True)
class Target:
    """A diffusion model and where it reads this text encoder."""

    name: str
    read_points: tuple[str, ...]
    preset: str  # of `presets`, by name


def targets(member: str | None) -> dict[str, Target]:
    """By the name that commands and nodes give; clip_g's vector behind the projection is read as well."""
    if member == "clip_g":
        sdxl = Target("SDXL", ("penultimate", "projected"), "clip-g")
    else:
        sdxl = Target("SD2" if member == "clip_h" else "SDXL", ("penultimate",), "sdxl-repair")
    return {"sdxl": sdxl, "sd1": Target("SD1", ("last",), "sd15"), "flux": Target("Flux", ("pooled",), "flux-repair")}


TARGETS = tuple(targets(None))


def target_of(name: str, member: str | None) -> Target:
    """One of `targets`. Raises InputError for a name that is not in TARGETS."""
    if name not in TARGETS:
        raise InputError(f"target {name!r} is not one of {', '.join(TARGETS)}")
    return targets(member)[name]


# ---- one read point -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """One place in an encoder, against the original's: `order`, `far` and `collapsed` are independent of each other."""

    state: str  # untouched, moved, damaged
    cosine: float | None  # of states to the original's, mean over rows; None where states are not finite
    error: float | None  # root of the mean squared distance over the original's spread: 1 is as far off as the mean
    structure: Structure | None
    original: Structure
    order: str  # kept, loosened, lost
    far: bool
    collapsed: bool


def read(
    untouched: bool, cosine: float | None, error: float | None, structure: Structure | None, original: Structure
) -> Reading:
    """untouched: nothing before this place has moved. structure None: states are not finite."""
    if structure is None or cosine is None or error is None:
        return Reading("damaged", None, None, None, original, "lost", True, True)
    agreement = structure.agreement
    order = "kept" if agreement >= ORDER_KEPT else "lost" if agreement < ORDER_LOST else "loosened"
    collapsed = has_collapsed(structure, original)
    if untouched:
        order, collapsed = "kept", False
    state = "untouched" if untouched else "damaged" if collapsed or order == "lost" else "moved"
    return Reading(state, cosine, error, structure, original, order, error > FAR and not untouched, collapsed)


def has_collapsed(mine: Structure, original: Structure) -> bool:
    """Whether prompts have run together, measured by what the original makes of the same ones."""
    return (
        1 - mine.mean_cosine < COLLAPSED_SPREAD * (1 - original.mean_cosine)
        or mine.effective_rank < COLLAPSED_RANK * original.effective_rank
        or mine.told_apart < original.told_apart - LOST_PROMPTS
    )


def coherence(reading: Reading) -> str:
    """The clause on the encoder in itself."""
    one = reading.structure
    if one is None:
        return "not computable: its states overflow"
    if reading.state == "untouched":
        return "the original"
    if reading.collapsed:
        told = f"tells {one.told_apart:.0%} of the prompts apart, the original {reading.original.told_apart:.0%}"
        spread = f"mean cosine of prompts {one.mean_cosine:.3f} against {reading.original.mean_cosine:.3f}"
        rank = f"effective rank {one.effective_rank:.0f} against {reading.original.effective_rank:.0f}"
        return f"incoherent in itself, collapsed ({told}; {spread}; {rank})"
    return f"coherent in itself (tells {one.told_apart:.0%} of the prompts apart)"


def distance(reading: Reading) -> str:
    """The clause on the original."""
    if reading.cosine is None:
        return "not comparable with the original"
    if reading.state == "untouched":
        return "unchanged"
    one, where = reading.structure, "far from" if reading.far else "near"
    how = {"kept": "as there", "loosened": "partly otherwise", "lost": "otherwise"}[reading.order]
    return (
        f"{where} the original (error {reading.error:.2f}, cosine {reading.cosine:.2f}), with prompts arranged {how} "
        f"(CKA {one.cka:.2f}, rank correlation {one.rank_correlation:.2f})"
    )


# ---- alignment ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alignment:
    """Whether captions still find pictures: guessed from `projected`, or measured."""

    finding: str  # aligned, weakened, lost, unknown
    measured: bool
    recognised: float | None  # share of prompts nearest to the original's vector of the same prompt
    recall_at_1: float | None  # mean of both directions
    original_recall_at_1: float | None
    images: int


def align(
    recognised: float | None, recalls: tuple[float, float] | None, images: int
) -> tuple[Alignment, tuple[str, ...]]:
    """The finding, and warnings. recalls: of the encoder and of the original, None without pictures."""
    warnings = []
    if recalls and images < LEAST_PAIRS:
        warnings.append(
            f"{images} pictures are too few to judge alignment by, at least {LEAST_PAIRS} are needed: their recall is "
            "told, and the verdict on alignment stays a guess from `projected`."
        )
    elif recalls and recalls[1] < LEAST_RECALL / images:
        warnings.append(
            f"The original itself finds next to none of these pictures (recall@1 {recalls[1]:.3f}): they and their "
            "captions do not tell whether the encoder is aligned."
        )
    elif recalls:
        share = recalls[0] / recalls[1]
        finding = "aligned" if share >= ALIGNED_RECALL else "lost" if share < UNALIGNED_RECALL else "weakened"
        return Alignment(finding, True, recognised, *recalls, images), ()
    if recognised is None:
        finding = "unknown"
    else:
        finding = "aligned" if recognised >= ALIGNED else "lost" if recognised < UNALIGNED else "weakened"
    return Alignment(finding, False, recognised, *(recalls or (None, None)), images), tuple(warnings)


def alignment_clause(alignment: Alignment) -> str:
    words = {
        "aligned": "aligned with vision",
        "weakened": "less well aligned with vision than the original",
        "lost": "no longer aligned with vision",
        "unknown": "of unknown alignment with vision",
    }[alignment.finding]
    if alignment.measured:
        return f"{words} (recall@1 {alignment.recall_at_1:.2f}, the original's {alignment.original_recall_at_1:.2f})"
    if alignment.recognised is None:
        return f"{words} (there is no text projection)"
    return f"probably {words} ({alignment.recognised:.0%} of projected prompts lie nearest to their original)"


# ---- the verdict ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """One sentence, what to do, and what cannot be known."""

    finding: str  # identical, rounded, unread, healthy, misaligned, loosened, far, rearranged, collapsed
    text: str
    preset: Preset | None
    advice: str
    unknown: tuple[str, ...]


_PAIR = (
    "Whether the diffusion model that goes with it needs exactly these changes is not in the weights: an encoder far "
    "from the original may still serve the model that was trained with it, and the original swapped in may draw worse. "
    "Compare pictures before and after."
)
_SIGHT = (
    "Alignment with vision is guessed from `projected` against the original's; captioned pictures and the vision tower "
    "would measure it."
)


def judge(target: Target, readings: Mapping[str, Reading], alignment: Alignment, pattern: str) -> Verdict:
    """readings by read point; pattern as `Trained` has it."""
    unknown = () if alignment.measured or pattern == "identical" else (_SIGHT,)
    if pattern in ("identical", "rounded"):
        how = "bit by bit" if pattern == "identical" else "but for the rounding of storage"
        text = f"This is the original, {how}: there is nothing to repair."
        return Verdict(pattern, text, None, "No repair is suggested.", ())
    points = [readings[point] for point in target.read_points if point in readings]
    places = " and ".join(point for point in target.read_points if point in readings)
    finding = _finding(points, alignment)
    if finding == "unread":
        text = f"{target.name} sees nothing of what was trained: what it reads, {places}, is the original's"
    else:
        text = f"As {target.name} reads it, the encoder is {_clauses(target, readings)}"
    text = f"{text}; it is {alignment_clause(alignment)}."
    preset = _preset(finding, target)
    changed = any(one.state != "untouched" for one in points)
    return Verdict(finding, text, preset, _advice(finding, target, preset), (*unknown, *((_PAIR,) if changed else ())))


def _clauses(target: Target, readings: Mapping[str, Reading]) -> str:
    places = [point for point in target.read_points if point in readings]
    clauses = [f"{coherence(readings[point])} and {distance(readings[point])} at {point}" for point in places]
    return ", and ".join(clauses)


def _finding(points: Sequence[Reading], alignment: Alignment) -> str:
    if any(one.collapsed for one in points):
        return "collapsed"
    if any(one.order == "lost" for one in points):
        return "rearranged"
    if any(one.far for one in points):
        return "far"
    if all(one.state == "untouched" for one in points):
        return "unread"
    if any(one.order == "loosened" for one in points):
        return "loosened"
    return "misaligned" if alignment.finding in ("lost", "weakened") else "healthy"


def _preset(finding: str, target: Target) -> Preset | None:
    if finding in ("collapsed", "rearranged", "far"):
        return presets.preset(target.preset)
    if finding in ("loosened", "misaligned"):
        return presets.aimed(presets.preset("gentle"), target.read_points[0])
    return None


def _advice(finding: str, target: Target, preset: Preset | None) -> str:
    if finding == "unread":
        return f"No repair is suggested: what {target.name} reads is as it was."
    if preset is None:
        return "No repair is suggested: nothing here looks broken."
    why = {
        "collapsed": "what is no longer told apart can't come back from this encoder alone; if pictures still obey "
        "their prompts, raise broken_weight",
        "rearranged": "give captions of what the fine-tune taught as concepts, which keeps it; if pictures of the "
        "paired model still obey their prompts, raise broken_weight or leave it alone",
        "far": "if it was trained together with its diffusion model, give captions of what it was taught as concepts "
        "and raise broken_weight rather than anchor_weight, or leave it alone",
        "loosened": "where it is read, prompts are only partly rearranged",
        "misaligned": "what is read is sound, the alignment alone seems to have suffered",
    }[finding]
    return f"Suggested repair: {preset}; {why}."
