"""What training minimises, against the textbook."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gmp import duplicates
from gmp.contrastive import Gallery, contrastive
from gmp.duplicates import alike, alike_keys, masked_pairs
from gmp.errors import InputError
from gmp.losses import anchor, info_nce, seed_loss, siglip
from tests.open_clip_peer import open_clip


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


# Duplicates, blocks and the gallery, against loops over rows: each softmax runs over a list of candidates


def among(logits, own, smoothing):
    """Cross-entropy of one row over its candidates; `own` is the position of the right one."""
    likelihood = logits.log_softmax(0)
    return -(1 - smoothing) * likelihood[own] - smoothing * likelihood.mean()


def candidates(i, groups, count):
    return [j for j in range(count) if j == i or not any(group[i] == group[j] for group in groups)]


def by_loops(images, texts, scale, smoothing=0.0, same_picture=None, same_caption=None):
    groups = [group.tolist() for group in (same_picture, same_caption) if group is not None]
    logits = scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    total = 0.0
    for i in range(len(images)):
        those = candidates(i, groups, len(images))
        for row in (logits[i], logits[:, i]):
            total = total + among(row[those], those.index(i), smoothing)
    return total / (2 * len(images))


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some_groups(count, kinds, seed=0):
    return torch.randint(kinds, (count,), generator=torch.Generator().manual_seed(seed))


def value_and_gradients(loss, *inputs):
    inputs = [each.detach().clone().requires_grad_() for each in inputs]
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def assert_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).norm() <= tolerance * b.norm(), (a, b)


GROUPS = {
    "none": (None, None),
    "pictures": (some_groups(23, 9), None),
    "captions": (None, some_groups(23, 9, seed=1)),
    "both": (some_groups(23, 12), some_groups(23, 12, seed=1)),
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss", [info_nce, contrastive])
def test_duplicates_are_left_out_of_both_softmaxes(loss, smoothing, groups):
    inputs = numbers(23, 6), numbers(23, 6, seed=1), torch.tensor(1.5, dtype=torch.float64)
    groups = dict(zip(("same_picture", "same_caption"), groups, strict=True))
    found = value_and_gradients(lambda *x: loss(*x, smoothing=smoothing, **groups), *inputs)
    assert_close(found, value_and_gradients(lambda *x: by_loops(*x, smoothing, **groups), *inputs), 1e-12)


@pytest.mark.parametrize("block", [1, 4, 7, 23, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("scale", [0.0, math.log(100)])
def test_blocks_change_nothing(block, smoothing, scale):
    inputs = numbers(23, 6), numbers(23, 6, seed=1), torch.tensor(scale, dtype=torch.float64)
    groups = dict(zip(("same_picture", "same_caption"), GROUPS["both"], strict=True))
    found = value_and_gradients(lambda *x: contrastive(*x, smoothing=smoothing, block=block, **groups), *inputs)
    assert_close(found, value_and_gradients(lambda *x: info_nce(*x, smoothing, **groups), *inputs), 1e-11)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_contrastive_gives_the_gradients_that_are_asked_for(needed):
    inputs = numbers(9, 6), numbers(9, 6, seed=1), torch.tensor(1.5, dtype=torch.float64)
    expected = value_and_gradients(info_nce, *inputs)
    asked = [each.requires_grad_(i in needed) for i, each in enumerate(inputs)]
    (3 * contrastive(*asked, block=4)).backward()
    for i, each in enumerate(asked):
        if i in needed:
            assert_close([each.grad], [3 * expected[1 + i]], 1e-12)
        else:
            assert each.grad is None


def test_contrastive_without_gradients():
    images, texts = features()
    scale = torch.tensor(2.0, requires_grad=True)
    with torch.no_grad():
        found = contrastive(images, texts, scale, block=3)
    assert not found.requires_grad
    assert found.item() == pytest.approx(info_nce(images, texts, scale).item(), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss", [info_nce, contrastive])
def test_pictures_that_are_all_alike_teach_nothing(loss, smoothing):
    inputs = numbers(9, 6), numbers(9, 6, seed=1), torch.tensor(2.0, dtype=torch.float64)
    same = torch.zeros(9, dtype=torch.int64)
    found = value_and_gradients(lambda *x: loss(*x, smoothing=smoothing, same_picture=same), *inputs)
    assert all((each.abs() < 1e-15).all() for each in found)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_contrastive_in_single_precision(smoothing):
    """As close to fp64 as the plain formula in fp32 is, at CLIP's own temperature."""
    texts = numbers(300, 64, seed=1)
    images = texts + 2 * numbers(300, 64)
    scale = torch.tensor(math.log(100), dtype=torch.float64)
    groups = {"same_picture": some_groups(300, 250), "same_caption": some_groups(300, 250, seed=1)}
    expected = value_and_gradients(lambda *x: info_nce(*x, smoothing, **groups), images, texts, scale)
    singles = images.float(), texts.float(), scale.float()
    found = value_and_gradients(lambda *x: contrastive(*x, smoothing=smoothing, block=64, **groups), *singles)
    assert all(each.dtype == torch.float32 for each in found)
    assert_close(found, expected, 2e-5)


def test_contrastive_of_pairs_that_are_all_but_learnt():
    """1 - p of the own pair is 1e-7 to 1e-5 here: as a difference of numbers near 1 it would be noise in fp32."""
    texts = torch.eye(16, dtype=torch.float64) + 0.02 * numbers(16, 16)
    inputs = texts + 0.02 * numbers(16, 16, seed=1), texts, torch.tensor(math.log(15), dtype=torch.float64)
    expected = value_and_gradients(by_loops, *inputs)
    assert 1e-7 < expected[0] < 1e-4
    found = value_and_gradients(lambda *x: contrastive(*x, block=5), *[each.float() for each in inputs])
    assert_close(found, expected, 1e-4)


def test_contrastive_of_pairs_that_point_the_wrong_way():
    """Logits of -100 for the own pair and of 100 for another: exp(200) is no number in fp32."""
    texts = F.one_hot(torch.arange(8) // 2).double() * torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)[:, None]
    inputs = -texts, texts, torch.tensor(math.log(100), dtype=torch.float64)
    found = value_and_gradients(lambda *x: contrastive(*x, block=3), *[each.float() for each in inputs])
    assert found[0] == pytest.approx(200)
    expected = value_and_gradients(by_loops, *inputs)
    assert_close([found[0], found[3]], [expected[0], expected[3]], 1e-5)  # features move along themselves: gradient 0
    assert all(each.isfinite().all() for each in found)


def test_contrastive_takes_a_row_of_zeros():
    images, texts = numbers(2, 9, 6)
    texts[4] = 0
    inputs = images, texts, torch.tensor(2.0, dtype=torch.float64)
    found = value_and_gradients(lambda *x: contrastive(*x, block=4), *inputs)
    assert_close(found, value_and_gradients(info_nce, *inputs), 1e-12)


def test_contrastive_is_the_same_to_the_bit_when_repeated():
    inputs = *features(50, 16), torch.tensor(3.0)
    groups = {"same_picture": some_groups(50, 30), "same_caption": some_groups(50, 30, seed=1)}
    one, other = (value_and_gradients(lambda *x: contrastive(*x, block=16, **groups), *inputs) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(one, other, strict=True))


class Largest(TorchDispatchMode):
    """Notes the most elements that a tensor had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [each.numel() for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_contrastive_holds_no_square_matrix(smoothing):
    inputs = *features(96, 4), torch.tensor(3.0)
    groups = {"same_picture": some_groups(96, 60), "same_caption": torch.zeros(96, dtype=torch.int64)}
    with Largest() as largest:
        value_and_gradients(lambda *x: contrastive(*x, smoothing=smoothing, block=12, **groups), *inputs)
    assert largest.elements == 96 * 4
    with Largest() as largest:
        value_and_gradients(info_nce, *inputs)
    assert largest.elements == 96 * 96


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_contrastive_multiplies_in_single_precision(dtype):
    images, texts = features(32, 64)
    scale = torch.tensor(math.log(100))
    expected = value_and_gradients(contrastive, images, texts, scale)
    with torch.autocast("cpu", dtype=dtype):
        found = value_and_gradients(contrastive, images, texts, scale)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    low = value_and_gradients(contrastive, images.to(dtype), texts.to(dtype), scale)
    assert [each.dtype for each in low] == [torch.float32, dtype, dtype, torch.float32]
    expected = value_and_gradients(contrastive, images.to(dtype).float(), texts.to(dtype).float(), scale)
    assert low[0].equal(expected[0]) and low[1].equal(expected[1].to(dtype))


def test_features_that_do_not_pair_up_are_refused():
    images, texts = features()
    scale = torch.tensor(2.0)
    with pytest.raises(InputError, match=r"\(7, 12\) and \(6, 12\)"):
        contrastive(images, texts[:6], scale)
    with pytest.raises(InputError, match="at\\(pictures"):
        contrastive(images, texts, scale, gallery=Gallery.of(images))
    with pytest.raises(InputError, match="6 of the batch's 7"):
        contrastive(images, texts, scale, gallery=Gallery.of(images).at(torch.arange(6)))


# The gallery: 40 pictures with 1 to 3 captions each, a batch of 11

COUNTS = (1 + some_groups(40, 3, seed=2)).tolist()
PICTURES = torch.randperm(40, generator=torch.Generator().manual_seed(3))[:11]
CHOICE = torch.tensor([i % COUNTS[p] for i, p in enumerate(PICTURES.tolist())])
CAPTIONS = torch.tensor(COUNTS).cumsum(0)[PICTURES] - torch.tensor(COUNTS)[PICTURES] + CHOICE  # rows of all captions
WORLDS = {
    "no duplicates": (torch.arange(40) * 3, torch.arange(sum(COUNTS)) * 5),
    "few": (some_groups(40, 60, seed=4), some_groups(sum(COUNTS), 100, seed=5)),
    "many": (some_groups(40, 9, seed=4), some_groups(sum(COUNTS), 9, seed=5)),
}


def gallery_by_loops(images, texts, scale, everything, smoothing, same_picture, same_caption):
    """Pictures told from the batch's captions, captions from all pictures that are not alike and not called so."""
    images, texts, everything = (F.normalize(each, dim=-1) for each in (images, texts, everything.double()))
    called = [set(part.tolist()) for part in same_caption.split(COUNTS)]
    groups = [same_picture[PICTURES].tolist(), same_caption[CAPTIONS].tolist()]
    total = 0.0
    for i, own in enumerate(PICTURES.tolist()):
        those = candidates(i, groups, len(PICTURES))
        total = total + among(scale.exp() * texts[those] @ images[i], those.index(i), smoothing)
        those = [
            n
            for n in range(len(everything))
            if n == own or (same_picture[n] != same_picture[own] and groups[1][i] not in called[n])
        ]
        total = total + among(scale.exp() * everything[those] @ texts[i], those.index(own), smoothing)
    return total / (2 * len(PICTURES))


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("block", [1, 6, 64])
def test_captions_are_told_from_all_pictures(block, smoothing, world):
    same_picture, same_caption = world
    everything = numbers(40, 6, seed=6)
    inputs = everything[PICTURES], numbers(11, 6, seed=7), torch.tensor(2.0, dtype=torch.float64)
    gallery = Gallery.of(everything, same_picture, same_caption, COUNTS).at(PICTURES)
    groups = {"same_picture": same_picture[PICTURES], "same_caption": same_caption[CAPTIONS]}

    def loss(*inputs):
        return contrastive(*inputs, smoothing=smoothing, gallery=gallery, block=block, **groups)

    expected = value_and_gradients(lambda *x: gallery_by_loops(*x, everything, smoothing, *world), *inputs)
    assert_close(value_and_gradients(loss, *inputs), expected, 1e-11)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_gallery_of_the_batch_alone_is_the_batch(smoothing):
    images, texts = numbers(2, 12, 6)
    inputs = images, texts, torch.tensor(2.0, dtype=torch.float64)
    gallery = Gallery.of(images).at(torch.arange(12))
    found = value_and_gradients(lambda *x: contrastive(*x, smoothing=smoothing, gallery=gallery, block=5), *inputs)
    expected = value_and_gradients(lambda i, t, s: info_nce(i.detach(), t, s, smoothing) + 0 * i.sum(), *inputs)
    assert_close([found[0], *found[2:]], [expected[0], *expected[2:]], 1e-12)
    assert found[1].norm() > 0  # the batch's own pictures have their direction's gradient still


def test_a_gallery_of_pictures_that_are_all_alike_leaves_the_own_one():
    images, texts = numbers(2, 12, 6)
    gallery = Gallery.of(images, torch.zeros(12, dtype=torch.int64)).at(torch.arange(12))
    same = torch.zeros(12, dtype=torch.int64)
    for smoothing in (0.0, 0.1):
        found = value_and_gradients(
            lambda *x: contrastive(*x, smoothing=smoothing, same_picture=same, gallery=gallery, block=5),  # noqa: B023
            images, texts, torch.tensor(2.0, dtype=torch.float64),
        )  # fmt: skip
        assert all((each.abs() < 1e-14).all() for each in found)


class FromFile:
    """Rows that can be had in parts only, in half precision."""

    def __init__(self, rows):
        self.rows, self.most = rows.half(), 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, where):
        part = self.rows[where]
        self.most = max(self.most, len(part))
        return part


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_gallery_is_read_in_blocks(smoothing):
    everything = FromFile(numbers(40, 6, seed=6))
    exact = everything.rows.double()
    inputs = exact[PICTURES], numbers(11, 6, seed=7), torch.tensor(2.0, dtype=torch.float64)
    gallery = Gallery.of(everything, *WORLDS["few"], COUNTS).at(PICTURES)
    groups = {"same_picture": WORLDS["few"][0][PICTURES], "same_caption": WORLDS["few"][1][CAPTIONS]}
    expected = value_and_gradients(lambda *x: gallery_by_loops(*x, exact, smoothing, *WORLDS["few"]), *inputs)

    def loss(*inputs):
        return contrastive(*inputs, smoothing=smoothing, gallery=gallery, block=7, **groups)

    assert_close(value_and_gradients(loss, *inputs), expected, 1e-11)
    assert_close(value_and_gradients(loss, *[each.float() for each in inputs]), expected, 2e-6)
    assert everything.most == 7


def test_a_gallery_keeps_only_what_pictures_share():
    same_picture = torch.tensor([7, 3, 7, 9])
    same_caption = torch.tensor([50, 50, 60, 70, 60])  # picture 0 has 50 twice, pictures 1 and 3 both have 60
    gallery = Gallery.of(torch.ones(4, 2), same_picture, same_caption, (2, 1, 1, 1))
    assert sorted(zip(gallery.keys.tolist(), gallery.pictures.tolist(), strict=True)) == [
        (2 * 7 + 1, 0), (2 * 7 + 1, 2), (2 * 60, 1), (2 * 60, 3),
    ]  # fmt: skip
    with pytest.raises(InputError, match="3 picture groups"):
        Gallery.of(torch.ones(4, 2), same_picture[:3])
    with pytest.raises(InputError, match="counts"):
        Gallery.of(torch.ones(4, 2), same_picture, same_caption, (1, 1, 1, 1))


def test_captions_are_told_from_more_pictures_than_the_batch_holds():
    everything = numbers(40, 6, seed=6).float()
    inputs = everything[PICTURES], numbers(11, 6, seed=7).float(), torch.tensor(2.0)
    small = contrastive(*inputs, gallery=Gallery.of(everything[PICTURES]).at(torch.arange(11)))
    assert contrastive(*inputs, gallery=Gallery.of(everything).at(PICTURES)) > small + 0.1


# Which rows are equal


@pytest.mark.parametrize("kind", ["tokens", "pixels", "pictures", "features", "one number"])
def test_alike_names_the_first_equal_row(kind):
    generator = torch.Generator().manual_seed(0)
    shapes = {"tokens": (60, 5), "pixels": (60, 3, 1, 2), "pictures": (60, 4), "features": (60, 3), "one number": (60,)}
    rows = torch.randint(2, shapes[kind], generator=generator)
    dtypes = {"pixels": torch.uint8, "pictures": torch.int32, "features": torch.float32}
    rows = rows.to(dtypes.get(kind, torch.int64))
    found = alike(rows).tolist()
    plain = rows.tolist()
    assert found == [plain.index(row) for row in plain]
    assert len(set(found)) < 60


def test_alike_takes_rows_apart_that_differ_in_one_place():
    rows = torch.zeros(78, 77, dtype=torch.int64)
    rows[torch.arange(77), torch.arange(77)] = 49407
    assert alike(rows).tolist() == list(range(78))
    assert alike(torch.cat([rows, rows.flip(0)]))[78:].tolist() == list(reversed(range(78)))


def test_alike_takes_zero_of_either_sign_for_zero():
    assert alike(torch.tensor([[0.0, 1.0], [-0.0, 1.0], [0.0, -1.0]])).tolist() == [0, 0, 2]


def test_alike_holds_where_hashes_collide(monkeypatch):
    rows = torch.randint(2, (60, 5), generator=torch.Generator().manual_seed(0))
    expected = alike(rows)
    monkeypatch.setattr(duplicates, "_hashes", lambda rows: torch.zeros(len(rows), dtype=torch.int64))
    assert alike(rows).equal(expected)


def test_alike_works_in_parts(monkeypatch):
    rows = torch.randint(2, (60, 5), generator=torch.Generator().manual_seed(0))
    expected = alike(rows)
    monkeypatch.setattr(duplicates, "_rows_at_once", lambda rows: 7)
    assert alike(rows).equal(expected)


def test_alike_of_nothing():
    assert alike(torch.zeros(0, 77, dtype=torch.int64)).shape == (0,)
    assert alike_keys([]).dtype == torch.int64


def test_alike_keys():
    assert alike_keys(["b", "a", "b", "c", "a"]).tolist() == [0, 1, 0, 3, 1]


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_masked_pairs(groups):
    given = [group.tolist() for group in groups if group is not None]
    expected = sum(23 - len(candidates(i, given, 23)) for i in range(23)) / 2
    assert masked_pairs(*groups) == expected
    assert (expected > 0) == bool(given)


# The entropy of the softmaxes


def entropy_by_loops(logits, groups):
    """The mean over rows and columns of -Σ p log p, each softmax over its list of candidates."""
    total = 0.0
    for i in range(len(logits)):
        those = candidates(i, groups, len(logits))
        for row in (logits[i], logits[:, i]):
            p = row[those].softmax(0)
            total = total - (p * p.log()).sum()
    return total / (2 * len(logits))


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_entropy_is_rewarded(groups):
    inputs = numbers(23, 6), numbers(23, 6, seed=1), torch.tensor(1.5, dtype=torch.float64)
    given = [group.tolist() for group in groups if group is not None]
    groups = dict(zip(("same_picture", "same_caption"), groups, strict=True))

    def expected(images, texts, scale):
        logits = scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
        return by_loops(images, texts, scale, 0.1, **groups) - 0.3 * entropy_by_loops(logits, given)

    found = value_and_gradients(lambda *x: info_nce(*x, 0.1, entropy=0.3, **groups), *inputs)
    assert_close(found, value_and_gradients(expected, *inputs), 1e-12)


def test_entropy_of_certain_pairs_is_none():
    """p log p is 0 where p is 0, though its logarithm is not finite."""
    found = value_and_gradients(
        lambda *x: info_nce(*x, entropy=1.0), torch.eye(6), torch.eye(6), torch.tensor(math.log(1000))
    )
    assert found[0] == 0 and all(each.isfinite().all() for each in found)


# SigLIP


def siglip_by_loops(images, texts, scale, bias, groups=()):
    logits = scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T + bias
    total = 0.0
    for i in range(len(logits)):
        for j in candidates(i, groups, len(logits)):
            total = total - F.logsigmoid(logits[i, j] if i == j else -logits[i, j])
    return total / len(logits)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize(("scale", "bias"), [(0.0, 0.5), (math.log(10), -10.0), (math.log(100), -30.0)])
def test_siglip(scale, bias, groups):
    inputs = numbers(23, 6), numbers(23, 6, seed=1), *torch.tensor([scale, bias], dtype=torch.float64)
    found = value_and_gradients(lambda *x: siglip(*x, *groups), *inputs)
    given = [group.tolist() for group in groups if group is not None]
    assert_close(found, value_and_gradients(lambda *x: siglip_by_loops(*x, given), *inputs), 1e-12)


def test_siglip_is_that_of_open_clip():
    peer = open_clip().loss.SigLipLoss()
    inputs = numbers(23, 6), numbers(23, 6, seed=1), *torch.tensor([math.log(10), -10.0], dtype=torch.float64)

    def theirs(images, texts, scale, bias):
        return peer(F.normalize(images, dim=-1), F.normalize(texts, dim=-1), scale.exp(), bias)

    assert_close(value_and_gradients(siglip, *inputs), value_and_gradients(theirs, *inputs), 1e-12)


def pairs_like(kind):
    """Features whose own pairs are what `kind` says, (40, 64) twice."""
    texts = numbers(40, 64, seed=1)
    return {
        "strangers": (numbers(40, 64), texts),
        "like": (texts + 2 * numbers(40, 64), texts),
        "learnt": (texts + 0.01 * numbers(40, 64), texts),
        "opposite": (-texts, texts),
        "collapsed": (torch.ones_like(texts), torch.ones_like(texts)),
    }[kind]


@pytest.mark.parametrize("kind", ["strangers", "like", "learnt", "opposite", "collapsed"])
@pytest.mark.parametrize("scale", [0.0, math.log(10), math.log(100)])
@pytest.mark.parametrize("groups", [GROUPS["none"], (some_groups(40, 30), None)], ids=["all", "duplicates"])
def test_the_bias_of_siglip_is_the_best_one(kind, scale, groups):
    images, texts = pairs_like(kind)
    scale = torch.tensor(scale, dtype=torch.float64)

    def loss(bias):
        return siglip(images, texts, scale, bias, *groups).item()

    least, most = -300.0, 300.0
    for _ in range(200):  # the loss is convex in the bias: its minimum is between two thirds
        one, other = least + (most - least) / 3, most - (most - least) / 3
        least, most = (one, most) if loss(one) > loss(other) else (least, other)
    found = siglip(images, texts, scale, None, *groups).item()
    assert found == pytest.approx(loss(least), rel=1e-9, abs=1e-30)
    single = siglip(images.float(), texts.float(), scale.float(), None, *groups).item()
    assert single == pytest.approx(found, rel=1e-4, abs=1e-7)


def test_gradients_of_siglip_are_those_of_its_minimum_over_the_bias():
    inputs = *pairs_like("like"), torch.tensor(math.log(10), dtype=torch.float64)
    _, to_images, to_texts, to_scale = value_and_gradients(siglip, *inputs)

    def slope(moved, direction):
        ahead, behind = ([x + s * 1e-5 * direction if i == moved else x for i, x in enumerate(inputs)] for s in (1, -1))
        return (siglip(*ahead) - siglip(*behind)).item() / 2e-5

    for moved, gradient in enumerate((to_images, to_texts, to_scale)):
        direction = numbers(gradient.numel(), seed=7).view_as(gradient)
        assert (gradient * direction).sum().item() == pytest.approx(slope(moved, direction), rel=1e-5)
        assert gradient.norm() > 1e-3


def test_the_bias_of_siglip_takes_up_what_all_cosines_share():
    """One more common direction moves every logit alike; the lengths are kept by one of each side's own."""
    images, texts = (F.normalize(each, dim=-1) for each in pairs_like("like"))
    zeros, ones = torch.zeros(40, 1).double(), torch.ones(40, 1).double()
    scale = torch.tensor(math.log(10), dtype=torch.float64)
    plain = siglip(torch.cat([images, zeros, ones, zeros], 1), torch.cat([texts, zeros, zeros, ones], 1), scale)
    shared = siglip(torch.cat([images, ones, zeros], 1), torch.cat([texts, ones, zeros], 1), scale)
    assert shared.item() == pytest.approx(plain.item(), rel=1e-9)


@pytest.mark.parametrize("count", [1, 5])
def test_siglip_without_negatives_teaches_nothing(count):
    inputs = numbers(count, 6), numbers(count, 6, seed=1), torch.tensor(3.0, dtype=torch.float64)
    found = value_and_gradients(lambda *x: siglip(*x, same_picture=torch.zeros(count)), *inputs)
    assert all((each.abs() < 1e-7).all() for each in found)


# The loss of the original scripts


def by_the_script(logits, temperature, smoothing, weight=0.0):
    """ContrastiveLoss of a-loss-to-penalize-overfit-via-entropy.py, from the model's logits; in loops over rows."""
    rows = [row / row.norm() for row in logits]
    columns = [column / column.norm() for column in logits.T]
    count = len(logits)
    z = torch.stack([torch.stack([row @ column for column in columns]) for row in rows]) / temperature
    loss = entropy = 0.0
    for matrix in (z, z.T):
        for i, row in enumerate(matrix):
            target = [1 - smoothing if i == j else smoothing / (count - 1) for j in range(count)]
            loss = loss - sum(t * p for t, p in zip(target, row.log_softmax(0), strict=True)) / count
            p = row.softmax(0)
            entropy = entropy - (p * (p + 1e-8).log()).sum() / count
    return loss / 2 - weight * entropy / 2


@pytest.mark.parametrize(("smoothing", "weight"), [(0.0, 0.0), (0.1, 0.0), (0.1, 0.02)])
@pytest.mark.parametrize("scale", [0.0, math.log(100)])
def test_the_seeds_loss_is_that_of_its_script(scale, smoothing, weight):
    """Whatever scale the model's logits have."""
    images, texts = numbers(9, 6), numbers(9, 6, seed=1)

    def expected(images, texts):
        logits = math.exp(scale) * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
        return by_the_script(logits, 0.07, smoothing, weight)

    inverse = torch.tensor(-math.log(0.07), dtype=torch.float64)
    found = value_and_gradients(lambda *x: seed_loss(*x, inverse, smoothing, entropy=weight), images, texts)
    assert_close(found, value_and_gradients(expected, images, texts), 1e-7)  # the script adds 1e-8 to probabilities


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_seeds_loss_leaves_duplicates_out_too(smoothing):
    images, texts = numbers(23, 6), numbers(23, 6, seed=1)
    groups = [group.tolist() for group in GROUPS["both"]]
    cosines = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    z = F.normalize(cosines, dim=1) @ F.normalize(cosines.T, dim=1).T / 0.07
    total = 0.0
    for i in range(23):
        those = candidates(i, groups, 23)
        others = [those.index(j) for j in those if j != i]
        for row in (z[i], z[:, i]):
            likelihood = row[those].log_softmax(0)
            total -= (1 - smoothing) * likelihood[those.index(i)].item()
            total -= smoothing * likelihood[others].mean().item()
    inverse = torch.tensor(-math.log(0.07), dtype=torch.float64)
    assert seed_loss(images, texts, inverse, smoothing, *GROUPS["both"]).item() == pytest.approx(total / 46, rel=1e-12)


@pytest.mark.parametrize("entropy", [0.0, 0.02])
def test_the_seeds_loss_of_one_pair_is_zero(entropy):
    """The script divides by the number of other pairs there."""
    images, texts = numbers(1, 6), numbers(1, 6, seed=1)
    found = value_and_gradients(lambda *x: seed_loss(*x, torch.tensor(2.7), 0.1, entropy=entropy), images, texts)
    assert all((each == 0).all() for each in found)


def like_clips(count):
    """Pictures and captions with cosines as CLIP has them: own pairs 0.27, others 0.15 ± 0.035."""
    common, own, rest = 0.15**0.5, 0.12**0.5, 0.73**0.5
    noise = (F.normalize(numbers(count, 435, seed=seed), dim=-1) for seed in (0, 1))
    return (
        torch.cat([torch.full((count, 1), common), own * torch.eye(count), rest * each], dim=1).double()
        for each in noise
    )


def test_the_seeds_loss_is_nearly_blind_to_two_swapped_captions():
    images, texts = like_clips(40)
    swapped = texts[[1, 0, *range(2, 40)]]
    temperature = torch.tensor(math.log(100), dtype=torch.float64)
    inverse = torch.tensor(-math.log(0.07), dtype=torch.float64)
    right, wrong = (seed_loss(images, each, inverse).item() for each in (texts, swapped))
    known, missed = (info_nce(images, each, temperature).item() for each in (texts, swapped))
    assert right > 0.9 * math.log(40) and known < 0.2 * math.log(40)  # what it says of pairs that belong together
    assert missed - known > 0.2
    assert 0 < wrong - right < 0.05 * (missed - known)


def test_every_loss_is_computed_in_fp32_under_autocast():
    images, texts = features(32, 64)
    scale = torch.tensor(math.log(100))
    for loss in (siglip, seed_loss, lambda *x: info_nce(*x, entropy=0.1)):
        expected = loss(images, texts, scale)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss(images, texts, scale)
        assert found.dtype == torch.float32 and found.equal(expected)


# Anchors


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
