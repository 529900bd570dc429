"""What a CLIP file computes for given tokens and pixels, so that it can be held to the library that wrote it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clip import TextConfig, TextTower, VisionTower, end_of_text
from .errors import InputError
from .layouts import TowerFile
from .layouts.canonical import vision_part
from .tokenizer import END_ID

CHUNK_BYTES = 64 << 20  # of one MLP's activations: the largest thing that a pass needs beside its results

Tower = TypeVar("Tower", bound=nn.Module)


@dataclass(frozen=True)
class Encoded:
    """Results in fp32 on the CPU, for B captions of L tokens and P pictures; only what the file can compute.

    penultimate (B, L, width): before the last block, no final LayerNorm; transformers' `hidden_states[-2]`
    last (B, L, width): after the final LayerNorm; transformers' `last_hidden_state`
    pooled (B, width): row of `last` at end-of-text; transformers' `pooler_output`
    projected (B, embed): pooled @ text_projection, not normalised; OpenCLIP's `encode_text`
    image (P, embed): not normalised; OpenCLIP's `encode_image`
    logits (P, B): exp(logit_scale) times the cosines; transformers' `logits_per_image`, OpenCLIP's image logits
    """

    tensors: dict[str, Tensor]
    notes: tuple[str, ...]  # sentences: what was left out and why, and where libraries differ


@torch.no_grad()
def encode(text: TowerFile | None, vision: TowerFile | None, ids: Tensor | None, pixels: Tensor | None) -> Encoded:
    """Everything that the towers of a file compute for tokens (B, L) and normalised pixels (P, 3, S, S).

    Tokens may be any whole numbers, L up to the context length; pixels any floating point. Work is cut into chunks, so
    that a large batch needs little more memory than its results.
    Raises InputError for tokens and pixels that do not fit the towers, or for which there is no tower.
    """
    if problems := _unfit(text, vision, ids, pixels):
        file = text or vision
        raise InputError(f"{file.source.path if file else 'No tower'}: {'; '.join(problems)}")
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    if ids is not None:
        tensors |= _encode_text(text, ids.long(), notes)
    if pixels is not None:
        config = vision.config
        tower = _build(VisionTower, config, vision_part(vision.state))
        rows = _rows(config.tokens, config.mlp_width)
        tensors |= _in_chunks(lambda chunk: {"image": tower(chunk)}, pixels.float(), rows)
    if ids is not None and pixels is not None:
        if reason := _no_logits(text, vision, tensors):
            notes.append(f"logits are left out: {reason}")
        else:
            image, projected = (F.normalize(tensors[name], dim=-1) for name in ("image", "projected"))
            tensors["logits"] = text.state["logit_scale"].exp() * image @ projected.T
    return Encoded(tensors, tuple(notes))


def read_tokens(path: str | os.PathLike[str]) -> Tensor:
    """Token ids (B, L) int64 from a .npy file of any whole numbers. Raises InputError for anything else."""
    array = _read_array(Path(path))
    if array.dtype.kind not in "iu" or array.ndim != 2 or not array.size:
        raise InputError(
            f"{Path(path).name} holds {_kind(array)}; save token ids as whole numbers of shape (captions, tokens), "
            "at least one of each"
        )
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))


def read_pixels(path: str | os.PathLike[str]) -> Tensor:
    """Normalised pixels (P, 3, S, S) float32 from a .npy file of floating point numbers.

    Raises InputError for anything else.
    """
    array = _read_array(Path(path))
    if array.dtype.kind != "f" or array.ndim != 4 or array.shape[1] != 3 or not array.size:
        raise InputError(
            f"{Path(path).name} holds {_kind(array)}; save normalised pixels as floating point of shape "
            "(pictures, 3, height, width), at least one picture"
        )
    with np.errstate(over="ignore"):  # beyond fp32 becomes infinity, which `encode` refuses
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _read_array(path: Path) -> np.ndarray:
    """The one array of a .npy file; numpy is not allowed to unpickle anything."""
    name = path.name
    try:
        with path.open("rb") as file:
            start = file.read(6)
            file.seek(0)
            if start == b"\x93NUMPY":
                return np.load(file, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # numpy raises ValueError, EOFError, MemoryError, tokenize.TokenError and more
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{name} is damaged, or holds Python objects, which are not read ({reason}); save plain numbers with "
            "numpy.save"
        ) from error
    found = "a zip archive such as .npz" if start[:4] == b"PK\x03\x04" else "not a .npy file"
    raise InputError(f"{name} is {found}; save one array with numpy.save")


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} of shape {array.shape}"


def _unfit(text: TowerFile | None, vision: TowerFile | None, ids: Tensor | None, pixels: Tensor | None) -> list[str]:
    """Every reason not to encode, as the rest of a sentence that begins with the file's name."""
    problems = []
    if ids is None and pixels is None:
        problems.append("nothing to encode; give tokens, pixels or both")
    if ids is not None and text is None:
        problems.append("tokens are given and there is no text encoder; give a file that holds one, or no tokens")
    if pixels is not None and vision is None:
        problems.append("pixels are given and there is no vision tower; give a file that holds one, or no pixels")
    if ids is not None and text is not None:
        problems += _unfit_tokens(ids, text.config.context_length, text.config.vocab_size)
    if pixels is not None and vision is not None:
        problems += _unfit_pixels(pixels, vision.config.image_size)
    return problems


def _unfit_tokens(ids: Tensor, context: int, vocabulary: int) -> list[str]:
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not whole or ids.dim() != 2 or not ids.numel():
        return [
            f"tokens are {ids.dtype} of shape {list(ids.shape)}; give whole numbers of shape (captions, tokens), "
            "at least one of each"
        ]
    problems = []
    low, high = (int(end) for end in ids.long().aminmax())
    if low < 0 or high >= vocabulary:
        problems.append(
            f"token ids from {low} to {high} do not lie in its vocabulary 0..{vocabulary - 1}; use its own tokenizer"
        )
    if ids.shape[1] > context:
        problems.append(f"captions of {ids.shape[1]} tokens are longer than its context of {context}; cut them")
    return problems


def _unfit_pixels(pixels: Tensor, size: int) -> list[str]:
    wanted = f"(pictures, 3, {size}, {size})"
    floating = pixels.is_floating_point()
    problems = []
    if not floating or pixels.dim() != 4 or tuple(pixels.shape[1:]) != (3, size, size) or not len(pixels):
        problems.append(
            f"pixels are {pixels.dtype} of shape {list(pixels.shape)}; give normalised floating point of shape {wanted}"
        )
    if floating and (broken := (~pixels.float().isfinite()).sum().item()):
        problems.append(f"{broken} pixels are NaN or infinity; make the array again")
    return problems


def _encode_text(text: TowerFile, ids: Tensor, notes: list[str]) -> dict[str, Tensor]:
    """The read points; notes are added to."""
    config = text.config
    state = {name: tensor for name, tensor in text.state.items() if name != "logit_scale"}
    projected = "text_projection" in state
    if not projected:  # the tower cannot be without one; what comes out of it is dropped
        state["text_projection"] = torch.zeros(config.width, config.embed_dim)
    tower = _build(TextTower, config, state)
    points = _in_chunks(lambda chunk: vars(tower(chunk)), ids, _rows(ids.shape[1], config.mlp_width))
    if not projected:
        del points["projected"]
        notes.append(f"projected is left out: {text.source.path} has no text_projection that can be used")
    if rule := _disputed(ids, config):
        notes.append(rule)
    return points


def _disputed(ids: Tensor, config: TextConfig) -> str | None:
    """A sentence for captions whose end-of-text is elsewhere for transformers than for OpenAI and OpenCLIP."""
    end = min(END_ID, config.vocab_size - 1) if config.end_of_text is None else config.end_of_text
    differ = (end_of_text(ids, end) != end_of_text(ids)).sum().item()
    if not differ:
        return None
    taken = "the largest id, as OpenCLIP does" if config.end_of_text is None else f"the first {end}, as its config says"
    return (
        f"in {differ} of {len(ids)} captions the largest id is not the first end-of-text ({end}), so libraries differ; "
        f"pooled is read at {taken}"
    )


def _no_logits(text: TowerFile, vision: TowerFile, tensors: dict[str, Tensor]) -> str | None:
    """Why there are no logits; None if there are."""
    if "projected" not in tensors:
        return "they need projected"
    if "logit_scale" not in text.state:
        return f"{text.source.path} has no logit_scale that can be used"
    if any(name.rpartition(".")[2] == "logit_bias" for name in text.source.unexpected):
        return f"{text.source.path} has a logit_bias, which is not read"
    ours, theirs = tensors["projected"].shape[1], tensors["image"].shape[1]
    if ours != theirs:
        return f"text has {ours} dimensions and pictures have {theirs}: {text.source.path} and {vision.source.path}"
    return None


def _build(kind: type[Tower], config: object, state: dict[str, Tensor]) -> Tower:
    """A tower on the file's own memory: nothing is changed, and a second copy of bigG takes 7 GB."""
    with torch.device("meta"):
        tower = kind(config)
    tower.load_state_dict(state, assign=True)
    return tower.eval()


def _rows(length: int, mlp_width: int) -> int:
    """How many sequences to pass through a tower at once."""
    return max(1, CHUNK_BYTES // (4 * length * mlp_width))


def _in_chunks(run: Callable[[Tensor], dict[str, Tensor]], batch: Tensor, rows: int) -> dict[str, Tensor]:
    """The results of all chunks of a batch, each written to its place at once."""
    whole: dict[str, Tensor] = {}
    for start in range(0, len(batch), rows):
        for name, part in run(batch[start : start + rows]).items():
            if name not in whole:
                whole[name] = part.new_empty(len(batch), *part.shape[1:])
            whole[name][start : start + len(part)] = part
    return whole
