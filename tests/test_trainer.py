"""The loop: exact accumulation, skipped steps, what trains and what does not, anchors, precision."""

from __future__ import annotations

import copy
import dataclasses
import math
from itertools import islice

import pytest
import torch

from gmp import trainer
from gmp.clip import CLIP, MAX_LOGIT_SCALE, CLIPConfig, TextConfig, VisionConfig, initialize
from gmp.config import Anchor, RepairConfig
from gmp.duplicates import alike
from gmp.errors import InputError
from gmp.gradients import layer_and_role
from gmp.losses import anchor, info_nce
from gmp.measure import drift
from gmp.objective import held_out_loss
from gmp.pairs import Pairs
from gmp.trainer import begin, precision_of, set_up, train

CPU = torch.device("cpu")
CONFIG = CLIPConfig(TextConfig(32, 2, 2, 64, 12, 50, 16), VisionConfig(32, 1, 2, 64, 8, 16, 16))
COUNTS = (1, 3, 2, 1) * 6  # 24 pictures, 42 captions


class Pixels:
    """Stands in for PicturesAhead: pictures that are random numbers."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(5)
        self.pictures = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
        self.asked = []

    def ahead(self, positions):
        self.asked.append(list(positions))

    def __call__(self, positions):
        return self.pictures[list(positions)]


def make(seed=0):
    return initialize(CLIP(CONFIG), torch.Generator().manual_seed(seed))


def frozen(tower):
    return copy.deepcopy(tower).requires_grad_(False)


def make_pairs(train="text"):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 48, (sum(COUNTS), 12), generator=generator)
    ids[:, 0] = 48
    for row in range(len(ids)):
        ids[row, 3 + row % 8 :] = 49
    features = torch.randn(len(COUNTS), 16, generator=generator) if train == "text" else None
    return Pairs(ids, COUNTS, features, None if train == "text" else Pixels(len(COUNTS)))


def settings(**changes):
    return RepairConfig(**{
        "epochs": 1, "batch": 12, "lr": 1e-3, "warmup": 0.0, "anchors": (), "schedule": "constant", **changes,
    })  # fmt: skip


def prepare(clip, pairs, config, device):
    return begin(clip, set_up(clip, config, device), pairs.counts, config, device)


def start(config, clip=None, pairs=None, teachers=None):
    """A training and its events."""
    clip = clip or make()
    pairs = pairs or make_pairs(config.train)
    teachers = {name: frozen(tower) for name, tower in (teachers or {}).items()}
    training = prepare(clip, pairs, config, CPU)
    return training, train(training, pairs, teachers, config, CPU)


def steps(events):
    return [event for event in events if event["type"] == "step"]


def snapshot(clip):
    return {name: tensor.clone() for name, tensor in clip.state_dict().items()}


def gradients(config, steps=1):
    training, events = start(config, teachers={"original": make(3)})
    event = next(islice(events, steps - 1, None))
    return event, {name: p.grad for name, p in training.clip.named_parameters() if p.requires_grad}


ANCHORS = (Anchor("original", "penultimate", 0.3), Anchor("original", "pooled", 0.1))


@pytest.mark.parametrize("train_what", ["text", "both"])
@pytest.mark.parametrize(("batch", "accumulate"), [(4, 3), (6, 2), (3, 4)])
def test_accumulated_batches_give_the_gradients_of_one(train_what, batch, accumulate):
    common = {
        "train": train_what,
        "clip_norm": 0.0,
        "anchors": ANCHORS,
        "anchor_captions": 10,
        "smoothing": 0.1,
    }
    whole, expected = gradients(settings(batch=12, **common))
    parts, found = gradients(settings(batch=batch, accumulate=accumulate, **common))
    assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert parts["steps"] == whole["steps"] == 2
    assert expected["logit_scale"].abs() > 1e-4
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-9, name


def test_accumulation_is_not_the_mean_over_batches():
    """Naive accumulation has fewer negatives: a lower loss, another gradient."""
    _, whole = gradients(settings(batch=12, clip_norm=0.0))
    clip, pairs = make(), make_pairs()
    training = prepare(clip, pairs, settings(batch=12), CPU)
    pictures, choice = next(training.sampler)
    rows = pairs.first[pictures] + choice
    for part in range(3):
        some = slice(4 * part, 4 * part + 4)
        features = clip(pairs.ids[rows[some]]).projected
        (info_nce(pairs.features[pictures[some]], features, clip.logit_scale) / 3).backward()
    naive = clip.text_projection.grad
    assert torch.cosine_similarity(naive.flatten(), whole["text_projection"].flatten(), dim=0) < 0.99


def test_one_step_is_that_of_plain_torch():
    config = settings(geometric=(), weight_decay=0.1, clip_norm=0.5, betas=(0.8, 0.95))
    training, events = start(config)
    reported = next(events)
    clip, pairs = make(), make_pairs()
    clip.visual.requires_grad_(False)
    fresh = prepare(make(), pairs, config, CPU)
    pictures, choice = next(fresh.sampler)
    features = clip(pairs.ids[pairs.first[pictures] + choice]).projected
    loss = info_nce(pairs.features[pictures], features, clip.logit_scale)
    loss.backward()
    named = {n: p for n, p in clip.named_parameters() if p.requires_grad}
    norm = torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
    assert norm > 0.5
    plain = [n for n, p in named.items() if p.ndim < 2 or "embedding" in n]
    groups = [
        {
            "params": [p for n, p in named.items() if (n in plain) == free],
            "weight_decay": 0.0 if free else 0.1,
        }
        for free in (True, False)
    ]
    torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.95)).step()
    assert reported["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert reported["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for name, parameter in named.items():
        clear = parameter.grad.abs() > 1e-5 * parameter.grad.abs().max()  # Adam's first step is the gradient's sign
        found = training.clip.get_parameter(name)
        assert torch.allclose(found[clear], parameter[clear], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("train_what", ["text", "both"])
def test_accumulation_under_autocast_reaches_every_weight(train_what):
    """autocast keeps its low-precision copies of weights: those made without a graph must not serve the second pass."""
    common = {"train": train_what, "clip_norm": 0.0, "precision": "bf16"}
    _, expected = gradients(settings(batch=12, **common))
    _, found = gradients(settings(batch=4, accumulate=3, **common))
    for name, grad in expected.items():
        assert found[name] is not None, name
        if grad.norm() > 1e-3:
            assert torch.cosine_similarity(found[name].flatten(), grad.flatten(), dim=0) > 0.97, name


@pytest.mark.parametrize("train_what", ["text", "both"])
def test_bf16_on_the_cpu_trains(train_what):
    full, _ = gradients(settings(train=train_what))
    training, events = start(settings(train=train_what, epochs=4, precision="bf16", anchors=ANCHORS[:1]),
                             teachers={"original": make(3)})  # fmt: skip
    found = steps(events)
    assert found[0]["losses"]["contrastive"] == pytest.approx(full["loss"], rel=0.02)
    assert found[-1]["loss"] < found[0]["loss"]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in training.clip.parameters())


def test_precisions():
    assert precision_of("auto", CPU) == "fp32" and precision_of("bf16", CPU) == "bf16"
    with pytest.raises(InputError, match="fp16 training needs a GPU"):
        precision_of("fp16", CPU)


def test_steps_and_their_events():
    training, events = start(settings(epochs=3, schedule="cosine", warmup=0.34, anchors=ANCHORS),
                             teachers={"original": make(3)})  # fmt: skip
    found = list(events)
    assert [event["type"] for event in found] == ["step"] * 6
    assert [event["step"] for event in found] == [1, 2, 3, 4, 5, 6]
    assert [event["epoch"] for event in found] == [1, 1, 2, 2, 3, 3]
    rates = [event["lr"] for event in found]
    assert rates[:2] == pytest.approx([1e-3 / 3, 2e-3 / 3]) and rates[2] == 1e-3
    assert sorted(rates[2:], reverse=True) == rates[2:] and rates[-1] < 2e-4
    for event in found:
        assert set(event["losses"]) == {"contrastive", "original:penultimate=0.3", "original:pooled=0.1"}
        assert event["loss"] == pytest.approx(sum(event["losses"].values()))
        assert math.hypot(*event["grad_norms"].values()) == pytest.approx(event["grad_norm"], rel=1e-6)
        assert event["pairs_per_second"] > 0 and event["skipped"] == 0
    assert "text.1.theta" in found[0]["grad_norms"]
    assert list(train(training, make_pairs(), {}, settings(), CPU)) == []


def test_the_anchor_is_weighted_and_sees_the_full_context():
    training, events = start(settings(anchors=ANCHORS, anchor_captions=5), teachers={"original": make(3)})
    reported = next(events)["losses"]
    pairs, clip, other = make_pairs(), make(), make(3)
    pictures, choice = next(prepare(make(), pairs, settings(), CPU).sampler)
    ids = pairs.ids[pairs.first[pictures] + choice][:5]
    with torch.no_grad():
        for one in ANCHORS:
            found, target = (getattr(tower(ids), one.read_point) for tower in (clip, other))
            assert reported[str(one)] == pytest.approx(one.weight * anchor(found, target).item(), rel=1e-4)


def test_a_step_with_bad_gradients_is_skipped():
    pairs = make_pairs()
    config = settings(epochs=2)
    order = [next(prepare(make(), pairs, config, CPU).sampler) for _ in range(1)]
    pairs.features[order[0][0][4]] = math.nan  # in the first step of the first epoch
    training, events = start(config, pairs=pairs)
    before = snapshot(training.clip)
    step = next(events)
    assert step["step"] == step["skipped"] == 1 and not math.isfinite(step["grad_norm"])
    assert 0 < step["non_finite"] <= 1 and "update_ratios" not in step
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.clip.state_dict().items())
    assert all(not value.any() for state in training.optimizer.state.values() for value in state.values())
    after = next(events)
    assert (after["type"], after["step"], after["skipped"]) == ("step", 2, 1)
    assert training.skipped_in_a_row == 0
    assert not torch.equal(training.clip.text_projection, before["text_projection"])
    assert all(p.isfinite().all() for p in training.clip.parameters())


def test_a_run_that_only_skips_has_diverged(monkeypatch):
    monkeypatch.setattr(trainer, "MOST_SKIPS", 3)
    pairs = make_pairs()
    pairs.features[:] = math.inf
    training, events = start(settings(epochs=10), pairs=pairs)
    before, heard = snapshot(training.clip), []
    with pytest.raises(InputError, match="diverged: the last 3 steps"):
        for event in events:
            heard.append(event)
    assert len(steps(heard)) == 3 and training.skipped == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.clip.state_dict().items())


@pytest.mark.parametrize(("start_at", "sign", "end"), [(MAX_LOGIT_SCALE - 1e-3, 1, MAX_LOGIT_SCALE), (1e-3, -1, 0.0)])
def test_the_temperature_is_clamped(start_at, sign, end):
    """Captions that fit their pictures perfectly want it sharper still; the opposite of them want it blunt."""
    clip, pairs = make(), make_pairs()
    rows = pairs.first
    with torch.no_grad():
        clip.logit_scale.fill_(start_at)
        pairs = Pairs(pairs.ids[rows], (1,) * len(COUNTS), sign * clip(pairs.ids[rows]).projected, None)
    _, events = start(settings(epochs=3, lr=0.02, rates={"*": 0.0, "logit_scale": 1.0}), clip, pairs)
    scales = [event["logit_scale"] for event in steps(events)]
    assert scales == pytest.approx([end] * 6, abs=1e-6)


def test_text_mode_leaves_the_vision_tower_alone():
    training, events = start(settings(epochs=2))
    before = snapshot(training.clip)
    list(events)
    for name, parameter in training.clip.named_parameters():
        if name.startswith("visual."):
            assert parameter.grad is None and not parameter.requires_grad
            assert torch.equal(parameter, before[name])
        else:
            assert not torch.equal(parameter, before[name]), name
    assert not any(name.endswith((".r", ".theta")) for name in before if name.startswith("visual."))


def test_both_mode_trains_every_parameter():
    training, events = start(settings(train="both", epochs=2))
    before = snapshot(training.clip)
    list(events)
    for name, parameter in training.clip.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_both_mode_looks_one_step_ahead_and_no_further():
    config = settings(train="both", epochs=2)
    pairs = make_pairs("both")
    training, events = start(config, pairs=pairs)
    list(events)
    sampler = prepare(make(), pairs, config, CPU).sampler
    taken = [next(sampler)[0].tolist() for _ in range(4)]
    assert pairs.pixels.asked == [*taken[1:], []]


@pytest.mark.parametrize("geometric", [RepairConfig().geometric, ()])
def test_names_while_training(geometric):
    training, events = start(settings(train="both", geometric=geometric))
    next(events)
    names = set(training.clip.state_dict())
    mlps = [f"{tower}transformer.resblocks.0.mlp.{part}" for tower in ("", "visual.") for part in ("c_fc", "c_proj")]
    for mlp in mlps:
        assert (f"{mlp}.weight" in names) != bool(geometric)
        assert ({f"{mlp}.r", f"{mlp}.theta"} <= names) == bool(geometric)


def test_rates_freeze_and_scale():
    training, events = start(settings(rates={"*.r": 0.0, "logit_scale": 0.0, "token_embedding.weight": 0.0}))
    before = snapshot(training.clip)
    list(events)
    for name, parameter in training.clip.named_parameters():
        still = name.endswith(".r") or name in ("logit_scale", "token_embedding.weight") or "visual." in name
        assert torch.equal(parameter, before[name]) == still, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": {"*.rho": 1.0}}, r"\*\.rho"),
        ({"rates": {"*": 0.0}}, "every parameter is frozen"),
        ({"batch": 25}, "24 pictures don't fill a batch of 25"),
        ({"precision": "fp16"}, "needs a GPU"),
    ],
)
def test_settings_that_do_not_work(changes, message):
    with pytest.raises(InputError, match=message):
        prepare(make(), make_pairs(), settings(**changes), CPU)


def test_an_anchor_to_the_original_pulls_penultimate_closer():
    original = make(3)
    ids = make_pairs().ids
    found = {}
    for weight in (0.0, 3.0):
        anchors = (Anchor("original", "penultimate", weight),) if weight else ()
        clip = make(3)
        with torch.no_grad():
            for block in clip.transformer.resblocks:
                block.mlp.c_fc.weight += 0.1 * torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
        before = drift(clip, original, ids)["penultimate"].one_minus_cosine
        config = settings(epochs=30, lr=3e-3, anchors=anchors)
        training, events = start(config, clip, teachers={"original": original})
        list(events)
        found[weight] = drift(training.clip, original, ids)["penultimate"].one_minus_cosine
    assert found[3.0] < 0.5 * before and found[3.0] < 0.5 * found[0.0]


def test_an_anchor_to_the_broken_one_holds_it_where_it_was():
    ids, found = make_pairs().ids, {}
    for weight in (0.0, 10.0):
        anchors = (Anchor("broken", "last", weight),) if weight else ()
        training, events = start(settings(epochs=10, anchors=anchors), teachers={"broken": make()})
        list(events)
        found[weight] = drift(training.clip, make(), ids)["last"].one_minus_cosine
    assert found[10.0] < 0.5 * found[0.0]


def test_teachers_do_not_change():
    original = make(3)
    kept = frozen(original)
    pairs, config = make_pairs(), settings(anchors=ANCHORS)
    training = prepare(make(), pairs, config, CPU)
    list(train(training, pairs, {"original": kept}, config, CPU))
    for name, parameter in kept.named_parameters():
        assert torch.equal(parameter, original.get_parameter(name)) and parameter.grad is None


def test_the_same_seed_is_the_same_training():
    runs = []
    for seed in (0, 0, 1):
        training, events = start(settings(seed=seed, epochs=2))
        runs.append(([event["loss"] for event in steps(events)], snapshot(training.clip)))
    assert runs[0][0] == runs[1][0] and runs[0][0] != runs[2][0]
    assert all(torch.equal(tensor, runs[1][1][name]) for name, tensor in runs[0][1].items())


def test_held_out_loss():
    clip, other, pairs = make(), make(3), make_pairs()
    first = pairs.ids[pairs.first]
    config = settings(anchors=ANCHORS)
    found = held_out_loss(clip, pairs.features, first, {"original": other}, config, batch=20)
    with torch.no_grad():
        expected = info_nce(pairs.features, clip(first).projected, clip.logit_scale).item()
        assert found["contrastive"] == pytest.approx(expected, rel=1e-5)
        for one in ANCHORS:
            mine, theirs = (getattr(tower(first[:20]), one.read_point) for tower in (clip, other))
            assert found[str(one)] == pytest.approx(one.weight * anchor(mine, theirs).item(), rel=1e-5)
    assert found["loss"] == pytest.approx(sum(v for k, v in found.items() if k != "loss"))


def test_held_out_loss_of_a_broken_model_is_never_the_best():
    pairs = make_pairs()
    found = held_out_loss(make(), pairs.features * math.nan, pairs.ids[pairs.first], {}, settings())
    assert found["loss"] == math.inf


def short_of_memory(clip, most, error):
    """A CLIP whose text tower takes no more than `most` captions at a time."""
    encode_text = clip.encode_text

    def limited(ids):
        if len(ids) > most:
            raise error
        return encode_text(ids)

    clip.encode_text = limited
    return clip


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
    ],
    ids=["cuda", "cpu"],
)
def test_a_step_that_does_not_fit_is_taken_again_in_smaller_pieces(error):
    config = settings(epochs=2, anchors=ANCHORS[:1], anchor_captions=8)
    clip = short_of_memory(make(), 4, error)
    training, events = start(config, clip, teachers={"original": make(3)})
    heard = list(events)
    assert [(e["step"], e["batch"]) for e in heard if e["type"] == "out_of_memory"] == [(0, 6), (0, 3)]
    assert [event["step"] for event in steps(heard)] == [1, 2, 3, 4]
    twin_config = dataclasses.replace(config, batch=3, accumulate=4)
    twin, events = start(twin_config, make(), teachers={"original": make(3)})
    expected = steps(events)
    assert [event["losses"] for event in steps(heard)] == [event["losses"] for event in expected]
    for (name, found), (_, tensor) in zip(
        training.clip.state_dict().items(), twin.clip.state_dict().items(), strict=True
    ):
        assert torch.equal(found, tensor), name
    assert training.state()["micro_batch"] == 3


def test_one_pair_at_a_time_is_the_least():
    training, events = start(settings(), short_of_memory(make(), 0, torch.OutOfMemoryError("no")))
    with pytest.raises(torch.OutOfMemoryError):
        list(events)
    assert training.micro_batch == 1 and training.step == 0


def test_other_errors_are_not_taken_for_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        list(start(settings(), short_of_memory(make(), 4, RuntimeError("shapes do not fit")))[1])


def test_update_ratios_are_those_of_the_steps_they_are_told_of(monkeypatch):
    monkeypatch.setattr(trainer, "UPDATES_EVERY", 3)
    training, events = start(settings(epochs=3))
    before, told = snapshot(training.clip), []
    for event in events:
        after = snapshot(training.clip)
        if ratios := event.get("update_ratios"):
            told.append(event["step"])
            sums = {}
            for name, tensor in before.items():
                if not name.startswith("visual."):
                    change, length = sums.get(layer_and_role(name), (0.0, 0.0))
                    moved = (after[name] - tensor).double().square().sum().item()
                    sums[layer_and_role(name)] = change + moved, length + tensor.double().square().sum().item()
            naive = {key: math.sqrt(change / length) for key, (change, length) in sums.items() if length}
            assert ratios == pytest.approx(naive, rel=1e-4)
        before = after
    assert told == [1, 3, 6]


def test_statistics_change_nothing():
    """What is looked at is not touched: with and without statistics, the weights are the same to the bit."""
    one, events = start(settings(epochs=2))
    list(events)
    pairs = make_pairs()
    other = prepare(make(), pairs, settings(epochs=2), CPU)
    list(train(other, pairs, {}, settings(epochs=2), CPU, statistics=False))
    for (name, tensor), (_, twin) in zip(one.clip.state_dict().items(), other.clip.state_dict().items(), strict=True):
        assert torch.equal(tensor, twin), name


def test_what_a_step_tells():
    """Rates by group, speed in pairs and in tokens up to end-of-text, and how alike the captions are embedded."""
    config = settings(rates={"*.r": 0.1})
    clip, pairs = make(), make_pairs()
    pictures, choice = next(prepare(make(), pairs, config, CPU).sampler)
    ids = pairs.ids[pairs.first[pictures] + choice]
    with torch.no_grad():
        x = torch.nn.functional.normalize(clip(ids).projected, dim=-1)
    similar = x @ x.T
    naive = (similar.sum() - similar.diagonal().sum()) / (len(x) * (len(x) - 1))
    event = next(start(config, clip, pairs)[1])
    assert event["lrs"] == pytest.approx({"1": 1e-3, "0.1": 1e-4}) and event["lr"] == pytest.approx(1e-3)
    assert event["text_cosine"] == pytest.approx(naive.item(), abs=1e-5)
    tokens = sum(row.tolist().index(49) + 1 for row in ids)
    assert event["tokens_per_second"] / event["pairs_per_second"] == pytest.approx(tokens / len(ids), rel=1e-3)
    assert event["memory"] > 0 and event["non_finite"] == 0


def alike_pairs():
    """Pairs of which pictures 0 to 5 are one, and so are some captions of others."""
    pairs = make_pairs()
    ids = pairs.ids.clone()
    ids[pairs.first[10]] = ids[pairs.first[11]] = ids[pairs.first[20]]
    same_picture = torch.arange(len(COUNTS)).clamp_min(5)
    return dataclasses.replace(pairs, ids=ids, same_picture=same_picture, same_caption=alike(ids))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_what_is_the_same_is_no_negative(accumulate):
    config = settings(batch=24 // accumulate, accumulate=accumulate, smoothing=0.1)
    clip, pairs = make(), alike_pairs()
    pictures, choice = next(prepare(make(), pairs, config, CPU).sampler)
    batch = pairs.batch(pictures, choice, pictures[:0])
    with torch.no_grad():
        texts = make()(batch.ids).projected
        expected = info_nce(
            pairs.features[pictures], texts, clip.logit_scale, 0.1, batch.same_picture, batch.same_caption
        )
        plain = info_nce(pairs.features[pictures], texts, clip.logit_scale, 0.1)
    event = next(start(config, clip, pairs)[1])
    assert event["losses"]["contrastive"] == pytest.approx(expected.item(), rel=1e-5)
    assert abs(expected - plain) > 0.01
    same = (batch.same_picture[:, None] == batch.same_picture) | (batch.same_caption[:, None] == batch.same_caption)
    assert event["masked"] == (same.sum().item() - 24) // 2 >= 15


def test_negatives_may_be_all_pictures():
    """Of a batch of two, each caption is told from all 24 pictures."""
    config = settings(batch=2, negatives="all")
    pairs = alike_pairs()
    pictures, choice = next(prepare(make(), pairs, config, CPU).sampler)
    batch = pairs.batch(pictures, choice, pictures[:0])
    clip = make()
    with torch.no_grad():
        images = torch.nn.functional.normalize(pairs.features, dim=-1)
        texts = torch.nn.functional.normalize(make()(batch.ids).projected, dim=-1)
        logits = clip.logit_scale.exp() * texts @ images.T
        owners = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
        for row, picture in enumerate(pictures.tolist()):
            caption = batch.same_caption[row]
            left_out = pairs.same_picture == pairs.same_picture[picture]
            left_out[owners[pairs.same_caption == caption]] = True
            left_out[picture] = False
            logits[row, left_out] = -torch.inf
        to_image = torch.nn.functional.cross_entropy(logits, pictures)
        own = info_nce(pairs.features[pictures], make()(batch.ids).projected, clip.logit_scale)
        columns = clip.logit_scale.exp() * images[pictures] @ texts.T
        if batch.same_picture[0] == batch.same_picture[1] or batch.same_caption[0] == batch.same_caption[1]:
            columns = columns.masked_fill(~torch.eye(2, dtype=torch.bool), -torch.inf)
        columns = torch.nn.functional.cross_entropy(columns, torch.arange(2))
    event = next(start(config, clip, pairs)[1])
    assert event["losses"]["contrastive"] == pytest.approx((to_image.item() + columns.item()) / 2, rel=1e-4)
    assert event["loss"] > own.item() + 0.3


@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_moments_of_either_precision_train(state):
    losses = [event["loss"] for event in steps(start(settings(epochs=10, optimizer_state=state))[1])]
    assert losses[-1] < losses[0] - 0.3
