"""What of a text encoder was trained: which tensors differ from the original's by more than the rounding of storage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import some
from .layouts.canonical import block_name

# What files store weights in. A tensor that is the other's rounding to one of them was converted, not trained.
STORED = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
# A checkpoint in fp16 that is saved as bf16 or fp8: what lies between two numbers of the second may be rounded twice.
STORED_AGAIN = tuple((first, then) for first in STORED[:2] for then in STORED if then != first)
_HALF_ULPS = 2.0**-11 + 2.0**-8  # relative, of fp16 and bf16 together
_SAMPLE = 4096  # values that are looked at first: of a trained tensor, some of them differ
_FEW = 16  # values of a row, likewise
_INVERTED = 1000  # rows; a textual inversion has a few dozen at the most
TOKENS = "token_embedding.weight"
POSITIONS = "positional_embedding"
PROJECTION = "text_projection"
FINAL = ("ln_final.weight", "ln_final.bias")


@dataclass(frozen=True)
class Trained:
    """Which tensors have moved, and what that looks like."""

    pattern: str  # identical, rounded, embeddings, projection, last_block, all, some, sdxl, lora, or sdxl+lora
    text: str  # sentences
    tensors: int  # that both files have
    moved: tuple[str, ...]  # canonical names, in the order of the original's
    rounded: int  # differ by no more than rounding
    token_rows: int  # rows of the token table that have moved


def what_was_trained(state: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> Trained:
    """state, original: canonical and plain. What only one of the two has in this shape is left out, and logit_scale."""
    names = [n for n in original if n in state and n != "logit_scale" and state[n].shape == original[n].shape]
    different = [name for name in names if not torch.equal(state[name], original[name])]
    rows = 0
    if TOKENS in different:
        rows = int((~_same_rows(state[TOKENS], original[TOKENS])).sum())
    moved = tuple(n for n in different if (rows if n == TOKENS else not is_rounding(state[n], original[n])))
    pattern, text = _pattern(moved, names, rows, bool(different))
    return Trained(pattern, text, len(names), moved, len(different) - len(moved), rows)


def is_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether two fp32 tensors are equal, or one is the other after storage in fp16, bf16 or fp8, or in two of them.

    Also where each was stored in another of fp16 and bf16: then they may differ by what the two round.
    """
    a, b = one.reshape(-1), other.reshape(-1)
    return any(bool(same(a[:_SAMPLE], b[:_SAMPLE]).all()) and bool(same(a, b).all()) for same in _ROUNDINGS)


def _same_rows(one: Tensor, other: Tensor) -> Tensor:
    """Rows of a matrix that are equal but for the same kind of rounding. (N, W) -> (N,) bool"""
    found = torch.zeros(len(one), dtype=torch.bool)
    for same in _ROUNDINGS:
        left = (~found).nonzero().flatten()
        for rows in left.split(_SAMPLE):
            rows = rows[same(one[rows, :_FEW], other[rows, :_FEW]).all(dim=1)]
            found[rows] = same(one[rows], other[rows]).all(dim=1)
    return found


def _rounded_to(*dtypes: torch.dtype):
    """Whether one value is the other after storage in these, one after the other."""

    def stored(values: Tensor) -> Tensor:
        for dtype in dtypes:
            values = values.to(dtype)
        return values.float()

    return lambda a, b: (a == stored(b)) | (b == stored(a))


def _stored_in_both(a: Tensor, b: Tensor) -> Tensor:
    """Where one value is an fp16 number, the other a bf16 one, and both may come from the same fp32 value."""
    half, brain = torch.float16, torch.bfloat16
    stored = ((a == a.to(half)) & (b == b.to(brain))) | ((b == b.to(half)) & (a == a.to(brain)))
    size = torch.maximum(a.abs(), b.abs())
    return stored & ((a - b).abs() <= size * _HALF_ULPS + 2.0**-24)  # fp16's smallest step


_ROUNDINGS = (
    torch.eq,
    *(_rounded_to(dtype) for dtype in STORED),
    *(_rounded_to(*dtypes) for dtypes in STORED_AGAIN),
    _stored_in_both,
)


# ---- in words -------------------------------------------------------------------------------------------------------


def _pattern(moved: tuple[str, ...], names: list[str], rows: int, different: bool) -> tuple[str, str]:
    if not moved and not different:
        return "identical", "Every tensor equals the original's bit by bit: nothing was trained."
    if not moved:
        return "rounded", "Nothing was trained: tensors differ from the original's by no more than storage rounds."
    blocks = _blocks(names)
    last = f".{max(blocks)}." if blocks else "-"
    parts = {_part(name, last) for name in moved}
    whole = {_part(name, last) for name in names}
    if parts <= {"tokens", "positions"}:
        return "embeddings", _embeddings(parts, rows)
    if parts == {"projection"}:
        return "projection", "Only the text projection has moved: no diffusion model reads clip_l behind it."
    if parts <= {"last block", "final LayerNorm"}:
        return "last_block", (
            f"Only the {' and the '.join(sorted(parts, reverse=True))} moved: they are behind the place that SDXL, SD2 "
            "and SD3 read."
        )
    sentences = [_what(moved, names, rows, parts == whole and len(moved) == len(names))]
    patterns = []
    if not parts & {"last block", "final LayerNorm"} and {"last block", "final LayerNorm"} <= whole:
        patterns.append("sdxl")
        sentences.append(
            "The last block and the final LayerNorm are untouched. Training for SDXL leaves clip_l so (kohya's scripts "
            "do): SDXL reads it before them, so they get no gradient."
        )
    if all(_is_matrix(name) for name in moved):
        patterns.append("lora")
        sentences.append(
            "Only attention and MLP matrices have moved; biases, LayerNorms and embeddings have not, as after a LoRA "
            "was merged in."
        )
    return "+".join(patterns) or ("all" if len(moved) == len(names) else "some"), " ".join(sentences)


def _part(name: str, last: str) -> str:
    outside = {TOKENS: "tokens", POSITIONS: "positions", PROJECTION: "projection"} | dict.fromkeys(
        FINAL, "final LayerNorm"
    )
    return outside.get(name) or ("last block" if last in name else "blocks")


def _blocks(names: Iterable[str]) -> set[int]:
    return {at[1] for name in names if (at := block_name(name))}


def _is_matrix(name: str) -> bool:
    block = block_name(name)
    return block is not None and block[2].endswith("weight") and not block[2].startswith("ln_")


def _embeddings(parts: set[str], rows: int) -> str:
    what = []
    if "tokens" in parts:
        what.append(f"{rows} row{'s'[: rows != 1]} of the token table")
    if "positions" in parts:
        what.append("the positions")
    sentence = f"Only embeddings have moved: {' and '.join(what)}."
    return sentence + (" Textual inversion does that." if parts == {"tokens"} and rows <= _INVERTED else "")


def _what(moved: tuple[str, ...], names: list[str], rows: int, everything: bool) -> str:
    if everything:
        return f"All {len(names)} tensors have moved."
    blocks = sorted(_blocks(moved))
    what = [f"block{'s'[: len(blocks) != 1]} {spans(blocks)}"] if blocks else []
    words = {POSITIONS: "the positions", FINAL[0]: "the final LayerNorm", PROJECTION: "the text projection"}
    if TOKENS in moved:
        what.append(f"the token table ({rows} rows)")
    what += [word for name, word in words.items() if name in moved]
    return f"{len(moved)} of {len(names)} tensors have moved: {some(what, len(what), sort=False)}."


def spans(numbers: Iterable[int]) -> str:
    """`0 to 3, 5`"""
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in _runs(sorted(numbers)))


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            yield numbers[start], numbers[at - 1]
            start = at
