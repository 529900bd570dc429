"""CLIP as plain torch modules: one text tower, one vision tower, OpenAI's parameter names.

A pass through the text tower returns every place where a diffusion model reads it. The module tree spells OpenAI's
state dict, so that `state_dict()` is the canonical form and loading needs no mapping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .architectures import ACTIVATIONS

MAX_LOGIT_SCALE = math.log(100.0)  # OpenAI clamps the temperature here


@dataclass(frozen=True)
class TextConfig:
    """Shape of a text tower. `embed_dim` is the width of the space that text and pictures share.

    end_of_text: the id whose first place is pooled; None is CLIP's own rule, the largest id of each row. The two
    differ only for a vocabulary that was extended behind end-of-text, by textual inversion for example.
    assumed: fields that no one said, so that files that are made of this one do not state them as facts.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    context_length: int
    vocab_size: int
    embed_dim: int
    activation: str = "quick_gelu"
    end_of_text: int | None = None
    assumed: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class VisionConfig:
    """Shape of a vision tower: square pictures of `image_size` pixels in patches of `patch_size`."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch_size: int
    image_size: int
    embed_dim: int
    activation: str = "quick_gelu"
    assumed: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers. They must agree on `embed_dim`."""

    text: TextConfig
    vision: VisionConfig


@dataclass(frozen=True)
class ReadPoints:
    """Where diffusion models read a text tower, for a batch of B captions of L tokens."""

    penultimate: Tensor  # (B, L, width) before the last block, no final LayerNorm: SDXL, SD2, SD3
    last: Tensor  # (B, L, width) after the last block and the final LayerNorm: SD1
    pooled: Tensor  # (B, width) row of `last` at end-of-text: Flux
    projected: Tensor  # (B, embed_dim) pooled @ text_projection: clip_g in SDXL, and what contrastive training sees


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the activation of OpenAI's CLIPs."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {ACTIVATIONS}")
    return QuickGELU() if name == "quick_gelu" else nn.GELU()


class Attention(nn.Module):
    """Multi-head self-attention with OpenAI's fused parameters `in_proj_weight`, `in_proj_bias`, `out_proj`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:  # (B, L, W) -> (B, L, W)
        batch, length, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    def __init__(self, width: int, mlp_width: int, activation: str):
        super().__init__()
        self.c_fc = nn.Linear(width, mlp_width)
        self.activation = _activation(activation)
        self.c_proj = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """Pre-LayerNorm residual attention block."""

    def __init__(self, width: int, heads: int, mlp_width: int, activation: str):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_width, activation)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The blocks, so that parameter names read `transformer.resblocks.N`, and how they are run."""

    def __init__(self, config: TextConfig | VisionConfig):
        super().__init__()
        self.checkpointing = False  # see `set_checkpointing`
        self.resblocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_width, config.activation) for _ in range(config.layers)
        )

    def run(self, block: Block, x: Tensor, causal: bool) -> Tensor:  # (B, L, W) -> (B, L, W)
        """One of the blocks. Nothing in it is random, so that the process's random numbers are neither kept nor set."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, causal, use_reentrant=False, preserve_rng_state=False)
        return block(x, causal)


def end_of_text(ids: Tensor, token: int | None = None) -> Tensor:
    """Position of the first end-of-text token in each row: the given id, or else the row's largest. (B, L) -> (B,)"""
    return (ids if token is None else (ids == token).int()).argmax(dim=-1)


class TextTower(nn.Module):
    """A CLIP text encoder with its projection."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.text_config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = Transformer(config)
        self.ln_final = nn.LayerNorm(config.width)
        self.text_projection = nn.Parameter(torch.empty(config.width, config.embed_dim))

    def forward(self, ids: Tensor) -> ReadPoints:  # (B, L), L <= context_length
        """One pass, all read points.

        Attention is causal, so the rows up to end-of-text do not depend on what follows: a batch may be cut to its
        longest caption. Rows after end-of-text exist for SDXL only at the full context length.
        """
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        penultimate = x
        for block in self.transformer.resblocks:
            penultimate, x = x, self.transformer.run(block, x, causal=True)
        last = self.ln_final(x)
        ends = end_of_text(ids, self.text_config.end_of_text)
        pooled = last[torch.arange(len(ids), device=ids.device), ends]
        return ReadPoints(penultimate, last, pooled, pooled @ self.text_projection)

    def penultimate(self, ids: Tensor) -> Tensor:  # (B, L) -> (B, L, W)
        """The penultimate read point alone: the last block and the final LayerNorm are not computed."""
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        for block in self.transformer.resblocks[:-1]:
            x = self.transformer.run(block, x, causal=True)
        return x


class VisionTower(nn.Module):
    """A CLIP vision transformer with its projection."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        if config.image_size % config.patch_size:
            raise ValueError(f"image size {config.image_size} is not a multiple of patch size {config.patch_size}")
        patches = (config.image_size // config.patch_size) ** 2
        self.vision_config = config
        self.conv1 = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + patches, config.width))
        self.ln_pre = nn.LayerNorm(config.width)
        self.transformer = Transformer(config)
        self.ln_post = nn.LayerNorm(config.width)
        self.proj = nn.Parameter(torch.empty(config.width, config.embed_dim))

    def forward(self, pixels: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, embed_dim)
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        start = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = self.ln_pre(torch.cat([start, patches], dim=1) + self.positional_embedding)
        for block in self.transformer.resblocks:
            x = self.transformer.run(block, x, causal=False)
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(TextTower):
    """A text tower that also carries `visual` and `logit_scale`, as OpenAI's state dict does."""

    def __init__(self, config: CLIPConfig):
        if config.text.embed_dim != config.vision.embed_dim:
            raise ValueError(
                f"text embeds into {config.text.embed_dim} dimensions, vision into {config.vision.embed_dim}"
            )
        super().__init__(config.text)
        self.visual = VisionTower(config.vision)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def config(self) -> CLIPConfig:
        return CLIPConfig(self.text_config, self.visual.vision_config)

    def encode_image(self, pixels: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, embed_dim)
        return self.visual(pixels)


Tower = TypeVar("Tower", bound=nn.Module)


def load(kind: type[Tower], config: object, state: Mapping[str, Tensor]) -> Tower:
    """A tower, or a whole CLIP, with the weights of a canonical state dict, in memory of its own.

    Made without torch's initialisation: that would draw from the process's random numbers, which are the host's, and
    takes seconds at full size. Raises RuntimeError when names or shapes do not fit.
    """
    with torch.device("meta"):
        tower = kind(config)
    tower.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return tower


def initialize(clip: CLIP, generator: torch.Generator) -> CLIP:
    """Random weights by CLIP's rule (openai/CLIP `initialize_parameters`), from an own generator."""

    def normal(tensor: Tensor, std: float) -> None:
        tensor.normal_(0.0, std, generator=generator)

    with torch.no_grad():
        for module in clip.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
                module.bias.zero_()
        for tower, config in ((clip, clip.text_config), (clip.visual, clip.visual.vision_config)):
            residual = config.width**-0.5 * (2 * config.layers) ** -0.5
            for block in tower.transformer.resblocks:
                normal(block.attn.in_proj_weight, config.width**-0.5)
                normal(block.attn.out_proj.weight, residual)
                normal(block.mlp.c_fc.weight, (2 * config.width) ** -0.5)
                normal(block.mlp.c_proj.weight, residual)
                for bias in (
                    block.attn.in_proj_bias,
                    block.attn.out_proj.bias,
                    block.mlp.c_fc.bias,
                    block.mlp.c_proj.bias,
                ):
                    bias.zero_()
        normal(clip.token_embedding.weight, 0.02)
        normal(clip.positional_embedding, 0.01)
        normal(clip.text_projection, clip.text_config.width**-0.5)
        scale = clip.visual.vision_config.width**-0.5
        normal(clip.visual.conv1.weight, (3 * clip.visual.vision_config.patch_size**2) ** -0.5)
        for parameter in (clip.visual.class_embedding, clip.visual.positional_embedding, clip.visual.proj):
            normal(parameter, scale)
    return clip


def set_checkpointing(clip: nn.Module, on: bool) -> None:
    """Whether the blocks of all towers keep only their input for the backward pass and compute the rest again.

    Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): the same outputs and gradients for a fraction of the
    memory and a third more time. Passes without gradients are not touched.
    """
    for module in clip.modules():
        if isinstance(module, Transformer):
            module.checkpointing = on


def block_count(names: Mapping[str, object]) -> int:
    """Number of text blocks in a canonical state dict: one more than the highest index."""
    head = "transformer.resblocks."
    return 1 + max((int(name[len(head) :].split(".")[0]) for name in names if name.startswith(head)), default=-1)


def text_config_from(
    state: Mapping[str, Tensor], *, heads: int | None, activation: str, embed_dim: int | None = None
) -> TextConfig:
    """Reads a text tower's shape off a plain canonical state dict.

    Heads and activation are not in the tensors. `heads` None means width / 64, which holds for every CLIP text tower
    in circulation. `embed_dim` is needed where the file has no `text_projection`; None then means the tower's width.
    """
    vocab_size, width = state["token_embedding.weight"].shape
    projection = state.get("text_projection")
    if projection is not None:
        embed_dim = projection.shape[1]
    return TextConfig(
        width=width,
        layers=block_count(state),
        heads=heads or max(1, width // 64),
        mlp_width=state["transformer.resblocks.0.mlp.c_fc.bias"].shape[0],
        context_length=state["positional_embedding"].shape[0],
        vocab_size=vocab_size,
        embed_dim=embed_dim or width,
        activation=activation,
    )
