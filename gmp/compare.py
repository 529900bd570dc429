"""How far a CLIP has moved from another one, in its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gradients import layer_and_role


@torch.no_grad()
def moved(model: nn.Module, start: Mapping[str, Tensor]) -> dict[str, float]:
    """‖now - start‖ / ‖start‖ of what is trained, by layer and role; theta as rows of unit length.

    start: canonical plain weights (`transformer.resblocks.0.mlp.c_fc.weight`), also where the model has r and theta.
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
    elif (then := start.get(f"{stem}.weight")) is not None:
        then = then.to(now.device).float()
        lengths = torch.linalg.vector_norm(then, dim=1, keepdim=True)
        now, then = (now, lengths) if leaf == "r" else (F.normalize(now, dim=1), F.normalize(then, dim=1))
    if then is not None:
        yield now, then.to(now.device).float().reshape(now.shape)
