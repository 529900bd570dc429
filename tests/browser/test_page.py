"""The demo in the real page, in both canvases. Screenshots are kept in GMP_SCREENSHOTS, if that names a folder."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.host.conftest import PYTHON, host  # noqa: F401
from tests.host.graphs import ROOT

CHROMIUM = Path("/usr/bin/chromium")


@pytest.mark.parametrize("canvas", ["classic", "nodes2"])
def test_the_demo_runs_in_the_page_and_tells_its_steps(host, canvas, tmp_path):  # noqa: F811
    if not CHROMIUM.exists() or subprocess.run([PYTHON, "-c", "import playwright"], capture_output=True).returncode:
        pytest.skip("no Chromium, or no Playwright in ComfyUI's Python")
    workflow = json.loads((ROOT / "workflows" / "demo_repair.json").read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        values = node["widgets_values"]
        if node["type"] == "GmPDemoWorld":
            values[0] = 2048
        if node["type"] == "GmPRepair":
            values[5] = ["classic", "nodes2"].index(canvas)  # seed: a run for each canvas
    graph = tmp_path / "demo.json"
    graph.write_text(json.dumps(workflow))
    folder = Path(os.environ.get("GMP_SCREENSHOTS", tmp_path))
    script = Path(__file__).parent / "page.py"
    command = [PYTHON, script, str(host.port), graph, canvas, folder / f"demo_{canvas}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["queued"] and not seen["missing"]
    assert sum(text.startswith("step ") for text in seen["texts"]) >= 3, seen["texts"]
    assert seen["texts"][-1].startswith("finished"), seen["texts"]
    assert not [error for error in seen["errors"] if "gmp" in error.lower() or "text-encoder-repair" in error]
    assert (folder / f"demo_{canvas}_finished.png").stat().st_size > 50_000
