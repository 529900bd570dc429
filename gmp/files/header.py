"""What a file says about itself before any tensor is read, whatever its container."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME_LIMIT = 500  # letters of a tensor's name
# Bits of one item, by safetensors' names of dtypes.
ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "C128": 128,
    "F4": 4,
}


Stamp = tuple[int, int, int, int]


def stamp(state: os.stat_result) -> Stamp:
    """Another one for another file at the same path, and for the same file after a write."""
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


@dataclass(frozen=True)
class TensorInfo:
    """One tensor, and where its bytes lie; dtype as safetensors names it: "F32", "F16", "BF16", "F8_E4M3", "I64"."""

    dtype: str
    shape: tuple[int, ...]
    file: Path  # the one that holds the bytes: a shard, or the file itself
    start: int  # position of its first byte in that file
    stride: tuple[int, ...] | None = None  # in items; None is contiguous

    @property
    def items(self) -> int:
        """How many items the bytes from `start` on span; more than the tensor has where the stride leaves gaps."""
        if self.stride is None or 0 in self.shape:
            return math.prod(self.shape)
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def bytes(self) -> int:
        return -(-self.items * ITEM_BITS[self.dtype] // 8)


@dataclass(frozen=True)
class Header:
    """All tensors of a file or folder by name. Nothing of them has been read.

    container: "safetensors", "folder", "pickle" (torch's archives, old and recent) or "torchscript".
    configs: what `config.json` and the like say, by the prefix of the tensors they speak of, "" for all.
    notes: sentences on what is in the file beside tensors and was left unread.
    stamps: how each file was when its header was read; its tensors are of use only while it stays so.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    container: str = "safetensors"
    configs: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)
