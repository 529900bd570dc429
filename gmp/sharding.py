"""Moments shared out over several processes: each keeps those of its own parameters, and takes their steps.

The first stage of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054), by whole parameters. Every process has all weights
and all gradients, so that a step's numbers stay what they are: AdamW, AdaBelief and Lion look at one element at a time.
What it saves is 8 bytes per parameter in fp32 (4 with Lion), but for its share, and the arithmetic of others' steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .distributed import Group


def owners(sizes: Sequence[int], processes: int) -> list[int]:
    """Which process has which parameter, by their elements: the largest first, to whom has the least so far.

    The fullest share is at most 4/3 of the best possible one (Graham 1969, list scheduling).
    """
    load, found = [0] * processes, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):  # stable: the same in all processes
        found[index] = min(range(processes), key=load.__getitem__)
        load[found[index]] += sizes[index]
    return found


def shard(optimizer: torch.optim.Optimizer, group: Group) -> None:
    """Lets go of the moments of others' parameters, in place; from now on a step is taken together.

    Moments that lie elsewhere stay in the optimizer's state as tensors on the meta device, which have a shape and no
    memory. After a step every process has all weights; others' gradients are gone.
    """
    if group.size == 1:
        return
    owner = _owners(optimizer, group)
    foreign = [parameter for parameter, rank in owner.items() if rank != group.rank]
    for parameter in foreign:
        state = optimizer.state[parameter]
        for key, value in state.items():
            if _is_moment(key, value):
                state[key] = _changed(value, lambda part: part.to("meta"))

    def before(*_) -> None:
        for parameter in foreign:
            parameter.grad = None  # optimizers pass over what has none

    def after(*_) -> None:
        for rank in range(group.size):
            group.broadcast([parameter for parameter, one in owner.items() if one == rank], rank)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def whole(optimizer: torch.optim.Optimizer, group: Group) -> torch.optim.Optimizer | SimpleNamespace:
    """The optimizer's groups and state, with others' moments in the CPU's memory, for the first process to save.

    All processes call it. What the others get is not whole.
    """
    if group.size == 1:
        return optimizer
    states: dict[nn.Parameter, Mapping[str, object]] = {}
    for parameter, rank in _owners(optimizer, group).items():
        states[parameter] = state = dict(optimizer.state[parameter])
        if rank == 0 or group.rank not in (0, rank):
            continue

        def sent(part: Tensor, place: torch.device = parameter.device, rank: int = rank) -> Tensor:
            return group.send(part if group.rank else torch.empty_like(part, device=place), rank).cpu()

        if "step" in state:  # otherwise steps are counted by group, in every process
            steps = sent(torch.tensor(float(state["step"]), device=parameter.device))
            state["step"] = steps
        for key, value in state.items():
            if _is_moment(key, value):
                state[key] = _changed(value, sent)
    return SimpleNamespace(param_groups=optimizer.param_groups, state=states)


def own(optimizer: torch.optim.Optimizer, group: Group) -> torch.optim.Optimizer | SimpleNamespace:
    """The optimizer's groups, and of its state what this process has: to be moved to another device."""
    if group.size == 1:
        return optimizer
    mine = {p: optimizer.state[p] for p, rank in _owners(optimizer, group).items() if rank == group.rank}
    return SimpleNamespace(param_groups=optimizer.param_groups, state=mine)


def _owners(optimizer: torch.optim.Optimizer, group: Group) -> dict[nn.Parameter, int]:
    parameters = [parameter for one in optimizer.param_groups for parameter in one["params"]]
    return dict(zip(parameters, owners([p.numel() for p in parameters], group.size), strict=True))


def _is_moment(key: str, value: object) -> bool:
    return key != "step" and torch.is_tensor(value)


def _changed(value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor changed; quantised state is a tensor that consists of tensors, each of which is changed."""
    if not hasattr(value, "__tensor_flatten__"):
        return change(value)
    names, context = value.__tensor_flatten__()
    parts = {name: change(getattr(value, name)) for name in names}
    return type(value).__tensor_unflatten__(parts, context, value.size(), value.stride())
