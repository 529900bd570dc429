"""Opens a file or a folder of any kind: first its header, later the bytes of the tensors that are wanted."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import ChangedError, InputError
from . import archive, folder, safetensors
from .header import Header, TensorInfo, stamp

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MAGIC = (
    (b"GGUF", "is a GGUF file (quantised for llama.cpp); give the safetensors file it was made from"),
    (b"\x89PNG", "is a PNG picture, not a model"),
    (b"\xff\xd8\xff", "is a JPEG picture, not a model"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the model itself; fetch it with 'git lfs pull'"),
    (b"\x1f\x8b", "is a gzip archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it first"),
    (b"Rar!", "is a RAR archive; unpack it first"),
    (b"\x08\x07\x12", "is an ONNX model; give the safetensors file it was exported from"),
    (b"\x89HDF", "is an HDF5 file (Keras); give the safetensors edition"),
    (b"{", "is a JSON text, not a model; give the .safetensors file itself"),
)


def read_header(path: str | os.PathLike[str]) -> Header:
    """What a safetensors file, a PyTorch file or a model folder holds, from its header alone.

    No code in the file is run and no tensor is read. Raises InputError for a missing, empty, truncated or
    damaged file, and for any other kind of file, with a sentence that names it.
    """
    path = Path(path).absolute()  # so that "." has a name
    try:
        if path.is_dir():
            return folder.read(path, read_header)
        if not path.exists():
            raise InputError(f"{path.name} does not exist in {path.parent}")
        if not path.is_file():
            raise InputError(f"{path.name} is a device or a pipe, not a file")
        return _read_file(path)
    except OSError as error:
        raise InputError(f"{path.name} cannot be read: {error.strerror or error}") from error


def _read_file(path: Path) -> Header:
    before = {path: stamp(path.stat())}
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise InputError(f"{path.name} is empty (0 bytes); download or save it again")
    if start.startswith(b"PK\x03\x04"):
        header = archive.read_zip(path)
    else:
        header = safetensors.read(path)  # first: a header of 1,152 bytes begins as a pickle does
        if header is None and start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            header = archive.read_pickle(path)
    if header is None:
        if path.name.endswith(".index.json"):
            raise InputError(f"{path.name} lists the parts of a model; give the folder that it lies in")
        raise InputError(f"{path.name} {_looks_like(start)}")
    return folder.with_config(replace(header, stamps=before))


def _looks_like(start: bytes) -> str:
    """What a file that cannot be opened probably is, as the rest of a sentence."""
    for magic, sentence in _MAGIC:
        if start.startswith(magic):
            return sentence
    if start[257:262] == b"ustar":
        return "is a tar archive; unpack it and give the model file inside"
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not a model; the download link led to a page, often one that asks to log in"
    length = int.from_bytes(start[:8], "little")
    return (
        f"is not a safetensors file: its first 8 bytes promise a header of {length:,} bytes; give a .safetensors file"
    )


def read_tensors(header: Header, names: Iterable[str]) -> dict[str, Tensor]:
    """Read these tensors and no others, on the CPU, in the dtype they are stored in.

    The tensors own their memory, so the file may be replaced while they live.
    Raises InputError for absent names and for dtypes that torch does not have.
    """
    names = list(names)
    if absent := sorted(set(names) - header.tensors.keys()):
        raise InputError(f"{header.path.name} has no tensors named {', '.join(absent)}")
    opened: dict[Path, BinaryIO] = {}
    tensors = {}
    with contextlib.ExitStack() as stack:
        for name in names:
            info = header.tensors[name]
            try:
                if info.file not in opened:
                    opened[info.file] = stack.enter_context(open_unchanged(header, info.file))
                tensors[name] = _read(opened[info.file], info, f"{info.file.name}: {name}")
            except OSError as error:
                raise InputError(f"{info.file.name} cannot be read: {error.strerror or error}") from error
    return tensors


def open_unchanged(header: Header, path: Path) -> BinaryIO:
    """One of the header's files. Raises ChangedError if it is not what it was when the header was read."""
    file = path.open("rb", buffering=0)
    if header.stamps.get(path) not in (None, stamp(os.fstat(file.fileno()))):
        file.close()
        raise ChangedError(f"{path.name} was changed while it was read; try again")
    return file


def _read(file: BinaryIO, info: TensorInfo, name: str) -> Tensor:
    import torch

    dtype = torch_dtypes().get(info.dtype)
    if dtype is None:
        raise InputError(f"{name} is {info.dtype}, which is not read")
    flat = torch.empty(info.items, dtype=dtype)
    rest = memoryview(flat.view(torch.uint8).numpy())
    file.seek(info.start)
    while rest:
        count = file.readinto(rest)
        if not count:
            raise ChangedError(f"{name} ends {len(rest):,} bytes early; the file was cut while it was read")
        rest = rest[count:]
    if info.stride is None or 0 in info.shape:
        return flat.view(info.shape)
    return flat.as_strided(info.shape, info.stride).contiguous()


def dtype_name(dtype: torch.dtype) -> str:
    """torch's dtype -> safetensors' name."""
    return next(name for name, known in torch_dtypes().items() if known == dtype)


@functools.cache
def torch_dtypes() -> dict[str, torch.dtype]:
    """safetensors' names -> torch's dtypes, those that both have here."""
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
        "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    }  # fmt: skip
