"""What training minimises: losses between captions and pictures, and anchors at read points.

The losses hold a (B, B) matrix of all pairs. `contrastive.contrastive` is InfoNCE without one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEWTON_STEPS = 60  # at the most; a handful does, but where two far bounds have to be halved


def info_nce(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    smoothing: float = 0.0,
    same_picture: Tensor | None = None,
    same_caption: Tensor | None = None,
    entropy: float = 0.0,
) -> Tensor:
    """Symmetric InfoNCE over the pairs of a batch: the loss that CLIP was trained with (arXiv 2103.00020, figure 3).

    images, texts: (B, E), row i of one belongs to row i of the other; any length, normalised here, in fp32 or better.
    logit_scale: scalar, the logarithm of the temperature's inverse. same_picture, same_caption: (B,) group numbers
    (`alike`); rows of one group are not each other's negatives and are left out of both softmaxes, since they would
    contradict their own target. smoothing: label smoothing in both directions, 1 - smoothing + smoothing/n on the pair,
    smoothing/n on the other n - 1 that are not left out (torch.nn.functional.cross_entropy). entropy: its weight times
    the mean entropy of the softmaxes, in nats, is taken off the loss (the confidence penalty of arXiv 1701.06548).
    Holds (B, B) logits: the plain formula, for small batches and as the reference of `contrastive.contrastive`.
    """
    logits = _logits(images, texts, logit_scale)
    return _softmax_loss(logits, _left_out(logits, same_picture, same_caption), smoothing, entropy)


def siglip(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    bias: float | Tensor | None = None,
    same_picture: Tensor | None = None,
    same_caption: Tensor | None = None,
) -> Tensor:
    """SigLIP's sigmoid loss (arXiv 2303.15343): Σ softplus(-z (scale · cosine + bias)) over all pairs, over B.

    z is 1 for a picture and its caption, -1 for others. Arguments as of `info_nce`; what is left out there is left out
    of the sum here. bias: None takes the best one for these pairs (`best_bias`), as a constant: at its minimum the
    loss does not change with it, so that gradients are those of the loss with the bias minimised.
    """
    logits = _logits(images, texts, logit_scale)
    left_out = _left_out(logits, same_picture, same_caption)
    if bias is None:
        bias = best_bias(logits.detach(), left_out)
    logits = logits + bias
    own = F.logsigmoid(logits.diagonal()).sum()  # torch's softplus drops what is beyond 20
    others = F.logsigmoid(-logits).masked_fill(left_out | _own(logits), 0.0).sum()
    return -(own + others) / len(logits)


@torch.no_grad()
def best_bias(logits: Tensor, left_out: Tensor) -> Tensor:
    """The bias with which SigLIP's loss is the least, by Newton's method between two bounds. (B, B), (B, B) -> scalar

    The derivative is zero where Σ σ(x + bias) over the negatives equals Σ σ(-x - bias) over the pairs. The difference
    of the two sums' logarithms rises with a slope between 0 and 2 and does not underflow. The bounds are what the bias
    would be if every logit were the largest, or the smallest. Without negatives more is always better: the bias is then
    so large that the loss is 1e-9.
    """
    own, others = logits.diagonal(), logits.masked_fill(left_out | _own(logits), -torch.inf)
    negatives = ((~left_out).sum() - len(own)).clamp_min(1e-9 * len(own))
    odds = (len(own) / negatives).log().to(logits)
    least, most = odds - logits.max(), odds - logits.min()
    bias = (least + most) / 2
    for _ in range(NEWTON_STEPS):
        wrong, missed = F.logsigmoid(others + bias).flatten(), F.logsigmoid(-own - bias)
        gap = wrong.logsumexp(0) - missed.logsumexp(0)
        slope = (wrong.softmax(0) * (1 - wrong.exp())).sum() + (missed.softmax(0) * (1 - missed.exp())).sum()
        least, most = bias.where(gap < 0, least), bias.where(gap > 0, most)
        then = bias - gap / slope
        then = then.where((then > least) & (then < most), (least + most) / 2)
        step, bias = (then - bias).abs(), then
        if step <= 1e-5 * (1 + bias.abs()):  # what is left is of the order of its square
            break
    return bias


def seed_loss(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    smoothing: float = 0.0,
    same_picture: Tensor | None = None,
    same_caption: Tensor | None = None,
    entropy: float = 0.0,
) -> Tensor:
    """The loss of CLIP-fine-tune's GmP scripts, for repeating them (github.com/zer0int/CLIP-fine-tune, bdadc89).

    In place of cosines between features its softmaxes have Z[i, j] = cosine(what picture i scores with every caption,
    what caption j scores with every picture): rows of the matrix of logits are normalised, not features. It is all but
    flat where InfoNCE is not. Arguments as of `info_nce`; logit_scale only multiplies Z, 1/0.07 in the scripts, since
    the scale of the logits themselves falls out. smoothing: 1 - smoothing on the pair, smoothing/(n - 1) on others. A
    single pair has loss 0.
    """
    cosines = _logits(images, texts, torch.zeros_like(logit_scale))
    with torch.autocast(images.device.type, enabled=False):
        logits = logit_scale.to(cosines).exp() * F.normalize(cosines, dim=1) @ F.normalize(cosines.T, dim=1).T
    left_out = _left_out(logits, same_picture, same_caption)
    left = (~left_out).sum(dim=1).to(logits)
    # what cross_entropy gives the pair as well goes to the others here
    return _softmax_loss(logits, left_out, smoothing * left / (left - 1).clamp_min(1), entropy)


def _logits(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:  # (B, B) pictures × captions
    keep = torch.promote_types(torch.promote_types(images.dtype, texts.dtype), torch.float32)
    images, texts = (F.normalize(features.to(keep), dim=-1) for features in (images, texts))
    with torch.autocast(images.device.type, enabled=False):  # logits reach 100: bf16 would round them to halves
        return logit_scale.to(keep).exp() * images @ texts.T


def _left_out(logits: Tensor, *groups: Tensor | None) -> Tensor:
    """Where a row and a column are neither a pair nor each other's negatives. (B, B) bool, symmetric"""
    left_out = torch.zeros_like(logits, dtype=torch.bool)
    for group in groups:
        if group is not None:
            group = group.to(logits.device)
            left_out |= group[:, None] == group
    return left_out.fill_diagonal_(False)


def _own(logits: Tensor) -> Tensor:
    return torch.eye(len(logits), dtype=torch.bool, device=logits.device)


def _softmax_loss(logits: Tensor, left_out: Tensor, smoothing: float | Tensor, entropy: float) -> Tensor:
    """Mean over both directions of cross-entropy with the diagonal, less the weighted entropy.

    smoothing: of each row, as torch.nn.functional.cross_entropy has it.
    """
    logits = logits.masked_fill(left_out, -torch.inf)
    left = (~left_out).sum(dim=1)  # the same for rows and columns: the relation is symmetric
    loss = 0.0
    for dim in (0, 1):
        likelihood = logits.log_softmax(dim)
        there = likelihood.masked_fill(left_out, 0.0)
        mean = there.sum(dim) / left
        loss = loss - ((1 - smoothing) * likelihood.diagonal() + smoothing * mean).mean()
        if entropy:
            loss = loss + entropy * (likelihood.exp() * there).sum(dim).mean()
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
