"""Measure CLIP in a graph: what it shows, what it gives, and that it can be cancelled."""

from __future__ import annotations

import json

import jsonschema
import numpy as np
from PIL import Image

from gmp.evaluate import SCHEMA
from tests.host.graphs import node

WORLD = {
    "world": node("GmPDemoWorld", pictures=128),
    "clip": node("GmPReassembleCLIP", text_encoder=["world", 0], vision_tower=["world", 1]),
}


def measured(host, **inputs):
    """The result, the document and the text of a measurement."""
    inputs = {"gmp_clip": ["clip", 0]} | inputs
    prompt = WORLD | {
        "measure": node("GmPMeasureCLIP", **inputs),
        "text": node("PreviewAny", source=["measure", 0]),
        "json": node("PreviewAny", source=["measure", 1]),
        "confusion": node("SaveImage", images=["measure", 2], filename_prefix="confusion"),
    }
    result = host.run(prompt)
    if result.status != "success":
        return result, None, None
    return result, json.loads(result.outputs["json"][0]), result.outputs["text"][0]


def saved(host):
    """The newest picture of the output `confusion`, (H, W, 3) 0 to 255."""
    with Image.open(max((host.base / "output").glob("confusion_*.png"))) as image:
        return np.asarray(image.convert("RGB"))


def colours(host):
    """Three classes of a picture each; menus are read anew."""
    for name in ("red", "green", "blue"):
        folder = host.base / "input" / "kinds" / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), name).save(folder / "one.png")
    (host.base / "input" / "prompts.txt").write_text("a large {} circle\n")
    host.get("/object_info/GmPMeasureCLIP")


def test_a_clip_is_measured(host):
    result, found, text = measured(host, dataset=["world", 2])
    assert result.status == "success", result.error
    jsonschema.validate(found, json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert found["kind"] == "measurement" and found["data"]["images"] == 128
    one = found["retrieval"]["text_to_image"]["recall_at_1"]
    assert 0 < one["low"] <= one["value"] <= one["high"] < 0.6
    assert f"{one['value']:.3f} ({one['low']:.3f} … {one['high']:.3f})" in text
    picture = saved(host)  # which says that there are no classes
    assert picture.shape[1] < 512 and picture.min() < 100
    shown = result.outputs["measure"][0]
    assert "\n· recall@1 text → image" in shown and "  " not in shown and str(host.base) not in shown


def test_a_repair_is_held_against_what_was_before(host):
    colours(host)
    prompt = {"dataset": ["world", 2], "text_encoder": ["other", 0], "classes": "kinds"}
    prompt |= {"typographic": True, "relations": True}
    WORLD["other"] = node("GmPTestPerturb", text_encoder=["world", 0], layers=0)
    try:
        result, found, text = measured(host, **prompt)
    finally:
        del WORLD["other"]
    assert result.status == "success", result.error
    jsonschema.validate(found, json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert found["change"]["image_to_text"]["mean_rank"]["value"] != 0
    assert found["zero_shot"]["pictures"] == 3 and "typographic" in found and "relations" in found
    assert "change from" in text and "zero-shot: top-1" in text


def test_classes_are_measured_without_a_dataset(host):
    colours(host)
    result, found, text = measured(host, classes="kinds", templates="prompts.txt")
    assert result.status == "success", result.error
    jsonschema.validate(found, json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert found["zero_shot"]["pictures"] == 3 and found["zero_shot"]["templates"] == ["a large {} circle"]
    assert "structure" in found and "retrieval" not in found
    assert "on 3 pictures of 3 classes" in text
    is_note = [line.startswith("note: ") for line in result.outputs["measure"][0].split("\n· ")[1:]]
    assert is_note[0] and is_note == sorted(is_note, reverse=True)  # before the numbers that they are about
    assert saved(host).shape[0] > 300  # a matrix

    (host.base / "input" / "prompts.txt").write_text("a small {} square\n")
    _, found, _ = measured(host, classes="kinds", templates="prompts.txt")
    assert found["zero_shot"]["templates"] == ["a small {} square"]
    (host.base / "input" / "prompts.txt").write_text("no place\n")
    result, *_ = measured(host, classes="kinds", templates="prompts.txt")
    assert result.failed == "measure" and "no place" in result.error and str(host.base) not in result.error


def test_nothing_to_measure_on_is_one_sentence(host):
    result, *_ = measured(host)
    assert result.failed == "measure" and "connect a dataset, or choose a folder of classes" in result.error


def test_a_measurement_can_be_cancelled(host):
    prompt = {"world": node("GmPDemoWorld", pictures=1500)} | {"clip": WORLD["clip"]}
    result = host.run(prompt | {"see": node("PreviewAny", source=["clip", 0])})
    assert result.status == "success", result.error
    prompt["measure"] = node("GmPMeasureCLIP", gmp_clip=["clip", 0], dataset=["world", 2])
    features = host.base / "user" / "__gmp" / "features"
    before = set(features.rglob("*.safetensors"))
    prompt_id = host.queue(prompt)
    host.until(lambda: host.get("/queue")["queue_running"])
    host.post("/interrupt", {})
    assert host.result(prompt_id).interrupted
    assert set(features.rglob("*.safetensors")) == before  # of one shard, which was not finished


def test_a_folder_without_classes_is_refused(host):
    folder = host.base / "input" / "loose"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "one.png")
    result, *_ = measured(host, dataset=["world", 2], classes="loose")
    assert result.failed == "measure" and "class" in result.error, result.error
    assert str(host.base) not in result.error
