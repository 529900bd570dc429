"""Parameter groups, learning-rate schedules, and AdamW with moments in fp32, bf16 or 8 bits.

A group's rate is `initial_lr × schedule(step)`, so that rates per group survive any schedule. (A scheduler that is
given one maximum for all groups, as `OneCycleLR(max_lr=x)` is, overwrites them.)
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

SCHEDULES = ("cosine", "constant", "linear")
STATES = ("fp32", "bf16", "8bit")  # of AdamW's moments
LIBRARIES = ("torchao.optim", "bitsandbytes.optim")  # that have AdamW8bit, first choice first


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
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], float):
            group["lr"] = rate
        else:  # torchao compiles its step and takes a rate that changes as a tensor only
            group["lr"].fill_(rate)


def set_step(state: dict[str, object], number: int) -> None:
    """Sets a parameter's step counter, which is a tensor, or a number as bitsandbytes has it."""
    if isinstance(state["step"], int):
        state["step"] = number
    else:
        state["step"].fill_(number)


def make_optimizer(
    groups: Sequence[dict[str, object]],
    betas: tuple[float, float],
    device: torch.device,
    state: str = "fp32",
    seed: int = 0,
) -> torch.optim.Optimizer:
    """AdamW for the groups of `parameter_groups`, with its moments made now: no step ends half-way for lack of memory.

    state: `fp32`, 8 bytes per parameter; `bf16`, 4, rounded at random by the seed (`adamw.AdamW16`); `8bit`, 2, in
    blocks of 256 with a scale each (Dettmers et al. 2021, arXiv 2110.02861), by torchao or else bitsandbytes. fp32 and
    bf16 need no memory of their own while they step, where torch's AdamW is fused: on CUDA and on the CPU.

    Raises InputError for 8bit where neither library is installed, or its AdamW does not run on this device, and
    ValueError for another state.
    """
    import torch

    from .adamw import FUSED, AdamW16

    if state not in STATES:
        raise ValueError(f"optimizer state {state!r} is not one of {STATES}")
    if state == "bf16":
        return AdamW16(groups, betas, seed)
    if state == "fp32":
        return prepare(torch.optim.AdamW(groups, betas=betas, fused=device.type in FUSED))
    kind = _eight_bit()
    try:
        return _after_nothing(kind(groups, betas=betas))
    except RuntimeError as error:
        from .memory import is_out_of_memory

        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{kind.__module__.partition('.')[0]}'s AdamW8bit does not run on {device}: {_first_line(error)}; "
            "set the optimizer state to bf16"
        ) from error


def moment_bytes(elements: int, state: str) -> int:
    """Bytes of both moments of a tensor. Small ones stay in fp32, whatever the state."""
    from .adamw import LEAST

    if state == "fp32" or elements < LEAST:
        return 8 * elements
    if state == "bf16":
        return 4 * elements
    return 2 * (elements + 4 * -(-elements // 256) + 1024)  # codes, a scale for each block, and what the codes mean


def _eight_bit() -> type[torch.optim.Optimizer]:
    for library in LIBRARIES:
        try:
            return importlib.import_module(library).AdamW8bit
        except (ImportError, AttributeError):  # not there, or of a version without it
            continue
    raise InputError(
        "optimizer state 8bit needs torchao or bitsandbytes, and neither is installed; run `pip install --no-deps "
        "torchao` (which needs a compiler: Triton on a GPU) or `pip install --no-deps bitsandbytes`, or set it to bf16"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def prepare(optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
    """Moments as torch's AdamW makes them in its first step (torch/optim/adam.py `_init_group`); the optimizer."""
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


def _after_nothing(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer as its library makes it, after a step at rate 0 on gradients of 0: moments are there, and are 0.

    One parameter after the other, so that a single gradient is there at a time.
    """
    import torch

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    set_rates(optimizer, 0.0)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        parameter.grad = None
    for parameter in parameters:
        set_step(optimizer.state[parameter], 0)
    set_rates(optimizer, 1.0)
    return optimizer
