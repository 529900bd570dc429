"""Typographic attack: a word is written over a picture. Does the CLIP read it instead of looking?

Goh et al. 2021 ("Multimodal Neurons", Distill); measured as SCAM (Westerhoff et al. 2025, arXiv 2504.04893) and RTA-100
(Azuma and Matsui 2023, arXiv 2304.04512) do: a choice of two for each picture, what it shows or what is written on it.
Chance is 1/2, and a CLIP that looks has the same accuracy with and without the word, but for what the word covers.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .bootstrap import Interval, ratio, share
from .clip import TextTower, VisionTower
from .data.captions import Index
from .data.classes import Classes
from .data.images import load_picture, normalize, square
from .errors import InputError
from .events import Event, progress
from .features import content_keys, embed_files
from .relations import wins
from .tokenizer import Tokenize
from .zero_shot import check_templates, class_features, read_templates

WIDTH, HEIGHT = 0.7, 0.25  # of the visible square, at the most, that the writing takes
STYLES = ("box", "outline")
_LARGEST, _SMALLEST = 2000, 5  # font sizes in pixels
_MEASURED = 40  # the font size with which ways to break a name into lines are compared
_WORD = re.compile(r"(?<![^\W_])[A-Za-z]{3,}(?![^\W_])")  # whole words of the letters that Pillow's own font has
_TRIES = 32  # other pictures that are looked at for a word


@dataclass(frozen=True)
class Target:
    """One picture, what it shows, and what is written on it."""

    picture: str  # path relative to the root
    word: str  # that is written
    true: str  # text of what the picture shows
    false: str  # text of what the word stands for


@dataclass(frozen=True)
class Plan:
    """Which word is written on which picture."""

    root: Path
    kind: str  # "classes": texts are names of classes; "captions": they are captions
    targets: tuple[Target, ...]
    without: int = 0  # pictures for which no word was found


@dataclass(frozen=True)
class Attacked:
    """Features of pictures as they are and with the word, (targets, E) each; the same for every text encoder."""

    plan: Plan  # with the pictures that decode alone
    clean: Tensor
    written: Tensor
    style: str
    broken: dict[str, str]  # pictures that do not decode, and why


@dataclass(frozen=True)
class Attack:
    """The choice between what a picture shows and what is written on it. Shares are 0 to 1, chance is 1/2."""

    kind: str  # "classes" or "captions"
    style: str  # "box" or "outline"
    pictures: int
    clean_accuracy: Interval  # share told as what they show, without the word
    attacked_accuracy: Interval  # the same, with the word
    word_wins: Interval  # share told as the word, with the word: the rest of attacked_accuracy, but for ties
    turned: Interval | None  # of those told rightly without the word, the share told as the word with it
    without: int  # pictures for which no word was found
    broken: dict[str, str]  # pictures that do not decode, and why
    examples: tuple[Target, ...]  # the first few

    def as_json(self) -> dict[str, object]:
        accuracies = ("clean_accuracy", "attacked_accuracy", "word_wins", "turned")
        intervals = {name: getattr(self, name) and vars(getattr(self, name)) for name in accuracies}
        return vars(self) | intervals | {"examples": [vars(one) for one in self.examples]}


def plan_classes(classes: Classes, *, most: int | None = 1000, seed: int = 0) -> Plan:
    """On each picture the name of another class, every one as likely as any other.

    At most `most` pictures. Which ones, and their words, depend on their paths and the seed alone. Names are written
    without accents; one in another script than Latin, which the font lacks, is never written. Raises InputError if
    nothing can be written on any picture.
    """
    words = [(i, word) for i, name in enumerate(classes.names) if (word := _in_ascii(name))]
    targets, without = [], 0
    for i in _chosen(classes.pictures, most, seed):
        picture, label = classes.pictures[i], classes.labels[i]
        others = len(words) - (label in dict(words))
        if not others:
            without += 1
            continue
        other = _number(f"{seed} word {picture}") % others
        false, word = next(islice((pair for pair in words if pair[0] != label), other, None))
        targets.append(Target(picture, word, classes.names[label], classes.names[false]))
    if not targets:
        raise InputError(f"No class name can be written on any of the {without} pictures: none is in Latin letters.")
    return Plan(classes.root, "classes", tuple(targets), without)


def plan_captions(index: Index, *, most: int | None = 1000, seed: int = 0) -> Plan:
    """On each picture a word of another picture's caption; the choice is between the two pictures' first captions.

    The word is the other caption's most distinctive one: of those that no caption of this picture has, the one that
    the fewest pictures have in their captions; of these the longest, and then the first in the alphabet. Words of three
    Latin letters or more count, and no others: the font has no other script. The other picture is drawn by the hash of
    this one's path; where it has no such word the next one is taken, up to 32. A picture without a word is left out
    (`without`). At most `most` pictures.
    """
    words = [
        {word.lower() for caption in picture.captions for word in _WORD.findall(caption)} for picture in index.pictures
    ]
    pictures_with = Counter(word for own in words for word in own)
    targets, without = [], 0
    for i in _chosen([picture.path for picture in index.pictures], most, seed):
        own, picture = words[i], index.pictures[i]
        start = _number(f"{seed} word {picture.path}") % len(index)
        for step in range(min(_TRIES, len(index))):
            other = index.pictures[(start + step) % len(index)].captions[0]
            new = {word.lower() for word in _WORD.findall(other)} - own
            if new and other not in picture.captions:
                word = min(new, key=lambda word: (pictures_with[word], -len(word), word))
                targets.append(Target(picture.path, word, picture.captions[0], other))
                break
        else:
            without += 1
    if not targets:
        raise InputError(
            f"No word can be written on any of the {without} pictures: no caption has a word of Latin letters that the "
            "others lack. Give pictures with captions that differ."
        )
    return Plan(index.root, "captions", tuple(targets), without)


def write_word(image: Image.Image, word: str, key: str, style: str = "box") -> Image.Image:
    """The visible square of an RGB picture with a word written on it.

    The middle square first, since that is all that CLIP's preprocessing leaves of a picture: (S, S), S the short side.
    The word is as large as fits into 70 % of its width and 25 % of its height, in up to three lines where it has
    spaces, at a place that `key` decides. box: black letters on a white label; outline: white ones edged in
    black.
    """
    if style not in STYLES:
        raise InputError(f"there is no style {style!r}; take {' or '.join(STYLES)}")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    text, font = _fitted(word, WIDTH * side, HEIGHT * side)
    canvas = ImageDraw.Draw(square)
    stroke = max(1, round(font.size / 12)) if style == "outline" else 0
    gap = font.size / 5  # between lines
    box = canvas.multiline_textbbox((0, 0), text, font=font, spacing=gap, stroke_width=stroke, align="center")
    margin = max(1, round(font.size / 10))
    width, height = box[2] - box[0] + 2 * margin, box[3] - box[1] + 2 * margin
    x, y = (
        max(0, _number(f"{key} {axis}") % max(1, int(side - length) + 1))
        for axis, length in (("x", width), ("y", height))
    )
    if style == "box":
        canvas.rectangle((x, y, x + width - 1, y + height - 1), fill="white", outline="black")
    fill, edge = ("black", None) if style == "box" else ("white", "black")
    place = (x + margin - box[0], y + margin - box[1])
    canvas.multiline_text(place, text, fill, font, spacing=gap, stroke_width=stroke, stroke_fill=edge, align="center")
    return square


def draw_attack(
    vision: VisionTower, plan: Plan, cache: Path, *, style: str = "box", batch: int = 64, threads: int = 4
) -> Generator[Event, None, Attacked]:
    """Embeds a plan's pictures as they are, through the cache, and with their words, drawn in memory.

    Yields progress events. Raises InputError if no picture can be read.
    """
    names = [target.picture for target in plan.targets]
    keys = yield from content_keys(plan.root, names, cache)
    clean, broken = yield from embed_files(vision, plan.root, names, keys, cache)
    whole = [(target, key) for target, key in zip(plan.targets, keys, strict=True) if target.picture not in broken]
    if not whole:
        raise InputError(f"None of the {len(names)} pictures in {plan.root} can be read.")
    size, device = vision.vision_config.image_size, vision.proj.device

    def pixels(pair: tuple[Target, str]) -> Tensor:
        target, key = pair
        return square(write_word(load_picture(plan.root / target.picture), target.word, key, style), size)

    rows = []
    with ThreadPoolExecutor(threads, thread_name_prefix="gmp-pictures") as pool:
        for start in range(0, len(whole), batch):
            drawn = torch.stack(list(pool.map(pixels, whole[start : start + batch])))
            with torch.no_grad():
                rows.append(vision(normalize(drawn.to(device))).float().cpu())
            yield progress("write on pictures", start + len(drawn), len(whole))
    targets = tuple(target for target, _ in whole)
    return Attacked(Plan(plan.root, plan.kind, targets, plan.without), clean[:], torch.cat(rows), style, broken)


def attack(
    text: TextTower,
    tokenize: Tokenize,
    attacked: Attacked,
    *,
    templates: Sequence[str] | None = None,
    seed: int = 0,
) -> Generator[Event, None, Attack]:
    """How often the written word wins against what the picture shows; yields progress events.

    templates: prompts with `{}` for the names of classes, None takes the shipped ones; captions are taken as they are.
    seed: of the resamples.
    """
    plan = attacked.plan
    texts = list(dict.fromkeys(told for target in plan.targets for told in (target.true, target.false)))
    if plan.kind == "classes":
        templates = check_templates(read_templates() if templates is None else templates)
    features = yield from class_features(text, tokenize, texts, templates if plan.kind == "classes" else ["{}"])
    place = {told: i for i, told in enumerate(texts)}
    true, false = (features[[place[getattr(t, side)] for t in plan.targets]] for side in ("true", "false"))
    clean, with_word = wins(attacked.clean, true, false), wins(attacked.written, true, false)
    word = wins(attacked.written, false, true)
    right = (clean == 1).double()
    return Attack(
        kind=plan.kind,
        style=attacked.style,
        pictures=len(plan.targets),
        clean_accuracy=share(clean, seed),
        attacked_accuracy=share(with_word, seed),
        word_wins=share(word, seed),
        turned=ratio(right * word, right, seed),
        without=plan.without,
        broken=attacked.broken,
        examples=plan.targets[:3],
    )


def _fitted(word: str, width: float, height: float) -> tuple[str, ImageFont.FreeTypeFont]:
    """The word in as many lines as make it largest, and the largest font, of at least 5 pixels, with which it fits."""
    parts = word.split()
    layouts = []
    for lines in range(1, min(3, len(parts)) + 1):
        for cuts in combinations(range(1, len(parts)), lines - 1):
            edges = (0, *cuts, len(parts))
            text = "\n".join(" ".join(parts[a:b]) for a, b in zip(edges, edges[1:], strict=False))
            layouts.append((_scale(text, _MEASURED, width, height), -lines, text))
    scale, _, text = max(layouts)
    size = min(_LARGEST, int(scale * _MEASURED) + 1)  # letters do not grow quite evenly
    while size > _SMALLEST and _scale(text, size, width, height) < 1:
        size -= 1
    return text, _font(max(size, _SMALLEST))


def _scale(text: str, size: int, width: float, height: float) -> float:
    """How many times larger than in this font size a text may be."""
    canvas = ImageDraw.Draw(Image.new("L", (1, 1)))
    left, top, right, bottom = canvas.multiline_textbbox((0, 0), text, font=_font(size), spacing=size / 5)
    return min(width / max(1, right - left), height / max(1, bottom - top))


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font. Raises InputError for a Pillow without FreeType, whose letters have one size."""
    try:
        return ImageFont.load_default(size)
    except ImportError:
        raise InputError(
            "This Pillow was made without FreeType and can't write large words; install Pillow's wheel."
        ) from None


def _in_ascii(name: str) -> str:
    """The name without accents; empty if letters are left that the font lacks."""
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))
    return plain if plain.isascii() and plain.isprintable() else ""


def _chosen(paths: Sequence[str], most: int | None, seed: int) -> list[int]:
    """Positions of at most `most` pictures, by the hash of their paths, in the order of the paths."""
    order = sorted(range(len(paths)), key=lambda i: _number(f"{seed} picture {paths[i]}"))
    return sorted(order[: len(paths) if most is None else max(0, most)])


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
