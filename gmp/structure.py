"""How a text tower arranges prompts at every read point: which ones lie near which, and whether it tells them apart.

A text encoder can be far from the original in every vector and keep this arrangement (a rotation does that), and it can
lose the arrangement, or collapse, while its vectors stay near. Cosines to the original mix the two up; these numbers
keep them apart. All of them ignore a rotation and a common factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import READ_POINTS
from .clip import ReadPoints, TextTower, end_of_text

# Hosts compute text encoders in fp16 or bf16, whose rounding over a dozen blocks moves a vector by about a hundredth of
# its length: what lies nearer than that is the same prompt to the diffusion model.
TOLD_APART = 0.01
# fp32 leaves about 1e-6 of a vector's length as noise: singular values below this share of all vectors' common length
# are no structure. Without it, a tower that answers every prompt with one vector would have the full rank of its noise.
ROUNDING = 1e-5
LEAST = 4  # prompts: the unbiased estimate divides by N - 3


@dataclass(frozen=True)
class Structure:
    """One read point of one tower over N prompts, against another tower's."""

    cka: float  # linear, debiased; 1 is the same structure
    rank_correlation: float  # Spearman over pairs of prompts, of their cosines here and there
    mean_cosine: float  # of all pairs of prompts: near 1 is collapse
    effective_rank: float  # of the centred vectors: how many directions carry the differences
    told_apart: float  # share of prompts that the tower tells from every other one, see `told_apart`

    @property
    def agreement(self) -> float:
        """The lower one of CKA and rank correlation: at most 1, which is the other tower's arrangement of prompts."""
        return min(self.cka, self.rank_correlation)


@torch.no_grad()
def prompt_vectors(tower: TextTower, ids: Tensor, batch: int = 64) -> dict[str, Tensor]:
    """One vector per prompt at every read point: (N, L) -> read point -> (N, D) in fp32 on the CPU, in the given order.

    `penultimate` and `last`: the mean of rows 1 … end-of-text; row 0 is the same for every prompt. `pooled` and
    `projected`: the vector itself. Prompts are taken by length and cut to their batch's longest, which changes nothing:
    attention is causal.
    """
    ends = end_of_text(ids, tower.text_config.end_of_text)
    order = ends.argsort()
    device = tower.positional_embedding.device
    found: dict[str, list[Tensor]] = {point: [] for point in READ_POINTS}
    for rows in order.split(batch):
        points = tower(ids[rows, : ends[rows].max() + 1].to(device))
        for point, vectors in _vectors(points, ends[rows].to(device)).items():
            found[point].append(vectors.float().cpu())
    back = order.argsort()
    return {point: torch.cat(vectors)[back] for point, vectors in found.items()}


def _vectors(points: ReadPoints, ends: Tensor) -> dict[str, Tensor]:
    return {
        "penultimate": mean_rows(points.penultimate, ends),
        "last": mean_rows(points.last, ends),
        "pooled": points.pooled,
        "projected": points.projected,
    }


def mean_rows(states: Tensor, ends: Tensor) -> Tensor:
    """The mean of rows 1 … end of each prompt, end included: (B, L, W), (B,) -> (B, W)"""
    at = torch.arange(states.shape[1], device=states.device)
    counted = ((at[None] >= 1) & (at[None] <= ends[:, None])).to(states.dtype)
    return torch.einsum("blw,bl->bw", states, counted) / counted.sum(dim=1, keepdim=True).clamp_min(1)


def compare_structure(vectors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Structure]:
    """Structure of one tower's prompt vectors against another's, at every read point that both have.

    Row i of both is the same prompt, (N, D) and (N, E); the widths may differ. Needs four prompts. All numbers are NaN
    where a vector is not finite.
    """
    return {point: _structure(mine, others[point]) for point, mine in vectors.items() if point in others}


def _structure(mine: Tensor, others: Tensor) -> Structure:
    if not (mine.isfinite().all() and others.isfinite().all()):
        return Structure(*[math.nan] * 5)
    return Structure(
        cka=cka(mine, others),
        rank_correlation=rank_correlation(mine, others),
        mean_cosine=mean_cosine(mine),
        effective_rank=effective_rank(mine),
        told_apart=told_apart(mine),
    )


def cka(vectors: Tensor, others: Tensor) -> float:
    """Linear centred kernel alignment, debiased: (N, D), (N, E) -> at most 1, about 0 for unrelated vectors.

    HSIC(K, L) / √(HSIC(K, K) · HSIC(L, L)) (Kornblith et al. 2019, arXiv 1905.00414) with the unbiased HSIC of Song et
    al. 2012 (Nguyen et al. 2021, arXiv 2010.15327): the plain one rises towards 1 where vectors are wider than prompts
    are many. 0 where one of the two tells no prompts apart.
    """
    if len(vectors) != len(others) or len(vectors) < LEAST:
        raise ValueError(f"{len(vectors)} and {len(others)} prompts; both need the same ones, at least {LEAST}")
    grams = [_centred(_scaled(each)) for each in (vectors, others)]
    if any(gram is None for gram in grams):
        return 0.0
    mine, theirs = (gram @ gram.T for gram in grams)
    own = _hsic(mine, mine), _hsic(theirs, theirs)
    return _hsic(mine, theirs) / math.sqrt(own[0] * own[1]) if min(own) > 0 else 0.0


def _scaled(vectors: Tensor) -> Tensor:
    """In double precision, of mean length 1: squares of squares of large states would leave the range otherwise."""
    vectors = vectors.double()
    return vectors / vectors.square().sum(dim=1).mean().sqrt().clamp_min(1e-300)


def _centred(vectors: Tensor) -> Tensor | None:
    """Differences from the mean of all; None where they are mere rounding."""
    centred = vectors - vectors.mean(dim=0)
    return centred if centred.norm() > ROUNDING * vectors.norm() else None


def _hsic(k: Tensor, other: Tensor) -> float:
    """The unbiased Hilbert-Schmidt independence criterion of two Gram matrices (Song et al. 2012, equation 5)."""
    n = len(k)
    k, other = k - torch.diag(k.diagonal()), other - torch.diag(other.diagonal())
    trace = (k * other).sum()
    sums = k.sum() * other.sum() / ((n - 1) * (n - 2))
    mixed = 2 * (k.sum(dim=0) @ other.sum(dim=1)) / (n - 2)
    return ((trace + sums - mixed) / (n * (n - 3))).item()


def rank_correlation(vectors: Tensor, others: Tensor) -> float:
    """Spearman's correlation over all pairs of prompts, of their cosines here and there: (N, D), (N, E) -> -1 … 1

    Whether the prompts that lie near each other in one tower are those that do in the other. Equal cosines share their
    mean rank. 0 where all cosines of one tower are equal.
    """
    mine, theirs = (_ranks(_pairs(each)) for each in (vectors, others))
    mine, theirs = mine - mine.mean(), theirs - theirs.mean()
    length = mine.norm() * theirs.norm()
    return (mine @ theirs / length).item() if length > 0 else 0.0


def _cosines(vectors: Tensor) -> Tensor:
    unit = F.normalize(_scaled(vectors), dim=1, eps=1e-30)
    return unit @ unit.T


def _pairs(vectors: Tensor) -> Tensor:
    """The cosine of every pair of different prompts, rounded to what fp32 vectors tell. (N, D) -> (N (N - 1) / 2,)"""
    upper = torch.triu_indices(len(vectors), len(vectors), 1)
    return _cosines(vectors)[upper[0], upper[1]].round(decimals=9)


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0; equal values have their mean rank. (M,) -> (M,)"""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() + 1) / 2)[place]


def mean_cosine(vectors: Tensor) -> float:
    """Mean cosine of all pairs of prompts: near 1, all lie in one direction. (N, D) -> -1 … 1"""
    return _pairs(vectors).mean().item()


def effective_rank(vectors: Tensor) -> float:
    """exp of the entropy of the centred vectors' singular values, normalised to sum 1 (Roy and Vetterli 2007).

    (N, D) -> 0 where all vectors are equal, 1 for one direction of difference, at most min(N - 1, D).
    """
    scaled = _scaled(vectors)
    centred = scaled - scaled.mean(dim=0)
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()  # many times quicker than a decomposition of the vectors
    values = values[values > ROUNDING * scaled.norm()]
    if not len(values):
        return 0.0
    shares = values / values.sum()
    return math.exp(-(shares * shares.log()).sum().item())


def told_apart(vectors: Tensor) -> float:
    """Share of prompts whose nearest other prompt is farther than `TOLD_APART` of their own length. (N, D) -> 0 … 1

    Distance and length of the vectors as they are, since diffusion models read them so; a vector of length 0 is told
    from none.
    """
    scaled = _scaled(vectors)
    distances = torch.cdist(scaled, scaled, compute_mode="use_mm_for_euclid_dist")  # in fp64 it is exact enough
    distances.fill_diagonal_(torch.inf)
    return (distances.amin(dim=1) > TOLD_APART * scaled.norm(dim=1)).double().mean().item()
