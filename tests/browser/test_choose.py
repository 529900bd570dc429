"""The graph that measures and chooses, in the real page: pictures are drawn, and one press uses the strength."""

from __future__ import annotations

import json

import pytest

from tests.browser.test_page import ROOT, browse, change, host, screenshots  # noqa: F401


@pytest.mark.parametrize("canvas", ["classic", "nodes2"])
def test_one_press_uses_the_strength_that_the_scan_suggests(host, canvas, tmp_path):  # noqa: F811
    workflow = json.loads((ROOT / "workflows" / "demo_choose.json").read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        values = node["widgets_values"]
        if node["type"] == "GmPDemoWorld":
            values[0] = 2048
        if node["type"] == "GmPBlendTextEncoders":
            values[0] = 0.35  # none that a scan of so many points measures
    change(workflow, seed=10 + ["classic", "nodes2"].index(canvas))  # a run for each canvas
    graph = tmp_path / "choose.json"
    graph.write_text(json.dumps(workflow))
    seen = browse("choose.py", host.port, graph, canvas, screenshots(tmp_path) / f"choose_{canvas}")
    assert seen["queued"] and not seen["missing"] and set(seen["states"]) == {"success"}
    assert "strength" in seen["label"].lower() and not any(digit in seen["label"] for digit in "0123456789")
    suggested = float(seen["suggestion"].split()[-1])
    assert 0 < suggested <= 1.2
    # Apply to CLIP gets the blend, not the repaired encoder: its own strength is not the scan's
    assert dict(seen["strengths"]) == {"GmPBlendTextEncoders": suggested, "GmPApplyToCLIP": 1.0}
    # A page that is opened anew, and a graph whose results are all known, show as much as before
    again = seen["again"]
    assert (again["suggestion"], again["strengths"]) == (seen["suggestion"], seen["strengths"])
    for kind in ("GmPDiagnose", "GmPMeasureCLIP", "GmPStrengthScan"):
        assert seen["told"][kind] and again["told"][kind] == seen["told"][kind]
    saved = {node["type"]: node["size"][1] for node in workflow["nodes"]}
    grown = {kind: (height, saved[kind]) for kind, height in seen["heights"].items() if height > saved[kind] + 60}
    assert not grown  # a long text scrolls, and does not make its node cover the ones below
