"""The one form that a CLIP has in memory: OpenAI's names, fused qkv, projections used as x @ P.

A Piece says from which tensors of a file one canonical tensor is put together. The same Piece takes it apart
again, so a naming is one function `piece(name)`, used in both directions.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import some

if TYPE_CHECKING:
    from torch import Tensor

TOWERS = ("text", "vision")
STACK = {"text": "transformer.resblocks", "vision": "visual.transformer.resblocks"}
# Shapes are written in sizes that the first tensor to mention them settles; numbers are fixed.
OUTSIDE = {
    "text": {
        "token_embedding.weight": ("vocab", "width"),
        "positional_embedding": ("context", "width"),
        "ln_final.weight": ("width",),
        "ln_final.bias": ("width",),
        "text_projection": ("width", "embed"),
        "logit_scale": (),
    },
    "vision": {
        "visual.class_embedding": ("width",),
        "visual.conv1.weight": ("width", 3, "patch", "patch"),
        "visual.positional_embedding": ("rows", "width"),  # rows = 1 + registers + grid * grid
        "visual.ln_pre.weight": ("width",),
        "visual.ln_pre.bias": ("width",),
        "visual.ln_post.weight": ("width",),
        "visual.ln_post.bias": ("width",),
        "visual.proj": ("width", "embed"),
    },
}
BLOCK = {
    "ln_1.weight": ("width",),
    "ln_1.bias": ("width",),
    "attn.in_proj_weight": ("3 width", "width"),
    "attn.in_proj_bias": ("3 width",),
    "attn.out_proj.weight": ("width", "width"),
    "attn.out_proj.bias": ("width",),
    "ln_2.weight": ("width",),
    "ln_2.bias": ("width",),
    "mlp.c_fc.weight": ("mlp", "width"),
    "mlp.c_fc.bias": ("mlp",),
    "mlp.c_proj.weight": ("width", "mlp"),
    "mlp.c_proj.bias": ("width",),
}
# What some vision towers have beside it: registers, and gates that mix them into the class token.
REGISTERS = "visual.register_tokens"
_LAST_GATE = "visual.fusion_mlp"  # behind the tower
_GATES = "visual.transformer.intermediate_fusion_mlps"  # behind the last blocks, counted from the first of these
_GATE = {"0.weight": ("width", "2 width"), "0.bias": ("width",), "2.weight": (1, "width"), "2.bias": (1,)}
# What a text encoder's own file usually lacks; the original CLIP lends it when the towers are joined.
LENT = ("text_projection", "logit_scale")

_WIDTHS = {"2 width": 2, "3 width": 3}
_BLOCK_NAME = re.compile(r"^((?:visual\.)?transformer\.resblocks)\.(\d+)\.(.+)$")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """The tensors of a file that make one canonical tensor: stacked along dim 0, or transposed.

    scales: by key, the tensor that a scaled fp8 weight has to be multiplied by.
    kept: not 0 for Long-CLIP's positions, where so many rows come from the first tensor and the rest from the second.
    """

    keys: tuple[str, ...]
    transposed: bool = False
    scales: Mapping[str, str] = field(default_factory=dict)
    kept: int = 0


def block_name(name: str) -> tuple[str, int, str] | None:
    """Stack, block number and inner name of a canonical tensor inside a block; None outside of blocks."""
    match = _BLOCK_NAME.match(name)
    return (match[1], int(match[2]), match[3]) if match else None


def expected(tower: str, blocks: Iterable[int]) -> dict[str, tuple[int | str, ...]]:
    """Every tensor of a tower that has these blocks, with its shape in sizes."""
    inside = {f"{STACK[tower]}.{n}.{name}": shape for n in blocks for name, shape in BLOCK.items()}
    return {**OUTSIDE[tower], **inside}


def registers(present: Callable[[str], bool]) -> dict[str, tuple[int | str, ...]]:
    """Tensors of a vision tower's registers and their gates, with shapes as `expected`; {} where there are none."""
    if not present(REGISTERS):
        return {}
    count = next(n for n in itertools.count() if not present(f"{_GATES}.{n}.0.bias"))
    modules = [f"{_GATES}.{n}" for n in range(count)]
    if modules or present(f"{_LAST_GATE}.0.bias"):
        modules.append(_LAST_GATE)
    gates = {f"{module}.{name}": shape for module in modules for name, shape in _GATE.items()}
    return {REGISTERS: ("registers", "width"), **gates}


def gate_count(names: Iterable[str]) -> int:
    """How many gates these canonical tensors are of."""
    return sum(name.startswith((_GATES, _LAST_GATE)) and name.endswith(".0.bias") for name in names)


def is_vision(name: str) -> bool:
    return name.startswith("visual.")


def text_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text tower's tensors of a canonical state, without logit_scale, which belongs to the whole CLIP."""
    return {name: tensor for name, tensor in state.items() if not is_vision(name) and name != "logit_scale"}


def vision_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower's tensors of a canonical state, by their names inside of it."""
    return {name.removeprefix("visual."): tensor for name, tensor in state.items() if is_vision(name)}


def sizes_of(tower: str, names: Mapping[str, tuple], shapes: Mapping[str, Shape]) -> tuple[dict, list[str]]:
    """Sizes that the shapes of a tower's tensors settle, and a sentence for those that contradict each other.

    names: as `expected` gives them; shapes: what is there, by canonical name.
    """
    sizes: dict[str, int] = {}
    wrong = []
    for name, symbols in names.items():
        if (shape := shapes.get(name)) is None:
            continue
        if len(shape) == len(symbols):
            for symbol, length in zip(symbols, shape, strict=True):
                if isinstance(symbol, str) and symbol not in _WIDTHS:
                    sizes.setdefault(symbol, length)
        if "width" in sizes:
            sizes |= {symbol: times * sizes["width"] for symbol, times in _WIDTHS.items()}
        wanted = tuple(sizes.get(symbol, symbol) for symbol in symbols)
        if shape != wanted:
            wrong.append(f"{name} is {list(shape)} and not {list(wanted)}")
    sizes = {symbol: size for symbol, size in sizes.items() if symbol not in _WIDTHS}
    if nothing := [symbol for symbol, size in sizes.items() if size < 1]:
        wrong.append(f"{' and '.join(nothing)} 0")
    if "rows" in sizes:
        before = 1 + sizes.get("registers", 0)
        patches = sizes["rows"] - before
        if math.isqrt(max(patches, 0)) ** 2 != max(patches, 1):
            more = "one" if before == 1 else f"{before}, class token and registers,"
            wrong.append(f"visual.positional_embedding has {sizes['rows']} rows, not {more} more than a square number")
    return sizes, [f"shapes do not fit together: {some(wrong)}"] if wrong else []


def assemble(name: str, piece: Piece, tensors: Mapping[str, Tensor]) -> Tensor:
    """The canonical tensor from the tensors of a file, in their dtype; fp32 where they differ or are scaled."""
    import torch

    parts = [tensors[key] for key in piece.keys]
    if piece.scales or len({part.dtype for part in parts}) > 1:
        parts = [part.float() for part in parts]
    for at, key in enumerate(piece.keys):
        if key in piece.scales:
            scale = tensors[piece.scales[key]].float()
            parts[at] = parts[at] * (scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(()))
    if piece.kept:
        parts = [parts[0][: piece.kept], parts[1][piece.kept :]]
    dtype = parts[0].dtype
    if len(parts) > 1 and dtype.itemsize == 1:  # torch does not stack fp8
        parts = [part.view(torch.uint8) for part in parts]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts).view(dtype)
    if name == "logit_scale":  # some trainers store it with shape (1,)
        whole = whole.reshape(())
    return whole.T.contiguous() if piece.transposed else whole


def take_apart(piece: Piece, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors of a file from a canonical tensor; the inverse of `assemble`."""
    whole = tensor.T if piece.transposed else tensor
    parts = (whole,) if len(piece.keys) == 1 else whole.chunk(len(piece.keys))
    return dict(zip(piece.keys, parts, strict=True))


def content_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of named tensors in the given order: names, shapes, and values in fp32, whatever dtype they come in."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        for values in chunks(tensor):
            digest.update(values.numpy())
    return digest.hexdigest()


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The values of a tensor in fp32 on the CPU, 1 MiB at a time: a copy of the whole may not fit."""
    for values in tensor.detach().reshape(-1).split(1 << 18):
        yield values.cpu().float()


def is_finite(tensor: Tensor) -> bool:
    """True if no value is NaN or infinity."""
    return all(bool(values.isfinite().all()) for values in chunks(tensor))
