"""What in a picture a vision tower attends to, from its own weights; no other model is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .clip import Block, VisionTower, linear

SALIENCY = "attention rollout over all blocks, capped at its 98th percentile; version 1"
"""Names the procedure. Part of the keys of every cache of boxes: change it when saliency changes."""

# Some patches of empty background gather what a tower knows of the whole picture, and its attention with it: 2 % of
# them in OpenAI's ViT-L/14 (Darcet et al. 2023, arXiv 2309.16588). The most salient patches count alike.
CAP = 0.98


@torch.no_grad()
def saliency(tower: VisionTower, pixels: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, S / patch, S / patch)
    """How much each patch of normalised pixels comes to bear on the class token: attention rollout, capped.

    Rollout (Abnar & Zuidema 2020, arXiv 2005.00928): a block takes half of each token from its attention, the mean over
    heads, and half from the token itself; the product of all blocks' matrices says what the class token is made of.
    The tower's own pass runs, and is listened to meanwhile.
    """
    rolled: list[Tensor] = []

    def listen(block: Block, x: Tensor) -> None:
        mixed = attention(block, x.view(len(pixels), -1, x.shape[1]))
        mixed = (mixed + torch.eye(mixed.shape[1], device=mixed.device)) / 2
        rolled[:] = [mixed @ rolled[0] if rolled else mixed]

    with listening(tower.transformer.resblocks, listen):
        tower(pixels)
    side = tower.vision_config.image_size // tower.vision_config.patch_size
    patches = rolled[0][:, 0, -side * side :]  # behind the class token and the registers
    most = patches.quantile(CAP, dim=1, keepdim=True)
    return patches.minimum(most).view(-1, side, side)


def attention(block: Block, x: Tensor) -> Tensor:  # (B, L, W) -> (B, L, L)
    """Of what a block's attention is given: how much each token takes of every other, the mean over heads, in fp32."""
    attn = block.attn
    qkv = linear(x.flatten(0, 1).float(), attn.in_proj_weight, attn.in_proj_bias)
    q, k, _ = qkv.view(*x.shape[:2], 3, attn.heads, -1).permute(2, 3, 0, 1, 4)  # (heads, B, L, width / heads)
    scale = q.shape[-1] ** -0.5
    mean = torch.zeros(len(x), x.shape[1], x.shape[1], device=x.device)
    for query, key in zip(q, k, strict=True):  # head by head: less memory
        mean += (query @ key.transpose(1, 2) * scale).softmax(dim=-1)
    return mean / attn.heads


@contextlib.contextmanager
def listening(blocks: nn.ModuleList, listen: Callable[[Block, Tensor], None]) -> Iterator[None]:
    """Meanwhile `listen` is told of each block what its attention is given: (block, (T, W))."""
    handles = [
        block.ln_1.register_forward_hook(lambda module, given, x, block=block: listen(block, x)) for block in blocks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
