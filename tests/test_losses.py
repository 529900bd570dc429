"""What training minimises, against the textbook."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gmp.losses import anchor, info_nce


def features(rows=7, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, width, generator=generator)


def by_the_open_formula(images, texts, scale, smoothing):
    """Loops over rows in Python floats."""
    images = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in images.double().tolist()]
    texts = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in texts.double().tolist()]
    logits = [[math.exp(scale) * sum(a * b for a, b in zip(i, t, strict=True)) for t in texts] for i in images]
    n = len(logits)

    def one_way(rows):
        total = 0.0
        for i, row in enumerate(rows):
            top = max(row)
            normaliser = top + math.log(sum(math.exp(v - top) for v in row))
            for j, value in enumerate(row):
                target = smoothing / n + (1 - smoothing if i == j else 0)
                total -= target * (value - normaliser)
        return total / n

    return (one_way(logits) + one_way(list(zip(*logits, strict=True)))) / 2


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("scale", [0.0, 2.6, math.log(100)])
def test_info_nce(scale, smoothing):
    images, texts = features()
    found = info_nce(images, texts, torch.tensor(scale), smoothing)
    assert found.item() == pytest.approx(by_the_open_formula(images, texts, scale, smoothing), rel=1e-5)
    logits = math.exp(scale) * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    pairs = torch.arange(len(logits))
    both = [F.cross_entropy(matrix, pairs, label_smoothing=smoothing) for matrix in (logits, logits.T)]
    assert found.item() == pytest.approx(sum(both).item() / 2, rel=1e-6)


def test_info_nce_gradients():
    images, texts = features().double().requires_grad_()
    scale = torch.tensor(1.0, requires_grad=True)
    mine = torch.autograd.grad(info_nce(images, texts, scale), (images, texts, scale))
    logits = scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    matching = logits.log_softmax(dim=1).diagonal() + logits.log_softmax(dim=0).diagonal()
    theirs = torch.autograd.grad(-matching.mean() / 2, (images, texts, scale))
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_both_directions_count():
    images, texts = features()
    swapped = info_nce(texts, images, torch.tensor(2.0))
    assert info_nce(images, texts, torch.tensor(2.0)).item() == pytest.approx(swapped.item(), rel=1e-6)
    logits = math.exp(2.0) * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    one_way = F.cross_entropy(logits, torch.arange(7)).item()
    assert abs(swapped.item() - one_way) > 1e-3


def test_lengths_do_not_matter():
    images, texts = features()
    lengths = torch.rand(7, 1, generator=torch.Generator().manual_seed(1)) * 10 + 0.1
    a, b = (info_nce(images * s, texts, torch.tensor(2.0)).item() for s in (1, lengths))
    assert a == pytest.approx(b, rel=1e-5)


def test_swapping_two_captions_raises_the_loss():
    """A row-normalised loss without targets, as an ancestor of this code had, gives both the same value."""
    images, _ = features()
    aligned = info_nce(images, images, torch.tensor(2.0)).item()
    swapped = info_nce(images, images[[1, 0, *range(2, 7)]], torch.tensor(2.0)).item()
    shuffled = info_nce(images, images.roll(1, dims=0), torch.tensor(2.0)).item()
    assert swapped > aligned + 0.5
    assert shuffled > swapped + 0.5


def test_collapsed_features_give_log_of_the_batch():
    one = torch.ones(8, 12)
    assert info_nce(one, one, torch.tensor(3.0)).item() == pytest.approx(math.log(8), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_computed_in_fp32_under_autocast(dtype):
    """Logits reach 100; bf16 would round them to steps of 0.5."""
    images, texts = features(32, 64)
    scale = torch.tensor(math.log(100))
    expected = info_nce(images, texts, scale)
    assert expected > 1
    with torch.autocast("cpu", dtype=dtype):
        found = info_nce(images, texts, scale)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_low_precision_features_are_taken():
    images, texts = features().bfloat16()
    found = info_nce(images, texts, torch.tensor(2.0))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(info_nce(images.float(), texts.float(), torch.tensor(2.0)).item(), rel=1e-6)


def naive_anchor(found, target):
    values = []
    for x, y in zip(found.flatten(0, -2).double(), target.flatten(0, -2).double(), strict=True):
        variance = ((y - y.mean()) ** 2).mean()
        values.append((((x - y) ** 2).mean() / variance).item())
    return sum(values) / len(values)


@pytest.mark.parametrize("shape", [(5, 12), (3, 4, 12)])
def test_anchor(shape):
    generator = torch.Generator().manual_seed(0)
    found, target = torch.randn(2, *shape, generator=generator)
    assert anchor(found, target).item() == pytest.approx(naive_anchor(found, target), rel=1e-5)
    assert anchor(target, target).item() == 0


def test_anchor_weighs_every_row_alike():
    """A row a thousand times larger than the others, as CLIP's first token is, does not hide them."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(4, 12, generator=generator)
    moved = target + 0.5 * torch.randn(4, 12, generator=generator)
    size = torch.tensor([1000.0, 1, 1, 1])[:, None]
    assert anchor(moved * size, target * size).item() == pytest.approx(anchor(moved, target).item(), rel=1e-4)
    partly = target.clone()
    partly[1] = moved[1]
    assert anchor(partly * size, target * size).item() > 0.01


def test_anchor_survives_constant_rows():
    found = torch.zeros(2, 12, requires_grad=True)
    loss = anchor(found, torch.zeros(2, 12))
    loss.backward()
    assert loss.item() == 0 and found.grad.isfinite().all()
