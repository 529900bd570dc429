"""PyTorch's own files: zip archives since 1.6, TorchScript, and the older single pickles. Read as data.

Neither `torch.load` nor `pickle` is used. Of an archive nothing is unpacked: its directory is checked, its pickle is
read by `unpickle`, and tensors are described by where their bytes lie in the file.
"""

from __future__ import annotations

import io
import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError, some
from . import objects, unpickle
from .header import Header
from .tensors import Reference, Storage, reference

DIRECTORY_LIMIT = 8_000_000  # bytes; an archive of 3,000 tensors lists them in 250,000
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # what torch's older files begin with

_PICKLE = re.compile(r"[^/]+/data\.pkl")
_UNSAFE = re.compile(r"/|.*\\|[A-Za-z]:|(.*/)?\.\.(/|$)|.*[\0-\x1f]", re.DOTALL)
_BIG = "save it again on a computer with an x86 or ARM processor"
_PREFER = "give the file that its authors published, best as safetensors"


def read_zip(path: Path) -> Header:
    """The header of what `torch.save` or `torch.jit.save` wrote since torch 1.6; TorchScript's code is not read.

    Raises InputError for other zip archives, damaged ones, and those that torch would not have written: with unsafe
    or repeated names, links, encryption, compressed tensors, or members that lie in each other.
    """
    with path.open("rb") as file:
        members = _members(path)
        spans = _spans(path, file, members)
        names = [name for name in members if _PICKLE.fullmatch(name)]
        if len(names) != 1:
            raise InputError(
                f"{path.name} is a zip archive, and not one that torch writes ({len(names)} data.pkl in it); "
                "unpack it and give the model file inside"
            )
        stem = names[0].removesuffix("data.pkl")
        order = members.get(f"{stem}byteorder")
        if order and _content(path, file, order, spans, limit=16) != b"little":
            raise InputError(f"{path.name} was saved as big-endian; {_BIG}")
        content = _content(path, file, members[names[0]], spans, limit=unpickle.SIZE_LIMIT)
    loaded = unpickle.load(io.BytesIO(content), path.name)
    stored = {name: info for name, info in members.items() if name.startswith(f"{stem}data/")}
    if packed := [name for name, info in stored.items() if info.compress_type != zipfile.ZIP_STORED]:
        raise InputError(
            f"{path.name} has compressed tensors, which torch does not write ({some(packed)}); unpack it and pack it "
            "again without compression (zip -0 -r)"
        )
    storages = {name.removeprefix(f"{stem}data/"): spans[name] for name in stored}
    tensors, notes = objects.find(loaded, path, storages)
    script = f"{stem}constants.pkl" in members
    if script:
        notes = (*notes, "holds code (TorchScript), which was neither read nor run")
    return Header(path, tensors, {}, "torchscript" if script else "pickle", notes=notes)


class _Frugal(io.BufferedReader):
    """A file that refuses to be read in large pieces: `zipfile` takes a directory of any size into memory at once."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > DIRECTORY_LIMIT:
            raise ValueError(f"it lists its members in {size:,} bytes, and {DIRECTORY_LIMIT:,} would do")
        return super().read(size if size is not None and size >= 0 else DIRECTORY_LIMIT)


def _members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The archive's members by name. Raises InputError for a damaged directory and for one that is not torch's."""
    try:
        with _Frugal(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, EOFError) as error:
        raise InputError(
            f"{path.name} is a damaged or truncated zip archive ({some([str(error)])}); download or copy it again"
        ) from error
    problems = []
    names = Counter(info.orig_filename for info in infos)
    if unsafe := [name for name in names if _UNSAFE.match(name)]:
        problems.append(f"names that lead out of it: {some(unsafe)}")
    if repeated := [name for name, count in names.items() if count > 1]:
        problems.append(f"several members of one name: {some(repeated)}")
    if links := [info.orig_filename for info in infos if stat.S_ISLNK(info.external_attr >> 16)]:
        problems.append(f"links instead of files: {some(links)}")
    if secret := [info.orig_filename for info in infos if info.flag_bits & 0x2041]:
        problems.append(f"encrypted members: {some(secret)}")
    if problems:
        raise InputError(
            f"{path.name} is a zip archive that torch would not write; it has {'; '.join(problems)}; {_PREFER}"
        )
    return {info.orig_filename: info for info in infos}


def _spans(path: Path, file: BinaryIO, members: dict[str, zipfile.ZipInfo]) -> dict[str, Storage]:
    """Where each member's bytes lie, by the header before them, which has to agree with the directory."""
    size = path.stat().st_size
    spans, wrong, overlapping, end = {}, [], [], 0
    for name, info in sorted(members.items(), key=lambda member: member[1].header_offset):
        file.seek(max(info.header_offset, 0))
        header = file.read(LOCAL_HEADER.size)
        signature, name_length, extra_length = LOCAL_HEADER.unpack(header.ljust(LOCAL_HEADER.size, b"\0"))
        own_name = file.read(name_length).decode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace")
        start = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
        if info.header_offset < 0 or signature != b"PK\3\4" or own_name != name or start + info.compress_size > size:
            wrong.append(name)
        elif info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            wrong.append(name)
        elif info.header_offset < end:
            overlapping.append(name)
        else:
            end = start + info.compress_size
            spans[name] = Storage(start, info.compress_size)
    problems = [f"members that are not where its directory says: {some(wrong)}"] if wrong else []
    problems += [f"members that lie in each other: {some(overlapping)}"] if overlapping else []
    if problems:
        raise InputError(f"{path.name} is a damaged zip archive; it has {'; '.join(problems)}; download it again")
    return spans


def _content(path: Path, file: BinaryIO, info: zipfile.ZipInfo, spans: dict[str, Storage], limit: int) -> bytes:
    """A member's bytes, unpacked to exactly the size that the directory declares."""
    name, span = some([info.orig_filename]), spans[info.orig_filename]
    if info.file_size > limit or span.bytes > limit:
        raise InputError(f"{path.name}: {name} has {info.file_size:,} bytes; {limit:,} are the most that make sense")
    file.seek(span.start)
    content = file.read(span.bytes)
    if info.compress_type == zipfile.ZIP_DEFLATED:
        try:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, info.file_size + 1)
        except zlib.error:
            content = b""
    elif info.compress_type != zipfile.ZIP_STORED:
        raise InputError(f"{path.name}: {name} is compressed in a way that is not read; pack it again with zip -0")
    # torch can be told to leave the checksums at 0
    if len(content) != info.file_size or (info.CRC and zlib.crc32(content) != info.CRC):
        raise InputError(f"{path.name} is damaged: {name} is not what its size and checksum say; download it again")
    return content


def read_pickle(path: Path) -> Header:
    """The header of what `torch.save` wrote before torch 1.6, and does still if asked to.

    Five pickles, then for each storage its length and its bytes. Raises InputError for pickles of other programs,
    and for damaged, truncated and big-endian files.
    """
    name, size = path.name, path.stat().st_size
    with path.open("rb") as file:
        if not _begins_with_magic(file, name):
            file.seek(0)
            raise InputError(f"{name} {_whose(file.read(1 << 16))}")
        version, system = (unpickle.load(file, name, size_limit=4096).value for _ in range(2))
        if version != VERSION or not isinstance(system, dict):
            raise InputError(f"{name} is of a version of torch's files that is not read; save it again with torch.save")
        if system.get("little_endian") is not True:
            raise InputError(f"{name} was saved as big-endian; {_BIG}")
        loaded = unpickle.load(file, name)
        keys = unpickle.load(file, name).value
        storages, end = _storages(name, file, keys, loaded, size)
    tensors, notes = objects.find(loaded, path, storages)
    if end < size:
        notes = (*notes, f"{size - end:,} bytes follow its last tensor, which were not read")
    return Header(path, tensors, {}, "pickle", notes=notes)


def _begins_with_magic(file: BinaryIO, name: str) -> bool:
    try:
        return unpickle.load(file, name, size_limit=64).value == MAGIC
    except InputError:
        return False


def _whose(start: bytes) -> str:
    """What another program's pickle probably is, as the rest of a sentence."""
    if b"StructuredToParameterName@@" in start or (b"numpy" in start and b"_reconstruct" in start):
        return (
            "is a pickle of numpy arrays, as PaddlePaddle saves its models (.pdparams); convert it to safetensors "
            "with PaddleNLP or ppdiffusers first"
        )
    return "is a Python pickle that torch.save did not write; give the model's .safetensors or .pt file"


def _storages(
    name: str, file: BinaryIO, keys: Any, loaded: unpickle.Loaded, size: int
) -> tuple[dict[str, Storage], int]:
    """Where the storages lie that follow the last pickle, and where they end."""
    found: dict[str, Reference] = {}
    for persistent in loaded.persistents:
        if type(persistent.pid) is tuple and persistent.pid[:1] == ("module",):  # a class and its source text
            continue
        try:
            stored = reference(persistent)
        except ValueError as error:
            raise InputError(f"{name} cannot be read: a tensor of it {some([str(error)])}") from error
        found.setdefault(stored.key, stored)
    if (
        not isinstance(keys, list)
        or len(keys) != len(found)
        or {key for key in keys if isinstance(key, str)} != set(found)
    ):
        raise InputError(f"{name} is damaged: it does not list the storages that its tensors are in; download it again")
    end = file.tell() + sum(8 + stored.bytes for stored in found.values())
    if end > size:
        raise InputError(
            f"{name} is truncated: {end:,} bytes expected, {size:,} bytes found; download or copy it again"
        )
    storages = {}
    for key in keys:
        if int.from_bytes(file.read(8), "little", signed=True) != found[key].items:
            raise InputError(f"{name} is damaged: its storages are not of the sizes it says; download it again")
        storages[key] = Storage(file.tell(), found[key].bytes)
        file.seek(found[key].bytes, io.SEEK_CUR)
    return storages, end
