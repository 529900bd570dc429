"""Captions and pictures that are there more than once: they are not each other's negatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def masked_pairs(same_picture: Tensor | None = None, same_caption: Tensor | None = None) -> int:
    """How many pairs of rows are not each other's negatives, {i, j} counted once. (B,), (B,) group numbers

    Counted from the groups' sizes, without a (B, B) matrix.
    """
    groups = [group.unique(return_inverse=True)[1] for group in (same_picture, same_caption) if group is not None]
    sizes = sum(_pairs_within(group) for group in groups)
    if len(groups) == 2:  # those that share both were counted twice
        sizes -= _pairs_within(groups[0] * len(groups[1]) + groups[1])
    return sizes


def _pairs_within(groups: Tensor) -> int:
    sizes = groups.unique(return_counts=True)[1]
    return (sizes * (sizes - 1) // 2).sum().item()


def alike(rows: Tensor) -> Tensor:
    """The position of the first row that equals it, for every row: equal numbers, equal rows. (N, …) -> (N,) int64

    By a hash of each row, a part of them at a time, and then checked: 1,000,000 × 77 tokens take 80 MB beside
    themselves, where torch.unique(dim=0) sorts a copy.
    """
    flat = rows.reshape(len(rows), -1) if len(rows) else rows.reshape(0, 1)
    groups = _first(_hashes(flat))
    chunks = blocks(len(flat), _rows_at_once(flat))
    if all(flat[chunk].equal(flat[groups[chunk]]) for chunk in chunks):
        return groups
    return _first(flat.unique(dim=0, return_inverse=True)[1])  # two rows have one hash


def alike_keys(keys: Sequence[str]) -> Tensor:
    """`alike` for names of contents, such as hashes of files. N keys -> (N,) int64"""
    first: dict[str, int] = {}
    return torch.tensor([first.setdefault(key, i) for i, key in enumerate(keys)], dtype=torch.int64)


def _first(numbers: Tensor) -> Tensor:
    """The position of the first equal number. (N,) -> (N,)"""
    distinct, rank = numbers.unique(return_inverse=True)
    positions = torch.arange(len(numbers), device=numbers.device)
    first = torch.full_like(distinct, len(numbers), dtype=torch.int64)
    return first.scatter_reduce_(0, rank, positions, "amin")[rank]


def _hashes(rows: Tensor) -> Tensor:
    """A number for each row, (N, W) -> (N,) int64: its elements, mixed, times random odd numbers modulo 2^64."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator) * 2 + 1
    factors = factors.to(rows.device)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    found = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    for chunk in blocks(len(rows), _rows_at_once(rows)):
        part = rows[chunk]
        part = (part + 0.0).view(bits) if part.is_floating_point() else part  # + 0: -0.0 equals 0.0
        mixed = part.to(torch.int64) * -7046029254386353131
        found[chunk] = (mixed ^ (mixed >> 32)).mul_(factors).sum(dim=1)
    return found


def _rows_at_once(rows: Tensor) -> int:
    return max(1, 2**20 // max(1, rows.shape[1]))


def blocks(count: int, block: int) -> list[slice]:
    """0 … count - 1 in pieces of `block`, the last one shorter."""
    return [slice(start, min(start + block, count)) for start in range(0, count, block)]
