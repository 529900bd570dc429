"""What trains: locked towers and blocks, embeddings, and blocks that join one after the other."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import islice

import pytest
import torch

from gmp import checkpoint
from gmp.clip import CLIP, CLIPConfig, TextConfig, VisionConfig, initialize
from gmp.config import Anchor, Geometric, RepairConfig, Unfreeze
from gmp.errors import InputError
from gmp.locks import blocks_at, joined, part, trains, unfrozen
from gmp.pairs import Pairs
from gmp.trainer import begin, set_up, train
from tests.open_clip_peer import open_clip

CPU = torch.device("cpu")
CONFIG = CLIPConfig(TextConfig(32, 5, 2, 64, 12, 50, 16), VisionConfig(32, 4, 2, 64, 8, 16, 16))
REGISTERS = replace(CONFIG, vision=replace(CONFIG.vision, registers=2, gates=3))
GATES = "visual.transformer.intermediate_fusion_mlps"
STEM = ("visual.conv1", "visual.class_embedding", "visual.positional_embedding", "visual.ln_pre")
EMBEDDINGS = {"token_embedding.weight", "positional_embedding"}
TOTAL = 12


def names(config=CONFIG):
    with torch.device("meta"):
        return [name for name, _ in CLIP(config).named_parameters()]


def trained(config=CONFIG, **changes):
    settings = RepairConfig(**changes)
    return {name for name in names(config) if trains(name, config, settings)}


def blocks(found, stack="transformer"):
    """Numbers of blocks that are in a set of names; each must be in it as a whole."""
    inside = [name for name in found if name.startswith(f"{stack}.resblocks.")]
    numbers = sorted({int(name.removeprefix(f"{stack}.resblocks.").partition(".")[0]) for name in inside})
    whole = [name for name in names() if name.startswith(tuple(f"{stack}.resblocks.{n}." for n in numbers))]
    assert sorted(inside) == sorted(whole)
    return numbers


def peer():
    """OpenCLIP's model of the same shape."""
    with torch.random.fork_rng():
        return open_clip().CLIP(
            embed_dim=16,
            vision_cfg={"image_size": 16, "patch_size": 8, "layers": 4, "width": 32, "head_width": 16, "mlp_ratio": 2},
            text_cfg={"context_length": 12, "vocab_size": 50, "width": 32, "heads": 2, "layers": 5, "mlp_ratio": 2},
        )


# --- locks


def test_text_trains_the_text_tower_and_the_temperature_and_both_trains_all():
    assert trained() == {name for name in names() if not name.startswith("visual.")}
    assert trained(train="both") == set(names())


@pytest.mark.parametrize("unlocked", range(5))
def test_vision_blocks_are_one_group_less_than_open_clip_unlocks(unlocked):
    """Its first group is the projection, which is never locked here."""
    model = peer()
    model.lock_image_tower(unlocked_groups=unlocked + 1)
    theirs = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("visual.")}
    ours = {name for name in trained(train="both", vision_blocks=unlocked) if name.startswith("visual.")}
    assert ours == theirs and "visual.proj" in ours


@pytest.mark.parametrize("unlocked", range(5))
def test_text_blocks_are_one_group_less_than_open_clip_unlocks(unlocked):
    model = peer()
    model.lock_text_tower(unlocked_layers=unlocked + 1)
    theirs = {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("visual.")}
    assert trained(text_blocks=unlocked) == theirs


@pytest.mark.parametrize("unlocked", range(6))
def test_text_blocks_come_with_the_final_norm_and_without_embeddings(unlocked):
    found = trained(text_blocks=unlocked)
    assert blocks(found) == list(range(5 - unlocked, 5))
    outside = {name for name in found if "resblocks" not in name}
    assert outside == {"text_projection", "logit_scale"} | ({"ln_final.weight", "ln_final.bias"} if unlocked else set())


def test_embeddings_are_locked_by_themselves():
    gone = trained(train="both") - trained(train="both", embeddings=False)
    vision = {"visual.conv1.weight", "visual.class_embedding", "visual.positional_embedding"}
    assert gone == EMBEDDINGS | vision


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.07}, {"loss": "seed"}, {"loss": "siglip"}])
def test_a_fixed_temperature_does_not_train(changes):
    assert ("logit_scale" in trained(**changes)) == RepairConfig(**changes).trains_temperature
    assert "logit_scale" not in trained(temperature=0.07)


def test_gates_belong_to_the_blocks_that_they_are_behind():
    """Of three, one is behind the tower and two behind its last two blocks."""
    assert [part(f"{GATES}.{n}.0.weight", REGISTERS) for n in (0, 1)] == [2, 3]
    one = {name for name in trained(REGISTERS, train="both", vision_blocks=1) if name.startswith("visual.")}
    assert {name for name in one if name.startswith(GATES)} == {n for n in names(REGISTERS) if f"{GATES}.1." in n}
    assert "visual.fusion_mlp.0.weight" in one and "visual.register_tokens" not in one
    none = trained(REGISTERS, train="both", vision_blocks=0)
    assert {name for name in none if name.startswith("visual.")} == {"visual.proj"}
    assert "visual.register_tokens" in trained(REGISTERS, train="both")


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_more_blocks_than_there_are_is_an_error_that_says_how_many_there_are(tower):
    settings = RepairConfig(train="both", **{f"{tower}_blocks": 6})
    layers = {"text": 5, "vision": 4}[tower]
    with pytest.raises(InputError, match=f"{tower}_blocks is 6 and the {tower} tower has {layers} blocks"):
        set_up(make(), settings, CPU)


def test_an_optimizer_has_what_is_not_locked_and_locked_layers_are_not_split():
    clip = make()
    optimizer = set_up(clip, RepairConfig(text_blocks=2, train="both", vision_blocks=0), CPU)
    given = {name for group in optimizer.param_groups for name in group["names"]}
    assert given == {name for name, p in clip.named_parameters() if p.requires_grad}
    split = {name.removesuffix(".theta") for name in dict(clip.named_parameters()) if name.endswith(".theta")}
    assert split == {f"transformer.resblocks.{n}.mlp.{leaf}" for n in (3, 4) for leaf in ("c_fc", "c_proj")}


# --- one block after the other


@pytest.mark.parametrize("total", [1, 2, 7, 40, 1000])
@pytest.mark.parametrize("count", [1, 5, 24])
@pytest.mark.parametrize("until", [0.01, 1 / 3, 0.5, 1.0])
@pytest.mark.parametrize("start", [1, 3, 30])
def test_blocks_begin_with_the_start_never_fall_and_are_all_in_the_end(start, until, count, total):
    unfreeze = Unfreeze(start, until)
    found = [blocks_at(unfreeze, count, step, total) for step in range(total)]
    assert found[0] == min(start, count)
    assert found == sorted(found) and found[-1] <= count
    late = [number for step, number in enumerate(found) if step >= until * total]
    assert set(late) <= {count}


def test_blocks_join_at_an_even_pace():
    assert [blocks_at(Unfreeze(1, 0.5), 5, step, 16) for step in range(16)] == [1, 1, 2, 2, 3, 3, 4, 4, *[5] * 8]
    assert [blocks_at(Unfreeze(2, 1.0), 4, step, 4) for step in range(4)] == [2, 2, 3, 3]


def in_step(step, config=CONFIG, **changes):
    settings = RepairConfig(**changes)
    return {
        name for name in names(config) if trains(name, config, settings) and joined(name, config, settings, step, TOTAL)
    }


@pytest.mark.parametrize("end", ["output", "input"])
@pytest.mark.parametrize("more", [{}, {"text_blocks": 3, "vision_blocks": 2}, {"embeddings": False}])
def test_the_set_that_trains_never_shrinks_and_is_of_whole_blocks(end, more):
    """The original scripts count tensors in place of blocks, and freeze some again."""
    unfreeze = Unfreeze(1, 0.75, end)
    steps = [in_step(step, train="both", unfreeze=unfreeze, **more) for step in range(TOTAL)]
    for before, after in zip(steps, steps[1:], strict=False):
        assert before <= after
    assert steps[-1] == trained(train="both", **more) > steps[0]
    for stack, layers, unlocked in (("transformer", 5, "text_blocks"), ("visual.transformer", 4, "vision_blocks")):
        count = more.get(unlocked, layers)
        for step, found in enumerate(steps):
            now = blocks_at(unfreeze, count, step, TOTAL)
            first = layers - now if end == "output" else layers - count
            assert blocks(found, stack) == list(range(first, first + now))
        assert len(blocks(steps[0], stack)) == 1


def test_what_is_outside_of_blocks_joins_with_the_blocks_beside_it():
    always = {"text_projection", "ln_final.weight", "ln_final.bias", "logit_scale"}
    for end, early in (("output", False), ("input", True)):
        unfreeze = Unfreeze(1, 0.5, end)
        first, last_but_one = (in_step(step, unfreeze=unfreeze) for step in (0, 5))
        assert always <= first
        assert (first >= EMBEDDINGS) == (last_but_one >= EMBEDDINGS) == early
        assert in_step(6, unfreeze=unfreeze) >= EMBEDDINGS


def test_meanwhile_there_is_no_gradient_and_afterwards_all_require_one():
    clip = make()
    settings = RepairConfig(unfreeze=Unfreeze(2, 0.5))
    set_up(clip, settings, CPU)
    everything = {name for name, p in clip.named_parameters() if p.requires_grad}
    with pytest.raises(KeyError), unfrozen(clip, settings, 0, TOTAL):
        clip.encode_text(ids()).sum().backward()
        raise KeyError
    found = {name for name, p in clip.named_parameters() if p.grad is not None}
    assert {name.split(".")[2] for name in found if "resblocks" in name} == {"3", "4"}
    assert found >= {name for name in everything if name.startswith("transformer.resblocks.4.")}
    assert not EMBEDDINGS & found and "text_projection" in found
    assert {name for name, p in clip.named_parameters() if p.requires_grad} == everything


def test_the_way_back_ends_at_the_first_block_that_has_joined():
    clip = make()
    settings = RepairConfig(unfreeze=Unfreeze(2, 0.5))
    set_up(clip, settings, CPU)
    seen = []
    for number, block in enumerate(clip.transformer.resblocks):
        block.register_forward_hook(lambda _, x, out, number=number: seen.extend([number] * out.requires_grad))
    with unfrozen(clip, settings, 0, TOTAL):
        clip.encode_text(ids())
    assert seen == [3, 4]  # the graph has no others


# --- in a training


class Pixels:
    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.pictures = torch.randint(0, 256, (24, 3, 16, 16), dtype=torch.uint8, generator=generator)

    def ahead(self, positions, seeds=None):
        pass

    def __call__(self, positions, seeds=None):
        return self.pictures[list(positions)]


def make(config=CONFIG):
    return initialize(CLIP(config), torch.Generator().manual_seed(0))


def ids(count=24):
    found = torch.randint(1, 48, (count, 12), generator=torch.Generator().manual_seed(1))
    found[:, 0] = 48
    for row in range(count):
        found[row, 3 + row % 8 :] = 49
    return found


def begun(**changes):
    """A training of 8 steps, and its events."""
    base = {"epochs": 4, "batch": 12, "lr": 1e-3, "warmup": 0.0, "weight_decay": 0.1, "decay": "all", "anchors": ()}
    config = RepairConfig(**base | changes)
    features = torch.randn(24, 16, generator=torch.Generator().manual_seed(2))
    both = config.train == "both"
    pairs = Pairs(ids(), (1,) * 24, None if both else features, Pixels() if both else None)
    clip = make()
    teachers = {"original": copy.deepcopy(clip).requires_grad_(False)} if config.anchors else {}
    training = begin(clip, set_up(clip, config, CPU), pairs.counts, config, CPU)
    return training, train(training, pairs, teachers, config, CPU)


def state(training):
    return {name: tensor.clone() for name, tensor in training.clip.state_dict().items()}


@pytest.mark.parametrize("more", [{}, {"accumulate": 2, "batch": 6}, {"checkpointing": True, "train": "both"}])
def test_blocks_that_have_not_joined_stand_still_and_the_others_move(more):
    """Neither gradient nor weight decay moves them; figures are of what moves."""
    training, events = begun(unfreeze=Unfreeze(1, 0.75), **more)
    after = state(training)
    for step, event in enumerate(events):
        before, after = after, state(training)
        now = blocks_at(Unfreeze(1, 0.75), 5, step, event["steps"])
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        numbers = {int(name.split(".")[2]) for name in moved if name.startswith("transformer.resblocks.")}
        assert numbers == set(range(5 - now, 5)), step
        assert ("token_embedding.weight" in moved) == (now == 5)
        told = {key.rpartition(".")[0] for key in event["grad_norms"] if key.startswith("text.")}
        assert told - {"text"} == {f"text.{number}" for number in numbers}
        assert all(norm > 0 for norm in event["grad_norms"].values())
        assert event["non_finite"] == 0 and event["skipped"] == 0
    assert now == 5


@pytest.mark.parametrize("train_what", ["text", "both"])
@pytest.mark.parametrize("end", ["output", "input"])
def test_a_training_that_goes_on_in_the_middle_is_equal_to_the_bit(train_what, end, tmp_path):
    common = {
        "train": train_what,
        "unfreeze": Unfreeze(1, 0.75, end),
        "anchors": (Anchor("original", "penultimate", 0.3),),
    }
    whole, events = begun(**common)
    for _ in islice(events, 3):
        pass
    checkpoint.save(tmp_path, 3, whole.clip, whole.optimizer, whole.state(), 1, {})
    expected = list(events)
    again, events = begun(**common)
    again.restore(checkpoint.restore(checkpoint.list_checkpoints(tmp_path)[0], again.clip, again.optimizer))
    found = list(events)
    timed = ("pairs_per_second", "tokens_per_second", "memory")
    assert [{k: v for k, v in e.items() if k not in timed} for e in found] == [
        {k: v for k, v in e.items() if k not in timed} for e in expected
    ]
    for name, tensor in state(whole).items():
        assert torch.equal(state(again)[name], tensor), name


@pytest.mark.parametrize("changes", [{"text_blocks": 0}, {"text_blocks": 1}, {"unfreeze": Unfreeze(1, 1.0)}])
def test_an_anchor_before_all_that_trains_is_measured_and_pulls_at_nothing(changes):
    training, events = begun(anchors=(Anchor("original", "penultimate", 0.3),), **changes)
    event = next(events)
    assert event["losses"][str(Anchor("original", "penultimate", 0.3))] == pytest.approx(0, abs=1e-6)
    assert event["skipped"] == 0


def test_locked_blocks_stand_still_under_weight_decay():
    training, events = begun(text_blocks=2, train="both", vision_blocks=1)
    before, _ = state(training), list(events)
    moved = {name for name, tensor in state(training).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, p in training.clip.named_parameters() if p.requires_grad}


def test_geometric_layers_unfreeze_like_others():
    kinds = Geometric(("mlp", "qkv", "out", "projection"), sphere=True)
    training, events = begun(unfreeze=Unfreeze(1, 0.75), geometric=(kinds,))
    before = state(training)
    next(events)
    moved = {name for name, tensor in state(training).items() if not torch.equal(tensor, before[name])}
    inside = {name for name in moved if "resblocks" in name}
    assert inside and all(name.startswith("transformer.resblocks.4.") for name in inside)
    assert {"transformer.resblocks.4.attn.in_proj_weight.theta", "text_projection.r"} <= moved
