"""Checkpoints: exact, whole or not there, and few."""

from __future__ import annotations

import json
import os

import pytest
import torch

from gmp import adamw, checkpoint, optim
from gmp.ema import Ema
from gmp.errors import InputError
from gmp.files import read_header, read_tensors
from gmp.fsdp import Shards
from gmp.geometric import is_mlp, to_geometric
from gmp.optim import LIBRARIES, MOMENTS, counter, make_optimizer, optimized, parameter_groups
from tests.small import CONTEXT, SMALL, VOCAB, full_disk, small_clip

CPU = torch.device("cpu")


def make(train_vision=True, seed=0, state="fp32"):
    """state: one of AdamW's, or another kind of optimizer."""
    clip = small_clip(seed)
    to_geometric(clip, lambda name: is_mlp(name) and (train_vision or not name.startswith("visual.")))
    clip.visual.requires_grad_(train_vision)
    groups = parameter_groups(clip, 1e-2, {"ln_final.*": 0.0}, 0.01)
    if state in MOMENTS:
        return clip, make_optimizer(groups, (0.9, 0.98), CPU, kind=state)
    return clip, make_optimizer(groups, (0.9, 0.98), CPU, state)


def step(clip, optimizer, number):
    generator = torch.Generator().manual_seed(number)
    for parameter in clip.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def save(folder, number, clip, optimizer, keep=3, **state):
    return checkpoint.save(folder, number, clip, optimizer, state, keep, {"note": "x"})


def same(a, b):
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize("state", ["fp32", "bf16", *MOMENTS])
@pytest.mark.parametrize("train_vision", [True, False])
def test_restored_is_uninterrupted(tmp_path, train_vision, state, monkeypatch):
    monkeypatch.setattr(adamw, "LEAST", 200)  # so that the small tower has moments of both kinds
    one, optimizer = make(train_vision, state=state)
    for number in range(3):
        step(one, optimizer, number)
    save(tmp_path, 3, one, optimizer, sampler={"epoch": 1}, best=None)
    for number in range(3, 6):
        step(one, optimizer, number)

    other, fresh = make(train_vision, seed=1, state=state)
    (found,) = checkpoint.list_checkpoints(tmp_path)
    kept = checkpoint.restore(found, other, fresh)
    assert (kept["step"], kept["sampler"], kept["best"]) == (3, {"epoch": 1}, None)
    assert {counter(fresh, group, parameter) for _, parameter, group in optimized(fresh)} == {3.0}
    for number in range(3, 6):
        step(other, fresh, number)
    assert trained(one, other) and alike(optimizer, fresh)
    kinds = {moments["exp_avg"].dtype for moments in fresh.state.values()}
    assert kinds == ({torch.float32, torch.bfloat16} if state == "bf16" else {torch.float32})


def trained(a, b):
    """Whether what is saved is the same: of different seeds, a locked vision tower is another."""
    saved = (name for name, p in a.named_parameters() if p.requires_grad or not name.startswith("visual."))
    return all(torch.equal(a.get_parameter(name), b.get_parameter(name)) for name in saved)


def alike(a, b):
    for one, two in zip(a.state.values(), b.state.values(), strict=True):
        assert one.keys() == two.keys() and one
        for key, value in one.items():
            other = two[key]
            if hasattr(value, "__tensor_flatten__"):
                assert all(torch.equal(getattr(value, k), getattr(other, k)) for k in value.__tensor_flatten__()[0])
            elif isinstance(value, torch.Tensor):
                assert value.dtype == other.dtype and torch.equal(value, other)
            else:
                assert value == other
    return True


def two_tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (64, 128), "bias": (5,)}
    return torch.nn.ParameterDict(
        {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}
    )


@pytest.mark.parametrize("library", LIBRARIES)
def test_quantised_moments_are_restored_exactly(tmp_path, library, monkeypatch):
    pytest.importorskip(library, reason=f"needs {library.partition('.')[0]}")
    monkeypatch.setattr(optim, "LIBRARIES", (library,))

    def fresh(seed):
        model = two_tensors(seed)
        return model, make_optimizer(parameter_groups(model, 1e-2, {}, 0.01), (0.9, 0.98), CPU, "8bit")

    one, optimizer = fresh(0)
    for number in range(3):
        step(one, optimizer, number)
    found = save(tmp_path, 3, one, optimizer)
    for number in range(3, 6):
        step(one, optimizer, number)
    other, again = fresh(1)
    checkpoint.restore(found, other, again)
    for number in range(3, 6):
        step(other, again, number)
    assert all(torch.equal(one[name], other[name]) for name in one) and alike(optimizer, again)
    kinds = {info.dtype for info in read_header(found.path("optimizer.safetensors")).tensors.values()}
    assert kinds == {"U8", "F32"}


def test_before_the_first_step(tmp_path):
    one, optimizer = make()
    save(tmp_path, 0, one, optimizer)
    other, fresh = make(seed=1)
    step(other, fresh, 0)
    checkpoint.restore(checkpoint.list_checkpoints(tmp_path)[0], other, fresh)
    assert trained(one, other) and alike(optimizer, fresh)


@pytest.mark.parametrize(
    ("saved", "asked"), [("fp32", "bf16"), ("bf16", "fp32"), ("fp32", "lion"), ("adabelief", "fp32")]
)
def test_moments_of_another_kind_are_refused_and_nothing_is_changed(tmp_path, saved, asked, monkeypatch):
    monkeypatch.setattr(adamw, "LEAST", 200)
    one, optimizer = make(state=saved)
    step(one, optimizer, 0)
    found = save(tmp_path, 1, one, optimizer)
    other, fresh = make(seed=1, state=asked)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(
        InputError, match="optimizer.safetensors does not fit this run: .* optimizer state .*go on with"
    ):
        checkpoint.restore(found, other, fresh)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    assert not any(moments["exp_avg"].any() for moments in fresh.state.values())


@pytest.mark.parametrize("train_vision", [True, False])
def test_means_are_saved_beside_the_weights_and_restored_exactly(tmp_path, train_vision):
    def fresh(seed):
        clip, optimizer = make(train_vision, seed)
        return clip, optimizer, Ema(clip, optimizer, 0.9, Shards())

    one, optimizer, ema = fresh(0)
    for number in range(6):
        step(one, optimizer, number)
        ema.update()
        if number == 2:
            found = checkpoint.save(tmp_path, 3, one, optimizer, {}, 3, {"note": "x"}, ema.clip())
    other, again, restored = fresh(1)
    checkpoint.restore(found, other, again, means=restored.means)
    restored.updates = 3
    for number in range(3, 6):
        step(other, again, number)
        restored.update()
    assert trained(one, other) and alike(optimizer, again)
    assert restored.means.keys() == ema.means.keys() == {n for n, p in one.named_parameters() if p.requires_grad}
    assert all(torch.equal(mean, restored.means[name]) for name, mean in ema.means.items())
    assert all(
        torch.equal(p, restored.clip().get_parameter(n)) for n, p in ema.clip().named_parameters() if n[:3] != "vis"
    )


def test_what_a_checkpoint_gives_is_the_means_where_there_are_such(tmp_path):
    one, optimizer = make(train_vision=False)
    plain = save(tmp_path, 1, one, optimizer)
    assert plain.given() == plain.path("model.safetensors")
    ema = Ema(one, optimizer, 0.5, Shards())
    for number in range(2):
        step(one, optimizer, number)
        ema.update()
    found = checkpoint.save(tmp_path, 2, one, optimizer, {}, 3, {}, ema.clip())
    weights, means = (read_header(path).tensors for path in (found.path("model.safetensors"), found.given()))
    assert found.given() != found.path("model.safetensors") and weights.keys() == means.keys()
    header = read_header(found.given())
    expected = ema.clip().state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in read_tensors(header, list(header.tensors)).items())
    checkpoint.save(tmp_path, 3, one, optimizer, {}, 1, {}, ema.clip())
    assert len(list(tmp_path.iterdir())) == 4


def test_a_checkpoint_without_means_is_refused_where_they_are_asked_for(tmp_path):
    one, optimizer = make()
    found = save(tmp_path, 1, one, optimizer)
    other, fresh = make(seed=1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(InputError, match="ema.safetensors"):
        checkpoint.restore(found, other, fresh, means=Ema(other, fresh, 0.9, Shards()).means)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_a_locked_vision_tower_is_not_saved_and_a_frozen_text_weight_is(tmp_path):
    one, optimizer = make(train_vision=False)
    weights = save(tmp_path, 1, one, optimizer).weights()
    assert set(weights) == {n for n, _ in one.named_parameters() if not n.startswith("visual.")}
    assert "ln_final.weight" in weights and "transformer.resblocks.0.mlp.c_fc.theta" in weights
    one, optimizer = make(train_vision=True)
    weights = save(tmp_path / "both", 1, one, optimizer).weights()
    assert set(weights) == {n for n, _ in one.named_parameters()}


def test_only_the_newest_are_kept(tmp_path):
    one, optimizer = make()
    for number in (1, 2, 10, 11):
        save(tmp_path, number, one, optimizer, keep=2)
    assert [found.step for found in checkpoint.list_checkpoints(tmp_path)] == [10, 11]
    assert len(list(tmp_path.iterdir())) == 6


def test_without_a_state_a_checkpoint_does_not_count(tmp_path):
    assert checkpoint.list_checkpoints(tmp_path / "nowhere") == []
    one, optimizer = make()
    save(tmp_path, 1, one, optimizer)
    found = save(tmp_path, 2, one, optimizer)
    found.path("state.json").unlink()
    (tmp_path / "step_00000003.state.json.part").touch()
    (tmp_path / "notes.txt").touch()
    assert [c.step for c in checkpoint.list_checkpoints(tmp_path)] == [1]


def test_what_a_crash_left_behind_is_cleared_away(tmp_path):
    """A killed save leaves files of gigabytes; the next one removes them, and nothing that it does not know."""
    one, optimizer = make()
    save(tmp_path, 1, one, optimizer)
    save(tmp_path, 2, one, optimizer).path("state.json").unlink()
    torn = tmp_path / ".step_00000002.optimizer.safetensors.0123456789ab.part"
    for path in (torn, tmp_path / "notes.txt", tmp_path / "step_one.txt"):
        path.touch()
    save(tmp_path, 3, one, optimizer)
    names = {path.name for path in tmp_path.iterdir()}
    kinds = ("model.safetensors", "optimizer.safetensors", "state.json")
    whole = {f"step_0000000{number}.{kind}" for number in (1, 3) for kind in kinds}
    assert names == whole | {"notes.txt", "step_one.txt"}


@pytest.mark.parametrize("call", range(1, 6))
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, monkeypatch, call):
    one, optimizer = make()
    step(one, optimizer, 0)
    save(tmp_path, 1, one, optimizer, keep=1)
    kept = small_clip(5)
    to_geometric(kept)
    kept.load_state_dict(one.state_dict())
    step(one, optimizer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk(call))
        with pytest.raises(OSError, match="no space left to write .*step_00000002"):
            save(tmp_path, 2, one, optimizer, keep=1)
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")]
    (found,) = checkpoint.list_checkpoints(tmp_path)
    other, fresh = make()
    checkpoint.restore(found, other, fresh)
    assert found.step == 1 and same(other, kept)
    save(tmp_path, 2, one, optimizer, keep=1)
    assert [c.step for c in checkpoint.list_checkpoints(tmp_path)] == [2]


def test_another_form_is_refused(tmp_path):
    one, optimizer = make()
    found = save(tmp_path, 1, one, optimizer)
    plain = small_clip()
    fresh = make_optimizer(parameter_groups(plain, 1e-2, {}, 0.0), (0.9, 0.98), CPU)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with pytest.raises(InputError, match="does not fit this run: .*mlp.c_fc"):
        checkpoint.restore(found, plain, fresh)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


def test_files_are_plain(tmp_path):
    """Readable without this code: safetensors with the canonical names, and JSON."""
    from safetensors.torch import load_file

    one, optimizer = make()
    step(one, optimizer, 0)
    found = save(tmp_path, 7, one, optimizer, skipped=2)
    weights = load_file(found.path("model.safetensors"))
    assert weights["token_embedding.weight"].shape == (VOCAB, SMALL.text.width)
    assert weights["positional_embedding"].shape == (CONTEXT, SMALL.text.width)
    moments = load_file(found.path("optimizer.safetensors"))
    assert "text_projection|exp_avg_sq" in moments
    state = json.loads(found.path("state.json").read_text())
    assert (state["step"], state["skipped"], state["optimizer"]["text_projection"]) == (7, 2, 1.0)
