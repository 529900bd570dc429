"""Small valid files of every container, and ways to put a pickle into one. Shared by tests and the fuzzer."""

from __future__ import annotations

import functools
import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from gmp import files
from gmp.errors import InputError
from gmp.files.header import ITEM_BITS
from gmp.inspection import inspect, lines, sentence

SIXTEEN = MappingProxyType({"0": bytes(16)})  # storages: one of sixteen bytes
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001


@dataclass(frozen=True)
class Stored:
    """A storage, by what the pickle calls it."""

    pid: Any


def storage(key: str = "0", items: Any = 4, kind: Any = torch.FloatStorage) -> Stored:
    return Stored(("storage", kind, key, "cpu", items))


@dataclass(frozen=True)
class Made:
    """An object that a pickle asks to be made by calling a function."""

    function: Any
    args: Any

    def __reduce__(self) -> tuple[Any, Any]:
        return self.function, self.args


def tensor(
    items: Any = 4, offset: Any = 0, shape: Any = (2, 2), stride: Any = (2, 1), key: str = "0", metadata: Any = None
) -> Made:
    """A tensor as torch.save describes it, whatever sense it makes."""
    args = (storage(key, items), offset, shape, stride, False, OrderedDict())
    return Made(torch._utils._rebuild_tensor_v2, args if metadata is None else (*args, metadata))


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.pid if isinstance(value, Stored) else None


def pickled(value: Any, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def zipped(content: bytes, storages: Mapping[str, bytes] = SIXTEEN, stem: str = "archive") -> bytes:
    """A pickle in a zip archive as torch lays it out."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"{stem}/data.pkl", content)
        archive.writestr(f"{stem}/byteorder", "little")
        for key, stored in storages.items():
            archive.writestr(f"{stem}/data/{key}", stored)
        archive.writestr(f"{stem}/version", "3\n")
    return buffer.getvalue()


def legacy(content: bytes, storages: Mapping[str, bytes] = SIXTEEN, item: int = 4, **system: Any) -> bytes:
    """A pickle in a file as torch.save wrote it before 1.6. item: bytes of each item of a storage."""
    system = {"protocol_version": VERSION, "little_endian": True, "type_sizes": {"short": 2, "int": 4}, **system}
    head = b"".join(pickle.dumps(value, 2) for value in (MAGIC, VERSION, system))
    tail = b"".join(struct.pack("<q", len(stored) // item) + stored for stored in storages.values())
    return head + content + pickle.dumps(list(storages), 2) + tail


def legacy_pid(value: Any) -> Any:
    """The same object with storages as older files name them: with a sixth entry for views."""
    if isinstance(value, Stored):
        return Stored((*value.pid, None))
    if isinstance(value, Made):
        return Made(value.function, tuple(legacy_pid(arg) for arg in value.args))
    if isinstance(value, dict):
        return {key: legacy_pid(item) for key, item in value.items()}
    return value


class Block(nn.Module):
    """Names as in OpenAI's CLIP, and everything that a module may hold."""

    def __init__(self):
        super().__init__()
        self.ln_1 = nn.LayerNorm(4)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(4, 8), gelu=nn.GELU(), c_proj=nn.Linear(8, 4, bias=False)))
        self.scale = nn.Parameter(torch.tensor(4.6))
        self.register_buffer("positions", torch.arange(4))
        self.register_buffer("passing", torch.ones(1), persistent=False)
        self.register_buffer("absent", None)
        self.count = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.ln_1(x)) * self.scale + self.positions


def plain(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of all dtypes, shapes and strides that files have."""
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    return {
        "plain": values,
        "view.T": values.T,
        "view.rows": values[1:3],
        "view.column": values[:, 2],
        "view.steps": values[::2, 1::2],
        "view.last": values[3, 5],
        "one.row": values.as_strided((1, 4), (77, 1)),
        "scalar": torch.tensor(4.6),
        "empty": torch.zeros(0, 3),
        "half": values.half(),
        "brain": values.bfloat16(),
        "double": values.double(),
        "e4m3": values.to(torch.float8_e4m3fn),
        "e5m2": values.to(torch.float8_e5m2)[1:],
        "long": torch.arange(5),
        "int": torch.arange(5, dtype=torch.int32),
        "short": torch.arange(5, dtype=torch.int16),
        "char": torch.arange(5, dtype=torch.int8),
        "byte": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "parameter": nn.Parameter(values.clone()),
    }


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def scripted(module: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


@functools.cache
def seeds() -> dict[str, list[bytes]]:
    """Valid files by container: safetensors, zip, pickle."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = Block()
    small = {"a.weight": torch.ones(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16)}
    clip = {
        "token_embedding.weight": torch.ones(5, 4),
        "positional_embedding": torch.ones(3, 4),
        "ln_final.weight": torch.ones(4),
        "ln_final.bias": torch.ones(4),
        "text_projection": torch.ones(4, 4),
        **{f"transformer.resblocks.0.{name}": value for name, value in block.state_dict().items()},
    }
    values = [small, clip, {"state_dict": clip, "epoch": 3, "optimizer": {"state": {0: small}}}, block]
    contiguous = [{k: v.contiguous().clone() for k, v in group.items()} for group in (small, clip, plain())]
    return {
        "safetensors": [save(group, {"format": "pt"}) for group in contiguous],
        "zip": [*(saved(value) for value in (*values, plain())), scripted(block)],
        "pickle": [saved(value, _use_new_zipfile_serialization=False) for value in (*values, plain())],
    }


def pickles() -> list[bytes]:
    """The pickles inside of the zip archives."""
    archives = [zipfile.ZipFile(io.BytesIO(content)) for content in seeds()["zip"]]
    return [archive.read("archive/data.pkl") for archive in archives]


def header_or_sentence(path: Path, content: bytes) -> bool:
    """True for a header of which every tensor lies in the file, False for one sentence; nothing else may happen."""
    path.write_bytes(content)
    try:
        header = files.read_header(path)
    except InputError as error:
        assert str(error).startswith(path.name) and "\n" not in str(error), str(error)
        return False
    for name, info in header.tensors.items():
        assert info.dtype in ITEM_BITS, name
        assert 0 <= info.start and info.start + info.bytes <= len(content), name
    seen = inspect(path)
    assert lines(seen) and sentence(seen)
    return True
