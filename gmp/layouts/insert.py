"""Putting a text encoder back into the checkpoint that it came from: every other tensor keeps its bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import __version__, files
from ..errors import InputError, some
from .canonical import block_name
from .detect import describe, shape_of
from .write import DTYPES, parts

if TYPE_CHECKING:
    from torch import Tensor

    from ..clip import TextConfig

# Entries that state the hash of the file's tensors; they would be wrong in the copy.
_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


@dataclass(frozen=True)
class Inserted:
    """Names of the tensors that were replaced, and sentences on what was left out, left as it was, or not copied."""

    replaced: tuple[str, ...]
    notes: tuple[str, ...]


def insert_text(
    state: Mapping[str, Tensor | files.Pending],
    checkpoint: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    member: str,
    config: TextConfig,
    dtype: str = "keep",
    metadata: Mapping[str, str] | None = None,
) -> Inserted:
    """Write a copy of a checkpoint with another text encoder in it.

    state: a text encoder in canonical form, plain weights. What the checkpoint has no place for, such as clip_l's
    projection, is left out; what the state lacks, and the logit scale, stays as it is. The notes say so.
    dtype: "keep" takes the one that the checkpoint has each tensor in; "fp32", "fp16" or "bf16" for all replaced.
    path: a .safetensors file, written tensor by tensor; a pickled checkpoint's tensors are written so too.
    Raises InputError for a checkpoint without such an encoder, other shapes, and values that a dtype cannot hold.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    header = files.read_header(checkpoint)
    name = header.path.name
    if header.container == "folder":
        raise InputError(f"{name} is a folder, not a checkpoint in one file; write a huggingface_folder in its place")
    held = describe(header).text
    if member not in held:
        raise InputError(f"{name} holds no {member} to replace; it holds {some(held) or 'no text encoder'}")
    part = held[member]
    if part.problems:
        raise InputError(f"{name}: its {member} cannot be replaced: {'; '.join(part.problems)}")
    if any(piece.scales or piece.kept for piece in part.pieces.values()) or part.layout == "gmp":
        raise InputError(f"{name}: its {member} is not in plain weights; give the fp16 or fp32 edition")
    wrong = [
        f"{each} is {list(state[each].shape)} and not {list(shape_of(each, piece, header))}"
        for each, piece in part.pieces.items()
        if each in state and tuple(state[each].shape) != shape_of(each, piece, header)
    ]
    lost = part.pieces.keys() - state.keys() - {"text_projection", "logit_scale"}
    wrong += [f"{each} is missing" for each in sorted(lost)]
    # SD2's checkpoints may end before clip_h's last block, which SD2 does not read
    blocks = {f"{at[0]}.{at[1]}" for each in state if (at := block_name(each)) and at[1] >= part.layers}
    wrong += [f"{block} has no place" for block in sorted(blocks.difference(part.missing))]
    if part.place.activation not in (None, config.activation):
        wrong.append(f"its activation is {config.activation} and not {part.place.activation}")
    if wrong:
        raise InputError(f"{name}: the text encoder does not fit its {member}: {some(wrong)}")

    pieces = {each: piece for each, piece in part.pieces.items() if each in state and each != "logit_scale"}
    fresh = parts(state, pieces, lambda key, _: DTYPES[dtype] or header.tensors[key].dtype, name)
    notes = {"gmp_version": __version__, "gmp_replaced": json.dumps({"member": member, "tensors": len(fresh)})}
    entries = {key: value for key, value in header.metadata.items() if key not in _HASHES}
    whole = {key: fresh.get(key) or _as_it_is(header, key) for key in header.tensors}
    files.write_safetensors(whole, path, {**entries, **(metadata or {}), **notes})
    left_out = sorted(state.keys() - part.pieces.keys())
    kept = [each for each in ("text_projection", "logit_scale") if each in part.pieces and each not in pieces]
    dtypes = {pending.dtype for pending in fresh.values()}
    sentences = [f"stored as {some(dtypes)}"]
    sentences += [f"{some(left_out)}: {name} has no place for it"] if left_out else []
    sentences += [f"{' and '.join(kept)}: the checkpoint's own stays"] if kept else []
    return Inserted(tuple(fresh), (*header.notes, *sentences))


def _as_it_is(header: files.Header, key: str) -> files.Stored | files.Pending:
    """A tensor of the checkpoint for its copy; one that is not contiguous has to be read for that."""
    info = header.tensors[key]
    if info.stride is None:
        return files.Stored(header, key)
    return files.Pending(info.dtype, info.shape, lambda: files.read_tensors(header, [key])[key])
