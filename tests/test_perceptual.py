"""Perceptual hashes against the formula as it is written down, and near pairs against comparing all with all."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gmp.data import perceptual
from gmp.data.images import load_whole
from gmp.data.perceptual import BITS, SIDE, alike, connect, distance, looks, near_groups, near_pairs, plan
from gmp.errors import InputError
from gmp.events import finish


def pixels_of(count, seed=0, cells=6):
    """Smooth pictures, as small ones are."""
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, 256, (count, cells, cells, 3), dtype=np.uint8)
    made = [np.asarray(Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for one in noise]
    return np.stack(made).transpose(0, 3, 1, 2)


def naive_hash(pixels):
    """pHash bit by bit: DCT-II as a sum of cosines, waves 1..8 both ways, those above the median, first one highest."""
    luma = (0.299 * pixels[0] + 0.587 * pixels[1] + 0.114 * pixels[2]).tolist()
    waves = []
    for v in range(1, 9):
        for u in range(1, 9):
            waves.append(
                sum(
                    luma[y][x]
                    * math.cos(math.pi * v * (2 * y + 1) / (2 * SIDE))
                    * math.cos(math.pi * u * (2 * x + 1) / (2 * SIDE))
                    for y in range(SIDE)
                    for x in range(SIDE)
                )
            )
    middle = (sorted(waves)[31] + sorted(waves)[32]) / 2
    return int("".join("1" if wave > middle else "0" for wave in waves), 2)


def naive_pairs(hashes, radius):
    numbers = hashes.tolist()
    pairs = combinations(range(len(numbers)), 2)
    return {(i, j) for i, j in pairs if (numbers[i] ^ numbers[j]).bit_count() <= radius}


def clustered(count, seed=0, flips=9):
    """Hashes of which many are near each other, at all distances."""
    generator = np.random.default_rng(seed)
    centres = generator.integers(0, 2**64, max(1, count // 8), dtype=np.uint64)
    found = centres[generator.integers(0, len(centres), count)]
    for _ in range(flips):
        bit = np.uint64(1) << generator.integers(0, 64, count).astype(np.uint64)
        found = found ^ (bit * (generator.random(count) < 0.4).astype(np.uint64))
    return found


# --- hashes


def test_a_hash_is_that_of_the_formula():
    """Cosines are rounded to a thousandth: of 64 bits, those next to the median may differ."""
    pixels = pixels_of(6)
    for found, one in zip(looks(pixels).hashes.tolist(), pixels, strict=True):
        assert (found ^ naive_hash(one)).bit_count() <= 1


def test_a_picture_has_the_same_looks_alone_and_beside_others():
    pixels = pixels_of(50)
    together = looks(pixels)
    for i in (0, 17, 49):
        alone = looks(pixels[i : i + 1])
        assert alone.hashes[0] == together.hashes[i] and alone.contrasts[0] == together.contrasts[i]
        assert np.array_equal(alone.colours[0], together.colours[i])
        assert np.array_equal(alone.lights[0], together.lights[i])


def test_half_of_the_bits_are_set_and_pictures_differ():
    hashes = looks(pixels_of(200)).hashes
    assert all(one.bit_count() == 32 for one in hashes.tolist())
    assert len(naive_pairs(hashes, 4)) == 0


def test_colours_are_told_apart_where_brightness_is_the_same():
    pixels = np.zeros((2, 3, SIDE, SIDE), np.uint8)
    pixels[:, :, 8:24, 8:20] = 100
    pixels[0, 0, 8:24, 8:20], pixels[1, 2, 8:24, 8:20] = 140, 204  # as bright in red as in blue
    found = looks(pixels)
    assert distance(found.hashes[:1], found.hashes[1:]).item() <= 2
    assert not alike(found, np.array([0]), np.array([1])).item()


def test_contrast_and_colours_are_those_of_bt_601():
    pixels = np.zeros((3, 3, SIDE, SIDE), np.uint8)
    pixels[0] = 200
    pixels[1, :, :, 16:] = 255
    pixels[2, 0] = 255
    found = looks(pixels)
    assert found.contrasts.tolist() == [0, 255, 0]
    assert found.lights[0].tolist() == [200] * 64 and found.lights[1].tolist() == [0, 0, 0, 0, 255, 255, 255, 255] * 8
    assert np.all(found.colours[:2] == 0)
    blue, red = found.colours[2].reshape(2, -1)  # Cb = 0.564 (B - Y), Cr = 0.713 (R - Y) of pure red
    assert np.all(np.abs(blue + 0.564 * 76.245) <= 1) and np.all(red == 127)


def test_a_circle_is_no_triangle_and_a_paler_copy_is_a_copy():
    """Small things in the same place of a plain ground, as in icons."""
    drawn = []
    for shape, ink in (("ellipse", 200), ("regular_polygon", 200), ("ellipse", 150)):
        image = Image.new("RGB", (256, 256), (40, 40, 40))
        pen = ImageDraw.Draw(image)
        outline = ((128, 128, 40), 3) if shape == "regular_polygon" else ((88, 88, 168, 168),)
        getattr(pen, shape)(*outline, fill=(ink, ink, ink))
        drawn.append(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).transpose(2, 0, 1))
    found = looks(np.stack(drawn))
    assert alike(found, np.array([0, 0]), np.array([1, 2])).tolist() == [False, True]


def test_maps_are_compared_one_by_one():
    generator = np.random.default_rng(0)
    found = looks(pixels_of(60, cells=2))
    i, j = generator.integers(0, 60, (2, 400))
    i[:60] = j[:60]
    lights = (found.lights - found.lights.mean(axis=1, keepdims=True)) / found.lights.std(axis=1, keepdims=True)
    expected = [
        bool(np.abs(lights[a] - lights[b]).max() <= perceptual.CLOSE_LIGHT)
        and all(abs(int(x) - int(y)) <= perceptual.CLOSE_COLOUR for x, y in zip(*found.colours[[a, b]], strict=True))
        for a, b in zip(i, j, strict=True)
    ]
    assert alike(found, i, j).tolist() == expected and 60 <= sum(expected) < 400
    assert alike(found, i[:0], j[:0]).tolist() == []


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda image: image, {"format": "JPEG", "quality": 40}),
        (lambda image: image.resize((300, 200)), {"format": "JPEG", "quality": 80}),
        (lambda image: image.resize((150, 100)), {"format": "PNG"}),
        (lambda image: image, {"format": "WEBP", "quality": 60}),
    ],
)
def test_a_copy_that_is_resized_or_stored_again_looks_the_same(tmp_path, change, options):
    for seed in range(4):
        noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((600, 400), Image.Resampling.BICUBIC)
        image.save(tmp_path / "first.png")
        change(image).save(tmp_path / "second", **options)
        both = looks(np.stack([load_whole(tmp_path / name, SIDE)[0].numpy() for name in ("first.png", "second")]))
        assert distance(both.hashes[:1], both.hashes[1:]).item() <= 4
        assert alike(both, np.array([0]), np.array([1])).item()


def test_bits_are_counted_without_numpy_2_too():
    words = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    words[:3] = 0, 2**64 - 1, 2**63
    expected = [one.bit_count() for one in words.tolist()]
    assert perceptual._count_ones(words).tolist() == expected
    assert distance(words, np.zeros_like(words)).tolist() == expected


# --- pairs


@pytest.mark.parametrize("radius", range(17))
def test_near_pairs_are_those_of_comparing_all_with_all(radius):
    hashes = clustered(300, seed=radius, flips=radius + 1)
    found = [pair for i, j in near_pairs(hashes, radius) for pair in zip(i.tolist(), j.tolist(), strict=True)]
    assert len(found) == len(set(found))  # each once
    assert set(found) == naive_pairs(hashes, radius) and found


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_hashes_have_few_pairs(count):
    hashes = np.zeros(count, np.uint64)
    found = [pair for i, j in near_pairs(hashes, 4) for pair in zip(i.tolist(), j.tolist(), strict=True)]
    assert set(found) == set(combinations(range(count), 2))


@pytest.mark.parametrize("count", [1, 1000, 100_000, 1_000_000, 10_000_000])
@pytest.mark.parametrize("radius", range(17))
def test_a_plan_misses_no_pair(count, radius):
    """The pigeonhole: were all parts further apart than they are looked up, the whole would be beyond the radius."""
    parts = plan(count, radius)
    looked_up = {part.first for part in parts}
    whole = range(parts[0].step)
    least = sum(next((part.reach + 1 for part in parts if part.first == first), 0) for first in whole)
    assert least > radius and looked_up <= set(whole)
    assert sum(len(range(first, BITS, parts[0].step)) for first in whole) == BITS


def test_other_plans_find_the_same_pairs(monkeypatch):
    """Those of a million hashes, on few; and with chunks that cut through the middle of what is alike."""
    hashes = clustered(300)
    for count in (1_000_000, 30_000):
        for radius in (4, 8):
            parts = plan(count, radius)
            monkeypatch.setattr(perceptual, "plan", lambda *_, parts=parts: parts)
            monkeypatch.setattr(perceptual, "_CANDIDATES", 7)
            found = [pair for i, j in near_pairs(hashes, radius) for pair in zip(i.tolist(), j.tolist(), strict=True)]
            assert len(found) == len(set(found)) and set(found) == naive_pairs(hashes, radius)
            monkeypatch.undo()


def test_planted_pairs_are_found_among_many():
    generator = np.random.default_rng(3)
    hashes = generator.integers(0, 2**64, 60_000, dtype=np.uint64)
    bits = generator.permuted(np.tile(np.arange(64), (500, 1)), axis=1)[:, :4].astype(np.uint64)
    hashes[-500:] = hashes[:500] ^ np.bitwise_or.reduce(np.uint64(1) << bits, axis=1)
    groups = finish(near_groups(hashes, 4))
    assert np.array_equal(groups[-500:], np.arange(500))
    assert np.array_equal(groups[:-500], np.arange(59_500))


@pytest.mark.parametrize("radius", [-1, 17])
def test_a_distance_that_would_find_anything_is_refused(radius):
    with pytest.raises(InputError, match="give 0 to 16"):
        plan(10, radius)


# --- groups


def naive_groups(count, pairs):
    groups = list(range(count))
    for _ in range(count):
        for i, j in pairs:
            groups[i] = groups[j] = min(groups[i], groups[j])
    return groups


def test_groups_are_what_chains_of_pairs_connect():
    generator = np.random.default_rng(0)
    for count, edges in ((1, 0), (30, 12), (200, 150), (200, 400)):
        i, j = generator.integers(0, count, (2, edges))
        parents = np.arange(count)
        for part in np.array_split(np.arange(edges), 3):
            connect(parents, i[part], j[part])
        while not np.array_equal(parents[parents], parents):
            parents = parents[parents]
        assert parents.tolist() == naive_groups(count, list(zip(i.tolist(), j.tolist(), strict=True)))


def test_a_long_chain_is_one_group():
    parents = np.arange(1000)
    connect(parents, np.arange(999, 0, -1), np.arange(998, -1, -1))
    for _ in range(1000):
        parents = parents[parents]
    assert not parents.any()


def test_near_groups_are_those_of_all_pairs_that_count():
    hashes = clustered(200, seed=4)
    colours = np.random.default_rng(5).integers(0, 2, 200)
    pairs = [pair for pair in naive_pairs(hashes, 5) if colours[pair[0]] == colours[pair[1]]]
    groups = finish(near_groups(hashes, 5, lambda i, j: colours[i] == colours[j]))
    assert groups.tolist() == naive_groups(200, pairs)
    assert groups.tolist() != naive_groups(200, naive_pairs(hashes, 5))


def test_progress_ends_where_it_says_so():
    events = list(near_groups(clustered(100), 8))
    assert events[-1]["done"] == events[-1]["total"]
    assert [event["done"] for event in events] == sorted(event["done"] for event in events)
    assert finish(near_groups(np.zeros(0, np.uint64), 4)).shape == (0,)
