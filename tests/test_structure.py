"""Structure of prompts: against loops, numpy and the definitions, and what it does not see."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from gmp import READ_POINTS
from gmp.clip import TextConfig, TextTower
from gmp.structure import (
    TOLD_APART,
    cka,
    compare_structure,
    effective_rank,
    mean_cosine,
    prompt_vectors,
    rank_correlation,
    told_apart,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(width, seed=0):
    return torch.linalg.qr(normal(width, width, seed=seed).double()).Q.float()


def naive_hsic(k, other):
    """The U-statistic over all ordered quadruples of different samples (Song et al. 2012, equation 4)."""
    found = [
        k[i, j] * (other[i, j] + other[q, r] - 2 * other[i, q])
        for i, j, q, r in itertools.permutations(range(len(k)), 4)
    ]
    return np.mean(found)


def test_cka_is_the_one_of_unbiased_hsic():
    a, b = normal(7, 3), normal(7, 5, seed=1)
    b[:, :3] += a
    k, other = ((each.double() @ each.double().T).numpy() for each in (a, b))
    expected = naive_hsic(k, other) / math.sqrt(naive_hsic(k, k) * naive_hsic(other, other))
    assert cka(a, b) == pytest.approx(expected, rel=1e-5)


def test_unrelated_vectors_have_a_cka_near_zero_though_they_are_wider_than_many():
    a, b = normal(60, 500), normal(60, 500, seed=1)
    assert abs(cka(a, b)) < 0.05
    centred = [each - each.mean(dim=0) for each in (a, b)]
    grams = [each @ each.T for each in centred]
    assert (grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm()) > 0.7  # the plain one is fooled


def naive_spearman(a, b):
    def ranks(values):
        return np.array([np.mean([i for i, v in enumerate(sorted(values)) if v == value]) for value in values])

    x, y = ranks(a), ranks(b)
    return np.corrcoef(x, y)[0, 1]


def cosines(vectors):
    unit = vectors.double() / vectors.double().norm(dim=1, keepdim=True)
    return [round((unit[i] @ unit[j]).item(), 9) for i, j in itertools.combinations(range(len(vectors)), 2)]


def test_rank_correlation_is_spearmans_over_pairs():
    a = normal(12, 4)
    b = a + normal(12, 4, seed=1)
    assert rank_correlation(a, b) == pytest.approx(naive_spearman(cosines(a), cosines(b)), rel=1e-9)


def test_equal_cosines_share_their_rank():
    a = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [1, 1]])
    b = normal(5, 3)
    assert rank_correlation(a, b) == pytest.approx(naive_spearman(cosines(a), cosines(b)), rel=1e-9)


def test_mean_cosine_is_that_of_all_pairs():
    a = normal(9, 5)
    assert mean_cosine(a) == pytest.approx(np.mean(cosines(a)), abs=1e-8)


def test_effective_rank_is_the_exponential_of_the_entropy_of_singular_values():
    a = normal(20, 6) * torch.tensor([5, 3, 1, 1, 0.5, 0.1]) + 7
    values = np.linalg.svd((a - a.mean(dim=0)).double().numpy(), compute_uv=False)
    shares = values / values.sum()
    assert effective_rank(a) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)


def test_equally_strong_directions_count_one_each():
    eye = torch.eye(5)
    assert effective_rank(torch.cat([eye, -eye]) + 3) == pytest.approx(5, rel=1e-6)
    assert effective_rank(torch.outer(torch.arange(10.0), torch.ones(7))) == pytest.approx(1, abs=1e-6)


def test_a_prompt_is_told_apart_if_every_other_one_is_farther_than_a_hundredth_of_its_length():
    a = 100 * torch.eye(4, 6)
    near, far = 0.9 * TOLD_APART, 1.1 * TOLD_APART
    assert told_apart(torch.cat([a, a[:1] * (1 + near)])) == pytest.approx(3 / 5)
    assert told_apart(torch.cat([a, a[:1] * (1 + far)])) == 1
    assert told_apart(torch.cat([a, a[:1]])) == pytest.approx(3 / 5)


def test_a_rotation_and_a_factor_change_no_structure():
    a = normal(40, 16) + 2
    turned = 300 * a @ rotation(16)
    both = compare_structure({"last": turned, "pooled": a}, {"last": a})
    assert set(both) == {"last"}
    same = compare_structure({"last": a}, {"last": a})["last"]
    assert same.cka == pytest.approx(1) and same.rank_correlation == pytest.approx(1)
    for name in ("cka", "rank_correlation", "mean_cosine", "effective_rank", "told_apart"):
        assert getattr(both["last"], name) == pytest.approx(getattr(same, name), rel=1e-3), name


def test_noise_lowers_agreement_by_degrees():
    a = normal(80, 32)
    noisy = [a + amount * normal(80, 32, seed=3) for amount in (0.1, 0.5, 2.0)]
    for measure in (cka, rank_correlation):
        found = [measure(each, a) for each in noisy]
        assert 1 > found[0] > 0.9 > found[1] > found[2] > 0


def test_one_vector_for_every_prompt_has_no_structure_left():
    generator = torch.Generator().manual_seed(2)
    same = torch.ones(30, 8) + 1e-7 * torch.randn(30, 8, generator=generator)  # what fp32 leaves
    found = compare_structure({"last": same}, {"last": normal(30, 8)})["last"]
    assert (found.cka, found.effective_rank, found.told_apart) == (0, 0, 0)
    assert found.mean_cosine == pytest.approx(1)
    zeros = compare_structure({"last": torch.zeros(30, 8)}, {"last": normal(30, 8)})["last"]
    assert all(math.isfinite(value) for value in vars(zeros).values())


def test_huge_and_tiny_vectors_are_compared_like_any_others():
    a, b = normal(20, 6), normal(20, 6, seed=4)
    expected = compare_structure({"last": a}, {"last": b})["last"]
    found = compare_structure({"last": a * 1e18}, {"last": b * 1e-18})["last"]
    assert vars(found) == pytest.approx(vars(expected), rel=1e-4)


def test_too_few_prompts_are_refused():
    with pytest.raises(ValueError, match="at least 4"):
        cka(normal(3, 2), normal(3, 2))


# ---- prompt vectors -------------------------------------------------------------------------------------------------

END = 49


def tower(end_of_text=None):
    made = TextTower(TextConfig(32, 3, 2, 64, 12, 60, 16, "gelu", end_of_text))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return made.requires_grad_(False)


def captions(lengths, padding):
    """Start, words, end-of-text, padding."""
    ids = torch.randint(1, 40, (len(lengths), 12), generator=torch.Generator().manual_seed(6))
    ids[:, 0] = 48
    for row, length in zip(ids, lengths, strict=True):
        row[length - 1] = END
        row[length:] = padding
    return ids


@pytest.mark.parametrize("padding", [END, 0])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_vectors_are_means_up_to_the_end_of_text_in_the_given_order(batch, padding):
    sizes = [7, 2, 12, 4, 4, 9, 3]
    ids = captions(sizes, padding)
    made = tower(END)
    points = made(ids)
    found = prompt_vectors(made, ids, batch)
    assert set(found) == set(READ_POINTS)
    for at, size in enumerate(sizes):
        for point in ("penultimate", "last"):
            expected = getattr(points, point)[at, 1:size].mean(dim=0)
            torch.testing.assert_close(found[point][at], expected, rtol=1e-4, atol=1e-5)
        for point in ("pooled", "projected"):
            torch.testing.assert_close(found[point][at], getattr(points, point)[at], rtol=1e-4, atol=1e-5)


def test_the_end_of_text_is_the_configs_where_the_vocabulary_goes_on_behind_it():
    ids = captions([6, 8], END)
    ids[:, 2] = 55  # a token that was added later, and is not the end
    made = tower(END)
    torch.testing.assert_close(prompt_vectors(made, ids)["pooled"], made(ids).pooled, rtol=1e-4, atol=1e-5)
    last = made(ids).last
    torch.testing.assert_close(prompt_vectors(made, ids)["last"][0], last[0, 1:6].mean(dim=0), rtol=1e-4, atol=1e-5)


def test_vectors_that_are_not_finite_have_no_structure():
    whole = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    found = compare_structure(
        {"pooled": torch.full((6, 3), torch.nan), "last": whole}, {"pooled": whole, "last": whole}
    )
    assert all(math.isnan(value) for value in vars(found["pooled"]).values())
    assert found["last"].cka == pytest.approx(1)
