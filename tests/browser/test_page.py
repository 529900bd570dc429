"""The demo, and the line that tells what a file is, in the real page and both canvases.

Screenshots are kept in GMP_SCREENSHOTS, if that names a folder.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from gmp.layouts import write_clip, write_text
from tests.host import models
from tests.host.conftest import PYTHON, host  # noqa: F401
from tests.host.graphs import ROOT

CHROMIUM = Path("/usr/bin/chromium")
REPAIR = ("preset", "target", "anchor_weight", "epochs", "batch", "lr", "seed", "wait")  # its first widgets
NAME = "<img src=x onerror=window.gmpRan=1>.safetensors"


def need_browser() -> None:
    if not CHROMIUM.exists() or subprocess.run([PYTHON, "-c", "import playwright"], capture_output=True).returncode:
        pytest.skip("no Chromium, or no Playwright in ComfyUI's Python")


def is_ours(error: str) -> bool:
    """Whether an error of the page's console has to do with the pack."""
    return "gmp" in error.lower() or "text-encoder-repair" in error


def browse(script: str, *arguments: object) -> dict:
    """Runs a script with ComfyUI's Python and returns what it saw."""
    need_browser()
    command = [PYTHON, Path(__file__).parent / script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert not list(filter(is_ours, seen["errors"]))
    return seen


def screenshots(tmp_path: Path) -> Path:
    return Path(os.environ.get("GMP_SCREENSHOTS", tmp_path))


def change(workflow: dict, **given: object) -> None:
    """Sets widgets of the GmP Repair nodes in a saved workflow, by name."""
    for node in workflow["nodes"]:
        if node["type"] == "GmPRepair":
            for name, value in given.items():
                node["widgets_values"][REPAIR.index(name)] = value


@pytest.mark.parametrize("canvas", ["classic", "nodes2"])
def test_the_demo_runs_in_the_page_and_tells_its_steps(host, canvas, tmp_path):  # noqa: F811
    workflow = json.loads((ROOT / "workflows" / "demo_repair.json").read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        if node["type"] == "GmPDemoWorld":
            node["widgets_values"][0] = 2048
    change(workflow, seed=["classic", "nodes2"].index(canvas))  # a run for each canvas
    graph = tmp_path / "demo.json"
    graph.write_text(json.dumps(workflow))
    folder = screenshots(tmp_path)
    seen = browse("page.py", host.port, graph, canvas, folder / f"demo_{canvas}")
    assert seen["queued"] and not seen["missing"]
    assert sum(text.startswith("Running: step ") for text in seen["texts"]) >= 3, seen["texts"]
    assert seen["texts"][-1].startswith("Finished: step "), seen["texts"]
    assert (folder / f"demo_{canvas}_finished.png").stat().st_size > 50_000


def one(number: int, kind: str, pos: list[int], size: list[int], values: list) -> dict:
    """A node of a saved workflow."""
    place = {"id": number, "type": kind, "pos": pos, "size": size, "flags": {}, "order": number, "mode": 0}
    return place | {"inputs": [], "outputs": [], "properties": {}, "widgets_values": values}


@pytest.mark.parametrize("canvas", ["classic", "nodes2"])
def test_choosing_a_file_tells_what_it_is(host, canvas, tmp_path):  # noqa: F811
    folder = host.base / "models" / "text_encoders"
    (host.base / "models" / "checkpoints").mkdir(exist_ok=True)
    clip_l, clip_g = (models.text_part(models.canonical(seed)) for seed in (1, 2))
    models.sdxl_checkpoint(host.base / "models" / "checkpoints" / "small_xl.safetensors", clip_l, clip_g)
    for name in ("alone", "changing"):
        write_text(clip_l, folder / f"{name}.safetensors", config=models.CONFIG.text)
    write_clip(models.canonical(3), host.base / "models" / "clip_vision" / "seen.safetensors", config=models.CONFIG)
    models.lora(folder / "lora.safetensors")
    models.picture(folder / "picture.safetensors")
    models.picture(folder / NAME)
    kinds = [
        one(1, "GmPLoadTextEncoder", [20, 100], [330, 200], ["alone.safetensors", "auto", 0, "auto", 0]),
        one(2, "GmPLoadVisionTower", [400, 100], [330, 180], ["seen.safetensors", 0, "auto"]),
        one(3, "GmPInspectFile", [20, 450], [500, 300], [NAME]),
    ]
    graph = tmp_path / "graph.json"
    graph.write_text(json.dumps({"nodes": kinds, "links": [], "groups": [], "version": 0.4}))
    pictures = screenshots(tmp_path) / f"file_line_{canvas}"
    seen = browse("file_line.py", host.port, graph, folder, canvas, pictures)

    text, vision, any_file = seen["loaded"]
    assert text == "text encoder: clip_l (2 blocks of width 64); Hugging Face names"
    assert vision.startswith("full CLIP: clip_l (2 blocks of width 64), vision tower (")
    assert any_file == f"{NAME} is a PNG picture, not a model" and seen["ran"] is None
    assert seen["wrong"] == ["picture.safetensors is a PNG picture, not a model", vision, any_file]
    assert seen["chosen"][0].startswith("checkpoint: clip_l (") and "clip_g (" in seen["chosen"][0]
    lines = {"picture.safetensors": seen["wrong"], "alone.safetensors": seen["loaded"]}  # an undo may take both back
    assert seen["undone"][1:] == lines[seen["undone"][0]]
    assert seen["before"][0] == text and seen["reloaded"][0].startswith("LoRA · ")
    assert seen["set by a script"][0] == text
    assert seen["saved"] == [["alone.safetensors", "auto", 0, "auto", 0], ["seen.safetensors", 0, "auto"], [NAME]]
    assert seen["queued"] == {
        "file": "alone.safetensors", "member": "auto", "heads": 0, "activation": "auto", "end_of_text": 0,
    }  # fmt: skip
    assert seen["removed"] == [vision, any_file] and seen["left"] == 2
