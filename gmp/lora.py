"""The change that a repair made, as a LoRA: what to add to the broken text encoder to get the repaired one.

ComfyUI's Load LoRA applies the file to clip_l, clip_g or clip_h. Linears are stored low-rank under kohya's names, which
other programs read too; biases, LayerNorms and embeddings under ComfyUI's own names (`text_encoders.clip_l.…`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import __version__, files
from .errors import InputError, some
from .events import Event, progress
from .geometric import fold_state
from .layouts import Source, TowerFile, huggingface
from .layouts.canonical import LENT, block_name, expected, sizes_of, take_apart

# kohya's names of the text encoders. ComfyUI takes lora_te1 for clip_l in every model, also in SD1, and lora_te2 for
# clip_g where clip_l is beside it (SDXL, SD3); in an SDXL refiner, whose clip_g is alone, it does not know lora_te2.
KOHYA = {"clip_l": "lora_te1", "clip_g": "lora_te2", "clip_h": "lora_te"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SIZES = {
    "width": "width",
    "mlp": "MLP width",
    "context": "context length",
    "vocab": "vocabulary",
    "embed": "projection to",
}


@dataclass(frozen=True)
class Change:
    """One tensor's change, repaired - broken, under Hugging Face's name."""

    name: str
    norm: float  # Frobenius
    kept: float  # share of the squared norm that the file holds


@dataclass(frozen=True)
class LeftOut:
    """One tensor's change that the file does not hold, and why."""

    name: str
    norm: float | None  # Frobenius; None where the two cannot be subtracted
    reason: str


@dataclass(frozen=True)
class Lora:
    """A repair LoRA, its tensors named and rounded as in the file. alpha equals the rank everywhere: the scale is 1."""

    tensors: dict[str, Tensor]
    member: str  # "clip_l", "clip_g" or "clip_h"
    rank: int  # the largest of any matrix
    dtype: str
    whole: bool
    kept: float  # share of the squared Frobenius norm of the whole change that the file holds
    layers: tuple[Change, ...]  # what the file holds
    left_out: tuple[LeftOut, ...]
    repaired: Source
    broken: Source


def repair_lora(
    repaired: TowerFile, broken: TowerFile, rank: int, *, whole: bool = True, dtype: str = "fp16"
) -> Generator[Event, None, Lora]:
    """repaired - broken as a LoRA; yields a progress event per matrix. Tensors that did not change are not stored.

    rank: for each matrix; one that changed in fewer directions, or is smaller, takes what it needs and is exact.
    whole: store the changes of biases, position embedding and LayerNorms, as they are, and that of the token embedding,
    low-rank where this is smaller. ComfyUI applies them; most other programs pass them over. False stores Linears only.
    dtype: "fp16", "fp32" or "bf16".
    `kept` is measured on the rounded tensors and counts every weight that diffusion models read, stored or not. The
    logit scale and the projections of clip_l and clip_h are not among these: they are never stored nor counted, only
    listed in `left_out`.
    Raises InputError for encoders that differ in member or shape or do not differ at all, for a rank below 1, an
    unknown dtype, and changes that the dtype cannot hold.
    """
    after, before = fold_state(repaired.state), fold_state(broken.state)
    between = f"{repaired.source.path} minus {broken.source.path}"
    member = repaired.source.member
    if problems := _problems(after, before, (member, broken.source.member), rank, dtype):
        raise InputError(f"{between}: {'; '.join(problems)}")
    projected = member == "clip_g" and _fault(after, before, "text_projection") is None
    left_out = _unread(after, before, projected)
    pairs = _changed(after, before, projected)
    matrices = {name for name, (tensor, _) in pairs.items() if _is_low_rank(name, tensor, rank, whole)}
    if problem := _nothing(bool(pairs), whole or bool(matrices), bool(left_out)):
        raise InputError(f"{between}: nothing to write: {problem}")

    tensors: dict[str, Tensor] = {}
    layers: list[Change] = []
    total = lost = 0.0  # squared norms
    done = 0
    for name, (new, old) in pairs.items():
        change = new.detach().double() - old.detach().double()
        norm = torch.linalg.vector_norm(change).item()
        total += norm**2
        if not whole and name not in matrices:
            left_out.append(LeftOut(name, norm, "only the weights of Linears are stored"))
            lost += norm**2
            continue
        if name in matrices:
            entries, held = _low_rank(name, change, member, rank, DTYPES[dtype])
        else:
            entries, held = _as_it_is(name, change, member, DTYPES[dtype])
        error = torch.linalg.vector_norm(change - held).item() ** 2
        tensors |= entries
        layers.append(Change(name, norm, 1 - error / norm**2))
        lost += error
        if name in matrices:
            done += 1
            yield progress("factor matrices", done, len(matrices))
    if overflowing := [row.name for row in layers if not math.isfinite(row.kept)]:
        raise InputError(
            f"{between}: the change has values too large for {dtype} in {len(overflowing)} tensors: "
            f"{some(overflowing)}; write bf16 or fp32, and check that the two files belong together"
        )
    largest = max((len(tensor) for key, tensor in tensors.items() if key.endswith(".lora_down.weight")), default=0)
    kept, sources = 1 - lost / total, (repaired.source, broken.source)
    return Lora(tensors, member, largest, dtype, whole, kept, tuple(layers), tuple(left_out), *sources)


def write_lora(lora: Lora, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write the LoRA as safetensors, with kohya's metadata for rank and alpha.

    The entry `gmp_repair_lora`, JSON, tells the share that is kept, what was left out and both encoders' SHA-256.
    metadata: more entries for the file.
    Raises InputError for a folder that is not there, OSError naming the path for a full disk.
    """
    facts = {
        "rank": lora.rank,
        "kept": lora.kept,
        "member": lora.member,
        "whole": lora.whole,
        "repaired": {"file": lora.repaired.path, "sha256": lora.repaired.sha256},
        "broken": {"file": lora.broken.path, "sha256": lora.broken.sha256},
        "left_out": [row.name for row in lora.left_out],
    }
    entries = {
        "gmp_repair_lora": json.dumps(facts, sort_keys=True),
        "gmp_version": __version__,
    }
    if lora.rank:
        entries["ss_network_module"] = "networks.lora"
        entries["ss_network_dim"] = entries["ss_network_alpha"] = str(lora.rank)
    files.write_safetensors(lora.tensors, path, {**(metadata or {}), **entries})


def _problems(
    after: Mapping[str, Tensor], before: Mapping[str, Tensor], members: tuple[str | None, ...], rank: int, dtype: str
) -> list[str]:
    """Everything that keeps the two from being subtracted and written."""
    problems = []
    if rank < 1:
        problems.append(f"rank {rank} is below 1; 64 is usual")
    if dtype not in DTYPES:
        problems.append(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if members[0] != members[1]:
        problems.append(f"the first is {members[0]} and the second {members[1]}")
    elif members[0] not in KOHYA:
        problems.append(f"{members[0]} is none of {', '.join(KOHYA)}, the encoders that a LoRA can name")
    here, there = _sizes(after, members[0]), _sizes(before, members[0])
    if different := [what for what in here if what in there and here[what] != there[what]]:
        sizes = ", ".join(f"{what} {here[what]} and {there[what]}" for what in different)
        problems.append(f"the shapes differ: {sizes}; give the encoder that the first was repaired from")
    return problems


def _sizes(state: Mapping[str, Tensor], member: str | None) -> dict[str, int]:
    blocks = {inside[1] for name in state if (inside := block_name(name))}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if member != "clip_g":
        shapes.pop("text_projection", None)
    sizes, _ = sizes_of("text", expected("text", blocks), shapes)
    return {"layers": len(blocks)} | {word: sizes[size] for size, word in _SIZES.items() if size in sizes}


def _fault(after: Mapping[str, Tensor], before: Mapping[str, Tensor], name: str) -> str | None:
    """Why a tensor that a file may lack cannot be subtracted; None if it can."""
    for state, which, other in ((after, "repaired", "broken"), (before, "broken", "repaired")):
        if name not in state:
            return f"only the {other} encoder has it"
        if not state[name].isfinite().all():
            return f"it is NaN or infinite in the {which} encoder"
    return "the two have different shapes" if after[name].shape != before[name].shape else None


def _unread(after: Mapping[str, Tensor], before: Mapping[str, Tensor], projected: bool) -> list[LeftOut]:
    rows = []
    for name in LENT:
        if (projected and name == "text_projection") or not (name in after or name in before):
            continue
        label = huggingface.piece(name).keys[0]
        if fault := _fault(after, before, name):
            rows.append(LeftOut(label, None, fault))
        elif norm := torch.linalg.vector_norm(after[name].double() - before[name].double()).item():
            rows.append(LeftOut(label, norm, "SD, SDXL, SD3 and Flux do not read it"))
    return rows


def _changed(
    after: Mapping[str, Tensor], before: Mapping[str, Tensor], projected: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Hugging Face's name -> repaired and broken tensor, of those that differ."""
    pairs = {}
    for name in after:
        if name not in LENT or (projected and name == "text_projection"):
            piece = huggingface.piece(name)
            old = take_apart(piece, before[name])
            pairs |= {key: (new, old[key]) for key, new in take_apart(piece, after[name]).items()}
    return {key: pair for key, pair in pairs.items() if not torch.equal(*pair)}


def _nothing(changed: bool, storable: bool, unread: bool) -> str | None:
    if not changed:
        return "the two are the same" + (" wherever a diffusion model reads them" if unread else "")
    if not storable:
        return "only biases, LayerNorms or embeddings differ; take the whole change, not its Linears alone"
    return None


def _is_low_rank(name: str, tensor: Tensor, rank: int, whole: bool) -> bool:
    """True for Linears, and for a token embedding whose two factors are smaller than itself.

    ComfyUI applies low-rank factors to an Embedding's weight as to a Linear's.
    """
    if name == "text_model.embeddings.token_embedding.weight":
        return whole and rank * sum(tensor.shape) < tensor.numel()
    return tensor.ndim == 2 and name != "text_model.embeddings.position_embedding.weight"


def _factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """up (out, r), down (r, in) in float64, whose product is the best approximation of that rank (Eckart-Young).

    Each singular value is shared between both by its root, so that neither leaves the range of fp16 first.
    """
    if change.shape[0] > change.shape[1]:
        up, down = _factors(change.T, rank)
        return down.T, up.T
    # The left singular vectors are the eigenvectors of the smaller Gram matrix: several times faster than a full SVD
    # and, unlike a randomised one, without the process's random numbers. Squaring halves float64's 16 digits, and 8 are
    # all that the fp32 weights have. The singular values are not the eigenvalues' roots but the lengths of the
    # projected rows, so that small ones stay true and the product is an orthogonal projection of the change.
    _, vectors = torch.linalg.eigh(change @ change.T)
    basis = vectors[:, -rank:]  # eigenvalues ascend
    rows = basis.T @ change
    values = torch.linalg.vector_norm(rows, dim=1)
    real = values > values.max() * max(change.shape) * torch.finfo(change.dtype).eps  # the rest is rounding
    root = values[real].sqrt()
    return basis[:, real] * root, rows[real] / root[:, None]


def _low_rank(
    name: str, change: Tensor, member: str, rank: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors for the file, and the change that they add, in float64."""
    up, down = (factor.to(dtype).contiguous() for factor in _factors(change, rank))
    module = name.removesuffix(".weight")
    key = _generic(module, member)
    if ".embeddings." not in name:  # kohya's names are for Linears only
        key = f"{KOHYA[member]}_{module.replace('.', '_')}"
    alpha = torch.tensor(float(len(down)))  # fp32: bf16 cannot hold 257
    entries = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": alpha}
    return entries, up.double() @ down.double()


def _as_it_is(name: str, change: Tensor, member: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """As `_low_rank`, for a change that is stored whole."""
    rounded = change.to(dtype)
    module, _, leaf = name.rpartition(".")
    return {f"{_generic(module, member)}.{'diff_b' if leaf == 'bias' else 'diff'}": rounded}, rounded.double()


def _generic(module: str, member: str) -> str:
    """ComfyUI's own name for a module of a text encoder."""
    return f"text_encoders.{member}.transformer.{module}"
