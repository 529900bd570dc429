"""AdamW with moments in bf16: half the memory of its state, the arithmetic in fp32 all the same.

A second moment that moves by 2 % of its distance in a step stands still in bf16 once rounded to the nearest, whose
steps are 0.4 to 0.8 %. Rounded up or down at random, by how near each neighbour is, it is right on average (Gupta et
al. 2015, arXiv 1502.02551).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

FUSED = ("cpu", "cuda")  # devices where torch has AdamW as one kernel
LEAST = 4096  # elements; smaller tensors keep fp32, as 8-bit optimizers do (Dettmers et al. 2021, arXiv 2110.02861)
_BLOCKS = {"cpu": 1 << 18}  # elements at a time: what a core's cache holds
_BLOCK = 1 << 22  # and on other devices
_WEYL, _MIX = 0x9E3779B1, 0x21F0AAAD


class AdamW16(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) for fp32 parameters; moments are made at once, in bf16.

    A step is torch's own, on moments widened to fp32, and rounds them afterwards. The noise depends on the seed, the
    step and the parameter's name in its group's `names`, alone: not on the device, nor on what else is trained, and a
    training that is resumed goes on as if it had never stopped.
    """

    def __init__(
        self, groups: Sequence[dict[str, object]], betas: tuple[float, float], seed: int = 0, eps: float = 1e-8
    ):
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.seed = seed
        for group in self.param_groups:
            for parameter in group["params"]:
                dtype = torch.bfloat16 if parameter.numel() >= LEAST else torch.float32
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device="cpu"),
                    "exp_avg": torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format),
                    "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format),
                }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of every parameter that has a gradient. Raises ValueError for a closure."""
        if closure is not None:
            raise ValueError("a step takes no closure")
        for group in self.param_groups:
            small = []
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is None:
                    continue
                self.state[parameter]["step"] += 1
                if parameter.numel() < LEAST:
                    small.append(parameter)
                else:
                    self._rounded_step(name, parameter, group)
            if small:
                states = [self.state[parameter] for parameter in small]
                moments = [[state[key] for state in states] for key in ("exp_avg", "exp_avg_sq")]
                taken = [int(state["step"]) for state in states]
                _step(small, [parameter.grad for parameter in small], *moments, taken, group)

    def _rounded_step(self, name: str, parameter: nn.Parameter, group: Mapping[str, object]) -> None:
        """Block by block, so that no copy of a whole tensor is made."""
        state = self.state[parameter]
        taken = int(state["step"])
        key = _key(self.seed, taken, name)
        flat = [parameter.view(-1), parameter.grad.reshape(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)]
        size = _BLOCKS.get(parameter.device.type, _BLOCK)
        positions = torch.arange(min(size, parameter.numel()), dtype=torch.int32, device=parameter.device)
        for start in range(0, parameter.numel(), size):
            weight, gradient, first, second = (tensor[start : start + size] for tensor in flat)
            wide = first.float(), second.float()
            _step([weight], [gradient], [wide[0]], [wide[1]], [taken], group)
            noise = _noise(positions[: len(weight)], start, key)
            round_into(first, wide[0], noise[0])
            round_into(second, wide[1], noise[1])


def _step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    taken: list[int],  # steps with this one, of each parameter
    group: Mapping[str, object],
) -> None:
    """torch's step, in place on parameters and moments in fp32."""
    device = parameters[0].device
    adamw(
        parameters,
        gradients,
        first,
        second,
        [],
        list(torch.tensor([number - 1.0 for number in taken], device=device).unbind()),
        fused=device.type in FUSED,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def round_into(target: Tensor, value: Tensor, noise: Tensor) -> None:
    """fp32 to bf16, up or down: noise, int32 of the same shape, uniform in 0..65535, is the chance. It is used up.

    bf16 is the upper half of fp32's bits; what the sum of lower half and noise carries over rounds away from zero. What
    bf16 can represent stays as it is.
    """
    bits = noise.add_(value.view(torch.int32))
    target.view(torch.int16).copy_(bits.bitwise_right_shift_(16))


def _key(seed: int, step: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {name}".encode(), digest_size=4).digest(), "little")


def _noise(positions: Tensor, start: int, key: int) -> tuple[Tensor, Tensor]:
    """Random numbers in 0..65535, two for each of the positions from `start` on, the same on every device.

    A hash of position and key: a Weyl sequence (Widynski 2017, arXiv 1704.00358) and one round of the mixer lowbias32
    (C. Wellons, github.com/skeeto/hash-prospector). torch's generators draw one after the other on the CPU, which takes
    longer than the step.
    """
    bits = positions.mul(_int32(_WEYL)).add_(_int32(key + start * _WEYL))
    bits.bitwise_xor_(bits >> 16).mul_(_MIX)
    return (bits >> 15).bitwise_xor_(bits).bitwise_and_(0xFFFF), (bits >> 16).bitwise_and_(0xFFFF)


def _int32(number: int) -> int:
    """The number with the same lower 32 bits that int32 can represent."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)
