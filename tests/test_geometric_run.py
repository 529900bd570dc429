"""A whole repair of both towers with attention and projections split, too: its record, checkpoints and files."""

from __future__ import annotations

import pytest
import torch

from gmp.checkpoint import list_checkpoints
from gmp.config import Geometric, RepairConfig
from gmp.inspection import inspect
from gmp.layouts import read_text, read_vision
from gmp.run import repair

EVERYWHERE = Geometric(("mlp", "qkv", "out", "projection"), sphere=True)


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A repair of both towers with everything split, and its events."""
    folder = tmp_path_factory.mktemp("split") / "run"
    config = RepairConfig(
        train="both",
        epochs=1,
        batch=8,
        lr=1e-3,
        held_out=0.1,
        geometric=(EVERYWHERE,),
    )
    cache = tmp_path_factory.mktemp("cache")
    return folder, list(repair(inputs, config, folder, cache=cache, device=torch.device("cpu")))


def test_a_run_with_everything_split_misses_nothing(run):
    folder, events = run
    assert events[-1]["type"] == "done"
    assert not [event for event in events if event["type"] == "alarm" and event["alarm"].startswith("no_")]
    measured = [event["moved"] for event in events if event["type"] == "measure"]
    assert not any(measured[0].values()) or max(measured[0].values()) < 1e-6
    assert measured[-1].keys() == measured[0].keys() >= {"text.r", "text.theta", "vision.theta", "text.1.theta"}
    assert min(measured[-1].values()) > 0


def test_a_checkpoint_is_a_gmp_file_of_the_encoder_that_the_run_gives(run):
    folder, _ = run
    saved = list_checkpoints(folder / "checkpoints")[-1].path("model.safetensors")
    assert inspect(saved).layout == "gmp"
    found, result = read_text(saved, heads=2), read_text(folder / "text_encoder.safetensors", heads=2)
    assert set(found.state) >= set(result.state) and not found.source.missing
    assert all(torch.allclose(found.state[name], tensor, rtol=0, atol=1e-6) for name, tensor in result.state.items())
    whole = read_vision(folder / "clip.safetensors", heads=2).state
    assert {"visual.proj", "visual.transformer.resblocks.0.attn.in_proj_weight"} <= set(whole)
