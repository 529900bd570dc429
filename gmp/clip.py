"""CLIP as plain torch modules: one text tower, one vision tower, OpenAI's parameter names.

A pass through the text tower returns every place where a diffusion model reads it. The module tree spells OpenAI's
state dict, so that `state_dict()` is the canonical form and loading needs no mapping.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .architectures import ACTIVATIONS

MAX_LOGIT_SCALE = math.log(100.0)  # OpenAI clamps the temperature here
# tokens of padding that one stretch of a stream more must save: it costs kernels, which a GPU waits for
WORTH = {"cpu": 8}
WORTH_ON_GPU = 1024
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # of `precision`, None: that of the weights
Shapes = Sequence[tuple[int, int]]  # rows × tokens of one stretch of a stream after the other


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
    """Shape of a vision tower: square pictures of `image_size` pixels in patches of `patch_size`.

    registers: learnt tokens between the class token and the patches (Darcet et al. 2023, arXiv 2309.16588).
    gates: how many mix the class token with the registers' mean: one behind the tower, the others behind its last
    blocks (zer0int/CLIP-fine-tune-registers-gated).
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch_size: int
    image_size: int
    embed_dim: int
    activation: str = "quick_gelu"
    registers: int = 0
    gates: int = 0
    assumed: tuple[str, ...] = field(default=(), compare=False)

    @property
    def tokens(self) -> int:
        """Of one picture: the class token, the registers and the patches."""
        return 1 + self.registers + (self.image_size // self.patch_size) ** 2


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


@dataclass(frozen=True)
class Packed:
    """Captions as one stream of tokens, those of about one length side by side, so that hardly any padding is computed.

    Attention is causal: what follows a caption's end changes nothing before it, and need not be there.
    """

    ids: Tensor  # (T,)
    positions: Tensor  # (T,) of each token in its caption
    shapes: tuple[tuple[int, int], ...]  # captions × tokens of one stretch of the stream after the other
    ends: Tensor  # (B,) where in the stream caption i ends

    def to(self, device: torch.device) -> Packed:
        move = functools.partial(Tensor.to, device=device, non_blocking=True)
        return Packed(move(self.ids), move(self.positions), self.shapes, move(self.ends))


def pack(ids: Tensor, end_token: int | None, worth: int) -> Packed:
    """Captions (B, L) as a stream.

    end_token: as `TextConfig.end_of_text`. worth: tokens of padding that one stretch more must save.
    """
    ends = end_of_text(ids, end_token)
    order = ends.argsort(stable=True)
    sizes, counts = (ends + 1).unique(return_counts=True)
    shapes = tuple(_shapes(sizes.tolist(), counts.tolist(), worth))
    stretches = [ids[rows, :size] for rows, (_, size) in zip(order.split([n for n, _ in shapes]), shapes, strict=True)]
    positions = [torch.arange(size, device=ids.device).repeat(n) for n, size in shapes]
    starts = torch.cat([torch.arange(n, device=ids.device) * size for n, size in shapes])
    before = torch.tensor([0, *itertools.accumulate(n * size for n, size in shapes)][:-1], device=ids.device)
    starts += before.repeat_interleave(torch.tensor([n for n, _ in shapes], device=ids.device))
    at = torch.empty_like(ends)
    at[order] = starts + ends[order]
    return Packed(torch.cat([stretch.flatten() for stretch in stretches]), torch.cat(positions), shapes, at)


def _shapes(sizes: list[int], counts: list[int], worth: int) -> list[tuple[int, int]]:
    """Which lengths share a stretch, so that tokens and `worth` for each stretch are the fewest: captions × tokens.

    By dynamic programming. sizes: the lengths that occur, ascending; counts: captions of each.
    """
    best: list[tuple[int, int]] = [(0, 0)]  # for the first lengths: cost, and where the last stretch begins
    for end in range(1, len(sizes) + 1):
        rows, choices = 0, []
        for start in range(end - 1, -1, -1):
            rows += counts[start]
            choices.append((best[start][0] + rows * sizes[end - 1] + worth, start))
        best.append(min(choices))
    shapes, end = [], len(sizes)
    while end:
        start = best[end][1]
        shapes.append((sum(counts[start:end]), sizes[end - 1]))
        end = start
    return shapes[::-1]


class _QuickGELU(torch.autograd.Function):
    """With u = 1.702 x it is silu(u) / 1.702, and its derivative that of silu at u: only x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(1.702 * x, inplace=True).div_(1.702)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, 1.702 * x)


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the activation of OpenAI's CLIPs."""

    def forward(self, x: Tensor) -> Tensor:
        return _QuickGELU.apply(x)


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {ACTIVATIONS}")
    return QuickGELU() if name == "quick_gelu" else nn.GELU()


def linear(x: Tensor, weight: Tensor | nn.Module, bias: Tensor | None) -> Tensor:  # (..., in) -> (..., out)
    """A matrix product in x's precision. weight: a matrix, or what stands in place of one (`geometric`)."""
    if isinstance(weight, nn.Module):
        return weight(x, bias)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Linear(nn.Linear):
    """A Linear that computes in the precision of what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head self-attention with OpenAI's fused parameters `in_proj_weight`, `in_proj_bias`, `out_proj`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = Linear(width, width)

    def mix(self, x: Tensor, shapes: Shapes, causal: bool) -> Tensor:  # (T, W) -> (T, W)
        """What every token takes from the others of its row, before `out_proj`."""
        qkv = linear(x, self.in_proj_weight, self.in_proj_bias)
        if qkv.device.type == "cpu":
            qkv = qkv.to(torch.promote_types(qkv.dtype, torch.float32))  # its attention in bf16 is seven times slower
        stretches = qkv.split([rows * length for rows, length in shapes])
        mixed = [self._mix(part, rows, causal) for part, (rows, _) in zip(stretches, shapes, strict=True)]
        return (torch.cat(mixed) if len(mixed) > 1 else mixed[0]).to(x.dtype)

    def _mix(self, qkv: Tensor, rows: int, causal: bool) -> Tensor:  # (rows × length, 3 W) -> (rows × length, W)
        q, k, v = qkv.view(rows, -1, 3, self.heads, qkv.shape[1] // (3 * self.heads)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return mixed.transpose(1, 2).reshape(len(qkv), -1)


class MLP(nn.Module):
    def __init__(self, width: int, mlp_width: int, activation: str):
        super().__init__()
        self.c_fc = Linear(width, mlp_width)
        self.activation = _activation(activation)
        self.c_proj = Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    """Pre-LayerNorm residual attention block.

    The residual stream and LayerNorm are in the stream's own precision; matrix products and attention in `dtype`.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, activation: str):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp_width, activation)

    def forward(
        self, x: Tensor, shapes: Shapes, causal: bool, dtype: torch.dtype, rows: Tensor | None = None
    ) -> Tensor:  # (T, W) -> (T, W), or (rows, W)
        """rows: those of the stream that are asked for; nothing else is computed that they do not need."""
        mixed = self.attn.mix(self.ln_1(x).to(dtype), shapes, causal)
        if rows is not None:
            x, mixed = x.index_select(0, rows), mixed.index_select(0, rows)
        x = x + self.attn.out_proj(mixed)
        return x + self.mlp(self.ln_2(x).to(dtype))


class Transformer(nn.Module):
    """The blocks, so that parameter names read `transformer.resblocks.N`, and how they are run."""

    def __init__(self, config: TextConfig | VisionConfig):
        super().__init__()
        self.checkpointing = False  # see `set_checkpointing`
        self.dtype: torch.dtype | None = None  # see `precision`
        self.resblocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_width, config.activation) for _ in range(config.layers)
        )

    def run(self, block: Block, x: Tensor, causal: bool) -> Tensor:  # (B, L, W) -> (B, L, W)
        """One of the blocks, on rows of one length."""
        return self.flow(block, x.flatten(0, 1), (x.shape[:2],), causal).view(x.shape)

    def flow(
        self, block: Block, x: Tensor, shapes: Shapes, causal: bool, rows: Tensor | None = None
    ) -> Tensor:  # (T, W) -> (T, W), or (rows, W)
        """One of the blocks, on a stream. Nothing in it is random: the process's random numbers are left alone."""
        dtype = self.dtype or x.dtype
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, shapes, causal, dtype, rows, use_reentrant=False, preserve_rng_state=False)
        return block(x, shapes, causal, dtype, rows)


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

    def encode_text(self, ids: Tensor) -> Tensor:  # (B, L) -> (B, embed_dim)
        """The projected read point alone, of captions without their padding: what `forward` gives, in less time.

        Of the last block only the rows at end-of-text are computed. ids are best given on the CPU.
        """
        device = self.positional_embedding.device
        packed = pack(ids, self.text_config.end_of_text, WORTH.get(device.type, WORTH_ON_GPU)).to(device)
        x = F.embedding(packed.ids, self.token_embedding.weight)
        x = x + F.embedding(packed.positions, self.positional_embedding)
        *blocks, last = self.transformer.resblocks
        for block in blocks:
            x = self.transformer.flow(block, x, packed.shapes, causal=True)
        x = self.transformer.flow(last, x, packed.shapes, causal=True, rows=packed.ends)
        return self.ln_final(x) @ self.text_projection

    def penultimate(self, ids: Tensor) -> Tensor:  # (B, L) -> (B, L, W)
        """The penultimate read point alone: the last block and the final LayerNorm are not computed."""
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        for block in self.transformer.resblocks[:-1]:
            x = self.transformer.run(block, x, causal=True)
        return x


class Gate(nn.Sequential):
    """g · class token + (1 - g) · mean of the registers, with g in 0..1 by an MLP of both."""

    def __init__(self, width: int):
        super().__init__(Linear(2 * width, width), nn.ReLU(), Linear(width, 1))

    def forward(self, first: Tensor) -> Tensor:  # (B, 1 + registers, W) -> (B, W)
        token, mean = first[:, 0], first[:, 1:].mean(dim=1)
        share = super().forward(torch.cat([token, mean], dim=1)).sigmoid()
        return share * token + (1 - share) * mean


class VisionTower(nn.Module):
    """A CLIP vision transformer with its projection.

    With registers there are as many more positions, added in the order of the tokens: those that were learnt for a
    tower without registers then lie so many tokens off, which is how published ones were trained.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        if config.image_size % config.patch_size:
            raise ValueError(f"image size {config.image_size} is not a multiple of patch size {config.patch_size}")
        if config.gates and not (config.registers and config.gates <= 1 + config.layers):
            raise ValueError(f"{config.gates} gates for {config.registers} registers and {config.layers} blocks")
        self.vision_config = config
        self.conv1 = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.positional_embedding = nn.Parameter(torch.empty(config.tokens, config.width))
        self.ln_pre = nn.LayerNorm(config.width)
        self.transformer = Transformer(config)
        if config.registers:
            self.register_tokens = nn.Parameter(torch.empty(config.registers, config.width))
        if config.gates:
            self.fusion_mlp = Gate(config.width)
        if config.gates > 1:
            self.transformer.intermediate_fusion_mlps = nn.ModuleList(
                Gate(config.width) for _ in range(config.gates - 1)
            )
        self.ln_post = nn.LayerNorm(config.width)
        self.proj = nn.Parameter(torch.empty(config.width, config.embed_dim))

    def forward(self, pixels: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, embed_dim)
        config, dtype = self.vision_config, self.transformer.dtype or pixels.dtype
        patches = F.conv2d(pixels.to(dtype), self.conv1.weight.to(dtype), stride=self.conv1.stride)
        patches = patches.flatten(2).transpose(1, 2)
        start = self.class_embedding[None]
        if config.registers:
            start = torch.cat([start, self.register_tokens])
        start = start.expand(len(patches), -1, -1)
        x = self.ln_pre(torch.cat([start, patches.to(start.dtype)], dim=1) + self.positional_embedding)
        shape, x = x.shape[:2], x.flatten(0, 1)
        *blocks, last = self.transformer.resblocks
        for number, block in enumerate(blocks):
            x = self.transformer.flow(block, x, (shape,), causal=False)
            x = self._gated(number, x, config.tokens)
        # only the class token's row is read, and those of registers where a gate does
        read = torch.arange(1 + config.registers if config.gates else 1, device=x.device)
        rows = torch.arange(0, len(x), shape[1], device=x.device)[:, None] + read
        x = self.transformer.flow(last, x, (shape,), causal=False, rows=rows.flatten())
        x = self.ln_post(self._gated(len(blocks), x, len(read)))
        if config.gates:
            x = self.fusion_mlp(x.view(*rows.shape, -1))
        return x @ self.proj

    def _gated(self, number: int, x: Tensor, length: int) -> Tensor:  # (B × length, W) -> the same
        """What a block gives, with the class tokens mixed by the gate behind it, if there is one."""
        at = number - self.vision_config.layers + self.vision_config.gates - 1
        if at < 0:
            return x
        x = x.view(-1, length, x.shape[1])
        first = x[:, : 1 + self.vision_config.registers].clone()  # so that the way back does not keep all of x
        gate = self.transformer.intermediate_fusion_mlps[at]
        return torch.cat([gate(first)[:, None], x[:, 1:]], dim=1).flatten(0, 1)


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
        if clip.visual.vision_config.registers:
            normal(clip.visual.register_tokens, scale)
        for gate in (module for module in clip.visual.modules() if isinstance(module, Gate)):
            for linear in (gate[0], gate[2]):
                normal(linear.weight, linear.in_features**-0.5)
                linear.bias.zero_()
    return clip


def set_checkpointing(clip: nn.Module, on: bool) -> None:
    """Whether the blocks of all towers keep only their input for the backward pass and compute the rest again.

    Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): the same outputs and gradients for a fraction of the
    memory and a third more time. Passes without gradients are not touched.
    """
    for module in clip.modules():
        if isinstance(module, Transformer):
            module.checkpointing = on


@contextlib.contextmanager
def precision(dtype: torch.dtype | None, *towers: nn.Module) -> Iterator[None]:
    """In what precision the blocks compute matrix products and attention meanwhile; None is that of the weights.

    Weights, LayerNorms, the residual stream and what comes out stay in fp32.
    """
    stacks = [module for tower in towers for module in tower.modules() if isinstance(module, Transformer)]
    before = [stack.dtype for stack in stacks]
    try:
        for stack in stacks:
            stack.dtype = dtype
        yield
    finally:
        for stack, previous in zip(stacks, before, strict=True):
            stack.dtype = previous


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
