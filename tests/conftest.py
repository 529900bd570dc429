"""Files and pictures of the small repair in `small.py`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch

from gmp.clip import VisionTower
from gmp.config import RepairConfig
from gmp.data.captions import read_index
from gmp.layouts import read_text, read_vision, write_clip, write_text
from gmp.run import Inputs, repair
from gmp.world.write import write_world
from tests.small import PICTURES, SMALL, disturbed, small_clip, tokenize

ONE_SERVER = ("tests/host", "tests/browser")  # tests that share one ComfyUI


def pytest_collection_modifyitems(items):
    """Where tests run in several processes, those that share a server stay in one."""
    for item in items:
        if item.nodeid.startswith(ONE_SERVER):
            item.add_marker(pytest.mark.xdist_group("host"))


# Tensors are small here; on a busy machine threads that wait for each other make tests ten times slower.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def line_of_fixtures(tmp_path_factory):
    """Runs that fixtures of modules make wait for no other test process, nor for this machine's user."""
    folder = tmp_path_factory.mktemp("line-of-fixtures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("TMPDIR", str(folder))
        yield


@pytest.fixture(autouse=True)
def own_line(tmp_path_factory, monkeypatch):
    """Runs of a test wait for each other, and not for those of another test or of this machine's user."""
    folder = tmp_path_factory.mktemp("line")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))  # of processes that the test starts
    return folder


@pytest.fixture(scope="session")
def small_files(tmp_path_factory) -> tuple[Path, Path]:
    """A full CLIP, and a text encoder that lacks projection and temperature."""
    folder = tmp_path_factory.mktemp("files")
    clip = small_clip()
    write_clip(clip.state_dict(), folder / "original.safetensors", config=SMALL)
    text = {
        name: tensor
        for name, tensor in disturbed(clip).state_dict().items()
        if not name.startswith("visual.") and name not in ("text_projection", "logit_scale")
    }
    write_text(text, folder / "ruined.safetensors", config=SMALL.text)
    return folder / "original.safetensors", folder / "ruined.safetensors"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "world"
    for _ in write_world(folder, PICTURES, 0):
        pass
    return folder


@pytest.fixture(scope="session")
def inputs(small_files, pictures) -> Inputs:
    original, ruined = small_files
    index = read_index(pictures, pictures / "captions.json")
    return Inputs(read_text(ruined), read_vision(original), read_text(original), index, tokenize)


@pytest.fixture
def embedded(monkeypatch):
    """How many pictures went through a vision tower."""
    counts = []
    forward = VisionTower.forward

    def spy(tower, pixels):
        counts.append(len(pixels))
        return forward(tower, pixels)

    monkeypatch.setattr(VisionTower, "forward", spy)
    return counts


@pytest.fixture(scope="module")
def alone(request, inputs, cache, tmp_path_factory) -> dict[str, Path]:
    """The folders of a module's CONFIGS, each run in one process without a stop. cache: the module's own."""
    folders = {}
    for name, config in request.module.CONFIGS.items():
        folders[name] = tmp_path_factory.mktemp("alone") / name
        list(repair(inputs, config, folders[name], cache=cache, device=torch.device("cpu")))
    return folders


@pytest.fixture(scope="module")
def write_order(small_files, pictures, cache):
    """Writes down what processes are to do (`processes.run`), in a folder that is theirs. cache: the module's own."""
    original, ruined = small_files
    shared = {"original": str(original), "ruined": str(ruined), "pictures": str(pictures), "cache": str(cache)}

    def write(folder: Path, config: RepairConfig, **what) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "order.json").write_text(json.dumps(shared | {"config": config.to_json()} | what))
        return folder

    return write
