"""Opening files from strangers and writing our own."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gmp import files
from gmp.errors import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(4, 6, generator=generator)
    return {
        "plain": plain,
        "scalar": torch.tensor(4.6),
        "view": plain.T,  # not contiguous
        "q": plain[:2],  # shares its storage
        "half": plain.half(),
        "brain": plain.bfloat16(),
        "e4m3": plain.to(torch.float8_e4m3fn),
        "e5m2": plain.to(torch.float8_e5m2),
        "ids": torch.arange(5),
        "empty": torch.zeros(0, 3),
        "bytes": torch.zeros(3, dtype=torch.uint8),
    }


def damaged(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_header_of_a_file_that_the_library_wrote(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, {"a": "b"})
    header = files.read_header(path)
    assert header.path == path
    assert header.metadata == {"a": "b"}
    kinds = {name: (info.dtype, info.shape) for name, info in header.tensors.items()}
    assert kinds["half"] == ("F16", (4, 6)) and kinds["scalar"] == ("F32", ()) and kinds["ids"] == ("I64", (5,))
    assert kinds["e4m3"][0] == "F8_E4M3"
    for name, info in header.tensors.items():
        assert (info.file, info.bytes) == (path, tensors[name].numel() * tensors[name].element_size())


def test_what_is_written_is_what_the_library_reads(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    files.write_safetensors(tensors, path, {"who": "me", "ünï": "✓"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].float(), tensor.float()), name
    assert files.read_header(path).metadata == {"format": "pt", "who": "me", "ünï": "✓"}


def test_every_tensor_is_aligned_to_its_dtype(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    files.write_safetensors(tensors, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for name, tensor in tensors.items():
        begin, _ = json.loads(content[8 : 8 + length])[name]["data_offsets"]
        assert begin % tensor.element_size() == 0, name


def test_only_the_named_tensors_are_read_and_they_own_their_memory(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    files.write_safetensors(tensors, path)
    header = files.read_header(path)
    read = files.read_tensors(header, ["half", "plain"])
    assert list(read) == ["half", "plain"] and read["half"].dtype == torch.float16
    with path.open("r+b") as file:  # a view into the mapped file would change with it
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(read["plain"], tensors["plain"])
    with pytest.raises(InputError, match="no tensors named nothing"):
        files.read_tensors(header, ["nothing"])


def test_same_content_same_bytes(tmp_path, tensors):
    metadata = {str(n): "x" for n in range(20)}
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    files.write_safetensors(tensors, one, metadata)
    files.write_safetensors(dict(reversed(tensors.items())), two, dict(reversed(metadata.items())))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path, length):
    """The first two bytes, 80 04 for 1,152, are those of a pickle of protocol 4."""
    path, metadata = tmp_path / "a.safetensors", {"format": "pt", "note": ""}
    entries = {"__metadata__": metadata, "x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    metadata["note"] = "n" * (length - len(json.dumps(entries)))
    path.write_bytes(struct.pack("<Q", length) + json.dumps(entries).encode() + b"\x07")
    assert load_file(path)["x"].tolist() == [7]
    assert files.read_tensors(files.read_header(path), ["x"])["x"].tolist() == [7]


def test_header_needs_no_torch():
    code = "import sys, gmp.files, gmp.layouts; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def other_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (other_zip(), "is a zip archive"),
        (b"GGUF" + bytes(60), "is a GGUF file"),
        (bytes(257) + b"ustar\x0000" + bytes(300), "is a tar archive"),
        (b"\x89PNG\r\n\x1a\n" + bytes(60), "is a PNG picture"),
        (b"<!DOCTYPE html><html><body>log in</body></html>", "is a web page"),
        (b"\n <html><body>log in</body></html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "is a Git LFS pointer"),
        (b'{"model_type": "clip"}', "is a JSON text"),
        (b"abc", "is not a safetensors file"),
        (struct.pack("<Q", 1 << 40) + b"{" + bytes(60), "is not a safetensors file.*1,099,511,627,776"),
    ],
)  # fmt: skip
def test_other_files_are_named(tmp_path, content, message):
    path = tmp_path / "clip.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        files.read_header(path)
    assert "\n" not in str(error.value) and str(error.value).startswith("clip.safetensors ")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="clip.safetensors does not exist"):
        files.read_header(tmp_path / "clip.safetensors")
    with pytest.raises(InputError, match="is a folder without a model in it"):
        files.read_header(tmp_path)


def test_truncated_says_how_many_bytes(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    files.write_safetensors(tensors, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(InputError, match=f"truncated: {len(whole):,} bytes expected, {len(whole) - 10:,} bytes found"):
        files.read_header(path)
    path.write_bytes(whole[:100])  # inside the header
    with pytest.raises(InputError, match="truncated: .* 100 bytes found"):
        files.read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"{}x",
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},  # 8 bytes needed
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": 3},
        {"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        },  # overlap
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},  # a gap
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
        b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',  # twice
        {"a" * 501: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"__metadata__": {"a": "\\ud800"}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        {"__metadata__": {"a": 3}},
        {"__metadata__": [1]},
    ],
)
def test_damaged_headers(tmp_path, header):
    path = damaged(tmp_path / "a.safetensors", header, bytes(8))
    with pytest.raises(InputError, match="damaged safetensors header"):
        files.read_header(path)


def test_failure_leaves_the_old_file_and_no_litter(tmp_path, tensors, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"no space left to write .*a\.safetensors: [\d,]+ bytes are needed") as error:
        files.write_safetensors(tensors, path)
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="no space left"):
        files.write_text("new", path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.safetensors"]


def test_where_nothing_can_be_written(tmp_path):
    with pytest.raises(InputError, match="the folder .*nowhere does not exist"):
        files.write_text("x", tmp_path / "nowhere" / "a.txt")
    with pytest.raises(InputError, match="a folder has that name"):
        files.write_text("x", tmp_path)


def test_text_and_json(tmp_path):
    path = tmp_path / "a.json"
    files.write_json({"b": 1, "ä": [None, 0.5]}, path)
    files.write_json({"b": 2, "ä": [None, 0.5]}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": 2, "ä": [None, 0.5]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json({"loss": float("nan")}, path)
    assert json.loads(path.read_text(encoding="utf-8"))["b"] == 2
    files.write_text("één\n", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == "één\n".encode()
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.txt"]
