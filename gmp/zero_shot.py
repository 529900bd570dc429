"""Zero-shot classification: does the text encoder find the class of a picture by the name of the class alone?

Radford et al. 2021 (arXiv 2103.00020), section 3.1; the same numbers as open_clip's `build_zero_shot_classifier` and
`accuracy` give for the same prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .bootstrap import Interval, difference, interval, resamples, share
from .clip import TextTower, VisionTower
from .data.classes import Classes
from .errors import InputError, some
from .events import Event, progress
from .features import content_keys, embed_files
from .measure import text_features
from .tokenizer import Tokenize

TEMPLATES = Path(__file__).parent / "assets" / "templates.txt"
BATCH = 48  # pictures, of the batch accuracy
_CLASSES = 32  # whose prompts are embedded between two progress events
_CHUNK = 4096  # pictures whose scores are in memory at once


@dataclass(frozen=True)
class ClassAccuracy:
    """One class."""

    name: str
    pictures: int
    top_1: float | None  # share of its pictures that are told as this class; None where no picture could be read


@dataclass(frozen=True)
class Confusion:
    """Pictures of one class that were told as another one."""

    true: str
    told: str
    pictures: int


@dataclass(frozen=True)
class BatchAccuracy:
    """`batch_accuracy` and its conditions, without which it says nothing."""

    value: float
    batch: int  # pictures; fewer where there are not so many
    choices: float  # different labels in a batch, on average: what one has to choose from
    normalised: bool  # whether text features had unit length
    seed: int  # of the order of pictures


@dataclass(frozen=True)
class ZeroShot:
    """Classification of pictures by the names of classes. Shares are 0 to 1."""

    top_1: Interval
    top_5: Interval | None  # None for five classes or fewer, where it is always 1
    mean_per_class: Interval  # mean of the classes' own top-1: each class counts the same, however many pictures it has
    batch_top_1: BatchAccuracy  # an older measure, for comparison with published figures
    chance: float  # 1 / classes
    pictures: int
    classes: int
    templates: tuple[str, ...]
    per_class: tuple[ClassAccuracy, ...]  # in the order of Classes.names
    confusions: tuple[Confusion, ...]  # every pair that happened, the most frequent first
    broken: dict[str, str]  # pictures that do not decode, and why; not counted
    loose: tuple[str, ...]  # pictures beside the class folders; not counted
    right: tuple[bool, ...]  # of each picture that is counted, whether its class was told, in the order of their paths

    def as_json(self, confusions: int = 100, loose: int = 20) -> dict[str, object]:
        """JSON values; of confusions the most frequent ones, of loose pictures the first ones and their number."""
        return {
            "top_1": vars(self.top_1),
            "top_5": self.top_5 and vars(self.top_5),
            "mean_per_class": vars(self.mean_per_class),
            "batch_top_1": vars(self.batch_top_1),
            "chance": self.chance,
            "pictures": self.pictures,
            "classes": self.classes,
            "templates": list(self.templates),
            "per_class": [vars(one) for one in self.per_class],
            "confusions": [vars(one) for one in self.confusions[:confusions]],
            "confused_pairs": len(self.confusions),
            "broken": self.broken,
            "loose": {"pictures": len(self.loose), "first": list(self.loose[:loose])},
        }


def read_templates(path: Path = TEMPLATES) -> tuple[str, ...]:
    """Prompts, one a line, with `{}` where the name of the class goes; empty lines and lines with # at their start are
    passed over.

    Raises InputError for a file without prompts, and for prompts without `{}`, all at once.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The templates {path} can't be read ({error}). Give a text file in UTF-8.") from None
    return check_templates([line.strip() for line in lines if line.strip() and not line.startswith("#")])


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """The same templates. Raises InputError if there are none, or some without `{}`."""
    if not templates:
        raise InputError("There are no templates. Give at least one, for example: a photo of a {}")
    bare = [template for template in templates if "{}" not in template]
    if bare:
        raise InputError(
            f"{len(bare)} of {len(templates)} templates have no {{}}: {some(bare, sort=False)}. "
            "Write {} where the name of the class goes."
        )
    return tuple(templates)


def class_features(
    text: TextTower, tokenize: Tokenize, names: Sequence[str], templates: Sequence[str]
) -> Generator[Event, None, Tensor]:
    """One unit vector a class: the normalised mean of its prompts' normalised features. -> (classes, E), on the CPU

    The ensemble of Radford et al. 2021, section 3.1.4. Yields progress events.
    """
    templates = check_templates(templates)
    rows = []
    for start in range(0, len(names), _CLASSES):
        chunk = names[start : start + _CLASSES]
        prompts = [template.replace("{}", name) for name in chunk for template in templates]
        features = F.normalize(text_features(text, tokenize(prompts).ids), dim=-1)
        rows.append(F.normalize(features.view(len(chunk), len(templates), -1).mean(dim=1), dim=-1))
        yield progress("embed class names", start + len(chunk), len(names))
    return torch.cat(rows)


def embed_classes(
    vision: VisionTower, classes: Classes, cache: Path
) -> Generator[Event, None, tuple[Classes, Tensor, dict[str, str]]]:
    """The pictures that decode, their features (pictures, E), and the reasons of those that do not. Yields progress."""
    keys = yield from content_keys(classes.root, classes.pictures, cache)
    features, broken = yield from embed_files(vision, classes.root, classes.pictures, keys, cache)
    return classes.without(broken), features[:], broken


def zero_shot(
    text: TextTower,
    vision: VisionTower,
    tokenize: Tokenize,
    classes: Classes,
    cache: Path,
    *,
    templates: Sequence[str] | None = None,
    seed: int = 0,
) -> Generator[Event, None, ZeroShot]:
    """Tells the class of every picture; yields progress events. `text` may be a whole CLIP, `vision` its `visual`.

    templates: prompts with `{}`; None takes the shipped ones. seed: of the resamples, and of the batches' order.
    Pictures are embedded once by content and vision tower: a second text encoder costs its prompts alone.
    """
    templates = check_templates(read_templates() if templates is None else templates)
    classes, images, broken = yield from embed_classes(vision, classes, cache)
    texts = yield from class_features(text, tokenize, classes.names, templates)
    labels = torch.tensor(classes.labels)
    ranks, told = tell_classes(images, texts, labels)
    bare = text_features(text, tokenize(classes.names).ids)
    counts = Counter(zip(labels.tolist(), told.tolist(), strict=True))
    sizes = torch.bincount(labels, minlength=len(classes.names)).tolist()
    per_class = tuple(
        ClassAccuracy(name, size, counts[i, i] / size if size else None)
        for i, (name, size) in enumerate(zip(classes.names, sizes, strict=True))
    )
    wrong = sorted(((-count, pair) for pair, count in counts.items() if pair[0] != pair[1]))
    return ZeroShot(
        top_1=share(ranks < 1, seed),
        top_5=share(ranks < 5, seed) if len(classes.names) > 5 else None,
        mean_per_class=mean_per_class(ranks < 1, labels, seed),
        batch_top_1=_batch_top_1(images, bare, labels, seed),
        chance=1 / len(classes.names),
        pictures=len(classes),
        classes=len(classes.names),
        templates=templates,
        per_class=per_class,
        confusions=tuple(Confusion(classes.names[true], classes.names[as_], -n) for n, (true, as_) in wrong),
        broken=broken,
        loose=classes.loose,
        right=tuple((ranks < 1).tolist()),
    )


def gain(now: ZeroShot, before: ZeroShot, seed: int = 0) -> Interval:
    """top-1 minus that of another text encoder on the same pictures, which are drawn together in each resample."""
    return difference(torch.tensor(now.right).double() - torch.tensor(before.right).double(), seed)


def tell_classes(image_features: Tensor, class_features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """0-based rank of each picture's true class among all, and the class that it is told as. -> (N,), (N,)

    image_features (N, E) and class_features (C, E) of any length; labels (N,). As in retrieval, of equal scores the
    first class comes first, and a score that is not a number is the worst: an encoder that has collapsed tells every
    picture as the first class, and is right as often as chance.
    """
    texts = F.normalize(class_features.float(), dim=-1)
    order = torch.arange(len(texts))
    ranks, told = [], []
    for images, truth in zip(image_features.split(_CHUNK), labels.split(_CHUNK), strict=True):
        scores = F.normalize(images.float(), dim=-1) @ texts.T  # (chunk, C)
        scores = scores.masked_fill(scores.isnan(), -torch.inf)
        true = scores.gather(1, truth[:, None])
        ranks.append(((scores > true) | ((scores == true) & (order < truth[:, None]))).sum(dim=1))
        best = scores == scores.amax(dim=1, keepdim=True)
        told.append(torch.where(best, order, len(texts)).amin(dim=1))
    return torch.cat(ranks), torch.cat(told)


def mean_per_class(right: Tensor, labels: Tensor, seed: int) -> Interval:
    """Mean of the classes' own shares of `right` (N,), with its bootstrap interval over pictures.

    A class that is not drawn at all is left out of that resample's mean.
    """
    right, classes = right.double(), int(labels.max()) + 1

    def means(weights: Tensor) -> Tensor:  # (B, N) -> (B,)
        counts, hits = (
            torch.zeros(len(weights), classes, dtype=torch.float64).index_add_(1, labels, values)
            for values in (weights, weights * right)
        )
        return (hits / counts).nanmean(dim=1)

    value = means(torch.ones(1, len(right), dtype=torch.float64)).item()
    return interval(value, torch.cat([means(weights) for weights in resamples(len(right), seed)]))


def batch_accuracy(
    image_features: Tensor,
    text_features: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    batch: int = BATCH,
    normalised: bool = False,
) -> float:
    """Top-1 within batches, as zer0int/CLIP-fine-tune measures it (`ft-D-eval-imagenet-objectnet`). No classification.

    Pictures are shuffled and cut into batches; the candidates of a picture are the bare labels of its own batch, one a
    picture, and any label equal to its own is right. text_features (C, E) of the bare labels, labels (N,).

    The number depends on the batch as much as on the encoder: the batch decides how many different labels there are to
    choose from (48 pictures of 50 classes hold about 31), so a smaller batch, more classes with few pictures each, and
    the last batch, which is shorter, are easier. Not normalised, labels with long vectors win more often than by their
    direction. Its softmax changes no order and is left out, as is its rounding to fp16. Published with it: .845 for
    OpenAI's ViT-L/14, .914 after its fine-tune, on ObjectNet's MVT set. For everything else take top-1.
    """
    return _batches(image_features, text_features, labels, generator, batch, normalised)[0]


def _batches(
    images: Tensor, texts: Tensor, labels: Tensor, generator: torch.Generator, batch: int, normalised: bool
) -> tuple[float, float]:
    """Batch accuracy, and the mean number of different labels in a batch."""
    images, texts = images.float(), texts.float()
    if normalised:  # a picture's length changes no order within its row
        texts = F.normalize(texts, dim=-1)
    right = choices = 0
    cut = torch.randperm(len(labels), generator=generator).split(batch)
    for picked in cut:
        scores = images[picked] @ texts[labels[picked]].T  # (B, B)
        told = labels[picked][scores.masked_fill(scores.isnan(), -torch.inf).argmax(dim=1)]
        right += (told == labels[picked]).sum().item()
        choices += len(labels[picked].unique())
    return right / len(labels), choices / len(cut)


def _batch_top_1(images: Tensor, bare: Tensor, labels: Tensor, seed: int) -> BatchAccuracy:
    generator = torch.Generator().manual_seed(seed)
    value, choices = _batches(images, bare, labels, generator, BATCH, normalised=False)
    return BatchAccuracy(value, min(BATCH, len(labels)), choices, False, seed)
