"""Tensors as torch describes them in a pickle, and where their bytes lie.

Works on the inert stand-ins of `unpickle`. What a tensor says of itself is checked against its storage.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .header import ITEM_BITS, NAME_LIMIT, TensorInfo
from .unpickle import Global, Persistent, Standin

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128", "UntypedStorage": "U8",
}  # fmt: skip
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "complex64": "C64", "complex128": "C128", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
# torch's functions that make a tensor of a storage -> how many arguments come before its metadata
_PLAIN = {"torch._utils._rebuild_tensor": 4, "torch._utils._rebuild_tensor_v2": 6, "torch._utils._rebuild_tensor_v3": 7}
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_SUBCLASSES = ("torch._tensor._rebuild_from_type", "torch._tensor._rebuild_from_type_v2")
_UNREADABLE = {
    "torch._utils._rebuild_sparse_tensor": "is sparse",
    "torch._utils._rebuild_sparse_csr_tensor": "is sparse",
    "torch._utils._rebuild_qtensor": "is quantised",
    "torch._utils._rebuild_nested_tensor": "is nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "was saved without its values",
}
WRAPPERS = 4  # a subclass in a parameter has two
RANK_LIMIT = 64


@dataclass(frozen=True)
class Storage:
    """Where the bytes of a storage lie in the file."""

    start: int
    bytes: int


@dataclass(frozen=True)
class Reference:
    """What a pickle says of a storage, and which part of it is meant: `length` items from the item `first` on."""

    key: str
    dtype: str
    items: int
    first: int
    length: int

    @property
    def bytes(self) -> int:
        return self.items * ITEM_BITS[self.dtype] // 8


def reference(persistent: Any) -> Reference:
    """What a pickle says of a storage. Raises ValueError, with the rest of a sentence, for anything else."""
    pid = persistent.pid if isinstance(persistent, Persistent) else None
    if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
        raise ValueError("is not in a storage")
    kind, key, _, items = pid[1:5]
    if not isinstance(kind, Global) or kind.name not in STORAGES:
        raise ValueError(f"is in a storage of a kind that is not read{_named(kind)}")
    view = pid[5] if len(pid) == 6 else None  # torch 0.3 and before: a part of another storage
    _, first, length = view if type(view) is tuple and len(view) == 3 else (None, 0, items)
    if not isinstance(key, str) or not _are_sizes((items, first, length)) or first + length > items:
        raise ValueError("is in a storage of no size")
    return Reference(key, STORAGES[kind.name], items, first, length)


def makes_tensors(name: Global) -> bool:
    """True for torch's functions that its pickles make tensors with."""
    return name.module in ("torch._utils", "torch._tensor") and name.name.startswith("_rebuild_")


def is_tensor(value: Any) -> bool:
    """True for what stands for a tensor, one that can be read or not."""
    return isinstance(value, Standin) and isinstance(value.made_by, Global) and makes_tensors(value.made_by)


def tensor_info(name: str, value: Any, path: Path, storages: Mapping[str, Storage]) -> TensorInfo:
    """Where a tensor lies in the file. Raises ValueError, with the rest of a sentence on it, if it cannot be read."""
    if len(name) > NAME_LIMIT or not name.isprintable():
        raise ValueError("has a name that cannot be shown")
    if not is_tensor(value):
        raise ValueError("is not a tensor")
    function, args = _unwrapped(value)
    if function not in _PLAIN:
        raise ValueError(_UNREADABLE.get(function, f"is made by {function}, which is not read"))
    before, typed = _PLAIN[function], function.endswith("_v3")
    if len(args) < (before if typed else 4):
        raise ValueError("is not described in full")
    stored = reference(args[0])
    metadata = args[before] if len(args) > before else None
    if isinstance(metadata, dict) and (metadata.get("conj") or metadata.get("neg")):
        raise ValueError("is stored negated or conjugated")
    dtype = _dtype(args[6]) if typed else stored.dtype
    if stored.key not in storages:
        raise ValueError(f"is in a storage that the file lacks: {stored.key}")
    return _placed(path, dtype, args[1:4], stored, storages[stored.key])


def _unwrapped(value: Standin) -> tuple[str, tuple[Any, ...]]:
    """Name and arguments of the function that makes the tensor itself, inside of parameters and subclasses."""
    function, args = value.made_by, value.args
    for _ in range(WRAPPERS):
        if str(function) in _PARAMETERS and args and is_tensor(args[0]):
            function, args = args[0].made_by, args[0].args
        elif str(function) in _SUBCLASSES and len(args) > 2 and isinstance(args[0], Global) and type(args[2]) is tuple:
            function, args = args[0], args[2]
    return str(function), args


def _dtype(value: Any) -> str:
    if not isinstance(value, Global) or value.module != "torch" or value.name not in DTYPES:
        raise ValueError(f"has a dtype that is not read{_named(value)}")
    return DTYPES[value.name]


def _placed(path: Path, dtype: str, geometry: tuple[Any, ...], stored: Reference, whole: Storage) -> TensorInfo:
    """geometry: offset, shape and stride, in items."""
    offset, shape, stride = geometry
    if type(shape) is not tuple or type(stride) is not tuple or len(shape) != len(stride) or len(shape) > RANK_LIMIT:
        raise ValueError("has no shape with a stride for each size")
    if not _are_sizes((offset, *shape, *stride)):
        raise ValueError("has sizes that are no numbers")
    if stored.bytes != whole.bytes:  # torch refuses it too
        raise ValueError(f"is in a storage of {stored.bytes:,} bytes, and {whole.bytes:,} are there")
    begin, part = (items * ITEM_BITS[stored.dtype] // 8 for items in (stored.first, stored.length))
    item = ITEM_BITS[dtype] // 8
    available, count = part // item, math.prod(shape)
    span = 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True)) if count else 0
    if offset + span > available:
        raise ValueError(f"reaches {offset + span - available:,} items beyond its storage")
    if count > available:  # a few bytes would ask for any amount of memory
        raise ValueError("is expanded, to more items than its storage has")
    start = whole.start + begin + offset * item
    return TensorInfo(dtype, shape, path, start, stride if count and not _is_contiguous(shape, stride) else None)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step = 1
    for length, found in zip(reversed(shape), reversed(stride), strict=True):
        if length != 1 and found != step:
            return False
        step *= length
    return True


def _are_sizes(numbers: Iterable[Any]) -> bool:
    return all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


def _named(value: Any) -> str:
    return f" ({value})" if isinstance(value, Global) else ""
