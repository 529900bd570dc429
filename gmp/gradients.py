"""Gradient norms per layer and role, read after unscaling and before clipping."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

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


def layer_and_role(name: str) -> str:
    """`text.3.theta`, `vision.11.attention`, `text.embedding`: the unit in which gradients are watched."""
    block = _BLOCK.match(name)
    tower = "vision" if name.startswith("visual.") else "text"
    return f"{tower}.{block[2]}.{role(name)}" if block else f"{tower}.{role(name)}"


@dataclass(frozen=True)
class GradientNorms:
    total: float
    layers: dict[str, float]  # by `layer_and_role`

    @property
    def finite(self) -> bool:
        return torch.isfinite(torch.tensor(self.total)).item()


def gradient_norms(names: Sequence[str], parameters: Sequence[nn.Parameter]) -> GradientNorms:
    """L2 norms of all gradients, with one copy to the host however many tensors there are."""
    found = [(name, p.grad) for name, p in zip(names, parameters, strict=True) if p.grad is not None]
    squares = torch.stack(torch._foreach_norm([grad for _, grad in found])).float().square()
    sums: dict[str, float] = {}
    for (name, _), square in zip(found, squares.tolist(), strict=True):
        key = layer_and_role(name)
        sums[key] = sums.get(key, 0.0) + square
    return GradientNorms(sum(sums.values()) ** 0.5, {key: value**0.5 for key, value in sums.items()})


def clip_gradients(parameters: Sequence[nn.Parameter], total: float, most: float) -> None:
    """Scales all gradients so that their common norm, which is `total`, is `most` at the most."""
    if most and total > most:
        grads: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(grads, most / total)
