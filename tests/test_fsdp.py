"""Repairs whose weights are shared out over processes: the result of one process, from a share of the memory."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file

from gmp import checkpoint, telemetry
from gmp.cli import main
from gmp.config import Geometric, Neuron, RepairConfig, Unfreeze
from gmp.distributed import Group
from gmp.errors import InputError
from gmp.fsdp import Shards, check_shards
from gmp.gradients import squares
from gmp.memory import estimate
from gmp.run import repair, status
from gmp.world.models import ASSETS, ORIGINAL, RUINED
from tests.processes import split_clip
from tests.side_by_side import Started, Torchrun
from tests.small import SMALL
from tests.test_distributed_run import CPU, TEXT, assert_near, assert_same, figures, go, of

# rows that do not divide by 3, and what is frozen
UNEVEN = dataclasses.replace(
    TEXT,
    batch=3,
    accumulate=2,
    checkpointing=True,
    clip_norm=0.1,
    epochs=1,
    rates={"transformer.resblocks.0.ln_*": 0.0},
)
EVERYWHERE = dataclasses.replace(
    TEXT, epochs=1, geometric=(Geometric(("mlp", "qkv", "out", "projection"), sphere=True),)
)
LOCKED = dataclasses.replace(EVERYWHERE, text_blocks=1, neurons=(Neuron("text", 1, 3, 5.0),))
CONFIGS = {"text": TEXT, "uneven": UNEVEN, "everywhere": EVERYWHERE, "locked": LOCKED}
GEOMETRIC = "transformer.resblocks.1.mlp.c_fc.theta"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("shards-cache")


@pytest.fixture(scope="module")
def order(write_order):
    return lambda folder, config=TEXT, **what: write_order(folder, config, **{"sharded": "012"} | what)


@pytest.fixture(scope="module")
def pair(order, tmp_path_factory):
    """An uninterrupted run in two processes: its folder, and what each process has heard."""
    return go(order(tmp_path_factory.mktemp("pair")), 2)


# --- the pieces


def test_each_process_has_rows_of_the_blocks_and_the_first_one_gathers_them(tmp_path):
    with Started("shards", 3, tmp_path) as started:
        assert started.wait() == [0, 0, 0], started.err
    first, second, third = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(3))
    expected = dict(split_clip().named_parameters())
    blocks = {name for name in expected if name.startswith("transformer.resblocks.")}
    for name, parameter in expected.items():
        assert torch.equal(first[f"whole.{name}"], parameter), name
        assert bool(first[f"trains.{name}"]) == (not name.startswith("transformer.resblocks.0.ln_"))
        rows = [found[f"here.{name}"] for found in (first, second, third) if f"here.{name}" in found]
        assert len(rows) == (3 if name in blocks else 0)
        if rows:
            assert torch.equal(torch.cat(rows), parameter)
            assert max(map(len, rows)) == -(-len(parameter) // 3)

    trained = [name for name in expected if first[f"trains.{name}"]]
    alone = squares([expected[name].detach() for name in trained])
    for found in (first, second, third):
        torch.testing.assert_close(found["squares"], alone)
        assert torch.equal(found["squares"], first["squares"])
        assert [name for name, one in zip(trained, found["broken"], strict=True) if not one.isfinite()] == [GEOMETRIC]
        assert found["share"].item() == pytest.approx(2 / sum(expected[name].numel() for name in trained))


def test_a_clip_that_is_not_shared_out_stays_as_it_is():
    clip, shards = split_clip(), Shards()
    assert not shards and shards.whole_clip(clip) is clip
    assert all(p is clip.get_parameter(name) for name, p in shards.here(clip).items())
    assert torch.equal(shards.sum(["a", "b"], torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("train", ["text", "both"])
def test_the_estimate_counts_rows_in_place_of_blocks(train):
    settings = RepairConfig(train=train, anchors=())
    whole, eighth = (estimate(SMALL, settings, "fp32", processes=n) for n in (1, 8))
    clip = split_clip()
    blocks = [*clip.transformer.resblocks, *(clip.visual.transformer.resblocks if train == "both" else ())]
    sizes = [p.numel() for block in blocks for p in block.parameters()]
    assert all(len(p) % 8 == 0 for block in blocks for p in block.parameters())
    assert whole.weights - eighth.weights == 4 * sum(sizes) * 7 // 8
    assert whole.gradients - eighth.gradients == 4 * sum(sizes) * 7 // 8
    assert whole.moments - eighth.moments == 8 * sum(sizes) * 7 // 8
    assert whole.teachers == eighth.teachers


# --- the result of one process


def test_shared_weights_have_the_result_of_one_process(pair, alone):
    folder, heard = pair
    assert_near(folder, alone["text"])
    assert figures(heard[0]) == figures(heard[1]) and len(figures(heard[0])) == 6
    assert {path.name for path in folder.iterdir()} == {path.name for path in alone["text"].iterdir()}
    assert json.loads((folder / "run.json").read_text()) == json.loads((alone["text"] / "run.json").read_text())
    kinds = [
        [event["type"] for event in telemetry.read(run) if event["type"] != "waiting"]  # for others on this machine
        for run in (folder, alone["text"])
    ]
    assert kinds[0] == kinds[1]
    for mine, one in zip(*(of("measure", telemetry.read(run)) for run in (folder, alone["text"])), strict=True):
        assert mine["moved"] == pytest.approx(one["moved"], rel=1e-3, abs=1e-7)
        assert mine["held_out"] == pytest.approx(one["held_out"], rel=1e-5)
    for mine, one in zip(*(of("step", telemetry.read(run)) for run in (folder, alone["text"])), strict=True):
        if "update_ratios" in one:
            assert mine["update_ratios"] == pytest.approx(one["update_ratios"], rel=1e-3)


def test_checkpoints_are_those_of_one_process_and_moments_are_shared(pair, alone):
    mine, one = (checkpoint.list_checkpoints(run / "checkpoints")[-1] for run in (pair[0], alone["text"]))
    for kind in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(mine.path(kind)), load_file(one.path(kind))
        assert [(n, t.shape, t.dtype) for n, t in ours.items()] == [(n, t.shape, t.dtype) for n, t in theirs.items()]
    assert mine.state()["optimizer"] == one.state()["optimizer"]
    moments = {n: t.numel() for n, t in load_file(one.path("optimizer.safetensors")).items()}
    blocks = sum(numel for name, numel in moments.items() if name.startswith("transformer.resblocks."))
    for rank in range(2):
        kept = int((pair[0].parent / f"{rank}.moments").read_text())
        assert kept == sum(moments.values()) - blocks // 2


@pytest.mark.parametrize("mode", ["everywhere", "locked"])
def test_every_kind_of_layer_may_be_split_and_shared_out(order, alone, tmp_path, mode):
    """Each process brings the rows of theta that it has back to their sphere; blocks may be locked."""
    folder, heard = go(order(tmp_path, CONFIGS[mode]), 2)
    assert_near(folder, alone[mode])
    assert figures(heard[0]) == figures(heard[1])
    saved = load_file(checkpoint.list_checkpoints(folder / "checkpoints")[-1].path("model.safetensors"))
    thetas = {name: tensor for name, tensor in saved.items() if name.endswith(".theta")}
    assert {name.split(".", 3)[-1] for name in thetas} >= {"attn.in_proj_weight.theta", "mlp.c_fc.theta"}
    for tensor in thetas.values():
        torch.testing.assert_close(tensor.norm(dim=1), torch.ones(len(tensor)))


# --- asked, stopped, gone on with


def test_a_run_holds_stops_and_goes_on_with_shared_weights_or_without(order, pair, alone, inputs, cache, tmp_path):
    folder, heard = go(order(tmp_path, at={"1": ["hold"], "2": ["measure", "save"], "3": ["stop"]}), 2)
    assert [event["offloaded"] for event in of("paused", heard[0])] == [True]
    assert 2 in [event["step"] for event in of("measure", heard[0])]
    assert heard[0][-1]["type"] == "stopped" and len(figures(heard[1])) == 3
    assert status(folder).step == 3
    shutil.copytree(folder, tmp_path / "single")
    again, heard = go(order(tmp_path), 2)
    assert [event["step"] for event in of("step", heard[1])] == [4, 5, 6]
    assert_same(again, pair[0])
    list(repair(inputs, TEXT, tmp_path / "single", cache=cache, device=CPU))
    assert_near(tmp_path / "single", alone["text"])


def test_a_run_of_one_process_goes_on_with_weights_that_three_share_unevenly(order, alone, inputs, cache, tmp_path):
    asked = threading.Event()
    for event in repair(inputs, UNEVEN, tmp_path / "run", cache=cache, device=CPU, stop=asked.is_set):
        if event["type"] == "step":
            asked.set()
    folder, heard = go(order(tmp_path, UNEVEN), 3)
    assert [[event["step"] for event in of("step", events)] for events in heard] == [[2, 3, 4]] * 3
    assert figures(heard[0]) == figures(heard[1]) == figures(heard[2])
    assert_near(folder, alone["uneven"])


# --- what goes wrong


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 1, "one process.*torchrun.*leave out --shard"),
        ({}, 3, "batch × accumulate is 8, which 3 processes cannot share evenly.*multiple of 3"),
        ({"anchor_captions": 7}, 2, "anchor captions is 7, which 2 processes cannot share evenly"),
        ({"unfreeze": Unfreeze()}, 2, "unfreeze is for whole weights.*leave out unfreeze, or --shard"),
        ({"optimizer_state": "bf16"}, 2, "optimizer state bf16.*fp32"),
        ({"optimizer_state": "8bit"}, 2, "optimizer state 8bit.*fp32"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(changes, size, message):
    with pytest.raises(InputError, match=message):
        check_shards(dataclasses.replace(TEXT, **changes), "fp32", Group(0, size))


def test_fp16_is_refused_and_captions_of_no_anchor_do_not_count():
    with pytest.raises(InputError, match="fp16.*bf16 or fp32"):
        check_shards(TEXT, "fp16", Group(1, 2))
    check_shards(dataclasses.replace(TEXT, anchors=(), anchor_captions=7), "bf16", Group(1, 2))


def test_one_process_is_refused_before_anything_is_written(pictures, cache, tmp_path, capsys):
    towers = ("--text", ASSETS / RUINED, "--vision", ASSETS / ORIGINAL, "--device", "cpu", "--shard")
    data = ("--images", pictures, "--captions", pictures / "captions.json", "--cache", cache, "--out", tmp_path / "run")
    assert main([str(one) for one in ("repair", *towers, *data)]) != 0
    assert "--nproc_per_node" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_processes_that_differ_in_it_are_refused(order, tmp_path):
    with Started("run", 2, order(tmp_path, sharded="0")) as started:
        assert started.wait() == [1, 1]
    assert "process 1 has another sharding than process 0" in (tmp_path / "1.txt").read_text()


# --- the command line


def test_torchrun_with_shard_repairs_both_towers_as_one_process_does(pictures, cache, tmp_path):
    towers = ("--text", ASSETS / RUINED, "--vision", ASSETS / ORIGINAL, "--device", "cpu", "--cache", cache)
    data = ("--images", pictures, "--captions", pictures / "captions.json", "--held-out", "0.08", "--epochs", "1")
    given = ("repair", *towers, *data, "--train", "both", "--batch", "4", "--accumulate", "2", "--json", "--out")
    with Torchrun(2, "gmp", *given, tmp_path / "run", "--shard") as started:
        code, out, err = started.wait()
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("{")]
    assert json.loads(line)["state"] == "done" and json.loads(line)["steps"] == 3
    assert main([str(one) for one in (*given, tmp_path / "alone")]) == 0
    assert_near(tmp_path / "run", tmp_path / "alone")
    ours, theirs = load_file(tmp_path / "run/clip.safetensors"), load_file(tmp_path / "alone/clip.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {name for name in ours if name.endswith("in_proj_bias")}:  # of keys, see `assert_near`
        assert (ours[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name
