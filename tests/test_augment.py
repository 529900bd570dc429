"""Random views against the formulas of torchvision's documentation: blends, hue in HSV, parts of the area."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image

from gmp.config import Pictures
from gmp.data.augment import RATIO, augment, flipped, random_box, recoloured, seed_of, varied
from gmp.data.crops import as_bytes, cropped
from gmp.data.sampler import seeded


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGE = noise(12, 9)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.float64)


def luma(pixels: np.ndarray) -> np.ndarray:  # ITU-R 601-2, as PIL's L
    return pixels @ np.array([0.299, 0.587, 0.114])


def blend(pixels: np.ndarray, other: np.ndarray | float, factor: float) -> np.ndarray:
    return np.clip(other + factor * (pixels - other), 0, 255)


def brightness(pixels, factor):
    return blend(pixels, 0.0, factor)


def contrast(pixels, factor):
    return blend(pixels, round(luma(pixels).mean()), factor)


def saturation(pixels, factor):
    return blend(pixels, luma(pixels)[:, :, None], factor)


def hue(pixels, share):
    found = np.empty_like(pixels)
    for place in np.ndindex(pixels.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*(pixels[place] / 255))
        found[place] = np.array(colorsys.hsv_to_rgb((h + share) % 1, s, v)) * 255
    return found


BLENDS = {0: brightness, 1: contrast, 2: saturation}


def one_jitter(place: int, most: float) -> Pictures:
    return Pictures(jitter=tuple(most if i == place else 0.0 for i in range(4)))


@pytest.mark.parametrize("place", BLENDS)
@pytest.mark.parametrize("most", [0.3, 1.0, 1.7])
def test_brightness_contrast_and_saturation_are_blends_by_a_factor_within_its_bounds(place, most):
    factors = []
    for seed in range(60):
        found = array(recoloured(IMAGE, one_jitter(place, most), seed))
        low, high = max(0.0, 1 - most), 1 + most
        grid = np.linspace(low, high, 401)
        misses = [np.abs(BLENDS[place](array(IMAGE), factor) - found).max() for factor in grid]
        best = int(np.argmin(misses))
        assert misses[best] <= 2.5  # PIL rounds down, and the grid is 0.0085 wide at the most
        factors.append((grid[best] - low) / (high - low))
    assert min(factors) < 0.15 and max(factors) > 0.85 and 0.35 < np.mean(factors) < 0.65


def test_hue_is_turned_by_a_share_of_its_circle():
    shares = []
    for seed in range(40):
        found = array(recoloured(IMAGE, one_jitter(3, 0.5), seed))
        grid = np.linspace(-0.5, 0.5, 256)
        misses = [np.abs(hue(array(IMAGE), share) - found).mean() for share in grid]
        assert min(misses) < 2.5  # 256 levels of hue and of saturation
        shares.append(grid[int(np.argmin(misses))])
    assert min(shares) < -0.35 and max(shares) > 0.35


def test_the_four_changes_come_in_every_order():
    """Where they do not commute, what comes out tells the order: contrast before brightness, or after it."""
    pictures = Pictures(jitter=(0.9, 0.9, 0.0, 0.0))
    first = [0, 0]
    for seed in range(60):
        found = array(recoloured(IMAGE, pictures, seed))
        generator = seeded(f"colours {seed}")
        torch.rand((), generator=generator, dtype=torch.float64)  # whether to jitter
        order = [place for place in torch.randperm(4, generator=generator).tolist() if place < 2]
        pixels, factors = array(IMAGE), {}
        for place in order:
            factors[place] = 0.1 + 1.8 * torch.rand((), generator=generator, dtype=torch.float64).item()
            pixels = np.floor(BLENDS[place](pixels, factors[place]))
        assert np.abs(pixels - found).max() <= 3
        first[order[0]] += 1
    assert min(first) > 15


def test_chances_are_kept():
    jitter = Pictures(jitter=(0.4, 0.4, 0.4, 0.1), jitter_chance=0.7)
    grey = Pictures(grey=0.2)
    flip = Pictures(flip=0.3)
    count = 1000
    same = IMAGE.tobytes()
    jittered = sum(recoloured(IMAGE, jitter, seed).tobytes() != same for seed in range(count))
    flips = [flipped(flip, seed) for seed in range(count)]
    greys = [recoloured(IMAGE, grey, seed) for seed in range(count)]
    for found, chance in ((jittered, 0.7), (sum(flips), 0.3), (sum(g.tobytes() != same for g in greys), 0.2)):
        assert abs(found / count - chance) < 4 * math.sqrt(chance * (1 - chance) / count)
    grey_one = next(one for one in greys if one.tobytes() != same)
    assert np.abs(array(grey_one) - luma(array(IMAGE))[:, :, None]).max() <= 1
    mirrored = IMAGE.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    assert all(varied(IMAGE, flip, s).tobytes() == (mirrored if flips[s] else same) for s in range(50))


def naive_part(width: int, height: int, least: float, generator: torch.Generator) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params: left, top, right, bottom."""

    def uniform(low, high):
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

    for _ in range(10):
        target_area = height * width * uniform(least, 1)
        aspect_ratio = math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        w = int(round(math.sqrt(target_area * aspect_ratio)))
        h = int(round(math.sqrt(target_area / aspect_ratio)))
        if 0 < w <= width and 0 < h <= height:
            j = torch.randint(0, width - w + 1, size=(1,), generator=generator).item()
            i = torch.randint(0, height - h + 1, size=(1,), generator=generator).item()
            return j, i, j + w, i + h
    in_ratio = width / height
    if in_ratio < 3 / 4:
        w = width
        h = int(round(w / (3 / 4)))
    elif in_ratio > 4 / 3:
        h = height
        w = int(round(h * (4 / 3)))
    else:
        w, h = width, height
    i, j = (height - h) // 2, (width - w) // 2
    return j, i, j + w, i + h


@pytest.mark.parametrize("shape", [(100, 100), (160, 90), (90, 160), (400, 101), (33, 300), (1, 1)], ids=str)
@pytest.mark.parametrize("least", [0.1, 0.5, 0.9])
def test_random_parts_are_torchvisions(shape, least):
    width, height = shape
    boxes = [random_box(width, height, least, seeded(str(seed))) for seed in range(200)]
    assert boxes == [naive_part(width, height, least, seeded(str(seed))) for seed in range(200)]
    assert all(0 <= l < r <= width and 0 <= t < b <= height for l, t, r, b in boxes)  # noqa: E741
    roomy = shape != (1, 1) and least < 0.5 * RATIO[1] * min(shape) / max(shape)  # most parts of this size fit
    if roomy:
        assert len(set(boxes)) > 150
        areas = np.array([(r - l) * (b - t) for l, t, r, b in boxes]) / (width * height)  # noqa: E741
        assert areas.min() >= least - 0.03 and areas.max() > least + 0.2


def test_areas_of_random_parts_are_even():
    """Of a square nothing that is drawn from 0.1 to 0.5 fails to fit."""
    areas = np.array([random_box(1000, 1000, 0.1, seeded(str(seed))) for seed in range(600)])
    areas = (areas[:, 2] - areas[:, 0]) * (areas[:, 3] - areas[:, 1]) / 1e6
    small = np.sort(areas[areas < 0.55])
    even = np.linspace(0.1, 0.55, len(small))
    assert np.abs(small - even).max() < 0.05


def test_a_view_is_a_random_part_resized_as_clip_does():
    image, pictures = noise(80, 60), Pictures(scale=0.3)
    for seed in range(5):
        box = random_box(80, 60, 0.3, seeded(f"part {seed}"))
        expected = image.crop(box).resize((16, 16), Image.Resampling.BICUBIC)
        assert torch.equal(augment(image, 16, pictures, seed), as_bytes(expected))


def test_parts_of_a_salient_crop_are_parts_of_its_square_and_those_of_a_letterbox_of_all_of_it():
    image = Image.new("RGB", (90, 30), "red")
    image.paste("blue", (60, 0, 90, 30))
    for seed in range(10):
        part = augment(image, 8, Pictures("salient", scale=0.2), seed, at=1.0)
        assert (part[0] == 0).all() and (part[2] == 255).all()
    shares = [(augment(image, 8, Pictures("letterbox", scale=0.9), seed)[1] > 60).float().mean() for seed in range(10)]
    assert min(shares) > 0.5  # two thirds are ground


def test_where_no_part_is_taken_a_view_is_the_crop_itself():
    image = noise(50, 30)
    for crop in ("centre", "letterbox", "salient"):
        view = augment(image, 16, Pictures(crop, grey=1.0), 3, at=0.2)
        expected = cropped(image, 16, crop, 0.2).convert("L").convert("RGB")
        assert torch.equal(view, as_bytes(expected))
        assert torch.equal(augment(image, 16, Pictures(crop), 3, 0.2), as_bytes(cropped(image, 16, crop, 0.2)))


def test_views_depend_on_their_seed_alone():
    pictures = Pictures(scale=0.5, flip=0.5, jitter=(0.2, 0.2, 0.2, 0.1), grey=0.2)
    state = torch.get_rng_state()
    views = [augment(noise(40, 30), 16, pictures, seed) for seed in range(20)]
    again = [augment(noise(40, 30), 16, pictures, seed) for seed in reversed(range(20))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    assert len({view.numpy().tobytes() for view in views}) == 20
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_of_views_are_those_of_content_and_number():
    seeds = {seed_of(key, view) for key in ("a", "b") for view in range(5)}
    assert len(seeds) == 10 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of("a", 1) == seed_of("a", 1)
