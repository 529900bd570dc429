"""The states of two text towers after every part of the computation, held against each other over prompts."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from .clip import TextTower, end_of_text
from .events import Event, progress
from .structure import mean_rows

BATCH = 32  # prompts; states of all blocks are held at once


@dataclass
class Compared:
    """Sums over the rows of all prompts after one part, and a vector per prompt of the tower and of the other."""

    sums: Tensor  # cosine, ‖a - b‖², ‖b‖², rows; fp64
    total: Tensor | float  # Σ b (W,)
    largest: list[float]  # |state| of the tower, and of the other
    vectors: tuple[list[Tensor], list[Tensor]]

    @property
    def cosine(self) -> float | None:
        """Mean over rows; None where a state is not finite."""
        return _finite(self.sums[0] / self.sums[3])

    @property
    def error(self) -> float | None:
        """√(Σ ‖a - b‖² / Σ ‖b - mean of b‖²): 1 is as far off as the other's mean state is, whatever the prompt."""
        spread = self.sums[2] - self.total.square().sum() / self.sums[3]
        return _finite((self.sums[1] / spread.clamp_min(1e-30)).sqrt())

    def prompts(self) -> tuple[Tensor, Tensor]:
        """Vectors (N, D) of the tower and of the other, row by row of the same prompt."""
        return torch.cat(self.vectors[0]), torch.cat(self.vectors[1])


def _finite(value: Tensor) -> float | None:
    return value.item() if value.isfinite() else None


@torch.no_grad()
def states(tower: TextTower, ids: Tensor, ends: Tensor) -> dict[str, Tensor]:
    """What every part gives, computed as `TextTower.forward` does; `pooled` as well.

    (B, L), (B,) positions of end-of-text -> `embeddings`, `block 0` …, `final LayerNorm` (B, L, W), `pooled` (B, W),
    `projection` (B, E)
    """
    x = tower.token_embedding(ids) + tower.positional_embedding[: ids.shape[1]]
    found = {"embeddings": x}
    for number, block in enumerate(tower.transformer.resblocks):
        x = tower.transformer.run(block, x, causal=True)
        found[f"block {number}"] = x
    last = tower.ln_final(x)
    pooled = last[torch.arange(len(ids), device=ids.device), ends]
    return found | {"final LayerNorm": last, "pooled": pooled, "projection": pooled @ tower.text_projection}


def compare_states(tower: TextTower, other: TextTower, ids: Tensor) -> Generator[Event, None, dict[str, Compared]]:
    """By part, as `states` names them, over prompts (N, L). Yields progress events.

    Prompts are taken by length and cut to their batch's longest; rows 1 … end-of-text count, and a prompt's vector is
    their mean, as for `prompt_vectors`.
    """
    device = tower.positional_embedding.device
    ends = end_of_text(ids, other.text_config.end_of_text)
    found: dict[str, Compared] = {}
    done = 0
    for rows in ends.argsort().split(BATCH):
        at = ends[rows].to(device)
        batch = ids[rows, : ends[rows].max() + 1].to(device)
        mine, theirs = states(tower, batch, at), states(other, batch, at)
        for name, one in theirs.items():
            sums = torch.zeros(4, dtype=torch.float64)
            _add(found.setdefault(name, Compared(sums, 0.0, [0.0, 0.0], ([], []))), mine[name], one, at)
        done += len(rows)
        yield progress("encode prompts", done, len(ids))
    return found


@torch.no_grad()
def _add(to: Compared, mine: Tensor, theirs: Tensor, ends: Tensor) -> None:
    for side, each in enumerate((mine, theirs)):
        vectors = mean_rows(each, ends) if each.dim() == 3 else each
        to.vectors[side].append(vectors.float().cpu())
        to.largest[side] = max(to.largest[side], each.abs().max().nan_to_num(torch.inf).item())
    if mine.dim() == 3:
        at = torch.arange(mine.shape[1], device=mine.device)
        counted = (at[None] >= 1) & (at[None] <= ends[:, None])
        mine, theirs = mine[counted], theirs[counted]
    lengths = mine.norm(dim=1), theirs.norm(dim=1)
    cosines = (mine * theirs).sum(dim=1) / (lengths[0] * lengths[1]).clamp_min(1e-30)
    rows = torch.stack([cosines, (mine - theirs).norm(dim=1).square(), lengths[1].square(), torch.ones_like(cosines)])
    to.sums += rows.cpu().double().sum(dim=1)
    to.total = to.total + theirs.sum(dim=0).cpu().double()
