"""Scenes: two objects in one of four relations, drawn as a picture and told as captions."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIZES = {"small": 6.5, "large": 12.5}  # radius in pixels
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (40, 80, 220),
    "yellow": (245, 220, 40),
    "orange": (245, 130, 20),
    "purple": (150, 60, 190),
    "cyan": (60, 210, 220),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross", "diamond")
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}  # and its inverse
OFFSETS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
IMAGE_SIZE = 64  # pixels
SPLITS = ("train", "held_out")
_OVERSAMPLING = 2


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """`first` stands in `relation` to `second`: first left of second."""

    first: Thing
    relation: str
    second: Thing

    def captions(self) -> tuple[str, str, str]:
        """Three ways to say it; the last one turns the relation round."""
        return (
            f"a {self.first} {self.relation} a {self.second}",
            f"a picture of a {self.first} {self.relation} a {self.second}",
            f"a {self.second} {RELATIONS[self.relation]} a {self.first}",
        )

    def split(self) -> str:
        """One scene in ten is held out, by its content: the same scene is on the same side for ever."""
        digest = hashlib.sha256(self.captions()[0].encode()).digest()
        return "held_out" if digest[0] % 10 == 0 else "train"


def all_scenes(split: str) -> list[Scene]:
    """Every distinct scene of one split. `right of` and `below` are `left of` and `above` with sides swapped."""
    things = [Thing(*words) for words in itertools.product(SIZES, COLOURS, SHAPES)]
    scenes = (
        Scene(first, relation, second)
        for first, second in itertools.permutations(things, 2)
        for relation in ("left of", "above")
    )
    return [scene for scene in scenes if scene.split() == split]


def draw_scenes(count: int, seed: int, split: str = "train") -> Iterator[tuple[Scene, random.Random]]:
    """`count` scenes in random order with the random numbers to draw each; all distinct until a split is used up.

    Half of them are turned round (`right of`, `below`), so that all four relations are told first.
    """
    scenes = all_scenes(split)
    order = random.Random(f"{seed} order {split}")
    drawn = 0
    while drawn < count:
        for scene in order.sample(scenes, min(count - drawn, len(scenes))):
            dice = random.Random(f"{seed} {drawn}")
            drawn += 1
            turn = dice.random() < 0.5
            yield (Scene(scene.second, RELATIONS[scene.relation], scene.first) if turn else scene), dice


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    if shape == "square":
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "diamond":
        return [(x, y - 1.25 * r), (x + 0.8 * r, y), (x, y + 1.25 * r), (x - 0.8 * r, y)]
    arm = r / 3  # cross
    corners = [(-arm, -r), (arm, -r), (arm, -arm), (r, -arm), (r, arm), (arm, arm)]
    return [(x + dx, y + dy) for dx, dy in corners + [(-dx, -dy) for dx, dy in corners]]


def _draw_thing(canvas: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, scale: float) -> None:
    r = SIZES[thing.size] * scale
    fill = COLOURS[thing.colour]
    box = (x - r, y - r, x + r, y + r)
    if thing.shape == "circle":
        canvas.ellipse(box, fill=fill)
    elif thing.shape == "ring":
        canvas.ellipse(box, outline=fill, width=round(0.38 * r))
    else:
        canvas.polygon(_outline(thing.shape, x, y, r), fill=fill)


def render(scene: Scene, dice: random.Random, size: int = IMAGE_SIZE) -> Image.Image:
    """Draws a scene on a dark grey ground; places, sizes and ground vary a little with `dice`."""
    side = size * _OVERSAMPLING
    unit = side / 64
    ground = dice.randint(15, 75)
    image = Image.new("RGB", (side, side), (ground,) * 3)
    canvas = ImageDraw.Draw(image)
    dx, dy = OFFSETS[scene.relation]
    for thing, direction in ((scene.first, 1), (scene.second, -1)):
        x = 32 + direction * dx * dice.uniform(13, 17) + dice.uniform(-3, 3)
        y = 32 + direction * dy * dice.uniform(13, 17) + dice.uniform(-3, 3)
        _draw_thing(canvas, thing, x * unit, y * unit, unit * dice.uniform(0.92, 1.08))
    return image.resize((size, size), Image.Resampling.BOX)
