"""PyTorch's files read as data: the tensors that torch reads, and nothing that a stranger planted."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import re
import stat
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from torch import nn

from gmp import files
from gmp.errors import InputError
from gmp.files.header import ITEM_BITS
from gmp.geometric import to_geometric
from gmp.layouts import describe
from tests.fuzz.seeds import (
    Block,
    Made,
    Stored,
    header_or_sentence,
    legacy,
    legacy_pid,
    pickled,
    pickles,
    plain,
    saved,
    scripted,
    seeds,
    storage,
    tensor,
    zipped,
)  # fmt: skip
from tests.small import small_clip

# TorchScript is read long after torch has ceased to recommend it
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
ROOT = Path(__file__).parents[1]
CONTAINERS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}
OUTSIDE = """
import torch
from torch import nn

class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
        self.text_projection = nn.Parameter(torch.ones(2, 2))
        self.register_buffer("ids", torch.arange(3))
        self.register_buffer("mask", torch.ones(3), persistent=False)
        self.register_parameter("bias", None)
        self.options = {"width": 3, "tensor": torch.zeros(1)}
"""


@pytest.fixture(params=CONTAINERS)
def container(request) -> str:
    return request.param


def save(path: Path, value: Any, container: str) -> Path:
    path.write_bytes(saved(value, **CONTAINERS[container]))
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    header = files.read_header(path)
    return files.read_tensors(header, header.tensors)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert torch.equal(found[name].double(), value.detach().double()), name


def crafted(path: Path, value: Any, container: str = "zip", storages: dict[str, bytes] | None = None) -> Path:
    storages = storages or {"0": bytes(16)}
    if container == "zip":
        path.write_bytes(zipped(pickled(value), storages))
    else:
        path.write_bytes(legacy(pickled(legacy_pid(value)), storages))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        files.read_header(path)
    message = str(error.value)
    assert message.startswith(path.name) and "\n" not in message and message.isprintable() and len(message) < 2000
    return message


# What torch saves


def test_every_dtype_shape_and_stride(tmp_path, container):
    path = save(tmp_path / "a.pt", plain(), container)
    header = files.read_header(path)
    assert header.path == path and header.container == "pickle" and header.metadata == {} and header.notes == ()
    assert_same(read(path), plain())


def test_torch_reads_the_same(tmp_path, container):
    expected = {name: value for name, value in plain().items() if value.dtype.itemsize > 1 or container == "zip"}
    path = save(tmp_path / "a.pt", expected, container)
    assert_same(read(path), torch.load(path, weights_only=True))


def test_contiguous_tensors_have_no_stride_and_shared_ones_share_their_bytes(tmp_path, container):
    path = save(tmp_path / "a.pt", plain(), container)
    infos = files.read_header(path).tensors
    strided = {name for name, info in infos.items() if info.stride is not None}
    assert strided == {"view.T", "view.column", "view.steps"}
    assert infos["view.T"].start == infos["plain"].start and infos["view.T"].stride == (1, 6)
    assert infos["view.rows"].start == infos["plain"].start + 6 * 4
    assert infos["view.rows"].bytes == 2 * 6 * 4


def test_dtypes_that_only_a_header_can_name(tmp_path):
    names = ("uint16", "uint32", "uint64", "complex64", "complex128", "float8_e4m3fnuz", "float8_e8m0fnu")
    value = {name: torch.zeros(2, dtype=getattr(torch, name)) for name in names}
    infos = files.read_header(save(tmp_path / "a.pt", value, "zip")).tensors
    assert [info.dtype for info in infos.values()] == ["U16", "U32", "U64", "C64", "C128", "F8_E4M3FNUZ", "F8_E8M0"]
    assert [info.bytes for info in infos.values()] == [value[name].nbytes for name in names]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path, container, protocol):
    path = tmp_path / "a.pt"
    path.write_bytes(saved(plain(), pickle_protocol=protocol, **CONTAINERS[container]))
    assert_same(read(path), plain())


def test_archives_without_checksums(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path / "a.pt", plain(), "zip")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(read(path), plain())


def test_a_repacked_archive_may_compress_its_pickle_but_not_its_tensors(tmp_path):
    source = zipfile.ZipFile(io.BytesIO(saved(plain())))
    for packed, message in (("data.pkl", None), ("data/0", "compressed tensors.*archive/data/0.*zip -0")):
        path = tmp_path / "a.pt"
        with zipfile.ZipFile(path, "w") as target:
            for name in source.namelist():
                deflated = zipfile.ZIP_DEFLATED if name == f"archive/{packed}" else zipfile.ZIP_STORED
                target.writestr(name, source.read(name), deflated)
        if message is None:
            assert_same(read(path), plain())
        else:
            with pytest.raises(InputError, match=message):
                files.read_header(path)


@pytest.mark.parametrize("make", [torch.jit.script, lambda module: torch.jit.trace(module, torch.ones(2, 4))])
def test_torchscript_gives_its_state_dict(tmp_path, make):
    module = nn.Sequential(OrderedDict(transformer=nn.Sequential(Block(), Block()), ln_final=nn.LayerNorm(4)))
    script = make(module.half() if make is torch.jit.script else module)
    script.save(tmp_path / "ViT-L-14.pt")
    header = files.read_header(tmp_path / "ViT-L-14.pt")
    assert header.container == "torchscript"
    assert header.notes == ("holds code (TorchScript), which was neither read nor run",)
    found = files.read_tensors(header, header.tensors)
    expected = torch.jit.load(tmp_path / "ViT-L-14.pt").state_dict()
    assert_same({name: found[name] for name in expected}, expected)
    assert found.keys() == expected.keys() and "transformer.1.mlp.c_fc.weight" in found


@pytest.fixture
def tower(tmp_path):
    """A module whose class nobody has any more once it is saved; its file runs code when it is imported."""
    source = tmp_path / "clip_of_a_stranger.py"
    source.write_text(OUTSIDE)
    spec = importlib.util.spec_from_file_location("clip_of_a_stranger", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules["clip_of_a_stranger"] = module
    spec.loader.exec_module(module)
    yield module.Tower()
    sys.modules.pop("clip_of_a_stranger", None)


@pytest.mark.filterwarnings("ignore::torch.serialization.SourceChangeWarning")
def test_a_whole_module_without_its_class(tmp_path, container, tower):
    expected = tower.state_dict()
    path = save(tmp_path / "a.pt", tower, container)
    nested = save(tmp_path / "b.pt", {"model": tower, "epoch": 3}, container)
    parallel = save(tmp_path / "c.pt", {"state_dict": nn.DataParallel(tower), "args": None}, container)
    del sys.modules["clip_of_a_stranger"]
    with pytest.raises(ModuleNotFoundError):
        torch.load(path, weights_only=False)
    assert_same(read(path), expected)
    assert_same(read(nested), expected)
    assert_same(read(parallel), {f"module.{name}": value for name, value in expected.items()})
    assert "clip_of_a_stranger" not in sys.modules
    (note,) = files.read_header(path).notes
    assert note.startswith("beside tensors it names clip_of_a_stranger.Tower, torch.nn.modules.container.Sequential, ")
    assert note.endswith(": nothing of it was imported or run")
    assert files.read_header(nested).notes[0] == "holds epoch, which was not read"


def test_a_whole_module_of_geometric_linears(tmp_path, container):
    clip = small_clip()
    assert len(to_geometric(clip)) == 6
    path = save(tmp_path / "a.pt", clip, container)
    assert_same(read(path), clip.state_dict())
    contents = describe(files.read_header(path))
    assert contents.layout == "gmp" and contents.problems == () and contents.vision is not None


def test_a_module_whose_parts_are_shared(tmp_path, container):
    shared = nn.Linear(2, 2)
    module = nn.Sequential(shared, nn.Sequential(shared), shared)
    assert_same(read(save(tmp_path / "a.pt", module, container)), module.state_dict())


def test_parameters_and_tensors_with_attributes_of_their_own(tmp_path, container):
    class Odd(torch.Tensor):
        pass

    odd = nn.Parameter(torch.arange(3.0))
    odd.note = "a"
    noted = torch.arange(4.0)[1:]
    noted.note = {"b": 1}
    value = {"odd": odd, "noted": noted, "kept": nn.Parameter(noted, requires_grad=False)}
    assert_same(read(save(tmp_path / "a.pt", value, container)), value)


# Checkpoints around the tensors


def test_a_checkpoint_of_lightning(tmp_path, container):
    """With the state of callbacks by their class, and objects of classes that are not there."""
    weights = {"cond_stage_model.transformer.a": torch.ones(2), "cond_stage_model.transformer.b": torch.zeros(3)}
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    module = type(sys)("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = callback
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", module.__name__]
    sys.modules |= {name: module for name in names}
    value = {
        "epoch": 6,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": OrderedDict(weights),
        "callbacks": {callback: {"best": torch.tensor(1.0), "path": Path("a")}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}],
        "ema": {"a": torch.ones(2)},
    }
    try:
        path = save(tmp_path / "a.ckpt", value, container)
    finally:
        for name in names:
            del sys.modules[name]
    assert_same(read(path), weights)
    unread, foreign = files.read_header(path).notes
    assert unread == ("holds callbacks, ema, epoch, optimizer_states, pytorch-lightning_version, which were not read")
    assert foreign.startswith("beside tensors it names pathlib.")
    assert "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint: nothing of it was imported" in foreign


def test_where_checkpoints_keep_their_model(tmp_path, container):
    weights = {"a": torch.ones(2)}
    for number, (value, note) in enumerate(
        [
            ({"net": weights}, None),
            ({"state_dict": {"model": weights}}, None),
            ({"params_ema": weights}, None),
            ({"params": {"b": torch.zeros(1)}, "params_ema": weights}, "holds params, which was not read"),
            ({"step": torch.tensor(1), "model": weights}, "holds step, which was not read"),
            ({"ema": {"b": torch.zeros(1)}, "model": weights}, "holds ema, which was not read"),
            ({"a": torch.ones(2), "shapes": {"a": [2]}, 3: 4}, "holds 3, shapes, which were not read"),
            ({"net": {"deep": {"model": weights}}}, None),
        ]
    ):
        path = save(tmp_path / f"{number}.pt", value, container)
        assert_same(read(path), weights)
        assert files.read_header(path).notes == ((note,) if note else ())


def test_files_without_a_model(tmp_path, container):
    advice = "give the file of a model's weights"
    for value, message in (
        (torch.ones(2), f"holds a single tensor without a name; {advice}"),
        ([torch.ones(2)], f"holds no tensors by name; {advice}"),
        ({}, f"holds no tensors by name; {advice}"),
        ({"state_dict": {}, "epoch": 1}, f"holds no tensors by name, but epoch, state_dict; {advice}"),
        ({0: torch.ones(2)}, f"holds no tensors by name, but 0; {advice}"),
        ({"g": {"a": torch.ones(1)}, "d": {"a": torch.ones(1)}}, "holds several sets of tensors (d, g); save the one"),
    ):
        assert message in refusal(save(tmp_path / "a.pt", value, container))


def test_config_beside_a_file_with_a_usual_name(tmp_path, container):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "hidden_act": "gelu"}))
    path = save(tmp_path / "pytorch_model.bin", plain(), container)
    assert files.read_header(path).configs == {"": {"model_type": "clip", "hidden_act": "gelu"}}
    assert files.read_header(tmp_path).configs == files.read_header(path).configs
    assert files.read_header(tmp_path).container == "folder"


def test_a_header_needs_neither_torch_nor_numpy(tmp_path):
    paths = [save(tmp_path / f"{container}.pt", plain(), container) for container in CONTAINERS]
    (tmp_path / "script.pt").write_bytes(scripted(Block()))
    code = (
        "import sys; from gmp.files import read_header\n"
        "for path in sys.argv[1:]: assert len(read_header(path).tensors) > 4\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, *map(str, paths), str(tmp_path / "script.pt")]
    subprocess.run(command, check=True, cwd=ROOT)


# Tensors that cannot be read


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch calls some of these kinds beta, others deprecated
def test_tensors_that_are_more_than_their_bytes_are_all_named(tmp_path):
    value = {
        "good": torch.ones(2),
        "a.sparse": torch.eye(2).to_sparse(),
        "b.rows": torch.eye(2).to_sparse_csr(),
        "c.quantised": torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8),
        "d.meta": torch.zeros(2, device="meta"),
        "e.expanded": torch.ones(1, 1).expand(2, 3),
        "f.negated": torch.conj(torch.ones(2, dtype=torch.complex64)).imag,
    }
    message = refusal(save(tmp_path / "a.pt", value, "zip"))
    for part in (
        "a.sparse is sparse", "b.rows is sparse", "c.quantised is quantised", "d.meta was saved without its values",
        "e.expanded is expanded, to more items than its storage has", "f.negated is stored negated or conjugated",
    ):  # fmt: skip
        assert part in message
    assert "good" not in message


def test_an_expanded_tensor_that_does_not_grow_is_read(tmp_path, container):
    value = {"position_ids": torch.arange(7).expand((1, -1)), "one": torch.ones(1).expand(1, 1, 1)}
    assert_same(read(save(tmp_path / "a.pt", value, container)), value)


BAD = {
    "items beyond the storage": (tensor(offset=1), "reaches 1 items beyond its storage"),
    "a stride beyond the storage": (tensor(stride=(3, 1)), "reaches 1 items beyond its storage"),
    "a shape of billions": (tensor(shape=(1 << 40, 1 << 40)), "beyond its storage"),
    "a billion times the same item": (tensor(shape=(1 << 30,), stride=(0,)), "is expanded, to more items"),
    "items that repeat": (tensor(shape=(2, 2, 2), stride=(1, 1, 1)), "is expanded, to more items"),
    "a storage that says too much": (tensor(items=5), "is in a storage of 20 bytes, and 16 are there"),
    "a storage that says too little": (tensor(items=3, shape=(3,), stride=(1,)), "storage of 12 bytes, and 16"),
    "a storage of billions": (tensor(items=1 << 62), "bytes, and 16 are there"),
    "a negative offset": (tensor(offset=-1), "sizes that are no numbers"),
    "a negative size": (tensor(shape=(-2, -2)), "sizes that are no numbers"),
    "a negative stride": (tensor(stride=(-2, 1)), "sizes that are no numbers"),
    "a bool for a size": (tensor(shape=(True, 2)), "sizes that are no numbers"),
    "a float for a size": (tensor(shape=(2.0, 2)), "sizes that are no numbers"),
    "a size of 10^1000": (tensor(shape=(10**1000, 0)), "sizes that are no numbers"),
    "a negative storage": (tensor(items=-4), "is in a storage of no size"),
    "a bool for a storage": (tensor(items=True), "is in a storage of no size"),
    "a list for a shape": (tensor(shape=[2, 2]), "no shape with a stride for each size"),
    "a shape without strides": (tensor(stride=(1,)), "no shape with a stride for each size"),
    "a thousand dimensions": (tensor(shape=(1,) * 1000, stride=(1,) * 1000), "no shape with a stride for each size"),
    "another storage": (tensor(key="../../0"), "is in a storage that the file lacks: ../../0"),
    "a storage without a name": (tensor(key=0), "is in a storage of no size"),
    "no storage": (Made(torch._utils._rebuild_tensor_v2, (1, 0, (2,), (1,), False, {})), "is not in a storage"),
    "no arguments": (Made(torch._utils._rebuild_tensor_v2, ()), "is not described in full"),
    "a negated one": (tensor(metadata={"neg": True}), "is stored negated"),
    "a parameter of nothing": (Made(torch._utils._rebuild_parameter, (1,)), "_rebuild_parameter, which is not read"),
    "another function": (
        Made(torch._tensor._rebuild_from_type_v2, (json.loads, torch.Tensor, ("made",), {})),
        "is made by json.loads, which is not read",
    ),
    "a storage of no kind": (
        Made(torch._utils._rebuild_tensor_v2, (storage(kind=json.loads), 0, (1,), (1,), False, {})),
        "a kind that is not read (json.loads)",
    ),
    "a dtype of no kind": (
        Made(torch._utils._rebuild_tensor_v3, (storage(), 0, (1,), (1,), False, {}, json.loads)),
        "has a dtype that is not read (json.loads)",
    ),
    "an outside thing that is no storage": (
        Made(torch._utils._rebuild_tensor_v2, (Stored((1, 2)), 0, (1,), (1,), False, {})), "is not in a storage",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("value", "message"), BAD.values(), ids=BAD)
def test_what_a_tensor_says_of_itself_is_checked(tmp_path, value, message):
    path = crafted(tmp_path / "a.pt", {"good": tensor(), "b.weight": value})
    assert re.search(rf"cannot be read: b\.weight .*{re.escape(message)}", refusal(path))


def test_a_crafted_file_without_a_fault_is_read(tmp_path, container):
    """What the refusals above differ from."""
    items = torch.arange(4.0)
    path = crafted(tmp_path / "a.pt", {"a": tensor()}, container, {"0": items.numpy().tobytes()})
    assert_same(read(path), {"a": items.view(2, 2)})
    assert_same(read(path), torch.load(path, weights_only=True))


def test_names_are_shown_as_they_are_or_not_at_all(tmp_path):
    for name in ("a\nb", "a\x1b[2J", "\ud800", "a" * 2000, "\u202e"):
        message = refusal(crafted(tmp_path / "a.pt", {name: tensor()}))
        assert "has a name that cannot be shown" in message or "…" in message


# What else a pickle may ask for


@pytest.fixture
def sentinel(tmp_path) -> Path:
    return tmp_path / "made"


class Doing:
    """Calls a function when Python's own pickle reads it."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_nothing_is_run_and_the_tensors_come_out(tmp_path, container, sentinel):
    weights = {"a": torch.ones(2), "b": torch.zeros(3)}
    value = {**weights, "z": Doing(os.mkdir, str(sentinel)), "y": Doing(exec, "import this_is_run")}
    path = save(tmp_path / "a.pt", value, container)
    assert_same(read(path), weights)
    unread, foreign = files.read_header(path).notes
    assert unread == "holds y, z, which were not read"
    assert "mkdir" in foreign and "exec: nothing of it was imported or run" in foreign
    assert not sentinel.exists()
    with pytest.raises(ModuleNotFoundError, match="this_is_run"):  # torch, asked to trust it, does all that
        torch.load(path, weights_only=False)
    assert sentinel.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cposix\nmkdir\n%s\x85R",
        b"\x8c\x05posix\x8c\x05mkdir\x93%s\x85R",
        b"(%siposix\nmkdir\n",
        b"(cposix\nmkdir\n%so",
        b"cposix\nmkdir\n%s\x85\x81",
        b"cposix\nmkdir\n%s\x85}\x92",
        b"cbuiltins\nobject\n)\x81}X\x0c\x00\x00\x00__setstate__cposix\nmkdir\nsb%sb",
        b"cfunctools\npartial\ncposix\nmkdir\n\x85R%s\x85R",
    ],
)
def test_every_way_to_call_a_function(tmp_path, container, sentinel, code):
    name = str(sentinel).encode()
    planted = code % (b"X" + struct.pack("<I", len(name)) + name)
    good = pickled({"a": tensor() if container == "zip" else legacy_pid(tensor())})
    content = good[:-1] + b"X\x01\0\0\0z" + planted + b"s."
    path = tmp_path / "a.pt"
    path.write_bytes(zipped(content) if container == "zip" else legacy(content))
    assert_same(read(path), {"a": torch.zeros(2, 2)})
    assert not sentinel.exists()
    assert "posix.mkdir" in files.read_header(path).notes[1]


def test_python_s_own_modules_are_named_first(tmp_path):
    value = {"a": torch.ones(1), "b": [nn.Linear(1, 1), np.float64(1), Doing(os.mkdir, "x")]}
    note = files.read_header(save(tmp_path / "a.pt", value, "zip")).notes[1]
    assert note.startswith(f"beside tensors it names {os.mkdir.__module__}.mkdir, numpy")


def test_objects_in_place_of_tensors_are_refused_in_a_module(tmp_path, container, sentinel):
    module = nn.Linear(1, 1)
    module._parameters["bias"] = Doing(os.mkdir, str(sentinel))
    assert "bias is not a tensor" in refusal(save(tmp_path / "a.pt", module, container))
    assert not sentinel.exists()


def module_of(parameters: Any, modules: Any = None) -> nn.Module:
    module = nn.Module()
    module._parameters, module._modules = parameters, modules or {}
    return module


def test_modules_without_end(tmp_path, container):
    endless = nn.Module()
    endless._modules["again"] = endless
    assert "modules within modules without end" in refusal(save(tmp_path / "a.pt", endless, container))
    deep = nn.Module()
    deep.weight = nn.Parameter(torch.ones(1))
    for _ in range(40):
        wide = nn.Module()
        wide.left, wide.right = deep, deep
        deep = wide  # 2^40 names for one tensor
    assert "modules within modules without end" in refusal(save(tmp_path / "a.pt", deep, container))
    chain = nn.Module()
    for _ in range(100):
        outer = nn.Module()
        outer.inner = chain
        chain = outer
    assert "modules within modules without end" in refusal(save(tmp_path / "a.pt", chain, container))


def test_modules_with_names_of_a_megabyte(tmp_path):
    inner = module_of({"a" * 1_000_000: nn.Parameter(torch.ones(1))})
    assert "names are not text, or too long" in refusal(save(tmp_path / "a.pt", inner, "zip"))
    inner = module_of({1: nn.Parameter(torch.ones(1))})
    assert "names are not text, or too long" in refusal(save(tmp_path / "a.pt", inner, "zip"))
    inner = module_of({"b.c": nn.Parameter(torch.ones(1))}, {"b": module_of({"c": nn.Parameter(torch.ones(1))})})
    assert "two tensors of one name, b.c" in refusal(save(tmp_path / "a.pt", inner, "zip"))


def test_dicts_without_end(tmp_path, container):
    endless: dict = {"epoch": 1}
    endless["model"] = endless
    assert "holds no tensors by name" in refusal(save(tmp_path / "a.pt", endless, container))
    wide: dict = {}
    for _ in range(100):
        wide = {f"{number}": wide for number in range(100)}
    assert "holds no tensors by name" in refusal(save(tmp_path / "a.pt", wide, container))


# Zip archives that torch did not write


def archive_of(path: Path, entries: list[tuple[Any, bytes]], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


GOOD = [("archive/data.pkl", pickled({"a": tensor()})), ("archive/byteorder", b"little"), ("archive/data/0", bytes(16))]


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../evil", "archive/../../evil", "..", "a\\..\\b", "C:/evil", "C:evil", "archive/a\nb"]
)
def test_names_that_lead_out_of_an_archive(tmp_path, name):
    info = zipfile.ZipInfo("x")
    info.filename = name
    message = refusal(archive_of(tmp_path / "a.pt", [*GOOD, (info, b"")]))
    assert "names that lead out of it: " + (name if name.isprintable() else ascii(name)) in message


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_of_one_name(tmp_path):
    message = refusal(archive_of(tmp_path / "a.pt", [*GOOD, ("archive/data.pkl", b"N.")]))
    assert "several members of one name: archive/data.pkl" in message


def test_links(tmp_path):
    info = zipfile.ZipInfo("archive/data/1")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    message = refusal(archive_of(tmp_path / "a.pt", [*GOOD, (info, b"/etc/passwd")]))
    assert "links instead of files: archive/data/1" in message


def patched(path: Path, *changes: tuple[bytes, int, bytes]) -> Path:
    """Write bytes at a distance from each occurrence of a signature."""
    content = bytearray(path.read_bytes())
    for signature, distance, value in changes:
        at = content.find(signature)
        while at >= 0:
            content[at + distance : at + distance + len(value)] = value
            at = content.find(signature, at + 1)
    path.write_bytes(content)
    return path


LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"


def test_encrypted_members(tmp_path):
    path = patched(archive_of(tmp_path / "a.pt", GOOD), (LOCAL, 6, b"\1\0"), (CENTRAL, 8, b"\1\0"))
    assert "encrypted members: archive/byteorder, archive/data.pkl" in refusal(path)


def test_members_that_lie_in_each_other(tmp_path):
    """Each entry of the directory may point at the same bytes: David Fifield's zip bomb."""
    path = archive_of(tmp_path / "a.pt", GOOD)
    content = bytearray(path.read_bytes())
    at = content.rfind(CENTRAL)
    offset = struct.unpack_from("<I", content, at + 42)[0]
    inner = bytes(content[offset : offset + 30 + len("archive/data/0")])
    outer = archive_of(tmp_path / "b.pt", [*GOOD[:2], ("archive/data/1", b"x" + inner + bytes(16)), GOOD[2]])
    content = bytearray(outer.read_bytes())
    at, hidden = content.rfind(CENTRAL), content.find(inner)
    struct.pack_into("<I", content, at + 42, hidden)
    outer.write_bytes(content)
    assert "members that lie in each other: archive/data/0" in refusal(outer)


@pytest.mark.parametrize(
    ("signature", "distance", "value"),
    [
        (CENTRAL, 0, b"PK\1\3"),
        (CENTRAL, 42, b"\xf0\xff\xff\x7f"),  # offsets
        (END, 0, b"PK\5\5"),
        (END, 12, b"\xff\xff\xff\x7f"),  # the directory's size
        (END, 16, b"\xff\xff\xff\x7f"),  # the directory's offset
    ],
)
def test_a_damaged_directory(tmp_path, signature, distance, value):
    path = patched(archive_of(tmp_path / "a.pt", GOOD), (signature, distance, value))
    assert re.match(r"a\.pt is a damaged (or truncated )?zip archive", refusal(path))


@pytest.mark.parametrize(
    ("signature", "distance", "value", "wrong"),
    [
        (LOCAL, 0, b"PK\3\5", "archive/data/0"),
        (LOCAL, 26, b"\0\0", "archive/data/0"),  # the name's length
        (CENTRAL, 20, b"\x11\x01\0\0\x11\x01\0\0", "archive/data/0"),  # the sizes: beyond the end of the file
        (CENTRAL, 24, b"\x11\0\0\0", "archive/data/0"),  # the size: of bytes that are not compressed
        (END, 16, b"\xf0\0\0\0", "archive/data.pkl, archive/data/0"),  # both would begin before the file
    ],
)
def test_a_member_is_where_its_directory_says(tmp_path, signature, distance, value, wrong):
    path = archive_of(tmp_path / "a.pt", [("archive/data.pkl", pickled({})), ("archive/data/0", bytes(16))])
    content = bytearray(path.read_bytes())
    at = content.rfind(signature) + distance
    content[at : at + len(value)] = value
    path.write_bytes(content)
    assert f"zip archive; it has members that are not where its directory says: {wrong};" in refusal(path)


def test_a_member_with_room_for_64_bit_sizes(tmp_path):
    """Writers that do not know a member's size beforehand leave room for a large one."""
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (GOOD[0], (GOOD[2][0], np.arange(4, dtype="<f4").tobytes())):
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(content)
    assert_same(read(path), {"a": torch.arange(4.0).view(2, 2)})


def test_a_name_that_differs_before_the_bytes(tmp_path):
    path = archive_of(tmp_path / "a.pt", GOOD)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"archive/data/0", b"archive/data/1", 1))
    assert "members that are not where its directory says: archive/data/0" in refusal(path)


def test_a_directory_of_millions_is_not_read(tmp_path):
    path = tmp_path / "a.pt"
    entry = struct.pack("<4s6H3I5H2I", CENTRAL, 20, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    directory = entry * 200_000
    end = struct.pack("<4s4H2IH", END, 0, 0, 0xFFFF, 0xFFFF, len(directory), 30, 0)
    path.write_bytes(LOCAL + bytes(26) + directory + end)
    assert "it lists its members in 9,200,000 bytes, and 8,000,000 would do" in refusal(path)


def test_a_pickle_that_unpacks_to_gigabytes(tmp_path):
    entries = [("archive/data.pkl", b"N" * 120_000_000 + b"."), *GOOD[1:]]
    path = archive_of(tmp_path / "a.pt", entries, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 200_000
    assert "archive/data.pkl has 120,000,001 bytes; 100,000,000 are the most" in refusal(path)


def test_a_pickle_of_another_size_than_declared(tmp_path):
    path = archive_of(tmp_path / "a.pt", [(GOOD[0][0], GOOD[0][1] + b"N" * 9000)], zipfile.ZIP_DEFLATED)
    for length in (len(GOOD[0][1]), len(GOOD[0][1]) + 9001):
        patched(path, (CENTRAL, 24, struct.pack("<I", length)), (CENTRAL, 16, bytes(4)))  # no checksum either
        assert "archive/data.pkl is not what its size and checksum say" in refusal(path)


def test_a_changed_pickle_is_noticed(tmp_path):
    path = archive_of(tmp_path / "a.pt", GOOD)
    path.write_bytes(path.read_bytes().replace(b"FloatStorage", b"HalfStorage "))
    assert "archive/data.pkl is not what its size and checksum say; download it again" in refusal(path)


def test_other_archives(tmp_path):
    assert "a.pt is a zip archive, and not one that torch writes (0 data.pkl in it); unpack it" in refusal(
        archive_of(tmp_path / "a.pt", [("model/clip.safetensors", b"x")])
    )
    twice = [*GOOD, ("other/data.pkl", b"N.")]
    assert "(2 data.pkl in it)" in refusal(archive_of(tmp_path / "a.pt", twice))


def test_big_endian_files(tmp_path):
    big = [GOOD[0], ("archive/byteorder", b"big"), GOOD[2]]
    assert "big-endian" in refusal(archive_of(tmp_path / "a.pt", big))
    path = tmp_path / "b.pt"
    path.write_bytes(legacy(pickled({"a": legacy_pid(tensor())}), little_endian=False))
    assert "big-endian" in refusal(path)


def test_a_truncated_archive(tmp_path):
    whole = saved(plain())
    path = tmp_path / "a.pt"
    for length in range(4, len(whole), 37):
        path.write_bytes(whole[:length])
        assert "a.pt is a damaged or truncated zip archive" in refusal(path)


# Older files, and pickles of others


def test_a_truncated_older_file(tmp_path):
    whole = saved(plain(), _use_new_zipfile_serialization=False)
    path = tmp_path / "a.pt"
    for length in range(600, len(whole), 37):
        path.write_bytes(whole[:length])
        refusal(path)
    path.write_bytes(whole[:-10])
    assert f"is truncated: {len(whole):,} bytes expected, {len(whole) - 10:,} bytes found" in refusal(path)
    path.write_bytes(whole + b"rest")
    assert files.read_header(path).notes == ("4 bytes follow its last tensor, which were not read",)
    assert_same(read(path), plain())


def test_parts_of_storages_as_torch_0_3_wrote_them(tmp_path):
    items = torch.arange(6.0)
    view = Stored(("storage", torch.FloatStorage, "0", "cpu", 6, ("1", 2, 4)))
    value = {"a": Made(torch._utils._rebuild_tensor_v2, (view, 1, (3,), (1,), False, OrderedDict()))}
    path = tmp_path / "a.pt"
    path.write_bytes(legacy(pickled(value), {"0": items.numpy().tobytes()}))
    assert_same(read(path), {"a": items[3:6]})
    assert_same(read(path), torch.load(path, weights_only=True))
    for part, message in ((("1", 2, 5), "is in a storage of no size"), (("1", -1, 4), "is in a storage of no size")):
        view = Stored((*view.pid[:5], part))
        value = {"a": Made(torch._utils._rebuild_tensor_v2, (view, 0, (1,), (1,), False, OrderedDict()))}
        path.write_bytes(legacy(pickled(value), {"0": items.numpy().tobytes()}))
        assert message in refusal(path)
    view = Stored((*view.pid[:5], ("1", 2, 4)))
    value = {"a": Made(torch._utils._rebuild_tensor_v2, (view, 2, (3,), (1,), False, OrderedDict()))}
    path.write_bytes(legacy(pickled(value), {"0": items.numpy().tobytes()}))
    assert "reaches 1 items beyond its storage" in refusal(path)


def test_storages_that_do_not_fit_the_older_file(tmp_path):
    content = pickled({"a": legacy_pid(tensor())})
    path = tmp_path / "a.pt"
    path.write_bytes(legacy(content, {"0": bytes(12), "rest": b""}))
    assert "does not list the storages that its tensors are in" in refusal(path)
    path.write_bytes(legacy(content, {"1": bytes(16)}))
    assert "does not list the storages that its tensors are in" in refusal(path)
    path.write_bytes(legacy(content, {"0": bytes(20)}))
    assert "its storages are not of the sizes it says" in refusal(path)
    for keys in ("0", ["0", "0"], ["0", 1], None):
        path.write_bytes(legacy(content).replace(pickle.dumps(["0"], 2), pickle.dumps(keys, 2)))
        assert "does not list the storages that its tensors are in" in refusal(path)
    quantised = {"a": torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)}
    assert "a kind that is not read (torch.QInt8Storage)" in refusal(save(path, quantised, "legacy"))


def test_pickles_of_others(tmp_path):
    array = np.ones((2, 3), dtype=np.float32)
    path = tmp_path / "model.pdparams"
    tables = {"StructuredToParameterName@@": {"a": "linear_0.w_0"}}
    for value in ({"a": array}, {"a": ("linear_0.w_0", array)}, tables):
        for protocol in (2, 4):
            path.write_bytes(pickle.dumps(value, protocol))
            message = refusal(path)
            assert "PaddlePaddle" in message and "convert it to safetensors with PaddleNLP or ppdiffusers" in message
    for value in ({"a": 1}, [1, 2], {"a": torch.ones(2)}, list(range(10_000))):
        path.write_bytes(pickle.dumps(value, 4))
        assert "is a Python pickle that torch.save did not write" in refusal(path)
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    path.write_bytes(head + pickle.dumps(1000, 2) + pickle.dumps({}, 2))
    assert "of a version of torch's files that is not read" in refusal(path)


# Anything at all

KINDS = ("safetensors", "zip", "pickle")
ANY = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def changed(data: st.DataObject, content: bytes) -> bytes:
    result = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(result) - 1, 0)))
        kind = data.draw(st.sampled_from(["byte", "cut", "insert", "copy", "word"]))
        if kind == "cut":
            del result[at : at + data.draw(st.integers(1, 1 << 9))]
        elif kind == "insert":
            result[at:at] = data.draw(st.binary(max_size=9))
        elif kind == "copy":
            source = data.draw(st.integers(0, max(len(result) - 1, 0)))
            part = result[source : source + data.draw(st.integers(1, 64))]
            result[at : at + len(part)] = part
        elif kind == "word":
            result[at : at + 4] = struct.pack("<I", data.draw(st.integers(0, 2**32 - 1)))
        else:
            result[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
    return bytes(result)


@pytest.mark.parametrize("kind", KINDS)
@ANY
@given(st.data())
def test_any_change_of_a_file_gives_a_header_or_a_sentence(tmp_path, kind, data):
    header_or_sentence(tmp_path / "a.pt", changed(data, data.draw(st.sampled_from(seeds()[kind]))))


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_that_are_changed_are_good_ones(tmp_path, kind):
    for content in seeds()[kind]:
        assert header_or_sentence(tmp_path / "a.pt", content)


MANY = {str(number): bytes(96) for number in range(32)}


@ANY
@given(st.data())
def test_any_change_of_the_pickle_inside_gives_a_header_or_a_sentence(tmp_path, data):
    content = changed(data, data.draw(st.sampled_from(pickles())))
    header_or_sentence(tmp_path / "a.pt", zipped(content, MANY))


numbers = st.one_of(st.integers(-2, 9), st.integers(0, 2**64), st.booleans(), st.none())
shapes = st.lists(numbers, max_size=4).map(tuple)


@ANY
@given(st.lists(st.tuples(numbers, numbers, shapes, shapes, st.sampled_from(["0", "1", "2"])), min_size=1, max_size=4))
def test_any_numbers_give_tensors_within_their_storage_or_a_sentence(tmp_path, rows):
    value = {f"t{number}": tensor(*row) for number, row in enumerate(rows)}
    content = zipped(pickled(value), {"0": bytes(16), "1": bytes(40)})
    if header_or_sentence(tmp_path / "a.pt", content):
        torch.load(tmp_path / "a.pt", weights_only=True)  # whatever is accepted, torch accepts


sizes = st.lists(st.integers(0, 5), max_size=3)


@ANY
@given(st.data())
def test_a_tensor_within_its_storage_is_what_torch_reads(tmp_path, data):
    shape = tuple(data.draw(sizes))
    stride = tuple(data.draw(st.integers(0, 6)) for _ in shape)
    offset, items = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 40))
    values = torch.arange(float(items))
    path = tmp_path / "a.pt"
    value = {"a": tensor(items, offset, shape, stride)}
    path.write_bytes(zipped(pickled(value), {"0": values.numpy().tobytes()}))
    try:
        found = read(path)["a"]
    except InputError as error:
        assert "beyond its storage" in str(error) or "is expanded" in str(error)
        reached = 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        assert offset + reached > items or torch.Size(shape).numel() > items
    else:
        assert torch.equal(found, torch.load(path, weights_only=True)["a"])


# safetensors: what the library accepts

KNOWN = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "U16",
    "U32",
    "U64",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_safetensors_file_is_accepted_where_the_library_accepts_it(tmp_path, data):
    header, end = {}, 0
    for name in data.draw(st.lists(st.text("abc.é", min_size=1, max_size=3), max_size=4, unique=True)):
        dtype, shape = data.draw(st.sampled_from(KNOWN)), data.draw(sizes)
        size = ITEM_BITS[dtype] // 8
        for length in shape:
            size *= length
        begin, end = end, end + size
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        if data.draw(st.integers(0, 7)) == 0:
            entry["data_offsets"][data.draw(st.integers(0, 1))] += data.draw(st.integers(-2, 8))
        if data.draw(st.integers(0, 15)) == 0:
            field = data.draw(st.sampled_from(sorted(entry)))
            entry[field] = data.draw(st.sampled_from([None, -1, [], [1], [0, 4], "F32", "X9", {}, 1.5, True, [True]]))
        header[name] = entry
    if data.draw(st.booleans()):
        strange = st.sampled_from([{}, {"a": "b"}, {"a": 1}, None, [], "a", {"a": None}])
        header["__metadata__"] = data.draw(strange)
    text = json.dumps(header, ensure_ascii=False).encode() + b" " * data.draw(st.integers(0, 9))
    length = len(text) + (data.draw(st.integers(-2, 2)) if data.draw(st.integers(0, 7)) == 0 else 0)
    content = struct.pack("<Q", length) + text + bytes(max(end + data.draw(st.sampled_from([0, 0, 0, -1, 1])), 0))
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
    except SafetensorError:
        names = None
    try:
        found = set(files.read_header(path).tensors)
    except InputError:
        found = None
    assert found == names
