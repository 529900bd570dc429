"""How a picture becomes square: its middle, all of it on a plain ground, or the part that matters."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Box = tuple[int, int, int, int]  # left, top, right, bottom: pixels of the upright picture

MIDDLE = 0.5
GROUND = (123, 117, 104)  # CLIP's mean colour, next to 0 once it is normalised
_PLACES = 256  # squares that are tried along a picture's long side at the most


# ---- boxes ----------------------------------------------------------------------------------------------------------


def centre_box(width: int, height: int) -> Box:
    """The largest square in the middle, where torchvision's CenterCrop has it."""
    return _box(width, height, MIDDLE)


def salient_box(saliency: Tensor, width: int, height: int) -> Box:
    """The largest square whose middle has the most of a picture's saliency.

    saliency: (rows, columns) over the whole picture, not negative, however coarse; what is no number counts as 0. Along
    the picture's long side a square weighs what it holds with 1 - u², u from -1 to 1 across it, so that a thing lies in
    it and not at its edge. Of squares that have the same, the one nearest to the middle.
    """
    slack = abs(width - height)
    profile = saliency.double().nan_to_num(0.0, 0.0, 0.0).sum(dim=0 if width > height else 1).cpu().numpy()
    lefts = np.unique(np.linspace(0, slack, min(slack, _PLACES) + 1).round())
    edges = np.linspace(0, max(width, height), len(profile) + 1)
    u = (2 * (edges[None] - lefts[:, None]) / min(width, height) - 1).clip(-1, 1)  # (places, cells + 1)
    weights = np.diff(u - u**3 / 3)  # of each cell: the integral of 1 - u²
    found = weights @ profile
    best = lefts[found >= found.max() - 1e-9 * abs(found.max())]
    left = int(best[np.abs(best - slack / 2).argmin()])
    return (left, 0, left + height, height) if width > height else (0, left, width, left + width)


def place(box: Box, width: int, height: int) -> float:
    """Where a square of the short side lies along the long side: 0 at its start, 1 at its end."""
    slack = abs(width - height)
    return (box[0] if width > height else box[1]) / slack if slack else MIDDLE


def _box(width: int, height: int, at: float) -> Box:
    side = min(width, height)
    left, top = int(round((width - side) * at)), int(round((height - side) * at))
    return left, top, left + side, top + side


# ---- pictures -------------------------------------------------------------------------------------------------------


def short_to(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Width and height as of torchvision's Resize: the short side exactly, the long side rounded down."""
    width, height = shape
    return (size, int(size * height / width)) if width <= height else (int(size * width / height), size)


def long_to(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Width and height as of open_clip's ResizeKeepRatio: the long side exactly, the short side rounded, 1 at least."""
    ratio = size / max(shape)
    return max(1, round(shape[0] * ratio)), max(1, round(shape[1] * ratio))


def cropped(image: Image.Image, size: int, crop: str, at: float = MIDDLE) -> Image.Image:
    """An upright RGB picture as a square of `size`, resampled as CLIP does it.

    crop: one of `config.CROPS`. at: where the square lies along the long side, as `place` gives it.
    """
    if crop == "letterbox":
        return letterboxed(image.resize(long_to(image.size, size), Image.Resampling.BICUBIC))
    return window(image.resize(short_to(image.size, size), Image.Resampling.BICUBIC), size, at)


def window(image: Image.Image, size: int, at: float = MIDDLE) -> Image.Image:
    """A square of a picture whose short side is `size`; half a pixel goes to the even side, as in torchvision."""
    left, top = int(round((image.width - size) * at)), int(round((image.height - size) * at))
    return image.crop((left, top, left + size, top + size))


def letterboxed(image: Image.Image) -> Image.Image:
    """All of an RGB picture in the middle of a square of CLIP's mean colour."""
    side = max(image.size)
    ground = Image.new("RGB", (side, side), GROUND)
    ground.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return ground


def region(image: Image.Image, crop: str, at: float = MIDDLE) -> Image.Image:
    """What random parts of an upright RGB picture are taken from, at its own size.

    All of it for the centre crop, as torchvision's RandomResizedCrop has it; the square itself for the other two.
    """
    if crop == "letterbox":
        return letterboxed(image)
    return image.crop(_box(*image.size, at)) if crop == "salient" else image


def as_bytes(image: Image.Image) -> Tensor:
    """An RGB picture as bytes (3, height, width)."""
    return torch.from_numpy(np.array(np.asarray(image).transpose(2, 0, 1), order="C"))
