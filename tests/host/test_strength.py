"""Blending and scanning in a graph of a real ComfyUI."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch
from safetensors.torch import load_file

from gmp.blend import blend
from gmp.evaluate import SCHEMA
from gmp.layouts import read_text
from gmp.world.models import ASSETS, ORIGINAL, RUINED
from tests.host.graphs import node


@pytest.fixture(scope="module")
def original(host) -> str:
    """The original's file as a menu lists it: it stands for a repaired encoder too."""
    name = "world_original.safetensors"
    (host.base / "models" / "text_encoders" / name).symlink_to(ASSETS / ORIGINAL)
    return name


def graph(original: str, strength: object = 0.8, along: str = "weights", toward: float = 0.0) -> dict:
    blended = {"broken": ["world", 0], "repaired": ["repaired", 0], "original": ["world", 1]}
    blended |= {"strength": strength, "toward_original": toward, "along": along}
    return {
        "world": node("GmPDemoWorld", pictures=256),
        "repaired": node("GmPLoadTextEncoder", file=original, member="auto"),
        "blend": node("GmPBlendTextEncoders", **blended),
        "dump": node("GmPTestDump", value=["blend", 0], name="blend"),
    }


def run(host, prompt: dict):
    result = host.run(prompt)
    assert result.status == "success", (result.failed, result.error)
    return result


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_graph_blends_as_the_engine_does(host, original):
    states = [read_text(ASSETS / name).state for name in (RUINED, ORIGINAL)]
    for along, strength, toward in (("weights", 0.8, 0.0), ("r_and_theta", 1.2, 0.0), ("theta", 0.5, 0.25)):
        result = run(host, graph(original, strength, along, toward))
        wanted = blend(*states, strength, along, states[1], toward)
        close(load_file(host.output / "blend.safetensors"), wanted)
        assert f"at strength {strength:g} along {along}" in result.outputs["blend"][0]


def test_an_applied_strength_above_1_is_the_blend_of_that_strength(host, original):
    """Apply to CLIP's patch of 1.2 times the difference, and the encoder blended at 1.2."""
    prompt = graph(original, 1.2) | {
        "apply": node("GmPApplyToCLIP", clip=["world", 3], text_encoder=["repaired", 0], member="auto", strength=1.2),
        "encode": node("CLIPTextEncode", clip=["apply", 0], text="a small red circle"),
        "taken": node("GmPTextEncoderFromCLIP", clip=["apply", 0], member="auto"),
        "dump taken": node("GmPTestDump", value=["taken", 0], name="taken"),
        "dump cond": node("GmPTestDump", value=["encode", 0], name="cond"),
    }
    run(host, prompt)
    blended, taken = (load_file(host.output / f"{name}.safetensors") for name in ("blend", "taken"))
    for name, tensor in taken.items():
        torch.testing.assert_close(tensor, blended[name], rtol=1e-5, atol=1e-6)
    assert load_file(host.output / "cond.safetensors")["cond"].isfinite().all()


def test_a_scan_suggests_a_strength_that_the_blend_takes(host, original):
    prompt = graph(original, ["scan", 1]) | {
        "clip": node("GmPReassembleCLIP", text_encoder=["world", 0], vision_tower=["world", 1]),
        "scan": node(
            "GmPStrengthScan",
            gmp_clip=["clip", 0],
            repaired=["repaired", 0],
            target="SDXL, SD2, SD3 (penultimate)",
            along="weights",
            dataset=["world", 2],
            points=5,
        ),
        "dump scan": node("GmPTestDump", value=["scan", 0], name="scan"),
        "image": node("SaveImage", images=["scan", 2], filename_prefix="scan"),
        "json": node("PreviewAny", source=["scan", 3]),
    }
    result = run(host, prompt)
    document = json.loads(result.outputs["json"][0])
    jsonschema.validate(document, json.loads(SCHEMA.read_text(encoding="utf-8")))
    suggested = document["suggested"]["strength"]
    assert 0 < suggested <= 1.2 and document["curve"]["pictures"] == 256
    assert result.outputs["scan"][0].startswith(f"suggested strength {suggested:g} along weights: ")
    assert str(host.base) not in result.outputs["scan"][0]
    blended, scanned = (load_file(host.output / f"{name}.safetensors") for name in ("blend", "scan"))
    assert blended.keys() == scanned.keys() and all(torch.equal(blended[n], scanned[n]) for n in blended)
    assert list(host.output.glob("scan_*.png"))


def test_what_is_missing_is_said(host, original):
    prompt = graph(original, 0.5, toward=0.5)
    del prompt["blend"]["inputs"]["original"]
    result = host.run(prompt)
    assert result.failed == "blend" and "connect a full CLIP" in result.error, result.error
