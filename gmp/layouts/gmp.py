"""Geometric parametrisation on disk: `X.r` (out, 1) and `X.theta` (out, in) in place of `X.weight`.

Everything else is as in OpenAI's layout. Any Linear may be stored so, not only those of the MLPs.
"""

from __future__ import annotations

from collections.abc import Callable


def in_radius_and_direction(names: dict[str, tuple], present: Callable[[str], bool]) -> dict[str, tuple]:
    """Expected tensors and shapes, with r and theta in place of the weights that are stored so."""
    result = {}
    for name, shape in names.items():
        stem = name.removesuffix(".weight")
        if stem != name and (present(f"{stem}.r") or present(f"{stem}.theta")):
            result |= {f"{stem}.theta": shape, f"{stem}.r": (shape[0], 1)}
        else:
            result[name] = shape
    return result
