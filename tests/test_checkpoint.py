"""Checkpoints: exact, whole or not there, and few."""

from __future__ import annotations

import json
import os

import pytest
import torch

from gmp import checkpoint
from gmp.errors import InputError
from gmp.geometric import is_mlp, to_geometric
from gmp.optim import parameter_groups
from tests.small import CONTEXT, SMALL, VOCAB, full_disk, small_clip


def make(train_vision=True, seed=0):
    clip = small_clip(seed)
    to_geometric(clip, lambda name: is_mlp(name) and (train_vision or not name.startswith("visual.")))
    clip.visual.requires_grad_(train_vision)
    return clip, torch.optim.AdamW(parameter_groups(clip, 1e-2, {"ln_final.*": 0.0}, 0.01))


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


@pytest.mark.parametrize("train_vision", [True, False])
def test_restored_is_uninterrupted(tmp_path, train_vision):
    one, optimizer = make(train_vision)
    for number in range(3):
        step(one, optimizer, number)
    save(tmp_path, 3, one, optimizer, sampler={"epoch": 1}, best=None)
    for number in range(3, 6):
        step(one, optimizer, number)

    other, fresh = make(train_vision)
    (found,) = checkpoint.list_checkpoints(tmp_path)
    state = checkpoint.restore(found, other, fresh)
    assert (state["step"], state["sampler"], state["best"]) == (3, {"epoch": 1}, None)
    for number in range(3, 6):
        step(other, fresh, number)
    assert same(one, other)
    for a, b in zip(optimizer.state_dict()["state"].values(), fresh.state_dict()["state"].values(), strict=True):
        assert a.keys() == b.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_before_the_first_step(tmp_path):
    one, optimizer = make()
    save(tmp_path, 0, one, optimizer)
    other, fresh = make(seed=1)
    checkpoint.restore(checkpoint.list_checkpoints(tmp_path)[0], other, fresh)
    assert same(one, other) and not fresh.state


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
    fresh = torch.optim.AdamW(parameter_groups(plain, 1e-2, {}, 0.0))
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
