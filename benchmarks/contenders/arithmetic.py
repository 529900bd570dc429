"""The arithmetic that a step cannot do without, and how fast this machine multiplies matrices of its shapes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gmp.clip import CLIPConfig, TextConfig, VisionConfig

BACKWARD = 2  # every product of a forward pass has two in the backward pass, for its input and for its weight
LEAST, MOST, LONGEST = 5, 200, 0.5  # passes of a layer that are timed, and seconds after which they are enough
ANCHORED = 64  # captions of `RepairConfig.anchor_captions`


@dataclass(frozen=True)
class Work:
    """Floating point operations, two for a multiplication and an addition, by tower; tokens of one pass."""

    text: float
    vision: float
    text_tokens: int
    vision_tokens: int

    @property
    def total(self) -> float:
        return self.text + self.vision


def block(c: TextConfig | VisionConfig) -> int:
    """Multiplications for each token in the four linear layers of a block."""
    return 4 * c.width**2 + 2 * c.width * c.mlp_width


def text_forward(c: TextConfig, lengths: Tensor, blocks: int | None = None) -> float:
    """Operations for captions of `lengths` (B,) tokens; with `blocks`, of that many blocks alone.

    Attention is causal: a token is compared with those before it. Of the last block only end-of-text is read, so that
    all other tokens need their keys and values there and nothing else.
    """
    tokens, captions = lengths.sum().item(), len(lengths)
    whole = tokens * block(c) + (lengths * (lengths + 1)).sum().item() * c.width  # scores and mixtures
    if blocks is not None:
        return 2.0 * blocks * whole
    last = tokens * 2 * c.width**2 + captions * (block(c) - 2 * c.width**2) + tokens * 2 * c.width
    return 2.0 * ((c.layers - 1) * whole + last + captions * c.width * c.embed_dim)


def vision_forward(c: VisionConfig, pictures: int) -> float:
    """Operations for so many pictures; of the last block only the class token is read."""
    patches = (c.image_size // c.patch_size) ** 2
    tokens = patches + 1
    whole = tokens * block(c) + 2 * tokens**2 * c.width
    last = tokens * 2 * c.width**2 + block(c) - 2 * c.width**2 + 2 * tokens * c.width
    return (
        2.0
        * pictures
        * (patches * 3 * c.patch_size**2 * c.width + (c.layers - 1) * whole + last + c.width * c.embed_dim)
    )


def step(shape: CLIPConfig, lengths: Tensor, vision: str, anchored: bool = False) -> Work:
    """One step over captions of `lengths` (B,). vision: "trained", "frozen" (a forward pass), or "cached"."""
    pairs, c = len(lengths), shape.text
    logits = 2.0 * pairs**2 * c.embed_dim
    text = (1 + BACKWARD) * text_forward(c, lengths) + logits * (3 if vision == "trained" else 2)
    if anchored:  # penultimate at the full context length, and the teacher's
        full = torch.full((min(ANCHORED, pairs),), c.context_length)
        text += (2 + BACKWARD) * text_forward(c, full, blocks=c.layers - 1)
    passes = {"trained": 1 + BACKWARD, "frozen": 1, "cached": 0}[vision]
    tokens = pairs * (1 + (shape.vision.image_size // shape.vision.patch_size) ** 2)
    return Work(text, passes * vision_forward(shape.vision, pairs), lengths.sum().item(), tokens)


def matmul_rate(c: TextConfig | VisionConfig, tokens: int, device: str, precision: str) -> float:
    """Operations per second in the four linear layers of a block, forward and backward: each layer's fastest pass."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    width, hidden = c.width, c.mlp_width
    layers = [
        (random(tokens, inputs), random(outputs, inputs), random(tokens, outputs))
        for inputs, outputs in ((width, 3 * width), (width, width), (width, hidden), (hidden, width))
    ]
    operations = 2.0 * (1 + BACKWARD) * tokens * block(c)
    seconds = 0.0
    for x, weight, grad in layers:
        passes = []
        while len(passes) < LEAST or (sum(passes) < LONGEST and len(passes) < MOST):
            synchronize(device)
            start = time.perf_counter()
            F.linear(x, weight), grad @ weight, grad.T @ x
            synchronize(device)
            passes.append(time.perf_counter() - start)
        seconds += min(passes)
    return operations / seconds


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
