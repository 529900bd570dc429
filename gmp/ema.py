"""The mean of weights over the steps, recent ones counting more: what is measured and given in place of them.

Steps scatter weights about where the loss is low, the mean lies nearer to it (Polyak and Juditsky 1992; for networks
Izmailov et al. 2018, arXiv 1803.05407), and a rate need not fall as far.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from .clip import CLIP
from .fsdp import Shards
from .optim import optimized


class Ema:
    """Means in fp32, on the weights' device. `means` has them by name; of weights that are shared out, the rows here.

    After t updates the weights w_1 … w_t have counted (1 - decay) · decay^(t - k) / (1 - decay^t) each: Adam's
    correction of its moments (Kingma and Ba 2015, arXiv 1412.6980, section 3), so that the start, which is what is to
    be repaired, has no part in it. (timm's `ModelEmaV3` and TensorFlow's `ExponentialMovingAverage` let the decay
    itself rise over the first steps, for the same reason.) Means of r and theta fold as r and theta do: a shorter
    theta is the same direction.
    """

    def __init__(self, clip: CLIP, optimizer: torch.optim.Optimizer, decay: float, shards: Shards):
        """Of what the optimizer moves. shards: what of the clip is shared out; the optimizer has the rows here."""
        self.decay, self.shards, self.updates = decay, shards, 0
        self._clip, self._trained = clip, {name: parameter for name, parameter, _ in optimized(optimizer)}
        self.means = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in self._trained.items()}
        self._view = None if shards else _view(clip, self.means)

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights of a step in."""
        self.updates += 1
        share = (1 - self.decay) / (1 - self.decay**self.updates)
        torch._foreach_lerp_(list(self.means.values()), list(self._trained.values()), share)

    @torch.no_grad()
    def clip(self) -> CLIP:
        """A CLIP with the means; what does not train is in the training's own memory, and does not require gradients.

        Where weights are shared out all processes call it, and the first one gets a whole CLIP of its own.
        """
        if self._view is not None:
            return self._view
        group, whole = self.shards.group, self.shards.whole_clip(self._clip)
        for name, mean in self.means.items():
            value = group.gather(mean) if name in self.shards.parts else mean.detach()
            if group.rank == 0:
                whole.get_parameter(name).data = value
        return whole


def _view(clip: CLIP, means: Mapping[str, nn.Parameter]) -> CLIP:
    """The same modules anew, with the means in place of parameters, and all other parameters themselves."""
    return copy.deepcopy(clip, {id(p): means.get(name, p) for name, p in clip.named_parameters()})
