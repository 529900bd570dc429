"""The only place that opens files from strangers, and the only one that writes model files.

Reading is safetensors only: the header is parsed with the standard library and checked against the file's
size before any tensor is touched. Writing is atomic (temp file beside the target, fsync, rename); the same
content gives the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

HEADER_LIMIT = 100_000_000  # bytes, the safetensors library's own limit
ITEM_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    "F4": 4,
}

_PICKLE = (
    "is a PyTorch pickle, which can run code when opened; only safetensors files are read: convert it with a "
    "tool you trust, or get the safetensors edition"
)
_MAGIC = (
    (b"GGUF", "is a GGUF file (quantised for llama.cpp); give the safetensors file it was made from"),
    (b"\x89PNG", "is a PNG picture, not a model"),
    (b"\xff\xd8\xff", "is a JPEG picture, not a model"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the model itself; fetch it with 'git lfs pull'"),
    (b"\x1f\x8b", "is a gzip archive; unpack it first"),
    (b"{", "is a JSON text, not a model; give the .safetensors file itself"),
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file; dtype as safetensors names it: "F32", "F16", "BF16", "F8_E4M3", "I64"."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself before any tensor is read."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Parse and check the header of a safetensors file.

    Raises InputError for a missing, empty, truncated or damaged file, a folder, and any other kind of file.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path.name} is a folder; give a .safetensors file, such as the one inside it")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            text = file.read(length) if size >= 8 and length <= min(size - 8, HEADER_LIMIT) else None
    except FileNotFoundError:
        raise InputError(f"{path.name} does not exist in {path.parent}") from None
    except OSError as error:
        raise InputError(f"{path.name} cannot be read: {error.strerror or error}") from error
    if not size:
        raise InputError(f"{path.name} is empty (0 bytes); download or save it again")
    if text is None and start[8:9] == b"{" and size - 8 < length <= HEADER_LIMIT:
        raise _truncated(path, 8 + length, size)
    if text is None or not text.startswith(b"{"):
        raise InputError(f"{path.name} {_looks_like(start, length)}")
    return _parse(path, text, size - 8 - length)


def _parse(path: Path, text: bytes, data_size: int) -> Header:
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata values are not all strings")
        tensors, end = {}, 0
        for name, entry in entries.items():
            shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
            if not all(isinstance(number, int) and number >= 0 for number in (*shape, first, last)):
                raise ValueError(f"{name}: shape and offsets are not whole numbers")
            bits = ITEM_BITS.get(entry["dtype"])
            if last < first or (bits and (last - first) * 8 != math.prod(shape) * bits):
                raise ValueError(f"{name}: {last - first} bytes do not hold {entry['dtype']} {list(shape)}")
            tensors[name], end = TensorInfo(entry["dtype"], shape), max(end, last)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path.name} has a damaged safetensors header ({error}); download it again") from error
    if end > data_size:
        raise _truncated(path, 8 + len(text) + end, 8 + len(text) + data_size)
    return Header(path, tensors, metadata)


def _truncated(path: Path, expected: int, found: int) -> InputError:
    return InputError(
        f"{path.name} is truncated: {expected:,} bytes expected, {found:,} bytes found; download or copy it again"
    )


def _looks_like(start: bytes, length: int) -> str:
    """What a file that is not safetensors probably is, as the rest of a sentence."""
    if start[:2] == b"\x80\x02" or start[:1] == b"\x80" and start[1:2] in (b"\x03", b"\x04", b"\x05"):
        return _PICKLE
    if start[:4] == b"PK\x03\x04":
        torch_zip = b"data.pkl" in start or b".data/" in start or b"/version" in start
        return _PICKLE if torch_zip else "is a zip archive; unpack it and give the .safetensors file inside"
    for magic, sentence in _MAGIC:
        if start.startswith(magic):
            return sentence
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not a model; the download link led to a page, often one that asks to log in"
    return (
        f"is not a safetensors file: its first 8 bytes promise a header of {length:,} bytes; give a .safetensors file"
    )


def read_tensors(header: Header, names: Iterable[str]) -> dict[str, Tensor]:
    """Read these tensors and no others, on the CPU, in the dtype they are stored in.

    The tensors own their memory, so the file may be replaced while they live.
    Raises InputError for absent names.
    """
    from safetensors import SafetensorError, safe_open

    names = list(names)
    if absent := sorted(set(names) - header.tensors.keys()):
        raise InputError(f"{header.path.name} has no tensors named {', '.join(absent)}")
    try:
        with safe_open(header.path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise InputError(f"{header.path.name} cannot be read as safetensors: {error}") from error


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file as hex, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def write_safetensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; metadata gets "format": "pt", or transformers would refuse it.

    The header is written here and not by the library, which puts metadata in random order: the same content
    gives the same bytes. Widest dtype first, then by name, as in the library, keeps every tensor aligned.
    Raises OSError naming the path and the bytes needed when the disk is full; an older file stays intact.
    """
    import torch

    dtypes = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
        torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    }  # fmt: skip
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, Any] = {"__metadata__": dict(sorted({**(metadata or {}), "format": "pt"}.items()))}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": dtypes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with _atomic(path, needed=8 + len(text) + end) as temporary, temporary.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            plain = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(plain.view(torch.uint8).numpy().data)
        _sync(file)


def write_json(value: Any, path: str | os.PathLike[str]) -> None:
    """Write a value as indented JSON, atomically; NaN and infinity are refused with ValueError."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"  # file names that are not UTF-8
    write_text(text, path)


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
