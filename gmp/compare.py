"""How far text encoders lie from another one: in their weights, block by block, and in which prompts are neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError
from .gradients import layer_and_role
from .join import unlike
from .layouts import TowerFile
from .layouts.canonical import BLOCK, STACK, block_name
from .layouts.gmp import weight_of

ROWS = 4096  # rows of a matrix that are taken in double precision at once
BINS = 80  # of theta's histogram
REACH = 4.0  # where theta's histogram ends, in root mean squares of a row
# Parts of a tower that are told apart although `layer_and_role` calls them the same.
PARTS = {
    "attn.in_proj": "in",
    "attn.out_proj": "out",
    "mlp.c_fc": "in",
    "mlp.c_proj": "out",
    "token_embedding": "token",
    "positional_embedding": "position",
}
# A matrix whose columns, not rows, belong to one output each: pooled @ text_projection.
COLUMNS = ("text_projection",)


@dataclass(frozen=True)
class WeightDrift:
    """How far one part of a text tower has moved, over its matrix and its bias.

    A row is what one output is computed with, its length r and its direction theta; a LayerNorm's weight is one row.
    """

    layer: str  # as `layer_and_role` and `PARTS` name it: `text.3.mlp.in`, `text.embedding.token`, `text.layer_norm`
    block: int | None  # None outside of blocks
    role: str  # the layer's name without tower and block: `mlp.in`
    change: float  # ‖now - then‖ / ‖then‖
    norm: float  # ‖now‖ / ‖then‖
    r: float  # Σ |r now - r then| / Σ r then over rows; 0.1 where all grew by a tenth
    angle: float  # degrees between a row's direction now and then, mean over rows
    cosine_distance: float  # 1 - cos of that angle, mean over rows


@dataclass(frozen=True)
class Geometry:
    """r and theta of one matrix, as a GmP repair would start from."""

    layer: str
    block: int | None
    role: str
    r: Tensor  # (rows,) fp32
    theta: Tensor  # (BINS,) shares of theta's values, times √columns, in equal bins from -REACH to REACH


@dataclass(frozen=True)
class Neighbour:
    """A prompt, and the other one that lies nearest to it in one text tower (before) and in another (after)."""

    prompt: str
    before: str
    after: str
    before_cosine: float  # to `before`, in the tower before
    after_cosine: float  # to `after`, in the tower after
    rank_of_before: int  # of `before` among the neighbours after; 1 is the nearest
    rank_of_after: int  # of `after` among the neighbours before


# ---- while a repair trains ------------------------------------------------------------------------------------------


@torch.no_grad()
def moved(model: nn.Module, start: Mapping[str, Tensor]) -> dict[str, float]:
    """‖now - start‖ / ‖start‖ of what is trained, by layer and role; theta as rows of unit length.

    start: canonical plain weights (`transformer.resblocks.0.mlp.c_fc.weight`), also where the model has r and theta.
    A projection's rows are those of theta, which are its columns.
    """
    sums: dict[str, tuple[float, float]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        for now, then in _pairs(name, parameter.float(), start):
            change, length = sums.get(layer_and_role(name), (0.0, 0.0))
            values = torch.stack([(now - then).square().sum(), then.square().sum()]).tolist()
            sums[layer_and_role(name)] = change + values[0], length + values[1]
    return {key: math.sqrt(change / length) for key, (change, length) in sums.items() if length > 0}


def _pairs(name: str, now: Tensor, start: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    stem, _, leaf = name.rpartition(".")
    if leaf not in ("r", "theta"):
        then = start.get(name)
    elif (then := start.get(weight_of(stem)[0])) is not None:
        then = then.to(now.device).float()
        then = then.T if weight_of(stem)[1] else then
        lengths = torch.linalg.vector_norm(then, dim=1, keepdim=True)
        now, then = (now, lengths) if leaf == "r" else (F.normalize(now, dim=1), F.normalize(then, dim=1))
    if then is not None:
        yield now, then.to(now.device).float().reshape(now.shape)


# ---- weights --------------------------------------------------------------------------------------------------------


def check_alike(original: TowerFile, others: Sequence[TowerFile]) -> None:
    """Raises InputError for text towers of another shape than the original's, naming files and sizes.

    A file that ends before its last block, as SD2's clip_h does, is compared in the blocks that it has.
    """
    for other in others:
        ours, theirs = original.config, other.config
        why = unlike(other, original)
        if why is None and theirs.mlp_width != ours.mlp_width:
            names = f"{other.source.path} and the text tower of {original.source.path}"
            why = f"{names} differ: MLP width {theirs.mlp_width} against {ours.mlp_width}"
        if why is None and not _ends_early(original, other):
            names = f"{other.source.path} and the text tower of {original.source.path}"
            why = f"{names} differ: {theirs.layers} blocks against {ours.layers}"
        if why is not None:
            raise InputError(f"{why}; compare text encoders of one family, such as two clip_l")


def _ends_early(one: TowerFile, other: TowerFile) -> bool:
    """Whether two towers have the same blocks but for a last one that a file lacks."""
    shorter, longer = sorted((one, other), key=lambda file: file.config.layers)
    missing = longer.config.layers - shorter.config.layers
    return missing == 0 or (missing == 1 and f"{STACK['text']}.{shorter.config.layers}" in shorter.source.missing)


def layer_of(name: str) -> tuple[str, int | None, str]:
    """layer, block and role of a canonical tensor of a text tower, as `WeightDrift` has them."""
    part = next((end for start, end in PARTS.items() if start in name), None)
    layer = layer_and_role(name) + (f".{part}" if part else "")
    block = block_name(name)
    return layer, block[1] if block else None, layer.split(".", 2 if block else 1)[-1]


@torch.no_grad()
def weight_drift(state: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> tuple[WeightDrift, ...]:
    """How far a text tower's weights lie from the original's, by layer, in the order of computation.

    Both canonical and plain, as `TowerFile.state`. What only one of the two has is left out, and so are the logit scale
    and rows of length 0, which have no direction. Everything is summed in double precision, and angles come from the
    distance of unit rows: the arccos of a cosine does not see what is below a hundredth of a degree.
    Raises InputError for tensors of different shapes.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    places: dict[str, tuple[int | None, str]] = {}
    for name in sorted(original.keys() & state.keys() - {"logit_scale"}, key=_place):
        now, then = state[name], original[name]
        if now.shape != then.shape:
            raise InputError(f"{name} is {list(now.shape)} against {list(then.shape)}; compare towers of one shape")
        layer, block, role = layer_of(name)
        places[layer] = block, role
        polar = now.dim() == 2 or name.endswith("weight")  # a bias has no rows
        sums.setdefault(layer, torch.zeros(3, dtype=torch.float64))
        for apart, a, b in _lengths(name, now, then):
            sums[layer] += torch.stack([apart.square().sum(), a.square().sum(), b.square().sum()])
            if polar:
                rows[layer] = rows.get(layer, 0) + _polar(apart, a, b)
    return tuple(
        _drift(layer, *places[layer], sums[layer].tolist(), rows[layer].tolist()) for layer in places if layer in rows
    )


def _place(name: str) -> tuple[int, ...]:
    """Order of computation: embeddings, blocks, last LayerNorm, projection; within a block as `BLOCK` has it."""
    if block := block_name(name):
        return (1, block[1], list(BLOCK).index(block[2]))
    names = ("token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias", "text_projection")
    return (0 if "embedding" in name else 2, names.index(name) if name in names else len(names))


def _lengths(name: str, now: Tensor, then: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """‖now - then‖, ‖now‖ and ‖then‖ of rows, in double precision, a few rows at a time: a token table is large."""
    if name in COLUMNS:
        now, then = now.T, then.T
    now, then = (each.reshape(-1, each.shape[-1]) if each.dim() else each.reshape(1, 1) for each in (now, then))
    for a, b in zip(now.split(ROWS), then.split(ROWS), strict=True):
        yield tuple(torch.linalg.vector_norm(each, dim=1, dtype=torch.float64) for each in (a.double() - b, a, b))


def _polar(apart: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """Σ |change of r|, Σ r then, Σ angle in degrees, Σ (1 - cos), rows that have an angle; from `_lengths`. -> (5,)

    By the law of cosines, the squared distance of the two unit rows is (‖a - b‖² - (‖a‖ - ‖b‖)²) / (‖a‖ ‖b‖).
    """
    both = (now > 0) & (then > 0)
    a, b = now[both], then[both]
    squared = ((apart[both].square() - (a - b).square()) / (a * b)).clamp(0, 4)
    angles = torch.rad2deg(2 * torch.atan2(squared.sqrt(), (4 - squared).sqrt()))
    sums = ((now - then).abs().sum(), then.sum(), angles.sum(), squared.sum() / 2)
    return torch.stack([*sums, both.double().sum()])


def _drift(layer: str, block: int | None, role: str, sums: list[float], rows: list[float]) -> WeightDrift:
    def root(part: float, whole: float) -> float:
        return math.sqrt(part / whole) if whole else (math.inf if part else 0.0)

    change, now, then = sums
    r, length, angle, distance, count = rows
    norm = root(now, then) if then or now else 1.0
    count = count or 1.0
    ratio = r / length if length else (math.inf if r else 0.0)
    return WeightDrift(layer, block, role, root(change, then), norm, ratio, angle / count, distance / count)


@torch.no_grad()
def geometry(state: Mapping[str, Tensor]) -> tuple[Geometry, ...]:
    """r and theta of every matrix in a text tower's blocks, in the order of computation.

    theta's values are told in root mean squares of a row, so that matrices of any width can be laid on one another:
    those of random weights then follow the standard normal distribution.
    """
    found = []
    for name in sorted((name for name in state if block_name(name) and state[name].dim() == 2), key=_place):
        matrix = state[name].float()
        r = torch.linalg.vector_norm(matrix, dim=1)
        theta = matrix[r > 0] / r[r > 0, None] * math.sqrt(matrix.shape[1])
        counts = torch.histc(theta.clamp(-REACH, REACH), BINS, -REACH, REACH)
        found.append(Geometry(*layer_of(name), r.clone(), counts / counts.sum().clamp_min(1)))
    return tuple(found)


# ---- prompts --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def neighbours(before: Tensor, after: Tensor, prompts: Sequence[str], k: int = 12) -> tuple[Neighbour, ...]:
    """The prompts whose nearest other prompt changed the most, at most k of them, those that changed most first.

    before, after: vectors of the same prompts in two text towers, (N, D) and (N, E). How much is told by ranks, not
    cosines, whose range differs from tower to tower: how far down the old neighbour is now, plus how far down the
    present one was.
    """
    if len(prompts) < 2:
        return ()
    cosines = [_cosines(each) for each in (before, after)]
    nearest = [each.argmax(dim=1) for each in cosines]
    rows = torch.arange(len(prompts))
    fallen, risen = (
        1 + (each > each[rows, other][:, None]).sum(dim=1)
        for each, other in ((cosines[1], nearest[0]), (cosines[0], nearest[1]))
    )
    changed = (nearest[0] != nearest[1]).nonzero().flatten()
    order = changed[(fallen + risen)[changed].argsort(descending=True, stable=True)][:k]
    return tuple(
        Neighbour(
            prompt=prompts[i],
            before=prompts[nearest[0][i]],
            after=prompts[nearest[1][i]],
            before_cosine=cosines[0][i, nearest[0][i]].item(),
            after_cosine=cosines[1][i, nearest[1][i]].item(),
            rank_of_before=int(fallen[i]),
            rank_of_after=int(risen[i]),
        )
        for i in order.tolist()
    )


def similarity(vectors: Tensor) -> Tensor:
    """Cosines of all pairs: (N, D) -> (N, N) in fp32"""
    return _cosines(vectors).fill_diagonal_(1.0).float()


def _cosines(vectors: Tensor) -> Tensor:
    """(N, N) with -inf on the diagonal: nothing is its own neighbour."""
    unit = F.normalize(vectors.double(), dim=1)
    return (unit @ unit.T).fill_diagonal_(-math.inf)
