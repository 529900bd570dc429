"""Gradient norms per layer and role, read after unscaling and before clipping; and clipping."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

LEAST_NORM = 1e-3  # that a row counts as, so that rows which are zero can move (arXiv 2102.06171, section 4)

_ROLES = (
    ("attn.", "attention"),
    ("ln_", "layer_norm"),
    ("mlp", "mlp"),  # also of the gates behind a vision tower's blocks
    ("embedding", "embedding"),
    ("register_tokens", "embedding"),
)
_BLOCK = re.compile(r"^(visual\.)?transformer\.resblocks\.(\d+)\.(.+)$")


def role(name: str) -> str:
    """What a parameter is: `r`, `theta`, `attention`, `layer_norm`, `mlp`, `embedding`, `projection`, `logit_scale`."""
    if name.endswith((".r", ".theta")):
        return name.rpartition(".")[2]
    for part, kind in _ROLES:
        if part in name:
            return kind
    return "logit_scale" if name == "logit_scale" else "embedding" if "conv1" in name else "projection"


@functools.cache
def layer_and_role(name: str) -> str:
    """`text.3.theta`, `vision.11.attention`, `text.embedding`: the unit in which gradients are watched."""
    block = _BLOCK.match(name)
    tower = "vision" if name.startswith("visual.") else "text"
    return f"{tower}.{block[2]}.{role(name)}" if block else f"{tower}.{role(name)}"


def squares(tensors: Sequence[Tensor]) -> Tensor:
    """Squared L2 norms in fp32, on the device, in a few kernels however many tensors there are. -> (tensors,)"""
    return torch.stack(torch._foreach_norm(list(tensors))).float().square()


def norms_by_layer(names: Sequence[str], squared: Sequence[float]) -> dict[str, float]:
    """L2 norms by `layer_and_role` from the squared norms of parameters."""
    sums: dict[str, float] = {}
    for name, square in zip(names, squared, strict=True):
        key = layer_and_role(name)
        sums[key] = sums.get(key, 0.0) + square
    return {key: math.sqrt(value) if value >= 0 else value for key, value in sums.items()}


def share_of_non_finite(grads: Sequence[Tensor], total: Callable[[Tensor], Tensor] = lambda counts: counts) -> float:
    """Share of elements that are NaN or infinite, with one copy to the host.

    total: from counts of these gradients, (2, tensors), those of all processes that have parts of them.
    """
    bad = torch.stack([(~grad.isfinite()).sum() for grad in grads])
    found, elements = total(torch.stack([bad, bad.new_tensor([grad.numel() for grad in grads])])).sum(dim=1).tolist()
    return found / elements


def clip_gradients(parameters: Sequence[nn.Parameter], total: float, most: float) -> None:
    """Scales all gradients so that their common norm, which is `total`, is `most` at the most."""
    if most and total > most:
        grads: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(grads, most / total)


@torch.no_grad()
def clip_rows(
    names: Sequence[str],
    parameters: Sequence[nn.Parameter],
    most: float,
    total: Callable[[Sequence[str], Tensor], Tensor] = lambda names, values: values,
) -> None:
    """Scales each row's gradient so that its norm is `most` times that of the row at the most, in place.

    Adaptive gradient clipping, ‖G_i‖ ≤ λ · max(‖W_i‖, 1e-3) (Brock et al. 2021, arXiv 2102.06171). A row is all that
    lies under one index of the first dimension, of a theta the direction of one output; a vector or a number is one
    row, as in the paper's code (`unitwise_norm`). Waits for nothing.

    total: from figures that add up over elements, (2, names), those of all processes that have rows of these vectors.
    """
    if not most:
        return
    known = {name: p for name, p in zip(names, parameters, strict=True) if p.grad is not None}
    flat = [name for name, p in known.items() if p.ndim < 2]
    if flat:
        each = [squares([known[name] for name in flat]), squares([known[name].grad for name in flat])]
        weight, grad = total(flat, torch.stack(each)).sqrt()
        for name, factor in zip(flat, _shrinks(grad, weight, most).unbind(), strict=True):
            known[name].grad.mul_(factor)
    for name in known.keys() - set(flat):
        parameter = known[name]
        shape = (-1, *[1] * (parameter.ndim - 1))
        grad, weight = (torch.linalg.vector_norm(one.flatten(1), dim=1) for one in (parameter.grad, parameter))
        parameter.grad.mul_(_shrinks(grad, weight, most).view(shape))


def _shrinks(grad: Tensor, weight: Tensor, most: float) -> Tensor:
    """Factors on gradients, from their norms and those of what they are of."""
    return (most * weight.clamp_min(LEAST_NORM) / grad.clamp_min(torch.finfo(grad.dtype).tiny)).clamp_max(1)
