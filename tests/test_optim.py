"""Rates, groups, gradient norms, and AdamW with moments of every kind, held to torch's plain one."""

from __future__ import annotations

import copy
import importlib
import math

import pytest
import torch

from gmp import adamw, optim
from gmp.adamw import LEAST, AdamW16, round_into
from gmp.clip import CLIP, CLIPConfig, TextConfig, VisionConfig, initialize
from gmp.errors import InputError
from gmp.geometric import to_geometric
from gmp.gradients import clip_gradients, clip_rows, layer_and_role, norms_by_layer, share_of_non_finite, squares
from gmp.optim import (
    LIBRARIES,
    MOMENTS,
    SCHEDULES,
    counter,
    decays,
    make_optimizer,
    momentum,
    optimized,
    parameter_groups,
    schedule,
    set_momentum,
    set_rates,
    steps_from_output,
)

CPU = torch.device("cpu")
BETAS = (0.9, 0.98)
CONFIG = CLIPConfig(TextConfig(32, 2, 2, 64, 12, 50, 16), VisionConfig(32, 2, 2, 64, 8, 16, 16))


@pytest.fixture
def clip():
    clip = initialize(CLIP(CONFIG), torch.Generator().manual_seed(0))
    to_geometric(clip)
    return clip


def whole(name, total, warmup):
    return [schedule(name, step, total, warmup) for step in range(total)]


@pytest.mark.parametrize("name", [name for name in SCHEDULES if not name.startswith("onecycle")])
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
    with pytest.raises(ValueError, match="'twocycle' is not one of"):
        schedule("twocycle", 0, 10, 0)


def one_cycle(name, total, share, maximum, groups=None, **more):
    """torch's own, after no step yet, and its optimizer."""
    groups = groups or [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
    optimizer = torch.optim.AdamW(groups, lr=1e-9, betas=(0.9, 0.98))
    kind = "linear" if name.endswith("linear") else "cos"
    options = {"total_steps": total, "pct_start": share, "anneal_strategy": kind}
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, maximum, **options, **more), optimizer


@pytest.mark.parametrize("name", ["onecycle", "onecycle_linear"])
@pytest.mark.parametrize(
    ("total", "share"), [(100, 0.3), (101, 0.3), (7, 0.1), (1000, 0.1), (10, 0.05), (50, 0.999), (30, 0.0), (1, 0.3)]
)
def test_onecycle_is_torchs_at_every_step(name, total, share):
    peer, optimizer = one_cycle(name, total, share, 3e-4)
    for step in range(total):
        (group,) = optimizer.param_groups
        at = name, step, total, share * total
        assert 3e-4 * schedule(*at) == pytest.approx(group["lr"], rel=1e-9)
        assert momentum(*at) == pytest.approx(group["betas"][0], rel=1e-12)
        optimizer.step()
        if step + 1 < total:
            peer.step()


def test_onecycle_begins_and_ends_where_torchs_does_and_its_top_may_be_the_first_step():
    values = [schedule("onecycle", step, 200, 60.0) for step in range(200)]
    assert (values[0], values[59], values[199]) == pytest.approx((1 / 25, 1.0, 1 / 25e4), rel=1e-9)
    assert [schedule("onecycle", step, 10, 1.0) for step in (0, 9)] == pytest.approx([1.0, 4e-6])  # torch divides by 0


def test_a_schedule_of_two_trainings_ends_at_81_percent_of_its_peak():
    """The original scripts count micro-batches, of which a step has two: their rate hardly falls."""
    steps = 500
    values = [schedule("onecycle", step, 2 * steps, 0.3 * 2 * steps) for step in range(steps)]
    peer, optimizer = one_cycle("onecycle", 2 * steps, 0.3, 5e-7)
    for value in values:
        assert 5e-7 * value == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        peer.step()
    assert values.index(max(values)) == 299  # a script's epoch 12 of 20
    assert values[-1] == pytest.approx(0.81, abs=0.005)


def table(clip):
    """Rates of a run that trains r faster, theta slower and the tokens' embedding hardly: by name, over 1e-3."""
    rates = {"*.r": 3.0, "*.theta": 0.5, "token_embedding.weight": 0.1}
    expected = {}
    for name, _ in clip.named_parameters():
        factor = 3.0 if name.endswith(".r") else 0.5 if name.endswith(".theta") else 1.0
        expected[name] = 0.1 if name == "token_embedding.weight" else factor
    return rates, expected


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_of_groups_keep_their_ratio_over_a_whole_run(clip, name):
    rates, expected = table(clip)
    optimizer = torch.optim.AdamW(parameter_groups(clip, 1e-3, rates, 0.01))
    for step in range(20):
        factor = schedule(name, step, 20, 3)
        set_rates(optimizer, factor)
        found = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
        assert found == pytest.approx({name: 1e-3 * one * factor for name, one in expected.items()}, rel=1e-12)


def test_onecyclelr_with_one_maximum_overwrites_the_rates_of_all_groups(clip):
    """What the original scripts do, and their groups' rates are dead from the first step on."""
    rates, expected = table(clip)
    groups = parameter_groups(clip, 1e-3, rates, 0.01)
    assert len({group["lr"] for group in groups}) == len(set(expected.values())) == 4
    peer, optimizer = one_cycle("onecycle", 20, 0.3, 1e-3, groups)
    for step in range(20):
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        optimizer.step()
        if step < 19:
            peer.step()


def test_a_whole_run_of_adamw_is_that_of_torch_with_onecyclelr(clip):
    """Rates and cycling betas, on the same gradients."""
    other = copy.deepcopy(clip)
    mine = make_optimizer(parameter_groups(clip, 1e-3, {}, 0.1), BETAS, CPU)
    peer, theirs = one_cycle("onecycle", 12, 0.3, 1e-3, parameter_groups(other, 1e-3, {}, 0.1))
    for step in range(12):
        for model in (clip, other):
            with_gradients(model, 0.1 + step)
        at = "onecycle", step, 12, 0.3 * 12
        set_momentum(mine, momentum(*at))
        set_rates(mine, schedule(*at))
        mine.step()
        theirs.step()
        if step < 11:
            peer.step()
    close(clip, other, 1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_first_beta_is_lowest_where_the_rate_is_highest(name):
    at = [(name, step, 40, 10) for step in range(40)]
    rates, betas = [schedule(*one) for one in at], [momentum(*one) for one in at]
    assert all(0.85 - 1e-12 <= beta <= 0.95 for beta in betas)
    assert betas[rates.index(max(rates))] == pytest.approx(0.85)
    assert betas == sorted(betas[: rates.index(max(rates))], reverse=True) + sorted(betas[rates.index(max(rates)) :])


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


def test_all_can_decay(clip):
    groups = parameter_groups(clip, 1e-3, {}, 0.01, decay="all")
    assert {group["weight_decay"] for group in groups} == {0.01}
    assert sum(len(group["names"]) for group in groups) == len(list(clip.parameters()))
    with pytest.raises(ValueError, match="'some' is not one of"):
        parameter_groups(clip, 1e-3, {}, 0.01, decay="some")


AWAY = {  # of towers with 3 and 4 blocks
    "token_embedding.weight": 3,
    "positional_embedding": 3,
    "transformer.resblocks.0.": 2,
    "transformer.resblocks.1.": 1,
    "transformer.resblocks.2.": 0,
    "ln_final.": 0,
    "text_projection": 0,
    "logit_scale": 0,
    "visual.conv1.weight": 4,
    "visual.class_embedding": 4,
    "visual.positional_embedding": 4,
    "visual.register_tokens": 4,
    "visual.ln_pre.": 4,
    "visual.transformer.resblocks.0.": 3,
    "visual.transformer.resblocks.1.": 2,
    "visual.transformer.resblocks.2.": 1,
    "visual.transformer.resblocks.3.": 0,
    "visual.transformer.intermediate_fusion_mlps.0.": 1,  # behind block 2
    "visual.transformer.intermediate_fusion_mlps.1.": 0,
    "visual.fusion_mlp.": 0,
    "visual.ln_post.": 0,
    "visual.proj": 0,
}


def test_layer_decay_lowers_rates_block_by_block_away_from_each_towers_output():
    vision = VisionConfig(32, 4, 2, 64, 8, 16, 16, registers=2, gates=3)
    clip = initialize(CLIP(CLIPConfig(TextConfig(32, 3, 2, 64, 12, 50, 16), vision)), torch.Generator().manual_seed(0))
    to_geometric(clip)
    groups = parameter_groups(clip, 1e-3, {"*.r": 2.0}, 0.01, layer_decay=0.7)
    found = {name: group["initial_lr"] for group in groups for name in group["names"]}
    away = steps_from_output(found)
    assert found.keys() == dict(clip.named_parameters()).keys()
    for name, rate in found.items():
        (expected,) = {steps for stem, steps in AWAY.items() if name.startswith(stem)}
        assert away[name] == expected, name
        assert rate == pytest.approx(1e-3 * 0.7**expected * (2 if name.endswith(".r") else 1), rel=1e-12), name
    assert len(parameter_groups(clip, 1e-3, {}, 0.01)) == 2  # where it is off there are no more groups than before


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


def naive_rows(parameters, most):
    """Adaptive clipping, row by row, in fp64 (arXiv 2102.06171, equation 3; vectors are one row)."""
    found = []
    for parameter in parameters:
        if parameter.grad is None:
            found.append(None)
            continue
        rows = range(len(parameter)) if parameter.ndim > 1 else [...]
        grad = parameter.grad.double().clone()
        for row in rows:
            limit = most * max(parameter[row].detach().double().norm().item(), 1e-3)
            size = grad[row].norm().item()
            if size > limit:
                grad[row] *= limit / size
        found.append(grad)
    return found


@pytest.mark.parametrize("most", [1e-3, 0.3, 1e9])
def test_adaptive_clipping_is_that_of_each_row(clip, most):
    names, parameters = with_gradients(clip)
    clip.get_parameter("visual.proj").data[3] = 0
    clip.get_parameter("ln_final.weight").grad.zero_()
    before, expected = [p.grad.clone() for p in parameters if p.grad is not None], naive_rows(parameters, most)
    clip_rows(names, parameters, most)
    for name, parameter, exact in zip(names, parameters, expected, strict=True):
        assert (parameter.grad is None) == (exact is None), name
        if exact is not None:
            torch.testing.assert_close(parameter.grad.double(), exact, rtol=1e-5, atol=0, msg=name)
    after = [p.grad for p in parameters if p.grad is not None]
    changed = sum(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert changed == 0 if most == 1e9 else 0 < changed < len(after)


def test_adaptive_clipping_is_that_of_pytorch_optimizer(clip):
    agc = pytest.importorskip("pytorch_optimizer.optimizer.agc").agc
    names, parameters = with_gradients(clip)
    expected = [None if p.grad is None else agc(p.detach(), p.grad, 1e-3, 0.3) for p in parameters]
    clip_rows(names, parameters, 0.3)
    for name, parameter, exact in zip(names, parameters, expected, strict=True):
        assert exact is None or torch.allclose(parameter.grad, exact, rtol=1e-5, atol=0), name


def test_adaptive_clipping_bounds_radii_and_directions_alone(clip):
    names, parameters = with_gradients(clip, 1e3)
    clip_rows(names, parameters, 0.01)
    layer = clip.get_submodule("transformer.resblocks.1.mlp.c_fc")
    torch.testing.assert_close(layer.theta.grad.norm(dim=1), torch.full((64,), 0.01))
    torch.testing.assert_close(layer.r.grad.abs(), 0.01 * layer.r.detach().abs())


def test_no_adaptive_clipping_changes_nothing(clip):
    names, parameters = with_gradients(clip, 1e3)
    before = [None if p.grad is None else p.grad.clone() for p in parameters]
    clip_rows(names, parameters, 0.0)
    assert all(p.grad is None or torch.equal(p.grad, grad) for p, grad in zip(parameters, before, strict=True))


# ---- AdamW ----------------------------------------------------------------------------------------------------------


def plain(groups):
    """The simple path: torch's loop over tensors."""
    return torch.optim.AdamW(groups, betas=BETAS, foreach=False, fused=False)


def walk(clip, optimizer, steps, start=0):
    """Steps on random gradients of sizes that differ by parameter; half the rate from the third step on."""
    for number in range(start, start + steps):
        generator = torch.Generator().manual_seed(number)
        for position, parameter in enumerate(p for p in clip.parameters() if p.requires_grad):
            gradient = 10.0 ** (position % 5 - 4) * torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(parameter.device)
        set_rates(optimizer, 1.0 if number < 2 else 0.5)
        optimizer.step()


def close(a, b, tolerance):
    for (name, one), other in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max().clamp_min(1e-3), name


def wide_clip():
    """Most of its matrices are large enough for rounded moments."""
    config = CLIPConfig(TextConfig(64, 2, 2, 128, 12, 50, 16), VisionConfig(64, 1, 2, 128, 8, 16, 16))
    clip = initialize(CLIP(config), torch.Generator().manual_seed(0))
    to_geometric(clip)
    return clip


def test_the_fused_step_is_the_plain_one(clip):
    other = copy.deepcopy(clip)
    optimizer = make_optimizer(parameter_groups(clip, 1e-2, {"*.r": 3.0}, 0.1), BETAS, CPU)
    reference = plain(parameter_groups(other, 1e-2, {"*.r": 3.0}, 0.1))
    assert {group["fused"] for group in optimizer.param_groups} == {True}
    walk(clip, optimizer, 6)
    walk(other, reference, 6)
    close(clip, other, 1e-6)
    for one, two in zip(optimizer.state.values(), reference.state.values(), strict=True):
        assert one.keys() == two.keys() and one["step"] == two["step"] == 6
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(one[key], two[key], rtol=1e-6, atol=0)


@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_moments_are_there_before_the_first_step(clip, state):
    optimizer = make_optimizer(parameter_groups(clip, 1e-2, {"visual.*": 0.0}, 0.1), BETAS, CPU, state)
    trained = [p for p in clip.parameters() if p.requires_grad]
    assert set(optimizer.state) == set(trained)
    for parameter, moments in optimizer.state.items():
        assert moments["step"] == 0
        assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == parameter.shape
        assert not moments["exp_avg"].any() and not moments["exp_avg_sq"].any()
    places = {id(moment) for moments in optimizer.state.values() for moment in moments.values()}
    walk(clip, optimizer, 1)
    assert {id(moment) for moments in optimizer.state.values() for moment in moments.values()} == places


def test_an_unknown_state_is_refused(clip):
    with pytest.raises(ValueError, match="'fp8' is not one of"):
        make_optimizer(parameter_groups(clip, 1e-2, {}, 0.1), BETAS, CPU, "fp8")


# ---- AdaBelief and Lion ---------------------------------------------------------------------------------------------


def belief(weights, gradients, rate, betas, eps, weight_decay):
    """AdaBelief (arXiv 2010.07468) with decoupled decay and RAdam's rectification (arXiv 1908.03265)."""
    m = s = torch.zeros_like(weights)
    longest = 2 / (1 - betas[1]) - 1
    for number, gradient in enumerate(gradients, 1):
        weights = weights * (1 - rate * weight_decay)
        m = betas[0] * m + (1 - betas[0]) * gradient
        s = betas[1] * s + (1 - betas[1]) * (gradient - m) ** 2 + eps
        length = longest - 2 * number * betas[1] ** number / (1 - betas[1] ** number)
        step = rate * m / (1 - betas[0] ** number)
        if length >= 5:
            right = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            step = step * math.sqrt(right) * math.sqrt(1 - betas[1] ** number) / (s.sqrt() + eps)
        weights = weights - step
    return weights


def lion(weights, gradients, rate, betas, weight_decay):
    """Lion (arXiv 2302.06675, algorithm 2)."""
    m = torch.zeros_like(weights)
    for gradient in gradients:
        weights = weights - rate * ((betas[0] * m + (1 - betas[0]) * gradient).sign() + weight_decay * weights)
        m = betas[1] * m + (1 - betas[1]) * gradient
    return weights


def test_adabelief_and_lion_are_their_papers():
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(6, 7, generator=generator)
    gradients = [torch.randn(6, 7, generator=generator) for _ in range(12)]
    for kind in ("adabelief", "lion"):
        weight = torch.nn.Parameter(start.clone())
        groups = parameter_groups(torch.nn.ParameterDict({"weight": weight}), 1e-2, {}, 0.1)
        optimizer = make_optimizer(groups, BETAS, CPU, kind=kind, eps=1e-12)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        exact = [gradient.double() for gradient in gradients]
        if kind == "lion":
            expected = lion(start.double(), exact, 1e-2, BETAS, 0.1)
        else:
            expected = belief(start.double(), exact, 1e-2, BETAS, 1e-12, 0.1)
        torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)
        assert (weight - start).abs().max() > 0.05


@pytest.mark.parametrize("kind", MOMENTS)
def test_their_moments_are_there_before_the_first_step_and_steps_are_counted(clip, kind):
    optimizer = make_optimizer(parameter_groups(clip, 1e-3, {"visual.*": 0.0}, 0.1), BETAS, CPU, kind=kind)
    assert set(optimizer.state) == {p for p in clip.parameters() if p.requires_grad}
    assert {tuple(moments) for moments in optimizer.state.values()} == {MOMENTS[kind]}
    places = {id(moment) for moments in optimizer.state.values() for moment in moments.values()}
    assert {counter(optimizer, group, p) for _, p, group in optimized(optimizer)} == {0.0}
    walk(clip, optimizer, 3)
    assert {id(moment) for moments in optimizer.state.values() for moment in moments.values()} == places
    assert {counter(optimizer, group, p) for _, p, group in optimized(optimizer)} == {3.0}
    assert all(moment.any() for moments in optimizer.state.values() for moment in moments.values())


def test_a_block_that_joins_later_takes_its_first_adabelief_step_as_one_that_is_trained_from_then_on(clip):
    """Its library counts steps by group: without groups of their own the moments of late blocks are not corrected."""
    late, found = "transformer.resblocks.0.", {}
    for start in (0, 5):
        model = copy.deepcopy(clip)
        groups = parameter_groups(model, 1e-3, {}, 0.1, by_block=True)
        assert all(len({n.startswith(late) for n in group["names"]}) == 1 for group in groups)
        optimizer = make_optimizer(groups, BETAS, CPU, kind="adabelief")
        for number in range(start, 9):
            with_gradients(model, 1 + number)
            for name, parameter in model.named_parameters():
                if name.startswith(late) and number < 5:
                    parameter.grad = None
            optimizer.step()
        steps = {name: counter(optimizer, group, p) for name, p, group in optimized(optimizer)}
        assert {steps[name] for name in steps if name.startswith(late)} == {4.0}
        found[start] = {n: p for n, p in model.named_parameters() if n.startswith(late)}
    assert all(torch.equal(found[0][name], found[5][name]) for name in found[0])


def test_embeddings_and_blocks_of_each_tower_can_be_apart(clip):
    places = {}
    for number, group in enumerate(parameter_groups(clip, 1e-3, {}, 0.0, by_block=True)):
        for name in group["names"]:
            places[name] = number
    assert len(set(places.values())) == 2 * (2 + 1 + 1)  # of each tower its blocks, what is before them, and the rest
    assert places["text_projection"] == places["ln_final.weight"] == places["logit_scale"] != places["visual.proj"]
    assert places["token_embedding.weight"] != places["visual.conv1.weight"]


@pytest.mark.parametrize("kind", MOMENTS)
def test_a_library_that_is_not_installed_is_named(clip, kind, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(optim.importlib, "import_module", missing)
    with pytest.raises(InputError, match=f"optimizer {kind} is of pytorch-optimizer, which is not installed"):
        make_optimizer(parameter_groups(clip, 1e-3, {}, 0.1), BETAS, CPU, kind=kind)
    with pytest.raises(ValueError, match="'sgd' is not one of"):
        make_optimizer(parameter_groups(clip, 1e-3, {}, 0.1), BETAS, CPU, kind="sgd")


@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_eps_is_adamws(clip, state):
    optimizer = make_optimizer(parameter_groups(clip, 1e-3, {}, 0.1), BETAS, CPU, state, eps=1e-3)
    assert {group["eps"] for group in optimizer.param_groups} == {1e-3}
    other = copy.deepcopy(clip)
    reference = torch.optim.AdamW(parameter_groups(other, 1e-3, {}, 0.1), betas=BETAS, eps=1e-3, foreach=False)
    walk(clip, optimizer, 1)
    walk(other, reference, 1)
    close(clip, other, 1e-6)


# ---- moments in bf16 ------------------------------------------------------------------------------------------------


VALUES = torch.tensor([1.0, 1.001, -1.0031, 0.0, -0.0, 3.14159e-20, -7.7e30, 2.0 - 2**-10, 1e-40, 65537.0, 0.1])


def test_rounding_over_all_noise_is_the_value_itself():
    noise = torch.arange(1 << 16, dtype=torch.int32).expand(len(VALUES), -1).clone()
    wide = VALUES[:, None].expand(-1, 1 << 16).contiguous()
    rounded = torch.empty(wide.shape, dtype=torch.bfloat16)
    round_into(rounded, wide, noise)
    mean = rounded.double().mean(1)
    torch.testing.assert_close(mean, VALUES.double(), rtol=1e-12, atol=0)


def test_rounding_takes_one_of_the_two_neighbours():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(10_000, generator=generator) * 10.0 ** torch.randint(-20, 20, (10_000,), generator=generator)
    low = wide.view(torch.int32).bitwise_and(-(1 << 16)).view(torch.float32)  # towards zero
    high = low.view(torch.int32).add(1 << 16).view(torch.float32)
    rounded = torch.empty(10_000, dtype=torch.bfloat16)
    round_into(rounded, wide, torch.randint(1 << 16, (10_000,), generator=generator, dtype=torch.int32))
    assert ((rounded.float() == low) | (rounded.float() == high)).all()
    assert 0.4 < (rounded.float() == low).float().mean() < 0.6
    exact = low.clone()
    round_into(rounded, exact, torch.full((10_000,), (1 << 16) - 1, dtype=torch.int32))
    assert torch.equal(rounded.float(), low)


def noise(start, count, *key):
    return torch.cat(adamw._noise(torch.arange(count, dtype=torch.int32), start, adamw._key(*key)))


def test_noise_is_uniform_and_differs_with_seed_step_name_and_place():
    one = noise(0, 1 << 18, 0, 1, "a")
    assert one.min() == 0 and one.max() == (1 << 16) - 1
    counts = torch.bincount(one, minlength=1 << 16).double()
    expected = len(one) / (1 << 16)
    assert 0.95 < ((counts - expected).square() / expected).mean() < 1.05  # chi-squared per degree of freedom
    others = [noise(0, 1 << 18, 1, 1, "a"), noise(0, 1 << 18, 0, 2, "a"), noise(0, 1 << 18, 0, 1, "b")]
    for other in [*others, noise(1, 1 << 18, 0, 1, "a"), one.roll(1 << 18)]:
        assert abs(torch.corrcoef(torch.stack([one, other]).double())[0, 1]) < 0.01
    for bit in range(16):
        assert abs((one >> bit & 1).double().mean() - 0.5) < 0.005


def test_noise_does_not_depend_on_how_a_tensor_is_cut():
    whole = noise(0, 1000, 3, 4, "a").view(2, -1)
    pieces = [noise(start, 250, 3, 4, "a").view(2, -1) for start in range(0, 1000, 250)]
    assert torch.equal(whole, torch.cat(pieces, 1))
    far = 40_000_000  # in the largest tensor of a CLIP
    assert torch.equal(noise(far, 10, 0, 1, "a").view(2, -1)[:, 5:], noise(far + 5, 5, 0, 1, "a").view(2, -1))


def test_a_step_on_bf16_moments_is_the_plain_step_and_its_moments_are_rounded_afterwards(monkeypatch):
    monkeypatch.setattr(adamw, "_BLOCKS", {"cpu": 1000})
    clip = wide_clip()
    walk(clip, optimizer := make_optimizer(parameter_groups(clip, 1e-2, {}, 0.1), BETAS, CPU, "bf16"), 4)
    other = copy.deepcopy(clip)
    reference = plain(parameter_groups(other, 1e-2, {}, 0.1))
    names = {p: n for n, p in clip.named_parameters()}
    twins = dict(other.named_parameters())
    for parameter, moments in optimizer.state.items():
        reference.state[twins[names[parameter]]] = {key: moment.float().clone() for key, moment in moments.items()}
    walk(clip, optimizer, 1, start=4)
    walk(other, reference, 1, start=4)
    close(clip, other, 1e-6)
    kinds = set()
    for parameter, moments in optimizer.state.items():
        exact = reference.state[twins[names[parameter]]]
        assert moments["step"] == exact["step"] == 5
        for key in ("exp_avg", "exp_avg_sq"):
            kinds.add((parameter.numel() >= LEAST, moments[key].dtype))
            tolerance = 2**-7 if moments[key].dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(moments[key].float(), exact[key], rtol=tolerance, atol=1e-30)
    assert kinds == {(True, torch.bfloat16), (False, torch.float32)}


def test_a_second_moment_in_bf16_arrives_where_one_rounded_to_the_nearest_stands_still():
    weight = torch.nn.Parameter(torch.zeros(64, 128))
    (group,) = parameter_groups(torch.nn.ParameterDict({"weight": weight}), 1e-3, {}, 0.0)
    optimizer = AdamW16([group], BETAS)
    nearest = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(400):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        nearest = (nearest.float() * 0.98 + 0.02).bfloat16()
    arrived = optimizer.state[weight]["exp_avg_sq"].float().mean()
    assert abs(arrived - (1 - 0.98**400)) < 0.003
    assert nearest < 0.95


def trajectory(seed, rates, steps=3):
    clip = wide_clip()
    walk(clip, make_optimizer(parameter_groups(clip, 1e-2, rates, 0.1), BETAS, CPU, "bf16", seed), steps)
    return clip.state_dict()


def test_bf16_moments_depend_on_the_seed_and_on_nothing_else():
    torch.randint(9, (3,))  # the process's random numbers have no part in it
    one, again, other = trajectory(0, {}), trajectory(0, {}), trajectory(1, {})
    assert all(torch.equal(one[name], again[name]) for name in one)
    name = "transformer.resblocks.0.attn.in_proj_weight"
    assert not torch.equal(one[name], other[name])


def test_what_else_is_trained_does_not_change_a_parameters_noise():
    """A process that holds a part of the moments rounds them as one that holds all."""
    name = "transformer.resblocks.1.attn.in_proj_weight"
    found = []
    for rates in ({}, {"transformer.resblocks.0.*": 0.0}):
        clip = wide_clip()
        optimizer = make_optimizer(parameter_groups(clip, 1e-2, rates, 0.1), BETAS, CPU, "bf16")
        parameter = clip.get_parameter(name)
        for _ in range(3):
            for one in clip.parameters():
                one.grad = torch.full_like(one, 0.37) if one.requires_grad else None
            optimizer.step()
        found.append((parameter, optimizer.state[parameter]["exp_avg_sq"]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_rounds_by_the_noise_of_the_cpu():
    positions = torch.arange(1 << 20, dtype=torch.int32)
    here, there = (adamw._noise(p, 1 << 25, adamw._key(0, 1, "a")) for p in (positions, positions.cuda()))
    assert all(torch.equal(one, other.cpu()) for one, other in zip(here, there, strict=True))
    clip, other = wide_clip(), wide_clip().cuda()
    for model, device in ((clip, CPU), (other, torch.device("cuda"))):
        walk(model, make_optimizer(parameter_groups(model, 1e-2, {}, 0.1), BETAS, device, "bf16"), 3)
    close(other.cpu(), clip, 1e-4)


def test_a_parameter_without_a_gradient_stands_still():
    clip = wide_clip()
    optimizer = make_optimizer(parameter_groups(clip, 1e-2, {}, 0.1), BETAS, CPU, "bf16")
    before = copy.deepcopy(clip.state_dict())
    for name in ("text_projection", "transformer.resblocks.0.attn.in_proj_weight"):
        clip.get_parameter(name).grad = torch.ones_like(clip.get_parameter(name))
    optimizer.step()
    moved = {name for name, tensor in clip.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"text_projection", "transformer.resblocks.0.attn.in_proj_weight"}
    assert {float(moments["step"]) for moments in optimizer.state.values()} == {0.0, 1.0}


# ---- moments in 8 bits ----------------------------------------------------------------------------------------------


def only(library, monkeypatch):
    pytest.importorskip(library, reason=f"needs {library.partition('.')[0]}")
    monkeypatch.setattr(optim, "LIBRARIES", (library,))


def two_tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (64, 128), "bias": (5,)}
    return torch.nn.ParameterDict(
        {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}
    )


@pytest.mark.parametrize("library", LIBRARIES)
def test_eight_bit_moments_are_there_before_the_first_step_and_train_like_fp32(library, monkeypatch):
    only(library, monkeypatch)
    model, other = two_tensors(), two_tensors()
    optimizer = make_optimizer(parameter_groups(model, 1e-2, {}, 0.1), BETAS, CPU, "8bit")
    assert all(torch.equal(model[name], other[name]) and model[name].grad is None for name in model)
    assert all(int(optimizer.state[parameter]["step"]) == 0 for parameter in model.values())
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([1e-2, 1e-2])
    reference = plain(parameter_groups(other, 1e-2, {}, 0.1))
    start = two_tensors()
    walk(model, optimizer, 6)
    walk(other, reference, 6)
    for name in model:
        ours, theirs = model[name] - start[name], other[name] - start[name]
        assert (ours - theirs).norm() < 0.05 * theirs.norm()
    assert torch.allclose(model["bias"], other["bias"], rtol=1e-5)  # too small to be quantised


def test_without_a_library_eight_bits_are_refused(clip, monkeypatch):
    monkeypatch.setattr(optim, "LIBRARIES", ("no_such_library.optim", "math"))
    with pytest.raises(InputError, match="needs torchao or bitsandbytes, and neither is installed; run `pip install"):
        make_optimizer(parameter_groups(clip, 1e-2, {}, 0.1), BETAS, CPU, "8bit")


class Uncompiled(torch.optim.AdamW):
    """A library that finds no compiler once it steps."""

    def step(self, closure=None):
        raise RuntimeError(self.problem)


@pytest.mark.parametrize(
    "problem", ["Cannot find a working triton installation.\nmore", "DefaultCPUAllocator: can't allocate memory"]
)
def test_eight_bits_that_do_not_run_here_are_refused(clip, monkeypatch, problem):
    Uncompiled.problem = problem
    monkeypatch.setattr(importlib, "import_module", lambda name: type("library", (), {"AdamW8bit": Uncompiled}))
    groups = parameter_groups(clip, 1e-2, {}, 0.1)
    if "triton" in problem:
        with pytest.raises(
            InputError, match="does not run on cpu: Cannot find a working triton installation.; set the"
        ):
            make_optimizer(groups, BETAS, CPU, "8bit")
    else:
        with pytest.raises(RuntimeError, match="can't allocate"):
            make_optimizer(groups, BETAS, CPU, "8bit")
