"""GmP: the same function as before, the gradients of weight normalisation, and the weights back again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

from gmp.clip import CLIP, CLIPConfig, TextConfig, VisionConfig, initialize
from gmp.geometric import GeometricLinear, fold, fold_state, is_mlp, merge, split, to_geometric

CONFIG = CLIPConfig(TextConfig(32, 2, 2, 64, 12, 50, 16), VisionConfig(32, 2, 2, 64, 8, 16, 16))
TEXT_MLPS = [f"transformer.resblocks.{i}.mlp.{part}" for i in (0, 1) for part in ("c_fc", "c_proj")]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture
def clip():
    return initialize(CLIP(CONFIG), generator())


@pytest.fixture
def inputs():
    ids = torch.randint(1, 48, (4, 12), generator=generator(1))
    ids[:, 9:] = 49
    return ids, torch.randn(4, 3, 16, 16, generator=generator(2))


def linear(rows=24, columns=16, seed=0, dtype=torch.float32, bias=True):
    layer = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        layer.weight.normal_(0, 0.3, generator=generator(seed))
        if bias:
            layer.bias.normal_(0, 0.3, generator=generator(seed + 1))
    return layer.to(dtype)


@torch.no_grad()
def test_outputs_stay(clip, inputs):
    ids, pixels = inputs
    before, image = clip(ids), clip.encode_image(pixels)
    assert len(to_geometric(clip)) == 8
    after = clip(ids)
    for point in ("penultimate", "last", "pooled", "projected"):
        assert relative(getattr(after, point), getattr(before, point)) < 1e-6
    assert relative(clip.encode_image(pixels), image) < 1e-6


@torch.no_grad()
def test_fold_gives_the_weights_back(clip):
    before = copy.deepcopy(clip.state_dict())
    split_names = to_geometric(clip)
    from_state = fold_state(clip.state_dict())
    assert fold(clip) == split_names
    after = clip.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        if name.removesuffix(".weight") in split_names:
            assert relative(after[name], tensor) < 1e-7
        else:
            assert torch.equal(after[name], tensor)
        assert torch.equal(from_state[name], after[name])


def test_names(clip):
    before = set(clip.state_dict())
    found = to_geometric(clip, lambda name: is_mlp(name) and not name.startswith("visual."))
    assert found == TEXT_MLPS
    after = set(clip.state_dict())
    assert before - after == {f"{name}.weight" for name in TEXT_MLPS}
    assert after - before == {f"{name}.{part}" for name in TEXT_MLPS for part in ("r", "theta")}
    layer = clip.transformer.resblocks[0].mlp.c_fc
    assert layer.r.shape == (64, 1) and layer.theta.shape == (64, 32)


def test_where_may_name_any_linear(clip):
    assert to_geometric(clip, lambda name: name.endswith("attn.out_proj") and "visual" not in name) == [
        "transformer.resblocks.0.attn.out_proj", "transformer.resblocks.1.attn.out_proj",
    ]  # fmt: skip
    assert to_geometric(clip, lambda name: False) == []


def test_is_mlp():
    assert is_mlp("visual.transformer.resblocks.3.mlp.c_fc") and is_mlp("mlp.c_proj")
    assert not is_mlp("transformer.resblocks.3.mlp.c_fc.weight") and not is_mlp("transformer.xmlp.c_fc")


def test_rows_have_unit_length_at_the_start():
    layer = GeometricLinear.from_linear(linear())
    assert torch.allclose(layer.theta.norm(dim=1), torch.ones(24), atol=1e-6)
    assert (layer.r >= 0).all()


@pytest.mark.parametrize("scale", [1.0, 3.7])
def test_equals_weight_norm_in_outputs_and_gradients(scale):
    plain = linear()
    mine = GeometricLinear.from_linear(plain)
    theirs = weight_norm(copy.deepcopy(plain))
    with torch.no_grad():
        mine.theta.mul_(scale)  # as in the middle of a training, when rows are no longer of unit length
        mine.r[3].neg_()
        theirs.parametrizations.weight.original0.copy_(mine.r)
        theirs.parametrizations.weight.original1.copy_(mine.theta)
    x = torch.randn(5, 7, 16, generator=generator(4))
    weight = torch.randn(5, 7, 24, generator=generator(5))
    outputs = []
    for layer in (mine, theirs):
        outputs.append(layer(x))
        (outputs[-1] * weight).sum().backward()
    assert relative(*outputs) < 1e-6
    assert relative(mine.r.grad, theirs.parametrizations.weight.original0.grad) < 1e-6
    assert relative(mine.theta.grad, theirs.parametrizations.weight.original1.grad) < 1e-6
    assert relative(mine.bias.grad, theirs.bias.grad) < 1e-6


def test_gradients_are_those_of_finite_differences():
    layer = GeometricLinear.from_linear(linear(5, 4, dtype=torch.float64))
    x = torch.randn(3, 2, 4, generator=generator(3), dtype=torch.float64).requires_grad_()
    inputs = (x, layer.r, layer.theta, layer.bias)
    assert torch.autograd.gradcheck(
        lambda x, r, theta, bias: functional_call(layer, dict(r=r, theta=theta, bias=bias), x), inputs
    )


@pytest.mark.parametrize("frozen", ["r", "theta", "bias"])
def test_parts_may_be_frozen(frozen):
    layer, whole = (GeometricLinear.from_linear(linear()) for _ in range(2))
    getattr(layer, frozen).requires_grad_(False)
    x = torch.randn(7, 16, generator=generator(3))
    for one in (layer, whole):
        one(x).square().sum().backward()
    for name in ("r", "theta", "bias"):
        found, expected = getattr(layer, name).grad, getattr(whole, name).grad
        assert found is None if name == frozen else torch.equal(found, expected)


def test_neither_weight_nor_direction_is_kept_for_the_backward_pass():
    layer = GeometricLinear.from_linear(linear())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(7, 16, generator=generator(3)).requires_grad_())
    assert {t.data_ptr() for t in kept if t.shape == layer.theta.shape} == {layer.theta.data_ptr()}


def test_gradient_of_theta_is_orthogonal_to_its_row():
    layer = GeometricLinear.from_linear(linear())
    layer(torch.randn(9, 16, generator=generator(4))).square().sum().backward()
    along = (layer.theta * layer.theta.grad).sum(dim=1)
    assert (along.abs() < 1e-5 * layer.theta.grad.norm(dim=1)).all()


def test_zero_rows_stay_zero_and_have_finite_gradients():
    plain = linear()
    with torch.no_grad():
        plain.weight[[2, 5]] = 0
    layer = GeometricLinear.from_linear(plain)
    x = torch.randn(9, 16, generator=generator(4))
    assert relative(layer(x), plain(x)) < 1e-6
    assert not layer.to_linear().weight[[2, 5]].any()
    layer(x).square().sum().backward()
    assert layer.r.grad.isfinite().all() and layer.theta.grad.isfinite().all()
    assert layer.r.grad[[2, 5]].all()  # they can be learned


@pytest.mark.parametrize("r", [-0.5, 0.0])
def test_radii_may_become_negative_or_zero(r):
    layer = GeometricLinear.from_linear(linear())
    with torch.no_grad():
        layer.r[4] = r
    x = torch.randn(9, 16, generator=generator(4))
    folded = layer.to_linear()
    assert relative(folded(x), layer(x)) < 1e-6
    assert torch.allclose(folded.weight[4], r * layer.theta[4], atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_survive(dtype):
    plain = linear(64, 96, dtype=dtype)
    plain.weight[0] *= 1e-3
    layer = GeometricLinear.from_linear(plain)
    assert layer.r.dtype == layer.theta.dtype == torch.float32
    assert torch.equal(layer.to_linear().weight.to(dtype), plain.weight)
    x = torch.randn(3, 96, generator=generator(4)).to(dtype)
    assert torch.equal(layer(x), plain(x))
    folded = layer.to_linear()
    assert folded(x.float()).isfinite().all()


def test_splitting_is_not_done_in_half_precision():
    """Split in the weight's own dtype, as the original scripts do, fp16 moves every weight by 1e-4."""
    weight = linear(64, 768).weight.detach().half()
    norm = weight.norm(dim=1, keepdim=True)
    assert relative(norm * (weight / norm), weight) > 1e-5
    assert relative(merge(*split(weight)), weight) < 1e-6


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_norms_neither_underflow_nor_overflow(size):
    weight = linear(64, 768).weight.detach() * size
    r, theta = split(weight)
    assert r.isfinite().all() and (r > 0).all()
    assert torch.allclose(theta.norm(dim=1), torch.ones(64), atol=1e-6)
    assert relative(merge(r, theta), weight) < 1e-6


def test_doubles_stay_doubles():
    weight = linear().weight.detach().double()
    r, theta = split(weight)
    assert r.dtype == theta.dtype == torch.float64
    assert relative(merge(r, theta), weight) < 1e-15


def test_without_bias():
    plain = linear(bias=False)
    layer = GeometricLinear.from_linear(plain)
    x = torch.randn(9, 16, generator=generator(4))
    assert layer.bias is None and layer.to_linear().bias is None
    assert relative(layer(x), plain(x)) < 1e-6


def test_parts_are_memory_of_their_own():
    plain = linear()
    before = plain.bias.detach().clone(), plain.weight.detach().clone()
    layer = GeometricLinear.from_linear(plain)
    folded = layer.to_linear()
    with torch.no_grad():
        layer.bias.zero_(), layer.theta.zero_()
    assert torch.equal(plain.bias, before[0]) and torch.equal(plain.weight, before[1])
    assert torch.equal(folded.bias, before[0]) and relative(folded.weight, before[1]) < 1e-7


def test_fold_state_refuses_halves():
    layer = GeometricLinear.from_linear(linear())
    state = {f"a.mlp.c_fc.{name}": tensor for name, tensor in layer.state_dict().items()}
    for missing in ("r", "theta"):
        half = {name: tensor for name, tensor in state.items() if not name.endswith(f".{missing}")}
        with pytest.raises(ValueError, match=r"r or theta is missing for \['a.mlp.c_fc'\]"):
            fold_state(half)


def test_fold_state_passes_a_plain_state_on():
    state = linear().state_dict()
    folded = fold_state(state)
    assert list(folded) == ["weight", "bias"]
    assert all(folded[name] is state[name] for name in state)


def test_nothing_draws_from_the_global_random_numbers(clip):
    state = torch.get_rng_state()
    to_geometric(clip)
    fold(clip)
    assert torch.equal(torch.get_rng_state(), state)
