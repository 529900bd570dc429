"""Perceptual hashes of pictures, and which of a million pictures look the same.

The hash is the 64-bit pHash of Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010): the
lowest frequencies of a small grey picture, each above their median or not. Small things on a plain ground, as in icons,
are often near in it though a circle is no triangle, and red is blue to it: coarse maps of brightness and colours beside
it tell those apart.

Pairs within a distance are found by multi-index hashing (Norouzi, Punjani and Fleet, "Fast Search in Hamming Space with
Multi-Index Hashing", CVPR 2012): exact, and in memory that does not grow with the number of pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np

from ..errors import InputError
from ..events import Event, progress

SIDE = 32  # pixels of the picture that is hashed
CELLS = 8  # of the map of brightness, across and down; that of colours has half as many
CLOSE_LIGHT = 0.5  # standard deviations of a picture's brightness, by which no cell of pictures that look alike differs
CLOSE_COLOUR = 12  # likewise of colours, in levels of 255
BITS = 64
RADIUS = 16  # the largest that is searched for: beyond it unrelated pictures are found
_CANDIDATES = 1 << 21  # pairs that are compared at once: about 100 MB
_WIDEST = 22  # bits of a substring: its table has 4 million places
_LUMA = np.array([299, 587, 114])  # thousandths of red, green and blue, ITU-R BT.601


# ---- hashes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Looks:
    """What N pictures look like, in numbers that can be compared."""

    hashes: np.ndarray  # (N,) uint64
    lights: np.ndarray  # (N, 64) uint8: the brightness of 8 × 8 cells, row by row
    colours: np.ndarray  # (N, 32) int8: Cb, then Cr, of 4 × 4 cells, row by row
    contrasts: np.ndarray  # (N,) uint8: the brightest minus the darkest of the small picture's pixels


def looks(pixels: np.ndarray) -> Looks:
    """Of pictures as bytes, (N, 3, 32, 32) uint8.

    Whole numbers throughout, none beyond 2^53: a picture has the same hash beside any others, and on any machine.
    """
    luma = np.tensordot(pixels.astype(np.int64), _LUMA, axes=(1, 0))  # (N, 32, 32) 0..255000
    basis = _basis()
    # in fp64, whose products are fast; sums stay below 255000 · (32 · 2^10)^2 = 2.7e14, which it holds exactly
    waves = (basis @ luma.astype(np.float64) @ basis.T).reshape(len(pixels), BITS)
    above = waves > np.median(waves, axis=1, keepdims=True)
    hashes = np.packbits(above, axis=1).view(">u8").astype(np.uint64).reshape(-1)
    contrasts = (luma.max(axis=(1, 2)) - luma.min(axis=(1, 2))) // 1000
    blue, red = (pixels[:, channel].astype(np.int64) * 1000 - luma for channel in (2, 0))
    chroma = np.stack([_cells(blue, CELLS // 2) * 564, _cells(red, CELLS // 2) * 713], axis=1)  # in millionths
    chroma = (chroma // 1_000_000).reshape(len(pixels), -1).clip(-128, 127)
    lights = (_cells(luma, CELLS) // 1000).reshape(len(pixels), -1)
    return Looks(hashes, lights.astype(np.uint8), chroma.astype(np.int8), contrasts.astype(np.uint8))


def _basis() -> np.ndarray:
    """Waves 1 to 8 of the 32-point DCT-II, in whole numbers up to 2^10. (8, 32) fp64"""
    waves, places = np.arange(1, 9)[:, None], np.arange(SIDE)
    return np.rint(1024 * np.cos(np.pi * waves * (2 * places + 1) / (2 * SIDE)))


def _cells(values: np.ndarray, count: int) -> np.ndarray:
    """Means over cells, rounded down. (N, 32, 32) -> (N, count, count)"""
    step = SIDE // count
    return values.reshape(len(values), count, step, count, step).sum(axis=(2, 4)) // step**2


def alike(one: Looks, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Which of the pairs of pictures have the same maps of brightness and colours. (P,), (P,) positions -> (P,) bool

    Brightness is compared without its mean and deviation, which a lighter or paler copy has others of.
    """
    first, second = (one.lights[at].astype(np.float32) for at in (i, j))
    for lights in (first, second):
        lights -= lights.mean(axis=1, keepdims=True)
        lights /= np.maximum(lights.std(axis=1, keepdims=True), 1)
    light = np.abs(first - second).max(axis=1, initial=0) <= CLOSE_LIGHT
    return light & (np.abs(one.colours[i].astype(np.int16) - one.colours[j]).max(axis=1, initial=0) <= CLOSE_COLOUR)


def distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """In how many bits hashes differ. uint64 -> uint8"""
    return _ones(one ^ other)


def _ones(words: np.ndarray) -> np.ndarray:
    if hasattr(np, "bitwise_count"):  # numpy 2
        return np.bitwise_count(words)
    return _count_ones(words)


def _count_ones(words: np.ndarray) -> np.ndarray:
    """Sums of neighbouring bits, then of pairs, then of fours; a product adds the bytes up. uint64 -> uint8"""
    one, two, four, bytes_, top = map(
        np.uint64, (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F, 0x0101010101010101, 56)
    )
    words = words - ((words >> np.uint64(1)) & one)
    words = (words & two) + ((words >> np.uint64(2)) & two)
    words = (words + (words >> np.uint64(4))) & four
    return ((words * bytes_) >> top).astype(np.uint8)


# ---- pairs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Some bits of every hash, looked up with all values that differ from them in at most `reach` bits."""

    first: int  # of every `step`-th bit, so that waves of all frequencies are in it
    step: int
    reach: int  # -1: not looked up

    @property
    def width(self) -> int:
        return len(range(self.first, BITS, self.step))

    @property
    def look_ups(self) -> int:
        return sum(comb(self.width, count) for count in range(self.reach + 1))


def plan(count: int, radius: int) -> tuple[Part, ...]:
    """How so many hashes are cut up, so that every two within the radius are alike in at least one part.

    With m parts and radius = m·q + a, two hashes would otherwise differ in q + 1 bits or more of the first a + 1 parts
    and in q bits or more of the others, which is more than the radius. Of the cuts that are so exact, the one with the
    fewest look-ups and comparisons for hashes that are spread evenly.
    """
    if not 0 <= radius <= RADIUS:
        raise InputError(f"The distance of near duplicates is {radius} bits of {BITS}; give 0 to {RADIUS}.")
    cuts = []
    for parts in range(-(-BITS // _WIDEST), radius + 2 if radius > 1 else 4):
        reach, over = divmod(radius, parts)
        cut = tuple(Part(at, parts, reach if at <= over else reach - 1) for at in range(parts))
        cuts.append(tuple(part for part in cut if part.reach >= 0))
    return min(cuts, key=lambda cut: sum(p.look_ups * (count + 2**p.width / 8 + count**2 / 2**p.width) for p in cut))


def near_pairs(hashes: np.ndarray, radius: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every two of the hashes (N,) that differ in at most `radius` bits, each pair once, smaller position first.

    Comes in pieces, as (i, j) int64 arrays of one length; there is one piece at least for every look-up of the plan,
    which may be empty. Memory is some 50 bytes for a hash, and what two million comparisons take.
    """
    parts = plan(len(hashes), radius)
    for number, part in enumerate(parts):
        table = _Table(hashes, part)
        for mask in _masks(part.width, part.reach):
            found = False
            for left, right in table.candidates(mask):
                i, j = table.order[left], table.order[right]
                near = distance(hashes[i], hashes[j]) <= radius
                i, j = i[near], j[near]
                for earlier in parts[:number]:  # it was found there
                    fresh = _ones(_bits(hashes[i] ^ hashes[j], earlier).astype(np.uint64)) > earlier.reach
                    i, j = i[fresh], j[fresh]
                found = True
                yield np.minimum(i, j), np.maximum(i, j)
            if not found:
                yield np.empty(0, np.int64), np.empty(0, np.int64)


def _masks(width: int, reach: int) -> Iterator[int]:
    for count in range(reach + 1):
        for bits in combinations(range(width), count):
            yield sum(1 << bit for bit in bits)


def _bits(hashes: np.ndarray, part: Part) -> np.ndarray:
    """A part of every hash as a number. (N,) uint64 -> (N,) int64"""
    found = np.zeros(len(hashes), np.uint64)
    for to, bit in enumerate(range(part.first, BITS, part.step)):
        found |= ((hashes >> np.uint64(bit)) & np.uint64(1)) << np.uint64(to)
    return found.astype(np.int64)


class _Table:
    """Hashes in the order of one of their parts, and where each of its values begins."""

    def __init__(self, hashes: np.ndarray, part: Part):
        keys = _bits(hashes, part)
        self.order = keys.argsort(kind="stable")
        self._keys = keys[self.order]
        self._starts = np.zeros(2**part.width + 1, np.int64)
        np.cumsum(np.bincount(keys, minlength=2**part.width), out=self._starts[1:])

    def candidates(self, mask: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Places in the order of every two whose parts differ in exactly the bits of the mask, each two once."""
        places = np.arange(len(self._keys))
        if mask:
            theirs = self._keys ^ mask
            first, last = self._starts[theirs], self._starts[theirs + 1]
            open_ = (last > first) & (theirs > self._keys)
            places, first, counts = places[open_], first[open_], (last - first)[open_]
        else:
            counts = self._starts[self._keys + 1] - places - 1
            open_ = counts > 0
            places, first, counts = places[open_], places[open_] + 1, counts[open_]
        ends = counts.cumsum()
        at = 0
        while at < len(places):
            done = ends[at - 1] if at else 0
            to = max(at + 1, int(np.searchsorted(ends, done + _CANDIDATES, side="right")))
            here = counts[at:to]
            steps = np.arange(ends[to - 1] - done) - np.repeat(ends[at:to] - here - done, here)
            yield np.repeat(places[at:to], here), np.repeat(first[at:to], here) + steps
            at = to


# ---- groups ---------------------------------------------------------------------------------------------------------


def near_groups(
    hashes: np.ndarray, radius: int, counts: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda i, j: i == i
) -> Generator[Event, None, np.ndarray]:
    """The first member of the group of each hash; groups are what chains of near pairs connect. (N,) -> (N,) int64

    counts: which of the pairs (i, j), (P,) and (P,), do: a mask (P,). Two members of a group may be further apart
    than the radius, where others lie between them. Yields progress events.
    """
    groups = np.arange(len(hashes))
    total = sum(part.look_ups for part in plan(len(hashes), radius))
    done = 0
    for i, j in near_pairs(hashes, radius):
        if len(i):
            mask = counts(i, j)
            connect(groups, i[mask], j[mask])
        done = min(done + 1, total)
        yield progress("compare pictures", done, total)
    while not np.array_equal(above := groups[groups], groups):
        groups = above
    return groups


def connect(parents: np.ndarray, i: np.ndarray, j: np.ndarray) -> None:
    """Makes one group of the groups of i and j, for every pair; union-find on whole arrays. Changes `parents`.

    Every element points to one that is not behind it, and the first of a group to itself.
    """
    while len(i):
        i, j = _first(parents, i), _first(parents, j)
        apart = i != j
        i, j = i[apart], j[apart]
        np.minimum.at(parents, np.maximum(i, j), np.minimum(i, j))


def _first(parents: np.ndarray, elements: np.ndarray) -> np.ndarray:
    found = parents[elements]
    while not np.array_equal(above := parents[found], found):
        found = above
    parents[elements] = found  # a shorter way the next time
    return found
