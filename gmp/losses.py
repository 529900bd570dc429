"""What training minimises: the contrastive loss between captions and pictures, and anchors at read points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, smoothing: float = 0.0) -> Tensor:
    """Symmetric InfoNCE over the pairs of a batch: the loss that CLIP was trained with (arXiv 2103.00020, figure 3).

    image_features, text_features: (B, E), row i of one belongs to row i of the other; any length, normalised here.
    logit_scale: scalar, the logarithm of the temperature's inverse. smoothing: label smoothing in both directions,
    1 - smoothing + smoothing/B on the pair, smoothing/B elsewhere (torch.nn.functional.cross_entropy).
    """
    images = F.normalize(image_features.float(), dim=-1)
    texts = F.normalize(text_features.float(), dim=-1)
    with torch.autocast(images.device.type, enabled=False):  # logits reach 100: bf16 would round them to halves
        logits = logit_scale.float().exp() * images @ texts.T  # (B, B) pictures × captions
    pairs = torch.arange(len(logits), device=logits.device)
    to_text = F.cross_entropy(logits, pairs, label_smoothing=smoothing)
    to_image = F.cross_entropy(logits.T, pairs, label_smoothing=smoothing)
    return (to_text + to_image) / 2


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
