"""Writing: atomic, synced, and the same bytes for the same content. Large files are streamed tensor by tensor."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import ChangedError, InputError
from .header import ITEM_BITS, Header
from .read import dtype_name, open_unchanged

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 22  # bytes that are copied at once


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when its turn to be written comes, so that a large file needs little memory."""

    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Stored:
    """A tensor of another file, whose bytes are copied as they are. Its stride is None."""

    header: Header
    name: str

    @property
    def dtype(self) -> str:
        return self.header.tensors[self.name].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.header.tensors[self.name].shape


def write_safetensors(
    tensors: Mapping[str, Tensor | Pending | Stored],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file atomically; metadata gets "format": "pt", or transformers would refuse it.

    Values are tensors, tensors to be made later, or those of another file, whose bytes are copied as they are.
    The header is written here and not by the library, which puts metadata in random order: the same content
    gives the same bytes. Widest dtype first, then by name, as in the library, keeps every tensor aligned.
    Raises OSError naming the path and the bytes needed when the disk is full; an older file stays intact.
    """
    kinds = {name: dtype_and_shape(tensor) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-ITEM_BITS[kinds[name][0]], name))
    entries: dict[str, Any] = {"__metadata__": dict(sorted({**(metadata or {}), "format": "pt"}.items()))}
    end = 0
    for name in order:
        dtype, shape = kinds[name]
        begin, end = end, end + math.prod(shape) * ITEM_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with _atomic(path, needed=8 + len(text) + end) as temporary, temporary.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            _write(file, tensors[name], kinds[name])
        if file.tell() != 8 + len(text) + end:
            raise ValueError(f"{file.tell()} bytes were written to {path} and not {8 + len(text) + end}")
        _sync(file)


def dtype_and_shape(tensor: Tensor | Pending | Stored) -> tuple[str, tuple[int, ...]]:
    """What a tensor will be in a file, by safetensors' names, made or not."""
    if isinstance(tensor, (Pending, Stored)):
        return tensor.dtype, tensor.shape
    return dtype_name(tensor.dtype), tuple(tensor.shape)


def _write(file: BinaryIO, tensor: Tensor | Pending | Stored, kind: tuple[str, tuple[int, ...]]) -> None:
    if isinstance(tensor, Stored):
        return _copy(file, tensor)
    if isinstance(tensor, Pending):
        tensor = tensor.make()
        if dtype_and_shape(tensor) != kind:
            raise ValueError(f"a tensor was announced as {kind} and is {dtype_and_shape(tensor)}")
    import torch

    plain = tensor.detach().cpu().contiguous().reshape(-1)
    file.write(plain.view(torch.uint8).numpy().data)


def _copy(file: BinaryIO, tensor: Stored) -> None:
    info = tensor.header.tensors[tensor.name]
    if info.stride is not None:
        raise ValueError(f"{tensor.name} of {info.file.name} is not contiguous and cannot be copied as it is")
    left = info.bytes
    with open_unchanged(tensor.header, info.file) as source:
        source.seek(info.start)
        while left:
            piece = source.read(min(left, PIECE))
            if not piece:
                raise ChangedError(f"{info.file.name} ends {left:,} bytes early; it was cut while it was read")
            file.write(piece)
            left -= len(piece)


def write_json(value: Any, path: str | os.PathLike[str]) -> None:
    """Write a value as indented JSON, atomically; NaN and infinity are refused with ValueError."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"  # file names that are not UTF-8
    write_text(text, path)


def read_json(path: Path) -> dict[str, object]:
    """An object that `write_json` wrote; empty where the file is not there, damaged, or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write a text as UTF-8, atomically."""
    write_bytes(text.encode(), path)


def write_bytes(content: bytes, path: str | os.PathLike[str]) -> None:
    """Write bytes, atomically."""
    with _atomic(path, needed=len(content)) as temporary, temporary.open("xb") as file:
        file.write(content)
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _atomic(path: str | os.PathLike[str], needed: int) -> Iterator[Path]:
    """Yield a path beside the target; it becomes the target on success and vanishes on failure.

    needed: bytes, for the message when the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: a folder has that name; give a file name")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex[:12]}.part")
    try:
        yield temporary
        _replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"no space left to write {path}: {needed:,} bytes are needed; free some and try again"
            raise OSError(error.errno, message) from error
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}; choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    if os.name == "posix":  # other systems cannot open a folder
        _sync_folder(path.parent)


def _replace(temporary: Path, path: Path) -> None:
    """os.replace; Windows refuses while another thread reads the old file, which takes moments."""
    for _ in range(20 if os.name == "nt" else 0):
        try:
            return os.replace(temporary, path)
        except PermissionError:
            time.sleep(0.1)
    os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the file system lets a folder be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
