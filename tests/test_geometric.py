"""GmP: the same function as before, the gradients of weight normalisation, and the weights back again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

from gmp.clip import CLIP, CLIPConfig, TextConfig, TextTower, VisionConfig, VisionTower, initialize, precision
from gmp.compare import moved
from gmp.config import Geometric, RepairConfig
from gmp.errors import InputError
from gmp.geometric import (
    GeometricLinear,
    GeometricMatrix,
    fold,
    fold_state,
    geometric_names,
    is_mlp,
    merge,
    split,
    split_layers,
    split_state,
    to_geometric,
    to_sphere,
    unit_rows,
)
from gmp.gradients import role
from gmp.inspection import inspect
from gmp.layouts import read_text, read_vision, write_clip, write_text
from gmp.locks import choose
from gmp.trainer import set_up

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


# --- attention and projections

KINDS = {
    "qkv": "transformer.resblocks.0.attn.in_proj_weight",
    "out": "transformer.resblocks.0.attn.out_proj",
    "projection": "text_projection",
    "vision qkv": "visual.transformer.resblocks.1.attn.in_proj_weight",
    "vision projection": "visual.proj",
}
EVERY = ("mlp", "qkv", "out", "projection")


def every(name):
    return "gate" not in name


@torch.no_grad()
def test_outputs_stay_where_everything_is_split(clip, inputs):
    ids, pixels = inputs
    before, image, caption = clip(ids), clip.encode_image(pixels), clip.encode_text(ids)
    assert set(KINDS.values()) <= set(to_geometric(clip, every))
    assert not any(isinstance(module, nn.Linear) for module in clip.modules())
    after = clip(ids)
    for point in ("penultimate", "last", "pooled", "projected"):
        assert relative(getattr(after, point), getattr(before, point)) < 1e-6
    assert relative(clip.encode_image(pixels), image) < 1e-6
    assert relative(clip.encode_text(ids), caption) < 1e-6


@torch.no_grad()
def test_bf16_computes_with_rounded_weights_as_plain_layers_do(clip, inputs):
    ids, pixels = inputs
    plain = copy.deepcopy(clip)
    to_geometric(clip, every)
    for mine, theirs in ((clip.encode_text, plain.encode_text), (clip.encode_image, plain.encode_image)):
        x = ids if mine == clip.encode_text else pixels
        exact = theirs(x)
        with precision(torch.bfloat16, clip, plain):
            assert relative(mine(x), theirs(x)) < 0.1 * relative(theirs(x), exact) + 5e-3


@torch.no_grad()
def test_fold_gives_every_canonical_tensor_back(clip):
    before = copy.deepcopy(clip.state_dict())
    to_geometric(clip, every)
    from_state = fold_state(clip.state_dict())
    fold(clip)
    after = clip.state_dict()
    assert set(after) == set(from_state) == set(before)
    for name, tensor in before.items():
        assert after[name].shape == tensor.shape and after[name].is_contiguous()
        assert relative(after[name], tensor) < 1e-7 or torch.equal(after[name], tensor)
        assert torch.equal(from_state[name], after[name])
    assert not geometric_names(clip) and isinstance(clip.text_projection, nn.Parameter)


def test_doubles_come_back_to_the_last_bit_but_one(clip):
    state = {name: tensor.double() for name, tensor in clip.state_dict().items()}
    again = fold_state(split_state(state, every_matrix))
    assert set(again) == set(state)
    assert all((again[name] - tensor).abs().max() <= 4e-16 * tensor.abs().max() for name, tensor in state.items())


def every_matrix(stem):
    return any(stem == name.removesuffix(".theta") for name in MATRICES)


MATRICES = {
    name
    for clip in [initialize(CLIP(CONFIG), generator())]
    for name in (to_geometric(clip, every), clip.state_dict())[1]
    if name.endswith(".theta")
}


@pytest.mark.parametrize("name", KINDS.values(), ids=KINDS)
def test_every_kind_has_the_gradients_of_weight_norm(clip, inputs, name):
    """Rows are neurons: those of q, k and v one by one, and the columns of a matrix that is used as x @ P."""
    ids, pixels = inputs
    plain = copy.deepcopy(clip)
    to_geometric(clip, name.__eq__)
    layer = clip.get_submodule(name)
    with torch.no_grad():
        layer.theta.mul_(2.5)
    owner, _, leaf = name.rpartition(".")
    owner = plain.get_submodule(owner)
    if isinstance(layer, GeometricLinear):
        theirs = weight_norm(getattr(owner, leaf))
        g, v = theirs.parametrizations.weight.original0, theirs.parametrizations.weight.original1
        weight = lambda: None  # noqa: E731
    else:
        g = nn.Parameter(layer.r.detach().clone())
        v = nn.Parameter(layer.theta.detach().clone())
        delattr(owner, leaf)
        columns = layer.columns
        weight = lambda: torch._weight_norm(v, g, 0).T if columns else torch._weight_norm(v, g, 0)  # noqa: E731
    with torch.no_grad():
        g.copy_(layer.r)
        v.copy_(layer.theta)
    for one in (clip, plain):
        if one is plain and not isinstance(layer, GeometricLinear):
            setattr(owner, leaf, weight())
        out = one.encode_image(pixels) if name.startswith("visual.") else one.encode_text(ids)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert relative(layer.r.grad, g.grad) < 1e-5 and relative(layer.theta.grad, v.grad) < 1e-5
    if "in_proj" in name:
        bias = name.replace("weight", "bias")
        assert relative(clip.get_parameter(bias).grad, plain.get_parameter(bias).grad) < 1e-5


def test_roles_are_r_and_theta_wherever_they_are():
    assert [role(f"{stem}.{leaf}") for stem in KINDS.values() for leaf in ("r", "theta")] == ["r", "theta"] * len(KINDS)


@torch.no_grad()
def test_how_far_a_part_has_moved_is_told_of_its_own_matrix(clip):
    start = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    to_geometric(clip, every)
    assert max(moved(clip, start).values()) < 1e-6
    clip.text_projection.r.mul_(1.1)
    clip.transformer.resblocks[0].attn.in_proj_weight.theta[:32] *= 7  # longer, and in the same direction
    clip.visual.proj.theta.neg_()
    found = {name: value for name, value in moved(clip, start).items() if value > 1e-6}
    assert found == pytest.approx({"text.r": 0.1, "vision.theta": 2.0}, rel=1e-5)


def test_towers_by_themselves_have_projections_too():
    text, vision = TextTower(CONFIG.text), VisionTower(CONFIG.vision)
    for tower, name in ((text, "text_projection"), (vision, "proj")):
        for parameter in tower.parameters():
            nn.init.normal_(parameter, generator=generator()) if parameter.dim() > 1 else nn.init.zeros_(parameter)
        before = {n: t.clone() for n, t in tower.state_dict().items()}
        assert to_geometric(tower, name.__eq__) == [name]
        again = fold_state(tower.state_dict())
        assert set(again) == set(before) and relative(again[name], before[name]) < 1e-7


def test_a_split_matrix_has_the_shape_and_the_place_of_the_whole(clip):
    shapes = [clip.text_projection.shape, clip.transformer.resblocks[0].attn.in_proj_weight.shape]
    to_geometric(clip, every)
    found = [clip.text_projection, clip.transformer.resblocks[0].attn.in_proj_weight]
    assert [one.shape for one in found] == shapes and found[0].device == torch.device("cpu")
    assert all(isinstance(one, GeometricMatrix) for one in found)


# --- files


def test_files_with_every_kind_split_are_read_as_the_weights_that_they_are(clip, tmp_path):
    state = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    to_geometric(clip, every)
    write_clip(clip.state_dict(), tmp_path / "clip.safetensors", layout="gmp", config=CONFIG)
    text = read_text(tmp_path / "clip.safetensors", heads=2)
    vision = read_vision(tmp_path / "clip.safetensors", heads=2)
    assert text.config.embed_dim == vision.config.embed_dim == 16
    found = text.state | vision.state
    assert set(found) == set(state) and not text.source.missing
    assert all(relative(found[name], tensor) < 1e-6 for name, tensor in state.items() if tensor.any())
    kept = read_text(tmp_path / "clip.safetensors", heads=2, fold=False).state
    assert torch.equal(kept["text_projection.theta"], clip.text_projection.theta)
    told = inspect(tmp_path / "clip.safetensors")
    assert told.layout == "gmp" and not told.problems and not any(tower.missing for tower in told.towers)


def test_other_layouts_get_the_folded_weights(clip, tmp_path):
    state = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    to_geometric(clip, every)
    text = {name: tensor for name, tensor in clip.state_dict().items() if not name.startswith("visual.")}
    write_text(text, tmp_path / "text.safetensors", config=CONFIG.text)
    found = read_text(tmp_path / "text.safetensors", heads=2).state
    assert relative(found["text_projection"], state["text_projection"]) < 1e-6
    assert relative(found[KINDS["qkv"]], state[KINDS["qkv"]]) < 1e-6


@pytest.mark.parametrize("stem", ["text_projection", KINDS["qkv"]])
def test_half_of_a_split_matrix_is_told(clip, tmp_path, stem):
    to_geometric(clip, every)
    state = clip.state_dict()
    del state[f"{stem}.r"]
    with pytest.raises(InputError, match=rf"missing.*{stem}\.r"):
        write_clip(state, tmp_path / "clip.safetensors", layout="gmp", config=CONFIG)


# --- which layers


def named(*entries, train="both", config=CONFIG):
    return split_layers(config, RepairConfig(train=train, geometric=entries))


def test_the_default_is_the_mlps_of_what_trains():
    assert list(named(Geometric(), train="text")) == TEXT_MLPS
    assert set(named(Geometric())) == {*TEXT_MLPS, *(f"visual.{name}" for name in TEXT_MLPS)}


def test_ranges_towers_and_layers_choose():
    found = named(Geometric(("qkv", "projection"), "vision", first=-1), Geometric(("out",), "text", last=0))
    assert list(found) == [KINDS["vision qkv"], "visual.proj", KINDS["out"]]
    assert set(named(Geometric(EVERY))) == set(to_geometric(CLIP(CONFIG), every))


def test_the_last_entry_that_names_a_layer_counts():
    first, second = Geometric(train="r"), Geometric(first=1, train="theta")
    found = named(first, second, train="text")
    assert [found[name] for name in TEXT_MLPS] == [first, first, second, second]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Geometric(first=2, last=5), r"geometric\[1\].*blocks 2 to 5.*text tower has blocks 0 to 1"),
        (Geometric(("projection", "qkv"), first=7), r"the vision tower has blocks 0 to 1"),
        (Geometric(first=-1, last=0), r"blocks -1 to 0"),
        (Geometric(()), r"layers none.*mlp, qkv, out, projection"),
    ],
)
def test_an_entry_that_names_nothing_is_an_error_that_says_what_there_is(entry, message):
    with pytest.raises(InputError, match=message):
        set_up(CLIP(CONFIG), RepairConfig(train="both", geometric=(Geometric(), entry)), torch.device("cpu"))


@pytest.mark.parametrize("train", ["both", "r", "theta"])
def test_one_part_may_be_frozen(clip, train):
    choose(clip, RepairConfig(geometric=(Geometric(EVERY, train=train, sphere=True),)))
    split = [clip.get_submodule(name) for name in geometric_names(clip)]
    assert len(split) == 9 and all(layer.sphere for layer in split)  # 4 layers of 2 blocks, and the projection
    assert {layer.r.requires_grad for layer in split} == {train != "theta"}
    assert {layer.theta.requires_grad for layer in split} == {train != "r"}
    assert clip.transformer.resblocks[0].mlp.c_fc.bias.requires_grad


def test_a_frozen_part_gets_no_gradient_and_is_in_no_group(clip, inputs):
    optimizer = set_up(clip, RepairConfig(geometric=(Geometric(EVERY, train="r"),)), torch.device("cpu"))
    names = [name for group in optimizer.param_groups for name in group["names"]]
    assert "text_projection.r" in names and not any(name.endswith(".theta") for name in names)
    clip.encode_text(inputs[0]).sum().backward()
    assert clip.text_projection.theta.grad is None and clip.text_projection.r.grad.any()


# --- the sphere


def turned(steps, sphere, rate=0.05):
    """Angles of a row's steps, in radians, where the loss pulls it to one direction after another across it."""
    layer = GeometricLinear(torch.ones(2, 1), torch.eye(2), None)
    theta = layer.theta
    optimizer = torch.optim.AdamW([theta], lr=rate, weight_decay=0.0)
    angles = []
    for _ in range(steps):
        before = theta.detach().clone()
        across = torch.stack([-before[:, 1], before[:, 0]], dim=1)  # a quarter turn ahead, all the time
        loss = -(layer(torch.eye(2)).T * across / across.norm(dim=1, keepdim=True)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if sphere:
            unit_rows([theta])
        cosine = torch.cosine_similarity(before.double(), theta.detach().double(), dim=1)
        angles.append(torch.arccos(cosine.clamp(max=1)).mean().item())
    return angles, theta.detach().norm(dim=1)


def test_on_the_sphere_a_step_turns_as_far_in_the_end_as_in_the_beginning():
    angles, lengths = turned(400, sphere=True)
    assert torch.allclose(lengths, torch.ones(2), atol=1e-6)
    early, late = (sum(angles[at : at + 100]) / 100 for at in (100, 300))
    assert late == pytest.approx(early, rel=0.05)


def test_off_the_sphere_theta_grows_and_a_step_turns_less_and_less():
    angles, lengths = turned(400, sphere=False)
    early, late = (sum(angles[at : at + 100]) / 100 for at in (0, 300))
    assert lengths.min() > 1.5 and late < 0.6 * early


def test_bringing_rows_back_changes_nothing_that_is_computed(clip, inputs):
    choose(clip, RepairConfig(geometric=(Geometric(EVERY, sphere=True),)))
    with torch.no_grad():
        for name in geometric_names(clip):
            clip.get_submodule(name).theta.mul_(1.7)
        before = clip.encode_text(inputs[0])
        to_sphere(clip, dict(clip.named_parameters()))
        assert relative(clip.encode_text(inputs[0]), before) < 1e-6
    for name in geometric_names(clip):
        assert torch.allclose(clip.get_submodule(name).theta.norm(dim=1), torch.tensor(1.0), atol=1e-6)


@torch.no_grad()
def test_only_thetas_that_shall_stay_on_their_sphere_and_have_moved_are_brought_back(clip):
    entries = (Geometric(sphere=True, last=0), Geometric(first=1))
    choose(clip, RepairConfig(geometric=entries))
    names = [f"{name}.theta" for name in TEXT_MLPS]
    for name in names:
        clip.get_parameter(name).mul_(3)
    to_sphere(clip, {name: p for name, p in clip.named_parameters() if name != names[1]})
    assert [round(clip.get_parameter(name)[0].norm().item(), 4) for name in names] == [1, 3, 3, 3]


def test_rows_of_a_part_and_of_no_rows_are_brought_back():
    """As they lie in a process that weights are shared out to."""
    rows, none = torch.randn(3, 5, generator=generator()), torch.empty(0, 5)
    unit_rows([rows, none])
    assert torch.allclose(rows.norm(dim=1), torch.ones(3)) and not none.numel()
