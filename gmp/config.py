"""The settings of one repair, checked as a whole before anything runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from . import READ_POINTS
from .errors import InputError
from .optim import SCHEDULES, STATES

TRAIN = ("text", "both")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
TEACHERS = ("original", "broken")
NEGATIVES = ("batch", "all")
# the trained objective on held-out pairs; recall@1, mean of both directions; cosine to the original at a read point
BEST_BY = ("objective", "recall", *READ_POINTS)
VERSION = 3


@dataclass(frozen=True)
class Anchor:
    """Keeps the text tower near a teacher's at one read point, with a weight on the loss."""

    teacher: str  # "original" or "broken"
    read_point: str
    weight: float

    def __str__(self) -> str:
        return f"{self.teacher}:{self.read_point}={self.weight:g}"

    @classmethod
    def parse(cls, text: str) -> Anchor:
        """`penultimate=0.3` or `broken:pooled=0.1`; the teacher is the original where none is named."""
        name, _, weight = text.partition("=")
        teacher, _, read_point = name.rpartition(":")
        try:
            return cls(teacher.strip() or "original", read_point.strip(), float(weight))
        except ValueError:
            raise InputError(
                f"anchor {text!r} is not of the form [TEACHER:]READ_POINT=WEIGHT, such as penultimate=0.3"
            ) from None


SDXL_ANCHOR = Anchor("original", "penultimate", 0.3)


@dataclass(frozen=True)
class RepairConfig:
    """One repair. A *batch* is the pairs of one forward pass, a *step* is `batch × accumulate` pairs."""

    train: str = "text"  # "text": vision locked, its features cached; "both"
    epochs: int = 5
    batch: int = 256  # pairs
    accumulate: int = 1  # batches per step; every pair of the step is a negative for every other
    lr: float | None = None  # None: `default_lr` of the text tower's width
    rates: dict[str, float] = field(default_factory=dict)  # shell pattern over parameter names -> factor on lr
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    schedule: str = "cosine"
    warmup: float = 0.1  # share of all steps
    negatives: str = "batch"  # "all": each caption's picture is told apart from all training pictures
    smoothing: float = 0.0  # of labels
    clip_norm: float = 1.0  # of all gradients; 0 is off
    geometric: bool = True  # train r and theta of the MLPs
    anchors: tuple[Anchor, ...] = (SDXL_ANCHOR,)
    anchor_captions: int = 64  # per step, at the full context length
    # keep only each block's input and compute the rest again in the backward pass: a third slower, a fraction of memory
    checkpointing: bool = False
    # AdamW's two moments; bf16 and 8bit round them, and take half and a quarter of the memory
    optimizer_state: str = "fp32"
    precision: str = "auto"  # bf16 where the GPU has it, else fp16; fp32 on the CPU
    held_out: float = 0.05  # share of the pictures that is measured and not trained on
    held_out_most: int = 1000
    measure_every: int = 0  # steps; an epoch's end is always measured
    best_by: str = "objective"  # what the best encoder is chosen by: one of BEST_BY
    patience: int = 0  # measurements without a better one after which a run ends early; 0 is off
    save_every: int = 200  # steps; an epoch's end is always saved
    keep: int = 3  # checkpoints
    seed: int = 0

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise InputError("These settings do not work: " + "; ".join(problems) + ".")

    @property
    def step_pairs(self) -> int:
        return self.batch * self.accumulate

    def rate(self, text_width: int) -> float:
        """The learning rate of this repair, before schedule and factors."""
        return self.lr or default_lr(text_width)

    def to_json(self) -> dict[str, object]:
        return {"version": VERSION} | json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> RepairConfig:
        """Raises InputError for unknown keys and for a version that this code does not know."""
        values = dict(values)
        version = values.pop("version", VERSION)
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if version != VERSION or unknown:
            raise InputError(f"config of version {version} with unknown keys {unknown}; this is version {VERSION}")
        if "anchors" in values:
            values["anchors"] = tuple(Anchor(**anchor) for anchor in values["anchors"])
        if "betas" in values:
            values["betas"] = tuple(values["betas"])
        return cls(**values)


def default_lr(text_width: int) -> float:
    """1e-3 · (64 / width)²: 1e-3 for the shipped world, 7e-6 for clip_l, 2.5e-6 for clip_g.

    A rule of thumb through two points: a rate that repairs the small world, and the 1e-6 to 1e-5 that people fine-tune
    full-size CLIPs with.
    """
    return 1e-3 * (64 / text_width) ** 2


def _problems(config: RepairConfig) -> list[str]:
    choices = {
        "train": TRAIN, "schedule": SCHEDULES, "precision": PRECISIONS, "best_by": BEST_BY, "negatives": NEGATIVES,
        "optimizer_state": STATES,
    }  # fmt: skip
    problems = [
        f"{name} is {getattr(config, name)!r}, not one of {', '.join(allowed)}"
        for name, allowed in choices.items()
        if getattr(config, name) not in allowed
    ]
    least = {
        "epochs": 1, "batch": 2, "accumulate": 1, "anchor_captions": 1, "held_out_most": 1, "save_every": 1, "keep": 1,
        "seed": 0, "measure_every": 0, "patience": 0, "weight_decay": 0, "clip_norm": 0,
    }  # fmt: skip
    problems += [
        f"{n} is {getattr(config, n)}, less than {low}" for n, low in least.items() if not getattr(config, n) >= low
    ]
    for name, high in {"warmup": 1, "smoothing": 1, "held_out": 0.9}.items():
        if not 0 <= getattr(config, name) < high:
            problems.append(f"{name} is {getattr(config, name)}, not in 0..{high}")
    measuring = {"patience": 0, "measure_every": 0, "best_by": "objective"}
    if not config.held_out:
        asked = [
            f"{name} is {getattr(config, name)}" for name, off in measuring.items() if getattr(config, name) != off
        ]
        problems += [f"{one} and no pictures are held out to measure; raise held_out" for one in asked]
    if config.negatives == "all" and config.train == "both":
        problems.append("negatives is all, which needs a locked vision tower: set train to text or negatives to batch")
    if config.lr is not None and not 0 < config.lr < 1:
        problems.append(f"lr is {config.lr}, not between 0 and 1")
    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        problems.append(f"betas are {config.betas}, not two numbers in 0..1")
    problems += [f"the rate of {p} is {f}, less than 0" for p, f in config.rates.items() if not f >= 0]
    places = [f"{anchor.teacher}:{anchor.read_point}" for anchor in config.anchors]
    problems += [f"anchor {p} is given more than once" for p in sorted(set(places)) if places.count(p) > 1]
    for anchor in config.anchors:
        if anchor.teacher not in TEACHERS:
            problems.append(f"anchor teacher {anchor.teacher!r} is not one of {', '.join(TEACHERS)}")
        if anchor.read_point not in READ_POINTS:
            problems.append(f"anchor read point {anchor.read_point!r} is not one of {', '.join(READ_POINTS)}")
        if not anchor.weight > 0:
            problems.append(f"anchor weight {anchor.weight} is not above 0")
    return problems
