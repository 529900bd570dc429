"""Features of MLPs' hidden layers that are scaled while a CLIP trains, and only then.

What zer0int/CLIP-fine-tune does with its "adverb neuron", feature 2432 of the vision tower's block 22, times 1000: the
rest of the network learns under an exaggerated feature. Its hooks stay while it measures and are in the way of every
validation; these last for the passes that they are for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from .clip import CLIP, CLIPConfig
from .config import Neuron
from .errors import InputError


def check_neurons(config: CLIPConfig, neurons: Sequence[Neuron]) -> None:
    """Raises one InputError for all features that are not there, or are named twice, and what the model has."""
    towers = {"text": config.text, "vision": config.vision}
    problems = [
        f"block {one.block} feature {one.feature} of the {one.tower} tower"
        for one in neurons
        if one.block >= towers[one.tower].layers or one.feature >= towers[one.tower].mlp_width
    ]
    if problems:
        there = [
            f"the {name} tower has blocks 0 to {tower.layers - 1} with features 0 to {tower.mlp_width - 1}"
            for name, tower in towers.items()
            if any(one.tower == name for one in neurons)
        ]
        raise InputError(f"neurons that are not there: {', '.join(problems)}; {' and '.join(there)}")
    places = [(one.tower, one.block, one.feature) for one in neurons]
    if twice := sorted({place for place in places if places.count(place) > 1}):
        told = ", ".join(f"block {block} feature {feature} of the {tower} tower" for tower, block, feature in twice)
        raise InputError(f"neurons that are given more than once: {told}; give each one factor")


@contextlib.contextmanager
def scaled(clip: CLIP, neurons: Sequence[Neuron]) -> Iterator[None]:
    """Meanwhile given features are multiplied before their activation, for every token, in every pass of this CLIP.

    It is for the contrastive passes of a step, forward and backward: with checkpointing blocks are computed again on
    the way back. The student's passes for anchors are outside of it: what they hold to a teacher's is what a diffusion
    model will read, which knows of no scaling. No one else sees it, neither measurements nor teachers nor exports.
    """
    factors: dict[nn.Module, dict[int, float]] = {}
    for one in neurons:
        blocks = (clip if one.tower == "text" else clip.visual).transformer.resblocks
        factors.setdefault(blocks[one.block].mlp.c_fc, {})[one.feature] = one.factor
    handles = [layer.register_forward_hook(_scaling(given)) for layer, given in factors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scaling(factors: dict[int, float]) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    def scale(layer: nn.Module, inputs: tuple, hidden: Tensor) -> Tensor:  # (..., features)
        for feature, factor in factors.items():
            hidden[..., feature] *= factor  # nothing keeps what a Linear gives: neither is there a copy of it
        return hidden

    return scale
