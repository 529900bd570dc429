"""What training minimises: the contrastive loss between captions and pictures, and anchors at read points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    smoothing: float = 0.0,
    same_picture: Tensor | None = None,
    same_caption: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE over the pairs of a batch: the loss that CLIP was trained with (arXiv 2103.00020, figure 3).

    images, texts: (B, E), row i of one belongs to row i of the other; any length, normalised here, in fp32 or better.
    logit_scale: scalar, the logarithm of the temperature's inverse. same_picture, same_caption: (B,) group numbers
    (`alike`); rows of one group are not each other's negatives and are left out of both softmaxes, since they would
    contradict their own target. smoothing: label smoothing in both directions, 1 - smoothing + smoothing/n on the pair,
    smoothing/n on the other n - 1 that are not left out (torch.nn.functional.cross_entropy).
    Holds (B, B) logits: the plain formula, for small batches and as the reference of `contrastive.contrastive`.
    """
    keep = torch.promote_types(torch.promote_types(images.dtype, texts.dtype), torch.float32)
    images, texts = (F.normalize(features.to(keep), dim=-1) for features in (images, texts))
    with torch.autocast(images.device.type, enabled=False):  # logits reach 100: bf16 would round them to halves
        logits = logit_scale.to(keep).exp() * images @ texts.T  # (B, B) pictures × captions
    left_out = torch.zeros_like(logits, dtype=torch.bool)
    for group in (same_picture, same_caption):
        if group is not None:
            group = group.to(logits.device)
            left_out |= group[:, None] == group
    left_out.fill_diagonal_(False)
    logits = logits.masked_fill(left_out, -torch.inf)
    left = (~left_out).sum(dim=1)  # the same for rows and columns: the relation is symmetric
    loss = 0.0
    for dim in (0, 1):
        likelihood = logits.log_softmax(dim)
        mean = likelihood.masked_fill(left_out, 0.0).sum(dim) / left
        loss = loss - ((1 - smoothing) * likelihood.diagonal() + smoothing * mean).mean()
    return loss / 2


def anchor(features: Tensor, target: Tensor) -> Tensor:
    """How far rows have moved from `target`, in units of each row's own variance. (..., W), (..., W) -> scalar

    Mean over rows of mean((x - y)²) / var(y). Per row, because CLIP's first token has hidden states many times larger
    than the others: a common variance would let that one row hide the rest.
    """
    target = target.float()
    error = (features.float() - target).square().mean(dim=-1)
    return (error / target.var(dim=-1, unbiased=False).clamp_min(1e-12)).mean()


def mean_cosine(features: Tensor) -> Tensor:
    """Mean cosine between two different rows, in one pass: (‖Σ x/‖x‖‖² - B) / (B (B - 1)). (B, E) -> scalar

    1 is collapse: everything is embedded in the same direction. 0 for a single row.
    """
    count = len(features)
    total = F.normalize(features.float(), dim=-1).sum(dim=0).square().sum()
    return (total - count) / max(1, count * (count - 1))
