"""Between a broken text encoder and its repair, past it, and back to the original: any point of that triangle.

A repair need not be taken whole. Along the line from one set of weights to the other lie encoders that have most of the
repair's gain and are nearer to what the diffusion model was trained with (WiSE-FT: Wortsman et al. 2022, arXiv
2109.01903, there for a fine-tune and its start).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .errors import InputError, some
from .features import state_key
from .geometric import is_mlp
from .layouts import Source, TowerFile
from .layouts.canonical import LENT, block_name, expected, sizes_of

ALONG = ("weights", "r_and_theta", "r", "theta")
STRONGEST = 1.2
_SIZES = {
    "layers": "layers",
    "width": "width",
    "mlp": "MLP width",
    "context": "context length",
    "vocab": "vocabulary",
    "embed": "projection to",
}
_PARALLEL = 1e-12  # rows of unit length that differ by less, in fp64, have one direction
State = Mapping[str, Tensor]


def blend(
    broken: State,
    repaired: State,
    strength: float,
    along: str = "weights",
    original: State | None = None,
    toward_original: float = 0.0,
) -> dict[str, Tensor]:
    """A text encoder `strength` of the way from broken to repaired, then `toward_original` of the way to the original.

    The states are canonical and plain; so is the result, in fp32 and computed in fp64. Tensors that are alike are
    passed on bit for bit, in the same memory. 0 is the start of a way and 1 its end, bit for bit too. A strength above
    1, up to `STRONGEST`, goes on in the same direction. text_projection and logit_scale, which files may lack, are
    taken from the state that has them.

    along: what moves.
    `weights`: every weight in a straight line.
    `r_and_theta`: of the MLPs' weights, each row's length in a straight line and its direction on the great circle, see
    `turned`; everything else in a straight line.
    `r`, `theta`: as that, with only the rows' length or only their direction; strength 1 is then not the repaired one.
    Raises InputError for states of different architecture, an unknown `along`, and numbers out of range.
    """
    if problems := _problems(broken, repaired, strength, along, original, toward_original):
        raise InputError("; ".join(problems))
    result = {}
    for name in dict.fromkeys((*broken, *repaired, *(original or {}))):
        tensor = _between(name, broken.get(name), repaired.get(name), strength, along)
        if original is not None:
            tensor = _between(name, tensor, original.get(name), toward_original, along)
        if tensor is not None:
            result[name] = tensor.float()
    return result


def _between(name: str, start: Tensor | None, end: Tensor | None, share: float, along: str) -> Tensor | None:
    """One tensor of the way from start to end, in fp64 where it is neither of them."""
    by_rows = along != "weights" and is_mlp(name.removesuffix(".weight")) and name.endswith(".weight")
    if share == 0 or (share == 1 and not (by_rows and along in ("r", "theta"))):
        return start if share == 0 else end
    if start is None or end is None:
        return end if start is None else start
    here, there = start.double(), end.double()
    if torch.equal(here, there):
        return start
    if by_rows:
        return _rows_between(here, there, share, along)
    return here + share * (there - here)


def _rows_between(here: Tensor, there: Tensor, share: float, along: str) -> Tensor:
    """A weight (out, in) whose rows' lengths, directions or both are `share` of the way from here to there, in fp64.

    A length does not fall below 0. A row of zeros has no direction and takes the other one's.
    """
    lengths, end_lengths = (torch.linalg.vector_norm(each, dim=1, keepdim=True) for each in (here, there))
    rows, end_rows = here / lengths, there / end_lengths
    rows, end_rows = torch.where(lengths > 0, rows, end_rows), torch.where(end_lengths > 0, end_rows, rows)
    r = lengths + share * (end_lengths - lengths) if along != "theta" else lengths
    theta = turned(rows, end_rows, share) if along != "r" else rows
    return torch.where(r > 0, r * theta, 0.0)


def turned(rows: Tensor, others: Tensor, share: float) -> Tensor:
    """Unit rows turned `share` of the angle to other unit rows: spherical interpolation (Shoemake 1985). (N, D) fp64

    sin((1 - share) ω) / sin ω · row + sin(share ω) / sin ω · other, written as
    cos(share ω) · row + sin(share ω) · across, with `across` the unit vector at right angles to the row that points to
    the other one: the same points, also beyond 1, without a division by sin ω where rows are nearly parallel or
    opposite. Parallel rows stay. Opposite rows have no shortest way: they turn through the axis along which the row is
    smallest.
    """
    angles = 2 * torch.atan2(  # Kahan's formula, exact for small angles and for those near π
        torch.linalg.vector_norm(rows - others, dim=1, keepdim=True),
        torch.linalg.vector_norm(rows + others, dim=1, keepdim=True),
    )
    across = others - rows * (rows * others).sum(dim=1, keepdim=True)
    lost = torch.linalg.vector_norm(across, dim=1, keepdim=True) < _PARALLEL
    axes = torch.nn.functional.one_hot(rows.abs().argmin(dim=1), rows.shape[1]).to(rows.dtype)
    across = torch.where(lost, axes, across)
    across = across - rows * (rows * across).sum(dim=1, keepdim=True)
    across = across / torch.linalg.vector_norm(across, dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return torch.cos(share * angles) * rows + torch.sin(share * angles) * across


def _problems(
    broken: State, repaired: State, strength: float, along: str, original: State | None, toward_original: float
) -> list[str]:
    """Everything that keeps the states from being blended."""
    problems = []
    if along not in ALONG:
        problems.append(f"along {along!r} is not one of {', '.join(ALONG)}")
    if not 0 <= strength <= STRONGEST:
        problems.append(f"strength {strength} is not within 0 and {STRONGEST}")
    if not 0 <= toward_original <= 1:
        problems.append(f"toward_original {toward_original} is not within 0 and 1")
    if toward_original and original is None:
        problems.append(f"toward_original {toward_original} needs the original; give it, or set 0")
    for end, which in ((repaired, "repaired"), (original, "original")):
        if end is not None and (difference := _difference(broken, end)):
            problems.append(
                f"the broken and the {which} text encoder have different shapes ({difference}); "
                "give encoders of one architecture"
            )
    return problems


def _difference(one: State, other: State) -> str | None:
    """In what the architectures of two states differ, the first one's size first; None if they do not."""
    sizes = [_sizes(state) for state in (one, other)]
    words = [
        f"{word} {sizes[0][size]} against {sizes[1][size]}"
        for size, word in _SIZES.items()
        if size in sizes[0] and size in sizes[1] and sizes[0][size] != sizes[1][size]
    ]
    if not words:
        names = (one.keys() ^ other.keys()) - set(LENT)
        words = [f"only one has {some(names)}"] if names else []
        words += [
            f"{name} is {list(tensor.shape)} against {list(other[name].shape)}"
            for name, tensor in one.items()
            if name in other and tensor.shape != other[name].shape
        ][:3]
    return ", ".join(words) or None


def _sizes(state: State) -> dict[str, int]:
    blocks = {inside[1] for name in state if (inside := block_name(name))}
    found, _ = sizes_of("text", expected("text", blocks), {name: tuple(t.shape) for name, t in state.items()})
    return {"layers": len(blocks)} | found


def blend_encoders(
    broken: TowerFile,
    repaired: TowerFile,
    strength: float,
    along: str = "weights",
    original: TowerFile | None = None,
    toward_original: float = 0.0,
) -> TowerFile:
    """`blend` of encoders as they were read; what was blended goes with it as `gmp_blend`, and into files made of it.

    Raises InputError as `blend` does, and where heads or activation differ, which no tensor shows.
    """
    for end in (repaired, original):
        if end is None or _difference(broken.state, end.state):  # `blend` tells sizes, which are the plainer reason
            continue
        if words := _unlike(broken, end):
            raise InputError(
                f"{broken.source.path} and {end.source.path} do not belong together: {words}; "
                "set what was assumed when they were read, or give encoders of one architecture"
            )
    state = blend(broken.state, repaired.state, strength, along, original and original.state, toward_original)
    corners = [repaired, broken, *([original] if original else [])]
    config = next((file.config for file in corners if "text_projection" in file.state), repaired.config)
    source = _source(broken, repaired, strength, along, original, toward_original, state)
    return TowerFile(state, config, source)


def _unlike(one: TowerFile, other: TowerFile) -> str:
    pairs = {name: (getattr(one.config, name), getattr(other.config, name)) for name in ("heads", "activation")}
    return ", ".join(f"{name} {mine} against {theirs}" for name, (mine, theirs) in pairs.items() if mine != theirs)


def _source(
    broken: TowerFile,
    repaired: TowerFile,
    strength: float,
    along: str,
    original: TowerFile | None,
    toward_original: float,
    state: State,
) -> Source:
    corners = {"broken": broken, "repaired": repaired} | ({"original": original} if toward_original else {})
    made = {
        "along": along,
        "strength": strength,
        "toward_original": toward_original,
        "of": {role: {"file": file.source.path, "sha256": file.source.sha256} for role, file in corners.items()},
    }
    words = f"{broken.source.path} → {repaired.source.path} at strength {strength:g} along {along}"
    if toward_original:
        words += f", then {toward_original:g} of the way to {original.source.path}"
    return replace(
        repaired.source,
        path=f"blend of {broken.source.path} and {repaired.source.path}",
        sha256=state_key(dict(state)),
        member=repaired.source.member or broken.source.member,
        missing=tuple(dict.fromkeys(name for name in (*LENT, *repaired.source.missing) if name not in state)),
        notes=(*repaired.source.notes, words),
        metadata=broken.source.metadata | repaired.source.metadata | {"gmp_blend": json.dumps(made)},
    )
