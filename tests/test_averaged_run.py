"""Whole runs with the mean of weights, optimizers of another library, and clipping by rows: alone, stopped, shared."""

from __future__ import annotations

import dataclasses
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file

from gmp import checkpoint, telemetry
from gmp.geometric import fold_state
from gmp.layouts import read_text
from gmp.run import BEST, RESULT, repair
from tests.test_distributed_run import BOTH, CPU, TEXT, assert_near, assert_same, go, of

# a mean of two steps or so, a schedule with a cycle, and rows that are clipped
OPTIONS = {"ema": 0.6, "schedule": "onecycle", "warmup": 0.3, "cycle_momentum": True, "clip_adaptive": 0.01}
BELIEF = dataclasses.replace(TEXT, optimizer="adabelief", weight_decay=1e-3, decay="all", layer_decay=0.9, **OPTIONS)
MEAN = dataclasses.replace(BOTH, keep=9, **OPTIONS)
CONFIGS = {"belief": BELIEF, "mean": MEAN, "lion": dataclasses.replace(BELIEF, optimizer="lion", lr=1e-4)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("averaged-cache")


@pytest.fixture(scope="module")
def order(write_order):
    return lambda folder, config, **what: write_order(folder, config, **what)


def folded(path):
    return {name: t for name, t in fold_state(load_file(path)).items() if not name.startswith("visual.")}


def test_what_is_given_and_the_best_are_the_means_and_checkpoints_have_both(alone):
    folder = alone["mean"]
    saved = {one.step: one for one in checkpoint.list_checkpoints(folder / "checkpoints")}
    best = checkpoint.best_of(folder)["step"]
    for name, step in ((RESULT, 6), (BEST, best)):
        given = read_text(folder / name).state
        weights, means = (folded(path) for path in (saved[step].path("model.safetensors"), saved[step].given()))
        assert given.keys() == weights.keys() == means.keys()
        for key, tensor in given.items():
            assert torch.equal(tensor, means[key]), key
        assert not torch.equal(given["text_projection"], weights["text_projection"])
    whole = load_file(folder / "clip.safetensors")
    assert torch.equal(whole["visual.proj"], load_file(saved[6].given())["visual.proj"])


def test_what_is_measured_is_what_is_given(alone, inputs):
    """The last measurement's distance from the start is that of the file, and not that of the last weights."""
    last, folder = of("measure", telemetry.read(alone["mean"]))[-1], alone["mean"]
    saved = checkpoint.list_checkpoints(folder / "checkpoints")[-1]
    given, weights = read_text(folder / RESULT).state, folded(saved.path("model.safetensors"))

    def norm(change):
        one = [change(f"transformer.resblocks.1.attn.{n}") for n in ("in_proj_weight", "in_proj_bias")]
        one += [change(f"transformer.resblocks.1.attn.out_proj.{n}") for n in ("weight", "bias")]
        return torch.cat([t.flatten() for t in one]).norm().item()

    start = inputs.text.state
    of_given, of_weights = (norm(lambda n, s=s: s[n] - start[n]) / norm(lambda n: start[n]) for s in (given, weights))
    assert last["step"] == 6 and last["moved"]["text.1.attention"] == pytest.approx(of_given, rel=1e-5)
    assert of_weights > 1.01 * of_given


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stopped_run_goes_on_to_the_bit(alone, inputs, cache, tmp_path, name):
    asked, folder = threading.Event(), tmp_path / "run"
    for event in repair(inputs, CONFIGS[name], folder, cache=cache, device=CPU, stop=asked.is_set):
        if event["type"] == "step" and event["step"] == 3:
            asked.set()
    list(repair(inputs, CONFIGS[name], folder, cache=cache, device=CPU))
    assert_same(folder, alone[name])
    measured = [[e["held_out"] for e in of("measure", telemetry.read(run))] for run in (folder, alone[name])]
    assert measured[0] == measured[1]


@pytest.mark.parametrize("sharded", ["", "01"], ids=["moments", "weights"])
@pytest.mark.parametrize("name", ["belief", "mean"])
def test_several_processes_have_the_result_of_one(order, alone, inputs, cache, tmp_path, name, sharded):
    """Shared moments, or shared weights and means; and one process goes on with what two have saved."""
    config = CONFIGS[name]
    folder, heard = go(order(tmp_path, config, sharded=sharded, at={"1": ["hold"], "3": ["stop"]}), 2)
    assert [event["offloaded"] for event in of("paused", heard[0])] == [True]
    shutil.copytree(folder, tmp_path / "single")
    again, _ = go(order(tmp_path, config, sharded=sharded), 2)
    assert_near(again, alone[name])
    list(repair(inputs, config, tmp_path / "single", cache=cache, device=CPU))
    assert_near(tmp_path / "single", alone[name])
    for mine, one in zip(*(of("measure", telemetry.read(run)) for run in (again, alone[name])), strict=True):
        assert mine["held_out"] == pytest.approx(one["held_out"], rel=1e-4)
    saved = [checkpoint.list_checkpoints(run / "checkpoints")[-1].given() for run in (again, alone[name])]
    ours, theirs = map(load_file, saved)
    assert {key: t.shape for key, t in ours.items()} == {key: t.shape for key, t in theirs.items()}
