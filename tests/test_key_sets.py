"""Files whose names, shapes and dtypes were tampered with: every one is read whole, or refused with a sentence."""

from __future__ import annotations

import json
import math
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gmp.errors import InputError
from gmp.files import read_header
from gmp.files.header import ITEM_BITS
from gmp.inspection import inspect, lines, sentence
from gmp.layouts import describe, huggingface, openai, read_text, read_vision
from gmp.layouts.canonical import expected

SIZES = {"vocab": 10, "width": 64, "3 width": 192, "context": 30, "mlp": 8, "embed": 4, "patch": 2, "rows": 5}


def tower(piece, *towers: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of small towers of two blocks in a naming."""
    result = {}
    for name, symbols in ((n, s) for one in towers for n, s in expected(one, range(2)).items()):
        found, shape = piece(name), tuple(SIZES.get(symbol, symbol) for symbol in symbols)
        shape = shape[::-1] if found.transposed else shape
        split = len(found.keys)
        result |= {key: (shape[0] // split, *shape[1:]) if split > 1 else shape for key in found.keys}
    return result


def below(prefix: str, names: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in names.items()}


HF, OPENAI = tower(huggingface.piece, "text", "vision"), tower(openai.piece, "text", "vision")
TEXT = tower(huggingface.piece, "text")
GMP = {
    new: shape
    for name, size in OPENAI.items()
    for new, shape in (
        {f"{name[:-6]}theta": size, f"{name[:-6]}r": (size[0], 1)}
        if ".mlp.c_" in name and name.endswith("weight")
        else {name: size}
    ).items()
}
STARTS = {
    "huggingface": HF,
    "openai": OPENAI,
    "gmp": GMP,
    "open_clip": {n if n == "logit_scale" or n.startswith("visual.") else f"text.{n}": s for n, s in OPENAI.items()},
    "sdxl": below("conditioner.embedders.0.transformer.", TEXT)
    | below("conditioner.embedders.1.model.", tower(openai.piece, "text"))
    | {"model.diffusion_model.out.2.weight": (2, 2)},
    "long_clip": OPENAI | {"positional_embedding_res": (30, 64)},
    "scaled": HF | {f"{n[:-6]}scale_weight": () for n in HF if ".mlp." in n and n.endswith("weight")},
}
JUNK = ("junk", "transformer.resblocks.7.ln_1.weight", "text_model.encoder.layers.1.extra.weight", "text_projection",
        "text_projection.weight", "text_projection.bias", "logit_bias", "visual.junk", "scaled_fp8", "vocab_size",
        "positional_embedding_res", "text_model.embeddings.position_ids", "lora_te_x.lora_up.weight", "",
        "text_model.encoder.layers.999999.mlp.fc1.weight", "transformer.resblocks.0.mlp.c_fc.r",
        "text_model.encoder.layers.0.mlp.fc1.scale_weight",
        "text_model.encoder.layers.0.mlp.fc1.comfy_quant")  # fmt: skip
DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "I64", "U8", "BOOL", "F4", "C64")


def write(path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file of zeros."""
    entries, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + -(-math.prod(shape) * ITEM_BITS[dtype] // 8)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


@st.composite
def tampered(draw) -> dict[str, tuple[str, tuple[int, ...]]]:
    start = STARTS[draw(st.sampled_from(sorted(STARTS)))]
    tensors = {name: ("F32", shape) for name, shape in start.items()}
    for _ in range(draw(st.integers(0, 4))):
        names = sorted(tensors)
        if not names:
            break
        name = draw(st.sampled_from(names))
        dtype, shape = tensors[name]
        what = draw(st.sampled_from(["drop", "rename", "add", "dtype", "reverse", "grow", "flatten", "block"]))
        if what == "drop":
            del tensors[name]
        elif what == "rename":
            tensors[draw(st.sampled_from(JUNK) | st.text(max_size=5))] = tensors.pop(name)
        elif what == "add":
            tensors[draw(st.sampled_from(JUNK))] = ("F32", draw(st.sampled_from([(), (1,), (2, 2), (30, 64), shape])))
        elif what == "dtype":
            tensors[name] = (draw(st.sampled_from(DTYPES)), shape)
        elif what == "reverse":
            tensors[name] = (dtype, shape[::-1])
        elif what == "grow":
            tensors[name] = (dtype, tuple(size + draw(st.integers(0, 1)) for size in shape))
        elif what == "flatten":
            tensors[name] = (dtype, (math.prod(shape),))
        else:
            tensors = {n: t for n, t in tensors.items() if ".1." not in n}
    tensors.pop("__metadata__", None)
    return {n: ("U8" if d == "F4" and math.prod(s) % 2 else d, s) for n, (d, s) in tensors.items()}  # F4 is half a byte


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(tensors=tampered())
def test_every_tensor_is_read_or_named_or_the_file_is_refused(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    write(path, tensors)
    header = read_header(path)
    contents = describe(header)
    told = inspect(path)
    assert lines(told) and sentence(told)
    for part in (*contents.text.values(), *([contents.vision] if contents.vision else [])):
        used = {key for piece in part.pieces.values() for key in (*piece.keys, *piece.scales.values())}
        own = {key for key in header.tensors if part.place.owns(key)}
        if not part.problems:
            assert used | set(part.unexpected) | set(part.buffers) == own
            assert not used & set(part.unexpected)
    for read in (read_text, read_vision):
        try:
            found = read(path)
        except InputError as error:
            assert str(error).startswith("a.safetensors") and len(str(error)) < 5000
        else:
            wanted = set(expected("text" if read is read_text else "vision", range(found.config.layers)))
            assert wanted - found.state.keys() <= {"text_projection", "logit_scale"}
            assert found.state.keys() <= wanted


@pytest.mark.parametrize("name", STARTS)
def test_untouched_they_are_all_read(tmp_path, name):
    path = tmp_path / "a.safetensors"
    write(path, {key: ("F32", shape) for key, shape in STARTS[name].items()})
    assert read_text(path).config.layers == 2
