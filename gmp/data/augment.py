"""Random views of a picture, as torchvision and open_clip draw them: all of it a function of the picture and a seed.

Random resized crop, flip, colour jitter in random order, grey: open_clip's `--aug-cfg`, whose names are
`scale=(…, 1)`, `color_jitter`, `color_jitter_prob`, `gray_scale_prob`. It never flips, since captions tell left from
right; where that is asked for, `mirror` turns the words of captions too.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from .crops import MIDDLE, Box, as_bytes, cropped, region
from .sampler import seeded

if TYPE_CHECKING:
    from ..config import Pictures

AUGMENTATION = "random resized crop, flip, colour jitter, grey; version 1"
"""Names the procedure. Part of the keys of every cache of views: change it when pixels change."""

RATIO = (3 / 4, 4 / 3)  # width / height of a random part, before it is made square
_TRIES = 10
_COLOURS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)  # blends with black, mean grey, grey


def seed_of(content_key: str, view: int) -> int:
    """The seed of one of a picture's views, by its content: the same under any name, in any run."""
    return int.from_bytes(hashlib.sha256(f"view {view} {content_key}".encode()).digest()[:8], "big") >> 1


def augment(image: Image.Image, size: int, pictures: Pictures, seed: int, at: float = MIDDLE) -> Tensor:
    """A view of an upright RGB picture as bytes (3, size, size); at: as in `crops.cropped`."""
    if pictures.scale < 1:
        image = region(image, pictures.crop, at)
        box = random_box(image.width, image.height, pictures.scale, seeded(f"part {seed}"))
        image = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    else:
        image = cropped(image, size, pictures.crop, at)
    return as_bytes(varied(image, pictures, seed))


def varied(image: Image.Image, pictures: Pictures, seed: int) -> Image.Image:
    """An RGB picture of any size, flipped or not and in other colours."""
    if flipped(pictures, seed):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return recoloured(image, pictures, seed)


def flipped(pictures: Pictures, seed: int) -> bool:
    """Whether the view of this seed is turned left to right."""
    return pictures.flip > 0 and _uniform(seeded(f"flip {seed}")) < pictures.flip


def random_box(width: int, height: int, least: float, generator: torch.Generator) -> Box:
    """A part of `least` or more of the area, width / height within RATIO: torchvision's RandomResizedCrop.get_params.

    Where none of ten draws fits into the picture, the middle of it, as large as RATIO allows.
    """
    low, high = (math.log(ratio) for ratio in RATIO)
    for _ in range(_TRIES):
        area = width * height * _uniform(generator, least, 1.0)
        ratio = math.exp(_uniform(generator, low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = torch.randint(width - w + 1, (), generator=generator).item()
            top = torch.randint(height - h + 1, (), generator=generator).item()
            return left, top, left + w, top + h
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def recoloured(image: Image.Image, pictures: Pictures, seed: int) -> Image.Image:
    """An RGB picture with its colours jittered and taken out by chance: torchvision's ColorJitter, RandomGrayscale.

    Brightness, contrast and saturation by a factor from max(0, 1 - x) to 1 + x, hue by a share of its circle from -x to
    x, in random order. Nothing is drawn from the generator for what is off, but the order.
    """
    generator = seeded(f"colours {seed}")
    if any(pictures.jitter) and _uniform(generator) < pictures.jitter_chance:
        for number in torch.randperm(4, generator=generator).tolist():
            most = pictures.jitter[number]
            if most and number < len(_COLOURS):
                image = _COLOURS[number](image).enhance(_uniform(generator, max(0.0, 1 - most), 1 + most))
            elif most:
                image = _turned_hue(image, _uniform(generator, -most, most))
    if pictures.grey and _uniform(generator) < pictures.grey:
        image = image.convert("L").convert("RGB")
    return image


def _turned_hue(image: Image.Image, share: float) -> Image.Image:
    """torchvision's adjust_hue: the hue, 0..255 in PIL's HSV, moved round by a share of 255."""
    hue, saturation, value = image.convert("HSV").split()
    moved = (np.asarray(hue).astype(np.int16) + int(share * 255)) % 256
    hue = Image.fromarray(moved.astype(np.uint8))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()
