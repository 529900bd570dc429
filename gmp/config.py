"""The settings of one repair: documented, checked as a whole before anything runs, one TOML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from . import READ_POINTS
from .errors import InputError
from .optim import DECAYS, OPTIMIZERS, SCHEDULES, STATES
from .settings import REQUIRED, SettingsError, as_toml, build, faults, plain, read_toml, setting

TRAIN = ("text", "both")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
LOSSES = ("infonce", "siglip", "seed")
NEGATIVES = ("batch", "all", "pass")
TOWERS = ("text", "vision", "both")
TEACHERS = ("original", "broken")
ANCHOR_CAPTIONS = ("dataset", "concepts")
FADES = ("linear", "cosine")
LAYERS = ("mlp", "qkv", "out", "projection")
PARTS = ("both", "r", "theta")
ENDS = ("output", "input")
CHOICES = ("random", "first", "first_two", "longest", "in_turn")
CUTS = ("sentence", "tokens")
CROPS = ("centre", "letterbox", "salient")
# the trained objective on held-out pairs; recall@1, mean of both directions; cosine to the original at a read point
BEST_BY = ("objective", "recall", *READ_POINTS)
VERSION = 4


@dataclass(frozen=True)
class Anchor:
    """Keeps the text tower near a teacher's at one read point, with a weight on the loss."""

    teacher: str = setting(REQUIRED, "whose states it is held to", choices=TEACHERS)
    read_point: str = setting(REQUIRED, "where", choices=READ_POINTS)
    weight: float = setting(REQUIRED, "on the loss, at the first step", above=0)
    captions: str = setting(
        "dataset",
        "on which captions: those of the step's pairs, or the captions of concepts that are given beside the data set",
        choices=ANCHOR_CAPTIONS,
    )
    end: float | None = setting(None, "its weight at the last step; not set: the same all the time", least=0)
    fade: str = setting("linear", "how the weight goes to its end", choices=FADES)

    def __str__(self) -> str:
        at = "" if self.captions == "dataset" else f"@{self.captions}"
        end = "" if self.end is None else f"..{self.end:g}" + ("" if self.fade == "linear" else f",{self.fade}")
        return f"{self.teacher}{at}:{self.read_point}={self.weight:g}{end}"

    @classmethod
    def parse(cls, text: str) -> Anchor:
        """`penultimate=0.3`, `broken:pooled=0.1` or `broken@concepts:penultimate=0.5..0.1,cosine`.

        The teacher is the original where none is named.
        """
        name, _, values = text.partition("=")
        who, _, read_point = name.rpartition(":")
        teacher, _, captions = who.partition("@")
        weights, _, fade = values.partition(",")
        weight, _, end = weights.partition("..")
        try:
            given = {"end": end and float(end), "captions": captions.strip(), "fade": fade.strip()}
            given = {key: value for key, value in given.items() if value != ""}
            return cls(teacher.strip() or "original", read_point.strip(), float(weight), **given)
        except ValueError:
            raise InputError(
                f"anchor {text!r} is not of the form [TEACHER[@CAPTIONS]:]READ_POINT=WEIGHT[..END], such as "
                "penultimate=0.3"
            ) from None


@dataclass(frozen=True)
class Geometric:
    """Linears that are trained as radius r and direction theta."""

    layers: tuple[str, ...] = setting(("mlp",), "which ones of a block, and the towers' projections", choices=LAYERS)
    tower: str = setting("both", "of what trains", choices=TOWERS)
    first: int = setting(0, "the first block; -1 is the last one of its tower")
    last: int = setting(-1, "the last block, likewise")
    train: str = setting("both", "what of them moves: r and theta, or one while the other is frozen", choices=PARTS)
    sphere: bool = setting(
        False, "bring theta's rows back to length 1 after each step, so that a rate is an angle all the time"
    )


@dataclass(frozen=True)
class Unfreeze:
    """Blocks join the training one after the other."""

    start: int = setting(1, "blocks of each tower that train from the first step", least=1)
    until: float = setting(0.5, "share of all steps after which all blocks train", above=0, most=1)
    end: str = setting("output", "where the first ones are", choices=ENDS)


@dataclass(frozen=True)
class Neuron:
    """A feature of an MLP's hidden layer, before its activation, that is scaled while training and only then."""

    tower: str = setting(REQUIRED, "text or vision", choices=TOWERS[:2])
    block: int = setting(REQUIRED, "counted from 0", least=0)
    feature: int = setting(REQUIRED, "counted from 0", least=0)
    factor: float = setting(REQUIRED, "what it is multiplied by; 1 leaves it")


@dataclass(frozen=True)
class Captions:
    """Which caption of a picture is taken, and what is done to it."""

    choose: str = setting(
        "random",
        "of a picture's captions: any, the first, one of the first two, the longest that fits the context, or one "
        "after the other from epoch to epoch",
        choices=CHOICES,
    )
    separator: str = setting(",", "between the tags of a caption, for the next three")
    shuffle: bool = setting(False, "put tags into another order each time")
    dropout: float = setting(0.0, "chance that a tag is left out this time", least=0, below=1)
    keep_first: int = setting(0, "tags at the front that are neither moved nor left out", least=0)
    prefix: str = setting("", "put in front of every caption")
    suffix: str = setting("", "put behind every caption; it survives a cut")
    cut: str = setting(
        "sentence", "where captions beyond the context end: at a sentence or comma, or at its last token", choices=CUTS
    )
    mirror: bool = setting(True, "left and right change places in the caption of a picture that is flipped")


@dataclass(frozen=True)
class Pictures:
    """How pictures are made square, and how they vary."""

    crop: str = setting(
        "centre",
        "the middle, as CLIP has it; the whole on a plain ground; or the square that the vision tower attends to",
        choices=CROPS,
    )
    views: int = setting(1, "of each picture that a locked vision tower embeds; the first is the crop itself", least=1)
    scale: float = setting(
        1.0, "least share of the area that a random view or augmentation takes; 1 takes the crop", above=0, most=1
    )
    flip: float = setting(0.0, "chance of a horizontal flip", least=0, most=1)
    jitter: tuple[float, float, float, float] = setting(
        (0.0, 0.0, 0.0, 0.0), "most change of brightness, contrast, saturation and hue", least=0
    )
    jitter_chance: float = setting(1.0, "chance of that change", least=0, most=1)
    grey: float = setting(0.0, "chance that colours are taken out", least=0, most=1)

    @property
    def varies(self) -> bool:
        """Whether a picture looks otherwise from time to time."""
        return self.scale < 1 or self.flip > 0 or any(self.jitter) or self.grey > 0


SDXL_ANCHOR = Anchor("original", "penultimate", 0.3)


@dataclass(frozen=True)
class RepairConfig:
    """One repair. A *batch* is the pairs of one forward pass, a *step* is `batch × accumulate` pairs."""

    train: str = setting("text", "text: the vision tower is locked, its features are cached; or both", choices=TRAIN)
    epochs: int = setting(5, "times through the pictures", least=1)
    batch: int = setting(256, "pairs in one forward pass", least=2)
    accumulate: int = setting(1, "batches in one step; every pair of the step is a negative of every other", least=1)
    loss: str = setting(
        "infonce",
        "CLIP's softmax, SigLIP's sigmoid, or that of the original scripts, which normalises the matrix of logits",
        choices=LOSSES,
    )
    negatives: str = setting(
        "batch",
        "what a caption tells its picture from: the pictures of its step; all training pictures, which needs a locked "
        "vision tower; or only those of its forward pass, as the original scripts accumulate",
        choices=NEGATIVES,
    )
    temperature: float | None = setting(
        None, "fixed temperature of the loss; not set: the CLIP's own, which trains", above=0, most=1
    )
    smoothing: float = setting(0.0, "of labels", least=0, below=1)
    entropy: float = setting(0.0, "weight of the softmax's entropy, which is rewarded: less certainty", least=0)
    anchor_captions: int = setting(64, "captions per step and source that anchors read, at full length", least=1)
    lr: float | None = setting(
        None, "learning rate; not set: 1e-3 · (64 / text width)², 7e-6 for clip_l", above=0, below=1
    )
    layer_decay: float = setting(1.0, "factor on the rate for each block away from a tower's output", above=0, most=1)
    optimizer: str = setting("adamw", "adabelief and lion are of pytorch-optimizer", choices=OPTIMIZERS)
    optimizer_state: str = setting(
        "fp32", "what AdamW keeps its two moments in; 8bit needs torchao or bitsandbytes", choices=STATES
    )
    betas: tuple[float, float] = setting((0.9, 0.98), "of the optimizer's moments", least=0, below=1)
    eps: float = setting(1e-8, "of the optimizer's division", above=0, below=1)
    weight_decay: float = setting(0.01, "of the optimizer", least=0)
    decay: str = setting(
        "matrices", "what decays: matrices, without r, biases, LayerNorms and embeddings; or all", choices=DECAYS
    )
    schedule: str = setting("cosine", "of the rate over the steps, after its rise", choices=SCHEDULES)
    warmup: float = setting(0.1, "share of the schedule in which the rate rises", least=0, below=1)
    schedule_length: float = setting(
        1.0, "of the schedule, in trainings: beyond 1 it does not reach its end", least=1, most=100
    )
    cycle_momentum: bool = setting(False, "let the first beta fall from 0.95 to 0.85 while the rate rises, and back")
    clip_norm: float = setting(1.0, "most norm of all gradients together; 0 is off", least=0)
    clip_adaptive: float = setting(
        0.0, "most norm of a row's gradient over the norm of the row itself, such as 0.01; 0 is off", least=0
    )
    ema: float = setting(
        0.0, "decay of the mean of weights that is measured and given, such as 0.999; 0 is off", least=0, below=1
    )
    text_blocks: int | None = setting(
        None, "blocks at the text tower's output that train, embeddings locked; not set: all of it", least=0
    )
    vision_blocks: int | None = setting(
        None, "likewise of the vision tower, where both train; 0 leaves its projection", least=0
    )
    embeddings: bool = setting(True, "train the embeddings of tokens, patches and positions")
    checkpointing: bool = setting(
        False, "keep each block's input only and compute the rest again: less memory, a third slower"
    )
    precision: str = setting("auto", "auto: bf16 where the GPU has it, else fp16; fp32 on a CPU", choices=PRECISIONS)
    held_out: float = setting(0.05, "share of the pictures that is measured and not trained on", least=0, below=0.9)
    held_out_most: int = setting(1000, "pictures that are held out at the most", least=1)
    measure_every: int = setting(0, "steps; an epoch's end is always measured", least=0)
    best_by: str = setting("objective", "what the best encoder on held-out pictures has the most of", choices=BEST_BY)
    patience: int = setting(0, "measurements without a better one after which a run ends early; 0 is off", least=0)
    save_every: int = setting(200, "steps; an epoch's end is always saved", least=1)
    keep: int = setting(3, "newest checkpoints that are kept", least=1)
    seed: int = setting(0, "of order, captions and views", least=0)
    rates: dict[str, float] = setting(
        dict, "factors on the rate, by shell pattern over parameter names; the last that matches counts, 0 freezes",
        least=0,
    )  # fmt: skip
    captions: Captions = setting(Captions(), "which caption of a picture is taken, and what is done to it")
    pictures: Pictures = setting(Pictures(), "how pictures are made square, and how they vary")
    unfreeze: Unfreeze | None = setting(None, "blocks join one after the other; not set: all train from the start")
    geometric: tuple[Geometric, ...] = setting(
        (Geometric(),), "layers trained as radius r and direction theta; the last that names a layer counts"
    )
    anchors: tuple[Anchor, ...] = setting(
        (SDXL_ANCHOR,), "where the text tower is held to a teacher's; those on concepts where such captions are given"
    )
    neurons: tuple[Neuron, ...] = setting((), "features of MLPs that are scaled while training")

    def __post_init__(self) -> None:
        problems = [*faults(self), *_contradictions(self)]
        if problems:
            raise SettingsError("The configuration", problems)

    @property
    def step_pairs(self) -> int:
        return self.batch * self.accumulate

    @property
    def trains_temperature(self) -> bool:
        """Whether the loss gives `logit_scale` a gradient; where it does not, that is to be frozen."""
        return self.temperature is None and self.loss != "seed"  # which has one of its own

    def rate(self, text_width: int) -> float:
        """The learning rate of this repair, before schedule and factors."""
        return self.lr or default_lr(text_width)

    def to_json(self) -> dict[str, object]:
        return {"version": VERSION} | plain(self)

    @classmethod
    def from_json(cls, values: Mapping[str, object], name: str = "the configuration") -> RepairConfig:
        """Raises InputError for all that does not work, and for a version that this code does not know."""
        values = dict(values)
        version = values.pop("version", VERSION)
        if version != VERSION:
            raise InputError(f"{name} is of version {version}; this program reads version {VERSION}")
        return build(cls, values, name)

    def to_toml(self) -> str:
        """Every setting, each under its sentence."""
        return as_toml(self, {"version": VERSION})

    @classmethod
    def from_toml(cls, text: str, name: str) -> RepairConfig:
        """What is not given has its default. Raises InputError as `from_json`, and for what is not TOML."""
        return cls.from_json(read_toml(text, name), name)


# Settings that are one value; the others are tables and lists.
SINGLE = {
    field.name: {"int": int, "float": float, "str": str, "bool": bool}[field.type.removesuffix(" | None")]
    for field in fields(RepairConfig)
    if field.type.removesuffix(" | None") in ("int", "float", "str", "bool")
}


def holding(config: RepairConfig, concepts: Sequence[str]) -> RepairConfig:
    """The configuration with the anchors that hold: those on concepts need captions of such."""
    if concepts:
        return config
    return replace(config, anchors=tuple(anchor for anchor in config.anchors if anchor.captions != "concepts"))


def default_lr(text_width: int) -> float:
    """1e-3 · (64 / width)²: 1e-3 for the shipped world, 7e-6 for clip_l, 2.5e-6 for clip_g.

    A rule of thumb through two points: a rate that repairs the small world, and the 1e-6 to 1e-5 that people fine-tune
    full-size CLIPs with.
    """
    return 1e-3 * (64 / text_width) ** 2


def _contradictions(config: RepairConfig) -> list[str]:
    """What does not work together."""
    problems = []
    if not config.held_out:
        off = {"patience": 0, "measure_every": 0, "best_by": "objective"}
        asked = [f"{name} is {getattr(config, name)}" for name, value in off.items() if getattr(config, name) != value]
        problems += [f"{one} and no pictures are held out to measure; raise held_out" for one in asked]
    if config.negatives == "all" and config.train == "both":
        problems.append("negatives is all, which needs a locked vision tower: set train to text or negatives to batch")
    if config.negatives == "all" and (config.loss != "infonce" or config.entropy):
        problems.append("negatives is all, which only infonce without entropy computes: set negatives to batch")
    if not config.captions.separator and (config.captions.shuffle or config.captions.dropout):
        problems.append("captions.separator is empty; give what stands between tags, such as ','")
    for number, one in enumerate(config.geometric):
        if one.first > one.last and (one.first < 0) == (one.last < 0):
            problems.append(f"geometric[{number}] goes from block {one.first} to {one.last}: give the first one first")
    if config.loss == "siglip" and (config.smoothing or config.entropy):
        problems.append("loss is siglip, which has no softmax: set smoothing and entropy to 0")
    if config.optimizer != "adamw" and config.optimizer_state != "fp32":
        problems.append(f"optimizer_state {config.optimizer_state} is AdamW's: set it to fp32")
    if config.cycle_momentum and config.optimizer_state == "8bit":
        problems.append("cycle_momentum changes a beta that 8-bit AdamW is compiled for: set optimizer_state to bf16")
    if config.train == "text":
        problems += [f"{what}, which is locked: set train to both" for what in _about_vision(config)]
    if config.pictures.jitter[3] > 0.5:
        problems.append(f"pictures.jitter[3] is {config.pictures.jitter[3]}: hue is a share of its circle, 0.5 at most")
    if config.pictures.views > 1 and config.train == "both":
        problems.append("pictures.views are for a locked vision tower; where both train every epoch sees its own view")
    if config.pictures.views == 1 and config.train == "text" and config.pictures.varies:
        problems.append("pictures vary and a locked vision tower sees each once: set pictures.views to 2 or more")
    places = [(a.teacher, a.read_point, a.captions) for a in config.anchors]
    for place in sorted(set(places)):
        if places.count(place) > 1:
            problems.append(f"anchor {place[0]}@{place[2]}:{place[1]} is given more than once")
    return problems


def _about_vision(config: RepairConfig) -> list[str]:
    about = ["vision_blocks is about the vision tower"] if config.vision_blocks is not None else []
    about += [f"neurons has block {n.block} of the vision tower" for n in config.neurons if n.tower == "vision"]
    return about + ["geometric names the vision tower" for g in config.geometric if g.tower == "vision"]
