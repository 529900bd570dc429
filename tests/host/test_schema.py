"""What the nodes promise: tooltips, documents, translations, and workflows that open."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.host.graphs import ROOT, WORKFLOWS, to_prompt

# Optional inputs that are not for experts: they came after the first saved workflows, or may be left open.
PLAIN = {
    "original", "vision_tower", "broken", "checkpoint", "rank", "save_in", "text_encoder", "repaired",
    "gmp_clip", "dataset", "run", "concepts", "dataset_3", "weight_3", "dataset_4", "weight_4",
}  # fmt: skip


@pytest.fixture(scope="session")
def ours(nodes: dict) -> dict:
    return {name: info for name, info in nodes.items() if name.startswith("GmP") and not name.startswith("GmPTest")}


def test_every_node_input_and_output_is_explained(ours):
    assert len(ours) == 21
    for name, info in ours.items():
        assert info["display_name"] and info["description"] and info["search_aliases"], name
        assert info["category"] == "model/text encoder repair"
        for section in ("required", "optional"):
            for key, (kind, *options) in info["input"].get(section, {}).items():
                options = options[0] if options else {}
                assert options.get("tooltip"), (name, key)
                if kind in ("INT", "FLOAT"):
                    assert {"min", "max", "default"} <= options.keys(), (name, key)
                advanced = section == "optional" and key not in PLAIN
                assert options.get("advanced", False) == advanced, (name, key)
        assert all(info["output_tooltips"]) and len(info["output_tooltips"]) == len(info["output"]), name


def test_every_node_has_a_page(ours):
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "web" / "docs").glob("*.md")}
    assert pages.keys() == ours.keys()
    for name, info in ours.items():
        for section in ("required", "optional"):
            for key in info["input"].get(section, {}):
                assert f"`{key}`" in pages[name], (name, key)


def test_the_english_texts_are_those_of_the_schema(ours):
    texts = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert texts == {name: texts_of(info) for name, info in ours.items()}


def texts_of(info: dict) -> dict:
    """The entry of nodeDefs.json that a schema stands for."""
    inputs = {}
    for section in ("required", "optional"):
        for key in info["input_order"].get(section, []):
            options = (info["input"][section][key][1:] or [{}])[0]
            inputs[key] = {"name": options.get("display_name", key), "tooltip": options["tooltip"]}
    outputs = {
        str(i): {"name": name, "tooltip": tooltip}
        for i, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
    }
    entry = {"display_name": info["display_name"], "description": info["description"], "inputs": inputs}
    return entry | ({"outputs": outputs} if outputs else {})


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_opens(path, nodes, host):
    """Its nodes exist, its links and values fit them, and links join sockets of one type."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    prompt = to_prompt(workflow, nodes)
    assert any(nodes[entry["class_type"]]["output_node"] for entry in prompt.values())
    for entry in prompt.values():
        info = nodes[entry["class_type"]]
        for key, value in entry["inputs"].items():
            kind = next(section[key][0] for section in info["input"].values() if key in section)
            if isinstance(value, list):
                given = nodes[prompt[value[0]]["class_type"]]["output"][value[1]]
                assert kind == "*" or given in kind.split(","), (entry, key)
        assert info["input"].get("required", {}).keys() <= entry["inputs"].keys(), entry
    picture = path.with_suffix(".jpg")
    assert picture.read_bytes()[:3] == b"\xff\xd8\xff" and picture.stat().st_size < 100_000


def test_importing_the_pack_does_nothing():
    code = f"import sys; sys.path.insert(0, {str(ROOT.parent)!r}); __import__({ROOT.name!r})"
    code += "; assert not {'torch', 'comfy_api', 'aiohttp'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_workflows_are_listed_as_templates(host):
    assert set(host.get("/workflow_templates")["text-encoder-repair"]) == {path.stem for path in WORKFLOWS}


def test_the_log_tells_of_no_fault(host):
    lines = host.log.read_text().splitlines()
    assert not [line for line in lines if "IMPORT FAILED" in line or "Cannot import" in line]


def test_saved_prompts_stay_valid(ours):
    """Inputs of the first release keep their places; what was added later has a default or may be left open."""
    first = {
        "GmPLoadTextEncoder": ["file", "member", "heads", "activation"],
        "GmPLoadVisionTower": ["file", "heads", "activation"],
        "GmPReassembleCLIP": ["text_encoder", "vision_tower"],
        "GmPSaveTextEncoder": ["text_encoder", "filename_prefix", "dtype", "layout"],
        "GmPCaptionDataset": ["folder", "captions", "missing_ok"],
    }
    for name, inputs in first.items():
        order = ours[name]["input_order"]
        now = order.get("required", []) + order.get("optional", [])
        assert now[: len(inputs)] == inputs
        assert set(order["required"]) <= set(inputs), name
