"""Square crops against naive formulas, and the salient one against where things were planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from gmp.data.crops import (
    GROUND,
    as_bytes,
    centre_box,
    cropped,
    letterboxed,
    long_to,
    place,
    region,
    salient_box,
)
from gmp.data.images import MEAN, STD, normalize, square

SHAPES = [(64, 64), (160, 64), (64, 161), (101, 50), (50, 21), (7, 300), (1, 1), (65, 64)]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_centre_box_is_what_a_centre_crop_of_the_short_side_takes(shape):
    image = noise(*shape)
    left, top, right, bottom = centre_box(*shape)
    assert right - left == bottom - top == min(shape)
    expected = square(image, min(shape))  # its short side has that size already
    assert torch.equal(as_bytes(image.crop((left, top, right, bottom))), expected)
    assert torch.equal(as_bytes(cropped(image, 16, "centre")), square(image, 16))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_place_of_a_box_gives_the_box_back(shape):
    slack = abs(shape[0] - shape[1])
    for left in {0, 1, slack // 3, slack} & set(range(slack + 1)):
        box = (left, 0, left + shape[1], shape[1]) if shape[0] > shape[1] else (0, left, shape[0], left + shape[0])
        at = place(box, *shape)
        assert 0 <= at <= 1
        assert region(noise(*shape), "salient", at).tobytes() == noise(*shape).crop(box).tobytes()


def test_a_crop_at_a_place_is_that_part_of_the_resized_picture():
    image = noise(160, 64)
    resized = np.asarray(image.resize((80, 32), Image.Resampling.BICUBIC))
    for at, left in ((0.0, 0), (0.25, 12), (1.0, 48)):
        assert np.array_equal(np.asarray(cropped(image, 32, "salient", at)), resized[:, left : left + 32])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_letterbox_shows_all_of_a_picture_on_clips_mean_colour(shape):
    """open_clip's ResizeKeepRatio(longest=1) and CenterCropOrPad, with another fill."""
    image, size = noise(*shape), 32
    ratio = max(shape) / size
    width, height = (max(1, round(side / ratio)) for side in shape)
    expected = np.full((size, size, 3), 255 * MEAN.astype(np.float64)).round().astype(np.uint8)
    left, top = (size - width) // 2, (size - height) // 2
    resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    expected[top : top + height, left : left + width] = resized
    assert np.array_equal(np.asarray(cropped(image, size, "letterbox")), expected)


def test_the_ground_of_a_letterbox_is_next_to_nothing_once_it_is_normalised():
    ground = normalize(as_bytes(Image.new("RGB", (2, 2), GROUND)))
    assert ground.abs().max() < 0.5 / 255 / STD.min()


def test_a_letterbox_keeps_a_pictures_pixels():
    image = noise(50, 21)
    found = letterboxed(image)
    assert found.size == (50, 50) and found.crop((0, 14, 50, 35)).tobytes() == image.tobytes()
    assert long_to((300, 7), 32) == (32, 1)


# ---- salient squares ------------------------------------------------------------------------------------------------


def naive_score(saliency: np.ndarray, width: int, height: int, left: int) -> float:
    """What a square holds, weighed with 1 - u² across it, by adding up many thin slices."""
    profile = saliency.sum(axis=0 if width > height else 1)
    short, long, slices = min(width, height), max(width, height), 20000
    x = left + (np.arange(slices) + 0.5) / slices * short
    cells = np.minimum((x / long * len(profile)).astype(int), len(profile) - 1)
    u = 2 * (x - left) / short - 1
    return float((profile[cells] * (1 - u**2)).mean())


@pytest.mark.parametrize("shape", [(90, 40), (40, 90), (57, 31), (64, 63), (30, 200)], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_the_salient_box_is_the_square_that_holds_the_most(shape, seed):
    saliency = np.random.default_rng(seed).random((7, 9)) ** 3
    box = salient_box(torch.from_numpy(saliency), *shape)
    left, slack = max(box[:2]), abs(shape[0] - shape[1])
    assert box[2] - box[0] == box[3] - box[1] == min(shape) and 0 <= left <= slack and min(box[:2]) == 0
    assert (box[1] == 0) if shape[0] > shape[1] else (box[0] == 0)
    scores = [naive_score(saliency, *shape, one) for one in range(slack + 1)]
    assert scores[left] >= max(scores) * (1 - 1e-4)


@pytest.mark.parametrize("shape", [(160, 64), (64, 160), (300, 64)], ids=str)
def test_one_salient_patch_is_in_the_middle_of_its_square(shape):
    for cell in range(8):
        saliency = torch.zeros(8, 8)
        saliency[(slice(None), cell) if shape[0] > shape[1] else (cell, slice(None))] = 1
        long, short = max(shape), min(shape)
        box = salient_box(saliency, *shape)
        wanted = np.clip((cell + 0.5) / 8 * long - short / 2, 0, long - short)
        assert abs(max(box[:2]) - wanted) <= max(1, long / 256)


def test_where_nothing_stands_out_the_salient_box_is_in_the_middle():
    for saliency in (torch.ones(7, 7), torch.zeros(7, 7), torch.full((7, 7), torch.nan), torch.ones(1, 1)):
        assert salient_box(saliency, 160, 64) == centre_box(160, 64) == (48, 0, 112, 64)
    assert salient_box(torch.rand(4, 4, generator=torch.Generator().manual_seed(0)), 33, 33) == (0, 0, 33, 33)


def test_a_long_picture_has_no_more_places_than_are_worth_trying():
    saliency = torch.zeros(1, 100)
    saliency[0, 70] = 1
    left, top, right, bottom = salient_box(saliency, 100_000, 1000)
    assert left <= 70_500 <= right and abs((left + right) / 2 - 70_500) < 400 and (top, bottom) == (0, 1000)
