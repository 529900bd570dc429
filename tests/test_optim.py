"""Rates, groups and gradient norms."""

from __future__ import annotations

import math

import pytest
import torch

from gmp.clip import CLIP, CLIPConfig, TextConfig, VisionConfig, initialize
from gmp.geometric import to_geometric
from gmp.gradients import clip_gradients, layer_and_role, norms_by_layer, share_of_non_finite, squares
from gmp.optim import SCHEDULES, decays, parameter_groups, schedule, set_rates

CONFIG = CLIPConfig(TextConfig(32, 2, 2, 64, 12, 50, 16), VisionConfig(32, 2, 2, 64, 8, 16, 16))


@pytest.fixture
def clip():
    clip = initialize(CLIP(CONFIG), torch.Generator().manual_seed(0))
    to_geometric(clip)
    return clip


def whole(name, total, warmup):
    return [schedule(name, step, total, warmup) for step in range(total)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(100, 10), (100, 0), (3, 1), (1, 0), (7, 6)])
def test_schedules_are_factors(name, total, warmup):
    values = whole(name, total, warmup)
    assert all(0 < value <= 1 for value in values)
    assert values[:warmup] == pytest.approx([(i + 1) / (warmup + 1) for i in range(warmup)])
    assert values[warmup] == 1
    after = values[warmup:]
    assert after == sorted(after, reverse=True)


def test_cosine_ends_near_zero():
    """Given twice the steps that are taken, as in the original scripts, a schedule never comes down."""
    values = whole("cosine", 1000, 100)
    assert values[-1] < 1e-5
    assert values[550] == pytest.approx(0.5, abs=1e-12)
    assert values[100 + 225] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_linear_and_constant():
    assert whole("linear", 110, 10)[-1] == pytest.approx(0.01)
    assert whole("linear", 110, 10)[60] == pytest.approx(0.5)
    assert set(whole("constant", 50, 0)) == {1.0}


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'onecycle' is not one of"):
        schedule("onecycle", 0, 10, 0)


def test_rates_of_groups_keep_their_ratio_over_a_whole_run(clip):
    """OneCycleLR with one maximum, as in the original scripts, overwrites the rates of all groups."""
    rates = {"*.r": 3.0, "*.theta": 0.5, "token_embedding.weight": 0.1}
    optimizer = torch.optim.AdamW(parameter_groups(clip, 1e-3, rates, 0.01))
    expected = {**dict.fromkeys(n for n, _ in clip.named_parameters())}
    for name in expected:
        factor = 3.0 if name.endswith(".r") else 0.5 if name.endswith(".theta") else 1.0
        expected[name] = 0.1 if name == "token_embedding.weight" else factor
    for step in range(20):
        factor = schedule("cosine", step, 20, 3)
        set_rates(optimizer, factor)
        found = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
        assert found == pytest.approx({name: 1e-3 * one * factor for name, one in expected.items()}, rel=1e-12)


def test_every_parameter_is_in_one_group(clip):
    groups = parameter_groups(clip, 1e-3, {"*.r": 2.0}, 0.01)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in clip.named_parameters())
    parameters = dict(clip.named_parameters())
    for group in groups:
        assert all(parameters[n] is p for n, p in zip(group["names"], group["params"], strict=True))


def test_what_decays(clip):
    groups = parameter_groups(clip, 1e-3, {}, 0.01)
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}
    block = "transformer.resblocks.1."
    assert {
        f"{block}attn.in_proj_weight",
        f"{block}mlp.c_fc.theta",
        "text_projection",
        "visual.proj",
    } <= decayed
    for name, _ in clip.named_parameters():
        plain = name.endswith((".r", "bias")) or "ln_" in name or "embedding" in name or name == "logit_scale"
        assert (name in decayed) == (not plain), name
        assert decays(name, clip.get_parameter(name)) == (name in decayed)


def test_decay_does_not_touch_radii(clip):
    optimizer = torch.optim.AdamW(parameter_groups(clip, 1e-2, {}, 0.5))
    before = {name: p.detach().clone() for name, p in clip.named_parameters()}
    for parameter in clip.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name for name, p in clip.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(decays(name, before[name]) for name in moved)


def test_rate_zero_freezes(clip):
    groups = parameter_groups(clip, 1e-3, {"visual.*": 0.0, "*logit_scale": 0.0}, 0.01)
    names = {name for group in groups for name in group["names"]}
    assert not any(name.startswith("visual.") or name == "logit_scale" for name in names)
    for name, parameter in clip.named_parameters():
        assert parameter.requires_grad == (name in names)


def test_the_last_pattern_wins(clip):
    groups = parameter_groups(clip, 1.0, {"*": 0.0, "*.theta": 2.0, "visual.*.theta": 3.0}, 0.0)
    found = {name: group["initial_lr"] for group in groups for name in group["names"]}
    assert {name for name in found if not name.endswith("theta")} == set()
    assert found["transformer.resblocks.0.mlp.c_fc.theta"] == 2.0
    assert found["visual.transformer.resblocks.0.mlp.c_fc.theta"] == 3.0


def test_frozen_parameters_are_in_no_group(clip):
    clip.visual.requires_grad_(False)
    names = {name for group in parameter_groups(clip, 1.0, {"*": 2.0}, 0.0) for name in group["names"]}
    assert names == {name for name, _ in clip.named_parameters() if not name.startswith("visual.")}
    assert not any(p.requires_grad for p in clip.visual.parameters())


def test_patterns_that_match_nothing_are_refused(clip):
    with pytest.raises(ValueError, match=r"\['\*\.rho', 'mlp'\]"):
        parameter_groups(clip, 1e-3, {"*.rho": 1.0, "*.r": 1.0, "mlp": 0.0}, 0.0)


def with_gradients(clip, size=1.0):
    generator = torch.Generator().manual_seed(1)
    for parameter in clip.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)
    clip.ln_final.bias.grad = None
    return [n for n, _ in clip.named_parameters()], [p for _, p in clip.named_parameters()]


def gradients(clip):
    found = {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}
    return list(found), list(found.values())


def test_gradient_norms(clip):
    with_gradients(clip)
    names, grads = gradients(clip)
    norms = norms_by_layer(names, squares(grads).tolist())
    layers = {}
    for name, grad in zip(names, grads, strict=True):
        layers[layer_and_role(name)] = layers.get(layer_and_role(name), 0) + grad.double().square().sum().item()
    assert norms == pytest.approx({key: math.sqrt(value) for key, value in layers.items()}, rel=1e-5)


def test_layers_and_roles(clip):
    expected = {
        "token_embedding.weight": "text.embedding",
        "positional_embedding": "text.embedding",
        "ln_final.weight": "text.layer_norm",
        "text_projection": "text.projection",
        "logit_scale": "text.logit_scale",
        "transformer.resblocks.1.attn.in_proj_bias": "text.1.attention",
        "transformer.resblocks.0.attn.out_proj.weight": "text.0.attention",
        "transformer.resblocks.0.ln_2.bias": "text.0.layer_norm",
        "transformer.resblocks.0.mlp.c_fc.r": "text.0.r",
        "transformer.resblocks.11.mlp.c_proj.theta": "text.11.theta",
        "transformer.resblocks.0.mlp.c_proj.bias": "text.0.mlp",
        "transformer.resblocks.0.mlp.c_proj.weight": "text.0.mlp",
        "visual.conv1.weight": "vision.embedding",
        "visual.class_embedding": "vision.embedding",
        "visual.ln_pre.weight": "vision.layer_norm",
        "visual.proj": "vision.projection",
        "visual.transformer.resblocks.1.mlp.c_fc.theta": "vision.1.theta",
    }
    assert {name: layer_and_role(name) for name in expected} == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_gradients_are_counted(clip, bad):
    with_gradients(clip)
    names, grads = gradients(clip)
    assert share_of_non_finite(grads) == 0 and math.isfinite(squares(grads).sum())
    clip.visual.proj.grad[3, 5:7] = bad
    assert not math.isfinite(squares(grads).sum())
    assert share_of_non_finite(grads) == 2 / sum(grad.numel() for grad in grads)
    assert [k for k, v in norms_by_layer(names, squares(grads).tolist()).items() if not math.isfinite(v)] == [
        "vision.projection"
    ]


@pytest.mark.parametrize("most", [0.5, 1e6, 0.0])
def test_clipping(clip, most):
    _, parameters = with_gradients(clip)
    before = [None if p.grad is None else p.grad.clone() for p in parameters]
    clip_gradients(parameters, math.sqrt(squares(gradients(clip)[1]).sum()), most)
    found = [None if p.grad is None else p.grad.clone() for p in parameters]
    for parameter, grad in zip(parameters, before, strict=True):
        parameter.grad = grad
    if most:
        torch.nn.utils.clip_grad_norm_(parameters, most)
    for parameter, grad in zip(parameters, found, strict=True):
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.allclose(grad, parameter.grad, rtol=1e-5, atol=0)
