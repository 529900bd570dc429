"""Parameter groups and learning-rate schedules.

A group's rate is `initial_lr × schedule(step)`, so that rates per group survive any schedule. (A scheduler that is
given one maximum for all groups, as `OneCycleLR(max_lr=x)` is, overwrites them.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

SCHEDULES = ("cosine", "constant", "linear")


def schedule(name: str, step: int, total: int, warmup: int) -> float:
    """Factor in 0..1 for optimizer step `step` of `total`, counted from 0.

    All rise linearly over `warmup` steps; then `cosine` and `linear` fall and end just above 0 on the last step.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r} is not one of {SCHEDULES}")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    if name == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1 - progress if name == "linear" else 1.0


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for weight matrices: not for radii, biases, LayerNorms, embeddings or the temperature."""
    return parameter.ndim >= 2 and not name.endswith(".r") and "embedding" not in name


def parameter_groups(
    model: nn.Module, lr: float, rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, object]]:
    """Trainable parameters as AdamW groups, one per rate and decay.

    `rates` maps a shell pattern over parameter names to a factor on `lr`; the last pattern that matches wins. A factor
    of 0 freezes: those parameters are set to not require gradients and appear in no group.

    Raises ValueError when a pattern matches no parameter that is trained.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    idle = [pattern for pattern in rates if not any(fnmatchcase(name, pattern) for name in trained)]
    if idle:
        raise ValueError(f"rate patterns match no parameter that is trained: {idle}; such are {trained[:3]}")
    groups: dict[tuple[float, bool], dict[str, object]] = {}
    for name, parameter in model.named_parameters():
        factor = next((f for pattern, f in reversed(rates.items()) if fnmatchcase(name, pattern)), 1.0)
        if factor == 0:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        decay = weight_decay if decays(name, parameter) else 0.0
        group = groups.setdefault(
            (factor, decay > 0),
            {"params": [], "names": [], "factor": factor, "lr": lr * factor}
            | {"initial_lr": lr * factor, "weight_decay": decay},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's rate to its own `initial_lr` times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def prepare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Makes AdamW's moments now, so that no step ever ends half-way for lack of memory. Returns the optimizer.

    They are as AdamW makes them in its first step (torch/optim/adam.py `_init_group`).
    """
    import torch

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            place = parameter.device if group["fused"] or group["capturable"] else "cpu"
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=place),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
    return optimizer
