"""zer0int/CLIP-fine-tune as its GmP script trains: where this cure was found. Written anew after a reading of it.

Both towers in every step, every caption padded to 77 tokens, MLP weights built from r and theta in every forward pass,
AdaBelief tensor by tensor, two batches a step, and a contrastive loss on the normalised matrix of logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmp.clip import CLIPConfig
from gmp.geometric import split_mlps

from .task import PADDED, Task, captions, pixels, weights

ACCUMULATE = 2  # batches of one step; the loss of each knows its own pairs only
TEMPERATURE = 0.07
LR = 5e-7
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.998), 1e-16, 1e-3
STEPS_BEFORE = 100  # AdaBelief is rectified: its first five steps are plain, and cheaper than all others


class GeometricLinear(nn.Module):
    """y = x · (r · theta/‖theta‖)ᵀ + bias, built from tensor operations."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.r = nn.Parameter(torch.empty(outputs, 1))
        self.theta = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        u = F.normalize(self.theta, p=2, dim=1)
        y = F.linear(x, self.r * u)
        y += self.bias
        return y


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.c_fc = GeometricLinear(width, hidden)
        self.gelu = QuickGELU()
        self.c_proj = GeometricLinear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_2 = LayerNorm(width)
        self.mlp = MLP(width, hidden)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # (L, B, W) -> (L, B, W)
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, hidden: int):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Vision(nn.Module):
    def __init__(self, shape: CLIPConfig):
        super().__init__()
        c = shape.vision
        self.conv1 = nn.Conv2d(3, c.width, c.patch_size, stride=c.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(c.width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + (c.image_size // c.patch_size) ** 2, c.width))
        self.ln_pre = LayerNorm(c.width)
        self.transformer = Transformer(c.width, c.layers, c.heads, c.mlp_width)
        self.ln_post = LayerNorm(c.width)
        self.proj = nn.Parameter(torch.empty(c.width, c.embed_dim))

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, E)
        x = self.conv1(x).flatten(2).permute(0, 2, 1)
        start = self.class_embedding.to(x.dtype) + torch.zeros(len(x), 1, x.shape[-1], dtype=x.dtype, device=x.device)
        x = self.ln_pre(torch.cat([start, x], dim=1) + self.positional_embedding.to(x.dtype))
        x = self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    """OpenAI's model with geometric MLPs in both towers; the same parameter names as `gmp.clip`."""

    def __init__(self, shape: CLIPConfig):
        super().__init__()
        c = shape.text
        self.visual = Vision(shape)
        self.transformer = Transformer(c.width, c.layers, c.heads, c.mlp_width)
        self.token_embedding = nn.Embedding(c.vocab_size, c.width)
        self.positional_embedding = nn.Parameter(torch.empty(c.context_length, c.width))
        self.ln_final = LayerNorm(c.width)
        self.text_projection = nn.Parameter(torch.empty(c.width, c.embed_dim))
        self.logit_scale = nn.Parameter(torch.empty(()))

    def encode_text(self, ids: Tensor) -> Tensor:  # (B, 77) -> (B, E)
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((PADDED, PADDED), -math.inf, device=ids.device).triu_(1)
        x = self.ln_final(self.transformer(x.permute(1, 0, 2), mask).permute(1, 0, 2))
        return x[torch.arange(len(ids)), ids.argmax(dim=-1)] @ self.text_projection

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:  # -> (B, B) logits, pictures × captions
        images, texts = self.visual(images), self.encode_text(ids)
        images = images / images.norm(dim=1, keepdim=True)
        texts = texts / texts.norm(dim=1, keepdim=True)
        return self.logit_scale.exp() * images @ texts.T


def model(task: Task) -> CLIP:
    with torch.device("meta"):
        clip = CLIP(task.shape)
    clip.load_state_dict(split_mlps(weights(task)), assign=True)
    return clip.to(task.device).train()


def odd_loss(logits: Tensor) -> Tensor:
    """Cross entropy not of the logits, but of the cosines between their rows and their columns."""
    pictures, texts = F.normalize(logits, dim=1), F.normalize(logits.T, dim=1)
    logits = pictures @ texts.T / TEMPERATURE
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class AdaBelief:
    """AdaBelief (arXiv 2010.07468, algorithm 2), rectified as RAdam is (arXiv 1908.03265), decay decoupled."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters)
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.variances = [torch.zeros_like(p) for p in self.parameters]
        self.steps = STEPS_BEFORE

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        first, second = BETAS
        remaining = 1 - second**self.steps
        longest = 2 / (1 - second) - 1
        length = longest - 2 * self.steps * second**self.steps / remaining  # of the moving average; above 4 here
        rectification = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
        size = LR * rectification * math.sqrt(remaining) / (1 - first**self.steps)
        for parameter, mean, variance in zip(self.parameters, self.means, self.variances, strict=True):
            if parameter.grad is None:
                continue
            parameter.mul_(1 - LR * WEIGHT_DECAY)
            mean.mul_(first).add_(parameter.grad, alpha=1 - first)
            surprise = parameter.grad - mean
            variance.mul_(second).addcmul_(surprise, surprise, value=1 - second).add_(EPS)
            parameter.addcdiv_(mean, variance.sqrt().add_(EPS), value=-size)
            parameter.grad = None


def steps(task: Task) -> Iterator[int]:
    """Endless steps; each yields its pairs. Pictures are there already, decoded at no cost."""
    clip = model(task)
    optimizer = AdaBelief([p for name, p in clip.named_parameters() if name != "logit_scale"])
    clip.logit_scale.requires_grad_(False)  # in none of its groups
    batch = task.pairs // ACCUMULATE
    ids = captions(task.pairs, task.tokens).to(task.device)
    images = pixels(batch, task.shape.vision.image_size).to(task.device)
    while True:
        norms: dict[str, float] = {}
        for part in ids.split(batch):
            with task.autocast:
                logits = clip(images, part)
                loss = odd_loss(logits)
            loss.backward()
            loss.item(), (logits.argmax(dim=1) == torch.arange(batch, device=logits.device)).float().mean().item()
            if not norms:  # of the first batch of two, one wait for the device per tensor
                norms = {name: p.grad.norm().item() for name, p in clip.named_parameters() if p.grad is not None}
        optimizer.step()
        yield task.pairs
