"""Weights shared out over several processes: of every block each has some rows, with their gradients and moments.

FSDP2 (`torch.distributed.fsdp.fully_shard`), the third stage of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054). A
block is gathered while it computes, forward and backward, and its gradient is summed and shared out as soon as it is
there. What lies outside of blocks, embeddings and projection above all, every process has whole. AdamW looks at one
element at a time: on rows it takes the same step as on the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .clip import CLIP
from .config import RepairConfig
from .distributed import ALONE, Group
from .errors import InputError
from .geometric import geometric_names, to_geometric
from .memory import move


@dataclass(frozen=True, eq=False)
class Part:
    """A parameter of which this process has some rows, which may be none."""

    weight: nn.Parameter  # all of it, as torch knows it: a DTensor, whose gradient FSDP fills in
    rows: nn.Parameter  # those that are here, in the same memory: what an optimizer is given
    start: int  # the first of them


class Shards:
    """The parameters that are shared out over a group, by name. `Shards()` is for a CLIP that every process has whole.

    All methods but `share_out` may be called in either case; those that say so are called by all processes together.
    """

    def __init__(self, group: Group = ALONE):
        self.group = group
        self.parts: dict[str, Part] = {}

    def __bool__(self) -> bool:
        return self.group.size > 1

    def share_out(self, clip: CLIP, groups: Sequence[dict[str, object]], device: torch.device, both: bool) -> None:
        """Moves a CLIP to its device block by block, and lets go of rows that others have, in place.

        groups: of `optim.parameter_groups`; they get `Part.rows`. both: whether the vision tower trains as well.
        """
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard, share_comm_ctx

        mesh, size = DeviceMesh.from_group(dist.group.WORLD, device.type), self.group.size
        towers = (clip, clip.visual) if both else (clip,)
        for tower in towers:
            for name, block in tower.transformer.resblocks.named_children():
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
                block.set_gradient_divide_factor(1.0)  # every process has its part of one loss: no mean is taken
                block.set_force_sum_reduction_for_comms(True)
                stem = f"{'' if tower is clip else 'visual.'}transformer.resblocks.{name}."
                for leaf, weight in block.named_parameters():
                    rows = nn.Parameter(weight.detach().to_local(), requires_grad=weight.requires_grad)
                    start = min(self.group.rank * -(-len(weight) // size), len(weight))  # as torch.chunk divides it
                    self.parts[stem + leaf] = Part(weight, rows, start)
            # otherwise what each block has sent would be kept until a whole backward pass ends
            share_comm_ctx(list(tower.transformer.resblocks))
        move([clip], None, device, [tower.transformer.resblocks for tower in towers])
        for one in groups:
            given = zip(one["names"], one["params"], strict=True)
            one["params"] = [self.parts[name].rows if name in self.parts else whole for name, whole in given]

    def here(self, clip: CLIP) -> dict[str, nn.Parameter]:
        """The CLIP's parameters by name; of one that is shared out the rows that are here."""
        return {n: self.parts[n].rows if n in self.parts else p for n, p in clip.named_parameters()}

    def take_gradients(self) -> None:
        """Hands over what FSDP has gathered since the last time, which is summed over all processes, to `Part.rows`."""
        for part in self.parts.values():
            gradient = part.weight.grad
            part.rows.grad = None if gradient is None else gradient.to_local()
            part.weight.grad = None

    def sum(self, names: Sequence[str], values: Tensor) -> Tensor:
        """Figures of parameters that add up over their elements, (…, names), over all processes, which all call this.

        What every process has whole counts once. The same to the bit in each.
        """
        if not self:
            return values
        counted = [name in self.parts or self.group.rank == 0 for name in names]
        return self.group.sum(torch.where(torch.tensor(counted, device=values.device), values, 0))

    @torch.no_grad()
    def whole_clip(self, clip: CLIP) -> CLIP:
        """The CLIP with all weights in the first process, without FSDP, on the same device. All processes call it.

        What is not shared out is in the same memory. The others get the CLIP as it is.
        """
        if not self:
            return clip
        state: dict[str, Tensor] = {}
        for name, parameter in self.here(clip).items():
            rows = self.group.gather(parameter) if name in self.parts else parameter.detach()
            if self.group.rank == 0:
                state[name] = rows
        if self.group.rank:
            return clip
        whole = _without_weights(clip)
        whole.load_state_dict(state, assign=True)
        return whole

    def whole_optimizer(self, optimizer: torch.optim.Optimizer) -> SimpleNamespace:
        """The optimizer's groups and state, with all moments in the first process, gathered in the CPU's memory.

        All processes call it. What the others get is not whole.
        """
        states: dict[nn.Parameter, Mapping[str, object]] = {}
        for one in optimizer.param_groups:
            for name, parameter in zip(one["names"], one["params"], strict=True):
                states[parameter] = state = dict(optimizer.state[parameter])
                for key in [key for key in state if key != "step" and name in self.parts]:
                    whole = self.group.gather(state[key])
                    state[key] = state[key] if self.group.rank else whole.cpu()
        return SimpleNamespace(param_groups=optimizer.param_groups, state=states)


def _without_weights(clip: CLIP) -> CLIP:
    """A CLIP of the same form, on the meta device."""
    with torch.device("meta"):
        plain = CLIP(clip.config)
    to_geometric(plain, set(geometric_names(clip)).__contains__)
    for name, parameter in clip.named_parameters():
        plain.get_parameter(name).requires_grad_(parameter.requires_grad)
    return plain


def check_shards(config: RepairConfig, precision: str, group: Group) -> None:
    """Raises InputError where the weights of this repair cannot be shared out.

    A block is gathered by all processes at once: each must have as many pairs and captions as the others, so that all
    make as many passes.
    """
    try:
        from torch.distributed.fsdp import share_comm_ctx  # noqa: F401
    except ImportError:
        raise InputError(
            f"torch {torch.__version__} cannot share weights out: it has no torch.distributed.fsdp.share_comm_ctx; "
            "update torch, or leave out --shard"
        ) from None
    if group.size == 1:
        raise InputError(
            "there is one process, and weights are shared out over several: start them by "
            "`torchrun --nproc_per_node 2 -m gmp repair …`, or leave out --shard"
        )
    if config.unfreeze:
        raise InputError(
            "unfreeze is for whole weights: where they are shared out, the same ones have gradients in every step; "
            "leave out unfreeze, or --shard"
        )
    if config.optimizer_state != "fp32":
        raise InputError(
            f"optimizer state {config.optimizer_state} is for whole weights: a shared-out one keeps its moments in "
            "fp32, and each process has its part of them; set the optimizer state to fp32, or leave out --shard"
        )
    if precision == "fp16":
        raise InputError(
            "fp16 needs a scale that all processes agree on, which shared-out weights do not have; set the precision "
            "to bf16 or fp32, or leave out --shard"
        )
    counts = {"batch × accumulate": config.step_pairs}
    if config.anchors:
        counts["anchor captions"] = min(config.anchor_captions, config.step_pairs)
    for what, count in counts.items():
        if count % group.size:
            raise InputError(
                f"{what} is {count}, which {group.size} processes cannot share evenly, as they must where weights are "
                f"shared out; set it to a multiple of {group.size}, or leave out --shard"
            )
