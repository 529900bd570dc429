"""Geometric parametrisation on disk: `X.r` (out, 1) and `X.theta` (out, in) in place of `X.weight`.

A matrix that is a tensor by itself, `attn.in_proj_weight`, `text_projection` or `visual.proj`, keeps its name as X. The
projections are used as x @ P: a row of theta is a column of P. Everything else is as in OpenAI's layout. Any Linear may
be stored so, not only those of the MLPs.
"""

from __future__ import annotations

from collections.abc import Callable

# The last is what a vision tower by itself calls its own.
PROJECTIONS = ("text_projection", "visual.proj", "proj")
_ROWS = "attn.in_proj_weight"


def stem_of(name: str) -> str | None:
    """X of the r and theta that may stand in place of a canonical tensor; None for what is no matrix of a layer."""
    if name in PROJECTIONS or name.endswith(_ROWS):
        return name
    return name.removesuffix(".weight") if name.endswith(".weight") else None


def weight_of(stem: str) -> tuple[str, bool]:
    """The canonical tensor that X's r and theta stand for, and whether theta's rows are its columns."""
    if stem in PROJECTIONS:
        return stem, True
    return (stem if stem.endswith(_ROWS) else f"{stem}.weight"), False


def in_radius_and_direction(names: dict[str, tuple], present: Callable[[str], bool]) -> dict[str, tuple]:
    """Expected tensors and shapes, with r and theta in place of the weights that are stored so."""
    result = {}
    for name, shape in names.items():
        stem = stem_of(name)
        if stem is not None and (present(f"{stem}.r") or present(f"{stem}.theta")):
            rows = shape[::-1] if name in PROJECTIONS else shape
            result |= {f"{stem}.theta": rows, f"{stem}.r": (rows[0], 1)}
        else:
            result[name] = shape
    return result
