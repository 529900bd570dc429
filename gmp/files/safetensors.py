"""The header of a safetensors file, parsed with the standard library and checked before anything relies on it.

Refused is what the safetensors library refuses: offsets that overlap, leave gaps or end elsewhere than the file,
sizes that do not fit dtype and shape, names that come twice.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import InputError, some
from .header import ITEM_BITS, NAME_LIMIT, Header, TensorInfo

HEADER_LIMIT = 100_000_000  # bytes, the safetensors library's own limit


def read(path: Path) -> Header | None:
    """The header; None for a file that is something else. Raises InputError for a damaged or truncated one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if start[8:] != b"{" or length > HEADER_LIMIT:
            return None
        if length > size - 8:
            raise _truncated(path, 8 + length, size)
        file.seek(8)
        text = file.read(length)
    return _parse(path, text, size - 8 - length)


def _parse(path: Path, text: bytes, data_size: int) -> Header:
    begin = 8 + len(text)
    try:
        entries = json.loads(text, object_pairs_hook=_once)
        metadata = entries.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata values are not all strings")
        "".join((*metadata, *metadata.values())).encode()
        spans = sorted(_span(name, entry) for name, entry in entries.items())
        end = 0
        for first, last, name in spans:
            if first != end:
                raise ValueError(f"{name} begins at byte {first}, where {end} is next: tensors overlap or leave a gap")
            end = last
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path.name} has a damaged safetensors header ({error}); download it again") from error
    if end > data_size:
        raise _truncated(path, begin + end, begin + data_size)
    if end < data_size:
        raise InputError(
            f"{path.name} is not a clean safetensors file: {data_size - end:,} bytes follow its last tensor; "
            "download it again"
        )
    tensors = {
        name: TensorInfo(entry["dtype"], tuple(entry["shape"]), path, begin + entry["data_offsets"][0])
        for name, entry in entries.items()
    }
    return Header(path, tensors, metadata)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    whole = dict(pairs)
    if len(whole) < len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"names come twice: {some(twice)}")
    return whole


def _span(name: str, entry: dict[str, Any]) -> tuple[int, int, str]:
    """First and last byte of a tensor, which must be what its dtype and shape need."""
    if len(name) > NAME_LIMIT:
        raise ValueError(f"a name has {len(name):,} letters")
    name.encode()  # half a surrogate pair can be written as JSON, and nowhere else
    shape, (first, last) = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or any(type(number) is not int or number < 0 for number in (*shape, first, last)):
        raise ValueError(f"{name}: shape and offsets are not whole numbers")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in ITEM_BITS:
        raise ValueError(f"{name}: {entry['dtype']!r} is no dtype of safetensors")
    if last < first or (last - first) * 8 != math.prod(shape) * ITEM_BITS[entry["dtype"]]:
        raise ValueError(f"{name}: {last - first} bytes do not hold {entry['dtype']} {shape}")
    return first, last, name


def _truncated(path: Path, expected: int, found: int) -> InputError:
    return InputError(
        f"{path.name} is truncated: {expected:,} bytes expected, {found:,} bytes found; download or copy it again"
    )
