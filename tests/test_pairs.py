"""The pairs of a step: views, augmentations, flipped captions and tags, each drawn by seed, step and row alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gmp.config import Captions, Pictures
from gmp.contrastive import contrastive
from gmp.data.augment import flipped, seed_of
from gmp.data.policy import drawn, tags_of
from gmp.data.sampler import seeded
from gmp.data.words import Words
from gmp.duplicates import alike, alike_keys
from gmp.pairs import Batch, Pairs, Texts, together
from gmp.tokenizer import Tokenizer

CPU = torch.device("cpu")
COUNT = 40
COUNTS = tuple(1 + n % 3 for n in range(COUNT))
KEYS = [f"{n:064x}" for n in range(COUNT)]
ORDER = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))[:16]
CHOICE = torch.randint(3, (16,), generator=torch.Generator().manual_seed(2)) % torch.tensor(COUNTS)[ORDER]
FLIPS = Pictures(views=3, flip=0.5)
tokenize = Tokenizer(20)


def rows(seed=0, count=COUNT, width=8):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def made(**given) -> Pairs:
    captions = [f"word{n} take{c}" for n in range(COUNT) for c in range(COUNTS[n])]
    return Pairs(tokenize(captions).ids, COUNTS, rows(), None, **given)


def viewed(**given) -> Pairs:
    return made(more_views=(rows(1), rows(2)), keys=KEYS, looks=FLIPS, **given)


def online(**given) -> Pairs:
    return dataclasses.replace(made(looks=Pictures(flip=0.5), **given), features=None, pixels=object())


def mirrored(pairs: Pairs) -> Pairs:
    """Of every caption, what a flip makes of it: here the same with a word more; every third stays itself."""
    count = len(pairs.ids)
    changed = torch.tensor([row for row in range(count) if row % 3])
    table = torch.arange(count)
    table[changed] = count + torch.arange(len(changed))
    other = pairs.ids[changed].clone()
    other[:, 1] = 7
    return dataclasses.replace(pairs, ids=torch.cat([pairs.ids, other]), mirrored=table)


def equal(one: Batch, other: Batch) -> bool:
    fields = [(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(Batch)]
    return all(a is b is None or torch.equal(a, b) for a, b in fields)


# ---- nothing drawn --------------------------------------------------------------------------------------------------


def test_without_anything_that_varies_a_step_is_the_same_whatever_its_number():
    pairs = made(same_picture=alike_keys(KEYS), same_caption=torch.arange(sum(COUNTS)))
    batch = pairs.batch(ORDER, CHOICE, ORDER[:3], 0)
    assert equal(batch, pairs.batch(ORDER, CHOICE, ORDER[:3], 9))
    captions = pairs.first[ORDER] + CHOICE
    assert torch.equal(batch.ids, pairs.ids[captions]) and torch.equal(batch.same_caption, captions)
    assert batch.views is batch.seeds is batch.upcoming_seeds is None
    assert torch.equal(pairs.image_features(batch, slice(2, 9), CPU), pairs.features[ORDER[2:9]])
    assert pairs.gallery_at(batch).features is pairs.features


# ---- views ----------------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_views_that_a_step_has():
    pairs = viewed()
    batch = pairs.batch(ORDER, CHOICE, ORDER[:0], 5)
    table = torch.stack([pairs.features, *pairs.more_views])
    assert set(batch.views.tolist()) == {0, 1, 2}
    for part in (slice(0, 16), slice(4, 9), torch.tensor([15, 0, 3])):
        expected = table[batch.views[part], batch.pictures[part]]
        assert torch.equal(pairs.image_features(batch, part, CPU), expected)
    assert torch.equal(pairs.features, rows()) and batch.seeds is None


def test_views_are_drawn_evenly_by_seed_and_step():
    pairs = viewed(seed=3)
    views = torch.stack([pairs.batch(ORDER, CHOICE, ORDER[:0], step).views for step in range(300)])
    counts = views.flatten().bincount()
    assert (counts - 1600).abs().max() < 5 * (4800 * 2 / 9) ** 0.5
    assert torch.equal(pairs.batch(ORDER.flip(0), CHOICE * 0, ORDER[:2], 7).views, views[7])
    assert not torch.equal(viewed(seed=4).batch(ORDER, CHOICE, ORDER[:0], 7).views, views[7])


def test_a_gallery_holds_the_views_of_the_steps_own_pictures_and_the_first_ones_of_all_others():
    pairs = viewed(same_picture=alike_keys(KEYS), same_caption=torch.arange(sum(COUNTS)))
    batch = pairs.batch(ORDER, CHOICE, ORDER[:0], 5)
    expected = pairs.features.clone()
    expected[ORDER] = pairs.image_features(batch, slice(None), CPU)
    gallery = pairs.gallery_at(batch)
    assert torch.equal(gallery.features[:], expected) and torch.equal(gallery.rows, ORDER)
    assert torch.equal(gallery.features[7:23], expected[7:23]) and gallery.features.shape == (COUNT, 8)
    assert torch.equal(gallery.features[ORDER.flip(0)], expected[ORDER.flip(0)])
    assert torch.equal(pairs.features, rows())  # nothing was written into it
    plain = dataclasses.replace(pairs, features=expected, more_views=()).gallery.at(ORDER)
    images, texts = expected[ORDER], rows(9, 16)
    losses = [
        contrastive(images, texts, torch.tensor(2.0), gallery=one, same_caption=batch.same_caption)
        for one in (gallery, plain)
    ]
    assert torch.equal(*losses)


# ---- flipped captions -----------------------------------------------------------------------------------------------


def test_captions_are_mirrored_where_their_view_is_flipped_and_only_there():
    pairs = mirrored(viewed())
    turned, counts = 0, [0, 0]
    for step in range(20):
        batch = pairs.batch(ORDER, CHOICE, ORDER[:0], step)
        for row, (picture, view) in enumerate(zip(ORDER.tolist(), batch.views.tolist(), strict=True)):
            flips = view > 0 and flipped(FLIPS, seed_of(KEYS[picture], view))
            caption = pairs.first[picture] + CHOICE[row]
            assert torch.equal(batch.ids[row], pairs.ids[pairs.mirrored[caption] if flips else caption])
            turned += flips
            counts[view > 0] += 1
    assert 0.3 * counts[1] < turned < 0.7 * counts[1]


def test_captions_are_mirrored_where_their_augmentation_flips():
    pairs = mirrored(online())
    for step in range(10):
        batch = pairs.batch(ORDER, CHOICE, ORDER[:0], step)
        captions = pairs.first[ORDER] + CHOICE
        flips = torch.tensor([flipped(pairs.looks, seed) for seed in batch.seeds.tolist()])
        assert flips.any() and not flips.all()
        assert torch.equal(batch.ids, pairs.ids[torch.where(flips, pairs.mirrored[captions], captions)])


def test_a_mirrored_caption_is_no_negative_of_a_picture_that_is_called_so():
    pairs = mirrored(viewed())
    pairs.ids[5] = pairs.ids[pairs.mirrored[1]]  # a picture's caption is another one's mirrored
    pairs = dataclasses.replace(pairs, same_caption=alike(pairs.ids))
    assert pairs.same_caption[5] == pairs.same_caption[pairs.mirrored[1]] != pairs.same_caption[1]
    batch = pairs.batch(ORDER, CHOICE, ORDER[:0], 3)
    assert torch.equal(alike(batch.ids), alike(batch.same_caption))
    assert len(pairs.gallery.keys) == 0  # no two pictures share a caption that is theirs unflipped


# ---- augmentations --------------------------------------------------------------------------------------------------


def test_seeds_of_augmentations_follow_from_seed_step_and_row_and_are_known_one_step_ahead():
    pairs = online(seed=2)
    batch = pairs.batch(ORDER, CHOICE, ORDER[:5], 4)
    then = pairs.batch(ORDER[:5], CHOICE[:5], ORDER[:0], 5)
    assert torch.equal(batch.upcoming_seeds, then.seeds) and len(then.upcoming_seeds) == 0
    assert len(batch.seeds.unique()) == 16
    assert torch.equal(pairs.batch(ORDER.flip(0), CHOICE * 0, ORDER[:5], 4).seeds, batch.seeds)
    assert not torch.equal(online(seed=3).batch(ORDER, CHOICE, ORDER[:5], 4).seeds, batch.seeds)


def test_pictures_that_do_not_vary_have_no_seeds():
    pairs = dataclasses.replace(online(), looks=Pictures())
    assert pairs.batch(ORDER, CHOICE, ORDER[:5], 4).seeds is None


# ---- tags -----------------------------------------------------------------------------------------------------------

TAGGED = [f"tag{n}, b{c}, c, d" for n in range(COUNT) for c in range(COUNTS[n])]


def tagged(captions=TAGGED, policy=Captions(shuffle=True, dropout=0.4, prefix="my"), **given) -> Pairs:  # noqa: B008
    pairs = made(texts=Texts(captions, policy, Words(tokenize)), **given)
    return dataclasses.replace(pairs, ids=tokenize(captions).ids)


def test_tags_are_drawn_by_seed_step_and_row_and_their_tokens_are_made_then():
    pairs = tagged()
    batch = pairs.batch(ORDER, CHOICE, ORDER[:0], 3)
    texts = [
        "my " + drawn(TAGGED[row], pairs.texts.policy, seeded(f"0 captions 3 {n}"))
        for n, row in enumerate((pairs.first[ORDER] + CHOICE).tolist())
    ]
    assert torch.equal(batch.ids, tokenize(texts).ids)
    captions = [TAGGED[row] for row in (pairs.first[ORDER] + CHOICE).tolist()]
    kept = [tags_of(text.removeprefix("my "), ",") for text in texts]
    assert all(set(some) <= set(tags_of(all_, ",")) for some, all_ in zip(kept, captions, strict=True))
    assert 0.4 < sum(map(len, kept)) / 64 < 0.8
    assert torch.equal(batch.ids, pairs.batch(ORDER, CHOICE, ORDER[:0], 3).ids)
    assert not torch.equal(batch.ids, pairs.batch(ORDER, CHOICE, ORDER[:0], 4).ids)
    alone = pairs.batch(ORDER[:5], CHOICE[:5], ORDER[:0], 3)
    assert torch.equal(batch.ids[:5], alone.ids)  # a row's draw has nothing to do with the others'


def test_captions_that_are_drawn_alike_are_not_each_others_negatives():
    captions = ["a, b" if n % 2 else "b, c" for n in range(COUNT)]
    policy = Captions(dropout=0.5)
    pairs = Pairs(
        tokenize(captions).ids, (1,) * COUNT, rows(), None, alike_keys(KEYS), alike_keys(captions),
        texts=Texts(captions, policy, Words(tokenize)),
    )  # fmt: skip
    batch = pairs.batch(ORDER, CHOICE * 0, ORDER[:0], 0)
    assert torch.equal(batch.same_caption % 2, ORDER % 2)  # by all that may be drawn
    same = batch.same_picture[:, None] == batch.same_picture
    drawn = alike(batch.ids)
    assert torch.equal(same, drawn[:, None] == drawn) and 1 < len(drawn.unique()) < 16


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], [0, 1, 2]),
        ([1, 1, 2, 3], [5, 6, 6, 7], [0, 0, 0, 3]),
        ([4, 3, 2, 1, 0, 0], [9, 8, 8, 7, 7, 9], [0, 1, 1, 0, 0, 0]),
        (None, [9, 8, 8], [9, 8, 8]),
    ],
)
def test_groups_that_overlap_are_one(first, second, expected):
    found = together(None if first is None else torch.tensor(first), torch.tensor(second))
    assert found.tolist() == expected


def test_groups_are_those_of_a_graph_search():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        first, second = torch.randint(12, (2, 15), generator=generator)
        linked = (first[:, None] == first) | (second[:, None] == second)
        for _ in range(4):
            linked = (linked.int() @ linked.int()) > 0
        found = together(first, second)
        assert torch.equal(found[:, None] == found, linked)
