"""Features that are scaled while training: the original's hooks, in every pass of a step, and nowhere else."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from gmp.clip import CLIP, CLIPConfig, TextConfig, VisionConfig, initialize, precision, set_checkpointing
from gmp.config import Anchor, Neuron, RepairConfig
from gmp.errors import InputError
from gmp.geometric import fold_state, to_geometric
from gmp.neurons import check_neurons, scaled
from gmp.pairs import Pairs
from gmp.trainer import begin, set_up, train
from tests.test_locks import CONFIG, CPU, Pixels, ids, make

# zer0int/CLIP-fine-tune, exp-acts-ft-finetune-OpenAI-ViT-L-14-GmP-manipulate-neurons.py
SEED = (
    Neuron("vision", 22, 2432, 1000.0),
    Neuron("vision", 20, 168, 100.0),
    Neuron("vision", 20, 1297, 100.0),
    Neuron("vision", 23, 281, 100.0),
)
VIT_L = CLIPConfig(TextConfig(768, 12, 12, 3072, 77, 49408, 768), VisionConfig(1024, 24, 16, 4096, 14, 224, 768))
SOME = (
    Neuron("vision", 1, 5, 3.0),
    Neuron("vision", 1, 9, -2.0),
    Neuron("vision", 3, 0, 4.0),
    Neuron("text", 2, 7, 5.0),
)


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def pictures(count=6, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def hooked(clip, neurons):
    """As the original scripts do it: forward hooks on `c_fc` that multiply columns, written over a plain model."""
    for one in neurons:
        tower = clip.visual if one.tower == "vision" else clip

        def hook(module, inputs, output, one=one):
            output = output.clone()
            output[:, one.feature] = output[:, one.feature] * one.factor
            return output

        tower.transformer.resblocks[one.block].mlp.c_fc.register_forward_hook(hook)
    return clip


def by_weights(clip, neurons):
    """The same function without any hook: rows of `c_fc` and their biases multiplied."""
    with torch.no_grad():
        for one in neurons:
            layer = (clip.visual if one.tower == "vision" else clip).transformer.resblocks[one.block].mlp.c_fc
            layer.weight[one.feature] *= one.factor
            layer.bias[one.feature] *= one.factor
    return clip


# --- the table of the original scripts


@pytest.mark.parametrize("geometric", [False, True])
def test_the_originals_table_on_a_tower_of_full_width(geometric):
    """Four blocks in place of 24, the features and factors as they are."""
    config = replace(CONFIG, vision=replace(VIT_L.vision, layers=4, image_size=28, embed_dim=16))
    neurons = [replace(one, block=one.block - 20) for one in SEED]
    clip = initialize(CLIP(config), torch.Generator().manual_seed(0))
    x = pictures(2, 28)
    with torch.no_grad():
        plain = clip.encode_image(x)
        expected = by_weights(copy.deepcopy(clip), neurons).encode_image(x)
        if geometric:
            to_geometric(clip)
        check_neurons(config, neurons)
        with scaled(clip, neurons):
            found = clip.encode_image(x)
        assert relative(expected, plain) > 0.01
        assert relative(found, expected) < 1e-4
        assert relative(clip.encode_image(x), plain) < 1e-5


def test_the_originals_features_are_there_in_vit_l():
    check_neurons(VIT_L, SEED)


def test_all_that_is_not_there_is_told_at_once_with_what_the_model_has():
    wrong = (Neuron("vision", 24, 2432, 2.0), *SEED, Neuron("text", 3, 3072, 2.0))
    with pytest.raises(InputError) as told:
        check_neurons(VIT_L, wrong)
    assert "block 24 feature 2432 of the vision tower, block 3 feature 3072 of the text tower;" in str(told.value)
    assert "the text tower has blocks 0 to 11 with features 0 to 3071" in str(told.value)
    assert "the vision tower has blocks 0 to 23 with features 0 to 4095" in str(told.value)


def test_they_are_checked_before_a_training_is_set_up():
    with pytest.raises(InputError, match="block 9 feature 1 of the text tower; the text tower has blocks 0 to 4"):
        set_up(make(), RepairConfig(neurons=(Neuron("text", 9, 1, 2.0),)), CPU)


def test_a_feature_has_one_factor():
    with pytest.raises(InputError, match="more than once: block 22 feature 2432 of the vision tower"):
        check_neurons(VIT_L, (*SEED, SEED[0]))


# --- gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("geometric", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_originals_hooks(checkpointing, geometric, dtype):
    mine, theirs = make(), hooked(make(), SOME)
    for clip in (mine, theirs):
        set_checkpointing(clip, checkpointing and clip is mine)
        if geometric:
            to_geometric(clip, lambda name: name.endswith("c_proj"))  # the originals' hooks stay on c_fc
    if geometric:
        to_geometric(mine)
    found = []
    for clip, neurons in ((mine, SOME), (theirs, ())):
        with precision(dtype, clip), scaled(clip, neurons):
            out = clip.encode_image(pictures()), clip.encode_text(ids(6))
            sum((one * torch.linspace(-1, 1, one.numel()).view_as(one)).sum() for one in out).backward()
        found.append((*out, clip.visual.conv1.weight.grad, clip.transformer.resblocks[0].ln_1.weight.grad))
    tolerance = 1e-5 if dtype is None else 2e-2
    for mine_, theirs_ in zip(*found, strict=True):
        assert relative(mine_, theirs_) < tolerance
    with torch.no_grad(), precision(dtype, theirs):
        assert relative(make().encode_image(pictures()), theirs.encode_image(pictures())) > 3 * tolerance


def test_a_factor_of_one_changes_nothing():
    clip = make()
    with torch.no_grad():
        before = clip.encode_text(ids(6))
        with scaled(clip, (Neuron("text", 1, 3, 1.0),)):
            assert torch.equal(clip.encode_text(ids(6)), before)


# --- only while training


def test_nothing_is_left_behind_and_no_other_clip_sees_it():
    clip, other = make(), make()
    with torch.no_grad():
        before = clip.encode_text(ids(6))
        with pytest.raises(ZeroDivisionError), scaled(clip, SOME):
            assert not torch.equal(clip.encode_text(ids(6)), before)
            assert torch.equal(other.encode_text(ids(6)), before)
            raise ZeroDivisionError
        assert torch.equal(clip.encode_text(ids(6)), before)
    assert not any(module._forward_hooks for module in clip.modules())


def begun(clip=None, **changes):
    base = {"epochs": 2, "batch": 12, "lr": 1e-3, "warmup": 0.0, "anchors": (), "train": "both", "neurons": SOME}
    config = RepairConfig(**base | changes)
    pairs = Pairs(ids(), (1,) * 24, None, Pixels())
    clip = clip or make()
    teachers = {"original": make().requires_grad_(False)} if config.anchors else {}
    training = begin(clip, set_up(clip, config, CPU), pairs.counts, config, CPU)
    return training, train(training, pairs, teachers, config, CPU)


def test_a_step_takes_the_gradients_of_the_scaled_network():
    _, events = begun()
    first = next(events)
    _, other = begun(clip=hooked(make(), SOME), neurons=(), geometric=())
    expected = next(other)
    assert first["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert first["grad_norms"]["text.0.attention"] == pytest.approx(
        expected["grad_norms"]["text.0.attention"], rel=1e-4
    )
    plain = next(begun(neurons=())[1])
    assert plain["loss"] != pytest.approx(first["loss"], rel=1e-3)


@pytest.mark.parametrize("more", [{"accumulate": 3, "batch": 4}, {"checkpointing": True}, {"geometric": ()}])
def test_pieces_and_checkpointing_and_plain_layers_give_the_same_step(more):
    whole, part = next(begun()[1]), next(begun(**more)[1])
    assert part["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    for name in ("vision.0.attention", "text.1.layer_norm", "text.embedding"):
        assert part["grad_norms"][name] == pytest.approx(whole["grad_norms"][name], rel=1e-4)


def test_between_steps_the_network_is_as_it_is():
    training, events = begun(anchors=(Anchor("original", "last", 0.3),))
    for _ in events:
        assert not any(module._forward_hooks for module in training.clip.modules())
        plain = make()
        plain.load_state_dict(fold_state(training.clip.state_dict()))
        with torch.no_grad():
            assert relative(training.clip.encode_text(ids(6)), plain.encode_text(ids(6))) < 1e-5


def test_anchors_hold_the_network_that_will_be_read():
    """A student that is its teacher still has no distance to it, whatever is scaled beside."""
    training, events = begun(anchors=(Anchor("original", "last", 0.3),))
    event = next(events)
    assert event["losses"][str(Anchor("original", "last", 0.3))] < 1e-6
