"""Gradient norms per layer and role, read after unscaling and before clipping."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

_BLOCK = re.compile(r"^(visual\.)?transformer\.resblocks\.(\d+)\.(.+)$")


def role(name: str) -> str:
    """What a parameter is: `r`, `theta`, `attention`, `layer_norm`, `mlp`, `embedding`, `projection`, `logit_scale`."""
    if name.endswith((".r", ".theta")):
        return name.rpartition(".")[2]
    for part, kind in (("attn.", "attention"), ("ln_", "layer_norm"), ("mlp.", "mlp"), ("embedding", "embedding")):
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
