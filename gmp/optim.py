"""Learning-rate schedules, parameter groups, and optimizers: AdamW with moments in fp32, bf16 or 8 bits, and others.

A group's rate is `initial_lr × schedule(step)`, so that rates per group survive any schedule. (A scheduler that is
given one maximum for all groups, as `OneCycleLR(max_lr=x)` is, overwrites them.)
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

SCHEDULES = ("cosine", "constant", "linear", "onecycle", "onecycle_linear")
OPTIMIZERS = ("adamw", "adabelief", "lion")
DECAYS = ("matrices", "all")  # of parameters
STATES = ("fp32", "bf16", "8bit")  # of AdamW's moments
LIBRARIES = ("torchao.optim", "bitsandbytes.optim")  # that have AdamW8bit, first choice first
MOMENTS = {"adabelief": ("exp_avg", "exp_avg_var"), "lion": ("exp_avg",)}  # as pytorch-optimizer names them
START, END = 1 / 25, 1 / 25e4  # of the maximum, where OneCycleLR begins and ends
MOMENTUM = (0.95, 0.85)  # the first beta at the lowest and at the highest rate, as OneCycleLR has it

_EMBEDDINGS = ("token_embedding", "positional_embedding", "class_embedding", "conv1", "ln_pre", "register_tokens")
_STACK = re.compile(r"^((?:visual\.)?transformer\.\w+)\.(\d+)\.")  # blocks, and gates behind blocks


# ---- schedules ------------------------------------------------------------------------------------------------------


def schedule(name: str, step: int, total: int, warmup: float) -> float:
    """Factor in 0..1 for optimizer step `step` of `total`, counted from 0; warmup: steps in which it rises.

    `cosine`, `constant` and `linear` rise linearly over the whole steps of warmup; then `cosine` and `linear` fall and
    end just above 0 on the last step. `onecycle` (by cosines) and `onecycle_linear` are torch's `OneCycleLR` with
    `pct_start = warmup / total`, as a factor on its maximum: from 1/25 up, and down to 1/250000.

    Raises ValueError for another name.
    """
    rises, height = _height(name, step, total, warmup)
    if not name.startswith("onecycle"):
        return height
    low = START if rises else END
    return low + (1 - low) * height


def momentum(name: str, step: int, total: int, warmup: float) -> float:
    """The first beta of such a step: it falls from 0.95 to 0.85 while the rate rises, and the other way around."""
    low, high = MOMENTUM
    return low + (high - low) * _height(name, step, total, warmup)[1]


def _height(name: str, step: int, total: int, warmup: float) -> tuple[bool, float]:
    """Whether the rate rises at this step, and where it is between its lowest, 0, and its highest, 1."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r} is not one of {SCHEDULES}")
    if name.startswith("onecycle"):
        top = warmup - 1  # torch/optim/lr_scheduler.py `OneCycleLR`: need not be a whole step, and may lie before all
        rises = step <= top
        if rises:
            progress = 1 - step / top if top else 0.0
        else:
            progress = (step - top) / (total - 1 - top)
        return rises, 1 - progress if name == "onecycle_linear" else (1 + math.cos(math.pi * progress)) / 2
    warmup = round(warmup)
    if step < warmup:
        return True, (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    if name == "cosine":
        return False, (1 + math.cos(math.pi * progress)) / 2
    return False, 1 - progress if name == "linear" else 1.0


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's rate to its own `initial_lr` times `factor`."""
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], float):
            group["lr"] = rate
        else:  # torchao compiles its step and takes a rate that changes as a tensor only
            group["lr"].fill_(rate)


def set_momentum(optimizer: torch.optim.Optimizer, beta: float) -> None:
    """Sets every group's first beta."""
    for group in optimizer.param_groups:
        group["betas"] = (beta, *group["betas"][1:])


# ---- groups ---------------------------------------------------------------------------------------------------------


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for weight matrices: not for radii, biases, LayerNorms, embeddings or the temperature."""
    embeds = "embedding" in name or name.endswith("register_tokens")
    return parameter.ndim >= 2 and not name.endswith(".r") and not embeds


def steps_from_output(names: Iterable[str]) -> dict[str, int]:
    """How far each of a CLIP's parameters is from the output of its tower, in blocks, by name.

    Block i of n is n - 1 - i away, so that the last one is at 0, as are the final LayerNorm, the projection and the
    temperature. Embeddings, and what is done to them before the first block, are at n. A gate is where its block is.
    (BEiT, arXiv 2106.08254, `LayerDecayValueAssigner`, has the head on a step of its own: one more for all the rest.)
    """
    stacks = {name: _STACK.match(name) for name in names}
    sizes: dict[str, int] = {}
    for match in filter(None, stacks.values()):
        sizes[match[1]] = max(sizes.get(match[1], 0), 1 + int(match[2]))
    found = {}
    for name, match in stacks.items():
        if match:
            found[name] = sizes[match[1]] - 1 - int(match[2])
        else:
            tower, embeds = _embeds(name)
            found[name] = sizes.get(f"{tower}transformer.resblocks", 0) if embeds else 0
    return found


def _embeds(name: str) -> tuple[str, bool]:
    """A parameter's tower, as a prefix of its name, and whether it is before the first block."""
    tower = "visual." if name.startswith("visual.") else ""
    return tower, name.removeprefix(tower).startswith(_EMBEDDINGS)


def parameter_groups(
    model: nn.Module,
    lr: float,
    rates: Mapping[str, float],
    weight_decay: float,
    *,
    layer_decay: float = 1.0,
    decay: str = "matrices",
    by_block: bool = False,
) -> list[dict[str, object]]:
    """Trainable parameters as an optimizer's groups, one per rate and decay.

    `rates` maps a shell pattern over parameter names to a factor on `lr`; the last pattern that matches wins. A factor
    of 0 freezes: those parameters are set to not require gradients and appear in no group. layer_decay: a further
    factor for each of `steps_from_output`. decay: what decays, `matrices` (`decays`) or `all`. by_block: blocks, and
    what is before them, are apart, for an optimizer that counts steps by group where blocks join one after the other.

    Raises ValueError when a pattern matches no parameter that is trained.
    """
    if decay not in DECAYS:
        raise ValueError(f"decay {decay!r} is not one of {DECAYS}")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    idle = [pattern for pattern in rates if not any(fnmatchcase(name, pattern) for name in trained)]
    if idle:
        raise ValueError(f"rate patterns match no parameter that is trained: {idle}; such are {trained[:3]}")
    away = steps_from_output(name for name, _ in model.named_parameters())
    groups: dict[tuple[object, ...], dict[str, object]] = {}
    for name, parameter in model.named_parameters():
        factor = next((f for pattern, f in reversed(rates.items()) if fnmatchcase(name, pattern)), 1.0)
        if factor == 0:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        factor *= layer_decay ** away[name]
        amount = weight_decay if decay == "all" or decays(name, parameter) else 0.0
        group = groups.setdefault(
            (factor, amount > 0, _place(name) if by_block else None),
            {"params": [], "names": [], "factor": factor, "lr": lr * factor}
            | {"initial_lr": lr * factor, "weight_decay": amount},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _place(name: str) -> object:
    """Equal where parameters join a training together, if blocks do so one after the other."""
    match = _STACK.match(name)
    return match[0] if match else _embeds(name)


# ---- optimizers -----------------------------------------------------------------------------------------------------


def make_optimizer(
    groups: Sequence[dict[str, object]],
    betas: tuple[float, float],
    device: torch.device,
    state: str = "fp32",
    seed: int = 0,
    *,
    kind: str = "adamw",
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """An optimizer for groups of `parameter_groups`, its moments made now: no step ends half-way for lack of memory.

    kind: `adamw`; `adabelief` (Zhuang et al. 2020, arXiv 2010.07468), rectified as RAdam is; `lion` (Chen et al. 2023,
    arXiv 2302.06675), which has one moment and no eps. The latter two are pytorch-optimizer's. Of all of them weight
    decay is apart from the gradient.

    state, of AdamW's moments: `fp32`, 8 bytes per parameter; `bf16`, 4, rounded at random by the seed
    (`adamw.AdamW16`); `8bit`, 2, in blocks of 256 with a scale each (Dettmers et al. 2021, arXiv 2110.02861), by
    torchao or else bitsandbytes. fp32 and bf16 need no memory of their own while they step, where torch's AdamW is
    fused: on CUDA and on the CPU.

    Raises InputError where a library is not installed, or its AdamW8bit does not run on this device, and ValueError
    for another kind or state.
    """
    import torch

    from .adamw import FUSED, AdamW16

    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer {kind!r} is not one of {OPTIMIZERS}")
    if state not in STATES:
        raise ValueError(f"optimizer state {state!r} is not one of {STATES}")
    if kind != "adamw":
        return _of_library(kind, groups, betas, eps)
    if state == "bf16":
        return AdamW16(groups, betas, seed, eps)
    if state == "fp32":
        return prepare(torch.optim.AdamW(groups, betas=betas, eps=eps, fused=device.type in FUSED))
    eight_bit = _eight_bit()
    try:
        return _after_nothing(eight_bit(groups, betas=betas, eps=eps))
    except RuntimeError as error:
        from .memory import is_out_of_memory

        if is_out_of_memory(error):
            raise
        raise InputError(
            f"{eight_bit.__module__.partition('.')[0]}'s AdamW8bit does not run on {device}: {_first_line(error)}; "
            "set the optimizer state to bf16"
        ) from error


def optimized(optimizer: object) -> Iterator[tuple[str, nn.Parameter, dict[str, object]]]:
    """Every parameter that an optimizer moves: its name, itself, and its group."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            yield name, parameter, group


def counter(optimizer: object, group: Mapping[str, object], parameter: nn.Parameter) -> float | None:
    """Steps that an optimizer has counted for a parameter, which some count by group; None where it counts none."""
    state = optimizer.state.get(parameter, {})
    steps = state.get("step", group.get("step"))
    return None if steps is None else float(steps)


def set_counter(
    optimizer: torch.optim.Optimizer, group: dict[str, object], parameter: nn.Parameter, steps: float
) -> None:
    """Sets what `counter` tells; a group's is that of all its parameters."""
    state = optimizer.state.get(parameter, {})
    if "step" in state:
        set_step(state, int(steps))
    else:
        group["step"] = int(steps)


def set_step(state: dict[str, object], number: int) -> None:
    """Sets a parameter's step counter, which is a tensor, or a number as bitsandbytes has it."""
    if isinstance(state["step"], int):
        state["step"] = number
    else:
        state["step"].fill_(number)


def moment_bytes(elements: int, state: str, kind: str = "adamw") -> int:
    """Bytes of all moments of a tensor. Small ones stay in fp32, whatever the state."""
    from .adamw import LEAST

    if kind != "adamw":
        return 4 * len(MOMENTS[kind]) * elements
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


def _of_library(
    kind: str, groups: Sequence[dict[str, object]], betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """pytorch-optimizer's AdaBelief or Lion, tensor by tensor: all at once, Lion copies all gradients at each step.

    Both count steps by group. A group without any gradient does not count, so that what joins later starts at 0.
    """
    import torch

    try:
        library = importlib.import_module("pytorch_optimizer")
    except ImportError:
        raise InputError(
            f"optimizer {kind} is of pytorch-optimizer, which is not installed; run `pip install pytorch-optimizer`, "
            "or set optimizer to adamw"
        ) from None
    if kind == "lion":
        optimizer = library.Lion(groups, betas=betas, weight_decouple=True, foreach=False)
    else:
        optimizer = library.AdaBelief(groups, betas=betas, eps=eps, weight_decouple=True, rectify=True, foreach=False)
    for group in optimizer.param_groups:
        group["step"] = 0
        for parameter in group["params"]:
            optimizer.state[parameter] = {key: torch.zeros_like(parameter) for key in MOMENTS[kind]}
    idle: list[dict[str, object]] = []

    def before(*_) -> None:
        idle[:] = [one for one in optimizer.param_groups if all(p.grad is None for p in one["params"])]

    def after(*_) -> None:
        for group in idle:
            group["step"] -= 1

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


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
