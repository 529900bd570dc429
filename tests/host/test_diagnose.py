"""GmP Diagnose in a real graph: the verdict on the demo's encoder, with and without pictures, and what is refused."""

from __future__ import annotations

import json

import jsonschema
import numpy as np
import torch
from PIL import Image

from gmp.diagnose import diagnose
from gmp.diagnosis import lines
from gmp.evaluate import SCHEMA
from gmp.events import finish
from gmp.files import read_header, read_tensors
from gmp.layouts import read_text
from gmp.world.models import ASSETS, ORIGINAL, RUINED
from tests.host.graphs import node


def prompt(**inputs: object) -> dict:
    given = {"text_encoder": ["world", 0], "original": ["world", 1], "target": "SDXL, SD2, SD3 (penultimate)"} | inputs
    return {
        "world": node("GmPDemoWorld", pictures=256),
        "diagnose": node("GmPDiagnose", **given),
        "text": node("PreviewAny", source=["diagnose", 0]),
        "json": node("PreviewAny", source=["diagnose", 1]),
        "save": node("SaveImage", images=["diagnose", 2], filename_prefix="diagnosed"),
    }


def test_the_demos_encoder_is_diagnosed_as_the_engine_does(host):
    result = host.run(prompt())
    assert result.status == "success", result.error
    expected = finish(diagnose(read_text(ASSETS / RUINED), read_text(ASSETS / ORIGINAL)))
    shown, told = result.outputs["diagnose"][0].split("\n· "), result.outputs["text"][0].splitlines()
    assert told[:2] == lines(expected)[:2] and len(told) == len(shown) - 1 + len(expected.parts)
    assert shown[:-1] == [line.replace("`", "") for line in told[: len(shown) - 1]] and told[-1].startswith(
        "projection: "
    )
    document = json.loads(result.outputs["json"][0])
    jsonschema.validate(document, json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert document["verdict"]["finding"] == expected.verdict.finding == "rearranged"
    with Image.open(max(host.output.glob("diagnosed_*.png"))) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    orange = np.abs(pixels.astype(int) - (0xD5, 0x5E, 0x00)).max(axis=2) < 4
    assert pixels.shape[1] >= 512 and orange.mean() > 0.1


def test_a_dataset_measures_the_alignment(host):
    result = host.run(prompt(dataset=["world", 2], target="Flux (pooled)"))
    assert result.status == "success", result.error
    document = json.loads(result.outputs["json"][0])
    assert document["verdict"]["alignment"]["measured"] and document["retrieval"]["images"] == 256
    assert "As Flux reads it" in result.outputs["diagnose"][0]


def test_an_original_without_a_text_tower_is_refused(host):
    header = read_header(ASSETS / ORIGINAL)
    vision = read_tensors(header, [name for name in header.tensors if name.startswith("visual.")])
    torch.save(vision, host.base / "models" / "clip_vision" / "eye.pt")
    alone = {"eye": node("GmPLoadVisionTower", file="eye.pt")}
    result = host.run(alone | prompt(original=["eye", 0]))
    assert result.failed == "diagnose" and "no text tower" in result.error


def test_an_encoder_of_another_shape_is_refused(host):
    tiny = {
        "clip": node("GmPTestTinyCLIP", kind="sdxl"),
        "tiny": node("GmPTextEncoderFromCLIP", clip=["clip", 0], member="clip_l"),
    }
    result = host.run(tiny | prompt(text_encoder=["tiny", 0]))
    assert result.failed == "diagnose" and "width 32 against 64" in result.error
