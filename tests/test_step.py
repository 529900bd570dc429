"""One step: each loss in pieces, in passes and in processes, and anchors that move, on two sources of captions."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from gmp.config import Anchor, RepairConfig
from gmp.data.images import normalize
from gmp.distributed import ALONE, Group
from gmp.errors import InputError
from gmp.fsdp import Shards
from gmp.losses import anchor, info_nce, seed_loss, siglip
from gmp.optim import parameter_groups
from gmp.pairs import Batch, Pairs
from gmp.step import (
    anchor_captions,
    anchor_step,
    anchor_weight,
    concept_batch,
    contrastive_step,
    pieces,
    temperature_of,
)
from gmp.trainer import begin, set_up, train
from tests.side_by_side import Started
from tests.small import disturbed, small_clip, tokenize

CPU = torch.device("cpu")
SCALER = torch.amp.GradScaler("cpu", enabled=False)
PAIRS = 12
SAME_PICTURE = torch.tensor([0, 1, 2, 3, 4, 5, 0, 7, 8, 9, 10, 10])  # two of one pass, two of different ones
SAME_CAPTION = torch.tensor([0, 1, 1, 3, 4, 5, 6, 7, 8, 9, 4, 11])
TEXT_ANCHORS = (
    Anchor("original", "penultimate", 0.3),
    Anchor("broken", "pooled", 0.2, "concepts", 0.05, "cosine"),
    Anchor("original", "last", 0.1, "concepts"),
)


def captions(count, seed):
    """Captions of 3 to 9 words. (count, context_length)"""
    words = torch.randint(1000, (count, 9), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokenize([" ".join(map(str, row[: 3 + i % 7])) for i, row in enumerate(words)]).ids


def settings(**changes):
    return RepairConfig(**{"batch": PAIRS, "anchors": (), "geometric": (), "lr": 1e-3, **changes})


LOSSES = {
    "infonce": {"smoothing": 0.1},
    "infonce, entropy": {"entropy": 0.2, "smoothing": 0.1},
    "infonce, fixed": {"temperature": 0.05},
    "infonce, entropy, fixed": {"entropy": 0.2, "temperature": 0.05},
    "siglip": {"loss": "siglip"},
    "siglip, fixed": {"loss": "siglip", "temperature": 0.1},
    "seed": {"loss": "seed"},
    "seed, smooth": {"loss": "seed", "smoothing": 0.1, "entropy": 0.02, "temperature": 0.1},
}
PASSES = {f"{name}, by pass": LOSSES[name] | {"negatives": "pass"} for name in ("infonce", "siglip", "seed, smooth")}
CONFIGS = {
    name: settings(batch=4, accumulate=3, anchors=TEXT_ANCHORS, anchor_captions=7, **changes)
    for name, changes in (LOSSES | PASSES).items()
}


class Pixels:
    """Stands in for PicturesAhead: pictures that are random numbers, and lighter with their seed."""

    def __init__(self):
        self.pictures = torch.randint(256, (PAIRS, 3, 32, 32), generator=torch.Generator().manual_seed(5)).byte()
        self.asked = []

    def ahead(self, positions, seeds=None):
        self.asked.append(positions if seeds is None else (positions, seeds))

    def __call__(self, positions, seeds=None):
        lighter = torch.zeros(len(positions)).long() if seeds is None else torch.tensor(seeds)
        return (self.pictures[positions] // 2 + lighter[:, None, None, None]).byte()


def make_pairs(train="text"):
    features = torch.randn(PAIRS, 16, generator=torch.Generator().manual_seed(1))
    ids, pixels = captions(PAIRS, 2), Pixels()
    text = train == "text"
    return Pairs(ids, (1,) * PAIRS, features if text else None, None if text else pixels, SAME_PICTURE, SAME_CAPTION)


def make_batch(pairs):
    pictures = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(3))
    return Batch(pictures, pictures.flip(0), pairs.ids[pictures], SAME_PICTURE, SAME_CAPTION)


def make_clip(config):
    clip = small_clip()
    clip.logit_scale.requires_grad_(config.trains_temperature)
    clip.visual.requires_grad_(config.train == "both")
    return clip


def gradients(clip):
    return {name: p.grad for name, p in clip.named_parameters() if p.requires_grad}


def teachers():
    return {"original": small_clip(3).requires_grad_(False), "broken": disturbed(small_clip()).requires_grad_(False)}


def taken(config, group=ALONE, size=None, sharded=False):
    """Losses and whole gradients of one step, anchors in the middle of their way included, by name."""
    clip, pairs, shards = make_clip(config), make_pairs(config.train), Shards(group) if sharded else Shards()
    if sharded:
        shards.share_out(clip, parameter_groups(clip, 1e-2, {}, 0.1), CPU, both=False)
    batch = make_batch(pairs)
    size = size or config.batch
    figures = contrastive_step(clip, pairs, batch, config, SCALER, size, CPU, group)
    read = anchor_captions(batch, captions(5, 4), config, step=6)
    losses = anchor_step(clip, teachers(), read, config, 0.5, SCALER, size, CPU, group)
    shards.take_gradients()
    whole = [p for n, p in clip.named_parameters() if p.requires_grad and n not in shards.parts]
    group.sum_gradients(whole, whole=[clip.logit_scale])
    found = {"loss": figures.losses["contrastive"], "cosine": figures.text_cosine, **losses}
    for name, p in shards.here(clip).items():
        if p.requires_grad and p.grad is not None:
            found[f"grad.{name}"] = group.gather(p.grad) if name in shards.parts else p.grad
    return found


def assert_same(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm() + 1e-7, name


# The losses


def naive(config, clip, pairs, batch):
    """The loss as autograd sees it whole: every feature with its graph, sums over passes written out."""
    texts = clip.encode_text(batch.ids)
    if pairs.features is None:
        images = clip.encode_image(normalize(pairs.pixels(batch.pictures.tolist())))
    else:
        images = pairs.features[batch.pictures]
    scale = clip.logit_scale
    if config.temperature:
        scale = torch.tensor(-math.log(config.temperature))
    elif config.loss == "seed":
        scale = torch.tensor(-math.log(0.07))
    loss = 0.0
    for start in range(0, PAIRS, config.batch if config.negatives == "pass" else PAIRS):
        rows = slice(start, start + config.batch if config.negatives == "pass" else PAIRS)
        groups = {"same_picture": SAME_PICTURE[rows], "same_caption": SAME_CAPTION[rows]}
        mine = images[rows], texts[rows], scale
        if config.loss == "siglip":
            loss = loss + siglip(*mine, **groups)
        else:
            softmax = {"infonce": info_nce, "seed": seed_loss}[config.loss]
            loss = loss + softmax(*mine, config.smoothing, entropy=config.entropy, **groups)
    return loss


@pytest.mark.parametrize("train_what", ["text", "both"])
@pytest.mark.parametrize("size", [1, 4, 5, 12])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_has_the_gradients_of_the_whole_loss(name, size, train_what):
    """In one piece, in passes, and in pieces that are smaller than a pass because memory is short."""
    config = dataclasses.replace(CONFIGS[name], train=train_what)
    clip, pairs = make_clip(config), make_pairs(train_what)
    figures = contrastive_step(clip, pairs, make_batch(pairs), config, SCALER, size, CPU, ALONE)
    other = make_clip(config)
    loss = naive(config, other, pairs, make_batch(pairs))
    loss.backward()
    assert figures.losses["contrastive"].item() == pytest.approx(loss.item(), rel=1e-5)
    expected = gradients(other)
    assert max(grad.norm() for grad in expected.values()) > 1e-3
    assert_same(gradients(clip), expected, 2e-4 if config.loss == "siglip" else 2e-5)
    with torch.no_grad():
        unit = F.normalize(clip.encode_text(make_batch(pairs).ids), dim=-1)
    cosines = (unit @ unit.T)[~torch.eye(PAIRS, dtype=torch.bool)]
    assert figures.text_cosine.item() == pytest.approx(cosines.mean().item(), abs=1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_pairs_of_different_passes_are_not_masked_since_they_never_meet(size):
    clip, pairs = make_clip(settings()), make_pairs()
    by_pass, whole = (
        contrastive_step(clip, pairs, make_batch(pairs), config, SCALER, size, CPU, ALONE).masked
        for config in (settings(batch=4, accumulate=3, negatives="pass"), settings(batch=4, accumulate=3))
    )
    assert by_pass == 2  # captions 1 and 2, pictures 10 and 11
    assert whole == 4


def test_a_loss_by_pass_takes_each_pass_once(monkeypatch):
    """No second pass for gradients: that is what it is quicker for."""
    clip, pairs, counts = make_clip(settings()), make_pairs(), []
    encode = clip.encode_text
    monkeypatch.setattr(clip, "encode_text", lambda ids: counts.append(len(ids)) or encode(ids))
    config = settings(batch=4, accumulate=3, negatives="pass")
    contrastive_step(clip, pairs, make_batch(pairs), config, SCALER, 4, CPU, ALONE)
    assert counts == [4, 4, 4]


@pytest.mark.parametrize("negatives", ["batch", "pass"])
def test_pictures_are_decoded_one_piece_ahead(negatives):
    config = settings(batch=4, accumulate=3, negatives=negatives, train="both")
    clip, pairs = make_clip(config), make_pairs("both")
    batch = make_batch(pairs)
    contrastive_step(clip, pairs, batch, config, SCALER, 4, CPU, ALONE)
    first, second, third = (part.tolist() for part in batch.pictures.split(4))
    after = batch.upcoming[:4].tolist()
    again = [second, third, first] if negatives == "batch" else []
    assert pairs.pixels.asked == [*again, second, third, after]


@pytest.mark.parametrize("size", [4, 12])
def test_pictures_are_asked_for_with_the_seeds_that_they_vary_by(size):
    config = settings(batch=size, accumulate=PAIRS // size, train="both")
    clip, pairs = make_clip(config), make_pairs("both")
    seeds = torch.arange(PAIRS) * 9
    batch = dataclasses.replace(make_batch(pairs), seeds=seeds, upcoming_seeds=seeds + 1)
    found = contrastive_step(clip, pairs, batch, config, SCALER, size, CPU, ALONE).losses["contrastive"]
    images = clip.encode_image(normalize(pairs.pixels(batch.pictures.tolist(), seeds.tolist())))
    groups = {"same_picture": SAME_PICTURE, "same_caption": SAME_CAPTION}
    expected = info_nce(images, clip.encode_text(batch.ids), clip.logit_scale, **groups)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert pairs.pixels.asked[-1] == (batch.upcoming[:size].tolist(), (seeds[:size] + 1).tolist())


def test_a_fixed_temperature_is_a_constant():
    clip = small_clip()
    with torch.no_grad():
        clip.logit_scale.fill_(2.0)
    for config, expected in (
        (settings(), 2.0),
        (settings(loss="siglip"), 2.0),
        (settings(temperature=0.02), math.log(50)),
        (settings(loss="siglip", temperature=0.5), math.log(2)),
        (settings(loss="seed"), -math.log(0.07)),
        (settings(loss="seed", temperature=0.1), math.log(10)),
    ):
        found = temperature_of(config, clip)
        assert found.item() == pytest.approx(expected, rel=1e-6)
        assert (found is clip.logit_scale) == config.trains_temperature == (expected == 2.0)
        assert found.requires_grad == config.trains_temperature


@pytest.mark.parametrize("frozen", ["text", "vision"])
def test_a_tower_that_is_locked_for_now_gets_no_gradient(frozen):
    config = settings(train="both", batch=4, accumulate=3)
    clip, pairs = make_clip(config), make_pairs("both")
    other = clip.visual.requires_grad_(False) if frozen == "vision" else None
    if frozen == "text":
        clip.requires_grad_(False)
        other = clip.visual.requires_grad_(True)
    contrastive_step(clip, pairs, make_batch(pairs), config, SCALER, 4, CPU, ALONE)
    assert all(p.grad is not None for p in clip.parameters() if p.requires_grad)
    assert any(p.grad is not None for p in other.parameters()) == (frozen == "text")


# Several processes


@pytest.mark.parametrize("count", [1, 2, 5, 12, 13, 64])
@pytest.mark.parametrize("size", [2, 3, 7, 100])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_every_process_has_as_many_pieces(processes, size, count):
    found = [pieces(count, size, Group(rank, processes)) for rank in range(processes)]
    assert len({len(each) for each in found}) == 1
    rows = [rows for each in found for rows in each]
    assert [i for one in rows for i in range(count)[one]] == list(range(count))
    assert all(one.stop - one.start <= size for one in rows)
    if count >= processes:
        assert all(one.stop > one.start for one in rows)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_together_take_the_step_of_one(processes, tmp_path):
    """5 captions of concepts for 2 and 3 processes, 7 of the data set: no share is even."""
    with Started("steps", processes, tmp_path) as started:
        assert started.wait() == [0] * processes, started.err
    expected = {f"{name}.{key}": v for name, config in CONFIGS.items() for key, v in taken(config).items()}
    expected |= {f"sharded.{key}": v for key, v in taken(CONFIGS["infonce"]).items()}
    for rank in range(processes):
        assert_same(load_file(tmp_path / f"{rank}.safetensors"), expected, 1e-4)


# Anchors


def test_the_weight_of_an_anchor_goes_to_its_end():
    still = Anchor("original", "pooled", 0.3)
    assert [anchor_weight(still, p) for p in (0, 0.5, 1)] == [0.3] * 3
    line = Anchor("original", "pooled", 0.5, end=0.1)
    assert [anchor_weight(line, p) for p in (0, 0.25, 0.5, 1)] == pytest.approx([0.5, 0.4, 0.3, 0.1])
    curve = Anchor("original", "pooled", 0.5, end=0.1, fade="cosine")
    assert [anchor_weight(curve, p) for p in (0, 0.5, 1)] == pytest.approx([0.5, 0.3, 0.1])
    assert anchor_weight(curve, 0.25) == pytest.approx(0.1 + 0.4 * (1 + math.cos(math.pi / 4)) / 2)
    rising = Anchor("original", "pooled", 0.1, end=0.5)
    assert [anchor_weight(rising, p) for p in (0, 1)] == pytest.approx([0.1, 0.5])


def test_captions_of_concepts_follow_from_seed_and_step():
    ids = torch.arange(50)[:, None]
    first = concept_batch(ids, 20, 0, 3).flatten().tolist()
    assert first == concept_batch(ids, 20, 0, 3).flatten().tolist()
    assert len(set(first)) == 20
    others = [concept_batch(ids, 20, *which).flatten().tolist() for which in ((0, 4), (1, 3))]
    assert all(set(other) != set(first) for other in others)
    assert sorted(concept_batch(ids, 64, 0, 0).flatten().tolist()) == list(range(50))
    seen = {i for step in range(30) for i in concept_batch(ids, 20, 0, step).flatten().tolist()}
    assert seen == set(range(50))


def naive_anchor(one, clip, teacher, ids):
    return anchor(getattr(clip(ids), one.read_point), getattr(teacher(ids), one.read_point))


def test_training_reads_both_sources_with_weights_that_move():
    """Each step's losses, from the encoder as it was before the step; the last step has the last weight."""
    anchors = TEXT_ANCHORS
    config = settings(batch=4, epochs=2, anchors=anchors, anchor_captions=3, lr=1e-2, schedule="constant", warmup=0.0)
    clip, pairs, concepts, others = small_clip(), make_pairs(), captions(9, 4), teachers()
    training = begin(clip, set_up(clip, config, CPU), pairs.counts, config, CPU)
    sampler, before = copy.deepcopy(training.sampler), copy.deepcopy(clip)
    seen = []
    for event in train(training, pairs, others, config, CPU, concepts=concepts):
        step = event["step"] - 1
        pictures, _ = next(sampler)
        read = {"dataset": pairs.ids[pictures[:3]], "concepts": concept_batch(concepts, 3, config.seed, step)}
        for one in anchors:
            with torch.no_grad():
                distance = naive_anchor(one, before, others[one.teacher], read[one.captions]).item()
            assert event["losses"][str(one)] == pytest.approx(anchor_weight(one, step / 5) * distance, rel=1e-4)
        seen.append(event["losses"])
        before = copy.deepcopy(training.clip)
    assert len(seen) == 6
    assert set(seen[0]) == {"contrastive", *map(str, anchors)}


@pytest.mark.parametrize("name", ["infonce, fixed", "siglip, fixed", "seed", "seed, smooth, by pass"])
def test_a_training_with_a_fixed_temperature_leaves_the_clips_own(name):
    config = dataclasses.replace(CONFIGS[name], anchors=(), epochs=2)
    clip, pairs = small_clip(), make_pairs()
    before = clip.logit_scale.item()
    training = begin(clip, set_up(clip, config, CPU), pairs.counts, config, CPU)
    told = list(train(training, pairs, {}, config, CPU))
    assert len(told) == 2 and all(math.isfinite(event["grad_norm"]) for event in told)
    assert clip.logit_scale.item() == before
    assert not clip.text_projection.equal(small_clip().text_projection)


def test_each_teacher_computes_what_its_own_anchors_read(monkeypatch):
    others, computed = teachers(), []
    for name, tower in others.items():
        forward, penultimate = tower.forward, tower.penultimate
        monkeypatch.setattr(tower, "forward", lambda ids, n=name, f=forward: computed.append((n, "all")) or f(ids))
        monkeypatch.setattr(
            tower, "penultimate", lambda ids, n=name, f=penultimate: computed.append((n, "penultimate")) or f(ids)
        )
    anchors = (
        Anchor("original", "penultimate", 1.0),
        Anchor("broken", "penultimate", 1.0, "concepts"),
        Anchor("broken", "pooled", 1.0, "concepts"),
    )
    config = settings(anchors=anchors)
    read = {"dataset": captions(4, 0), "concepts": captions(4, 1)}
    anchor_step(small_clip(), others, read, config, 0.0, SCALER, 8, CPU, ALONE)
    assert computed == [("original", "penultimate"), ("broken", "all")]


def test_anchors_in_pieces_are_those_of_the_whole():
    for one, other in itertools.pairwise([taken(CONFIGS["infonce"], size=size) for size in (1, 3, 12)]):
        assert_same(one, other)


def test_an_anchor_without_its_captions_is_refused():
    config, ids = settings(anchors=TEXT_ANCHORS), captions(4, 0)
    batch = Batch(torch.arange(4), torch.arange(4), ids)
    for concepts in (None, captions(4, 0)[:0]):
        read = anchor_captions(batch, concepts, config, 0)
        with pytest.raises(InputError, match="broken@concepts:pooled.*captions of concepts, and none are given"):
            anchor_step(small_clip(), teachers(), read, config, 0.0, SCALER, 4, CPU, ALONE)


def test_an_anchor_below_all_that_trains_so_far_is_only_told():
    clip = small_clip().requires_grad_(False)
    clip.transformer.resblocks[-1].requires_grad_(True)  # penultimate is read before it
    config = settings(anchors=TEXT_ANCHORS[:1])
    found = anchor_step(clip, teachers(), {"dataset": captions(4, 0)}, config, 0.0, SCALER, 4, CPU, ALONE)
    assert found[str(TEXT_ANCHORS[0])] > 0
    assert all(p.grad is None for p in clip.parameters())
