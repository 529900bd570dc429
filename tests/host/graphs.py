"""Saved workflows as API prompts, and the prompts of the tests."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
PRIMITIVES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOTES = ("Note", "MarkdownNote")


def widgets(info: dict) -> list[str | None]:
    """A node's widgets in the order of `widgets_values`; None for the control beside a seed."""
    names: list[str | None] = []
    for section in ("required", "optional"):
        for name in info["input_order"].get(section, []):
            kind, *rest = info["input"][section][name]
            options = rest[0] if rest else {}
            if (isinstance(kind, list) or kind in PRIMITIVES) and not options.get("forceInput"):
                names.append(name)
                control = options.get("control_after_generate", name in ("seed", "noise_seed"))
                names += [None] if control else []
    return names


def to_prompt(workflow: dict, nodes: dict) -> dict[str, dict]:
    """`nodes` is what /object_info gives. Asserts that links and widgets fit it."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        info = nodes[node["type"]]
        names = widgets(info)
        assert len(names) == len(node["widgets_values"]), (node["type"], names, node["widgets_values"])
        values = dict(zip(names, node["widgets_values"], strict=True))
        values.pop(None, None)
        for socket in node["inputs"]:
            assert any(socket["name"] in section for section in info["input"].values()), (node["type"], socket)
            if socket["link"] is not None:
                values[socket["name"]] = links[socket["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": values}
    return prompt


def node(kind: str, /, **inputs: object) -> dict[str, object]:
    return {"class_type": kind, "inputs": inputs}


def demo(nodes: dict) -> dict[str, dict]:
    """The demo workflow, small and quick, by the names of its nodes."""
    prompt = to_prompt(json.loads((ROOT / "workflows" / "demo_repair.json").read_text(encoding="utf-8")), nodes)
    names = {key: entry["class_type"] for key, entry in prompt.items()}
    for entry in prompt.values():
        entry["inputs"] = {
            name: [names[value[0]], value[1]] if isinstance(value, list) else value
            for name, value in entry["inputs"].items()
        }
    prompt = {names[key]: entry for key, entry in prompt.items()}
    prompt["GmPDemoWorld"]["inputs"]["pictures"] = 256
    prompt["GmPRepair"]["inputs"] |= {"epochs": 2, "batch": 64}
    prompt["dump"] = node("GmPTestDump", value=["CLIPTextEncode", 0], name="demo")
    return prompt
