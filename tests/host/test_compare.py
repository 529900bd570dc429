"""Pictures of text encoders as nodes of a graph: what they show, give and refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from gmp.comparison import PICTURES
from tests.host.graphs import node


@pytest.fixture(scope="module")
def files(host):
    from gmp.world.models import ASSETS, ORIGINAL, RUINED

    for name in (ORIGINAL, RUINED):
        (host.base / "models" / "text_encoders" / name).write_bytes((ASSETS / name).read_bytes())
    return {
        "original": node("GmPLoadTextEncoder", file=ORIGINAL, member="auto"),
        "broken": node("GmPLoadTextEncoder", file=RUINED, member="auto"),
    }


def compared(**inputs) -> dict:
    given = {"original": ["original", 0], "broken": ["broken", 0], "picture": "prompts", "read_point": "penultimate"}
    return {
        "compare": node("GmPCompareCLIPs", **given | inputs),
        "save": node("SaveImage", images=["compare", 0], filename_prefix="compared"),
        "json": node("PreviewAny", source=["compare", 2]),
    }


def newest(host, prefix: str) -> np.ndarray:
    path = max(host.output.glob(f"{prefix}_*.png"))
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def check(picture: np.ndarray) -> None:
    """Something is drawn, on white."""
    assert picture.shape[1] >= 512 and (picture == 255).all(axis=2).mean() > 0.1
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_encoders_are_compared_in_a_picture_words_and_numbers(host, files):
    result = host.run(files | compared(repaired=["original", 0]))
    assert result.status == "success", result.error
    check(newest(host, "compared"))
    lines = result.outputs["compare"][0].split("\n· ")
    assert lines[0].startswith("broken at penultimate: cosine to original 0.")
    assert lines[1].startswith("repaired at penultimate: cosine to original 1.000, structure (CKA) 1.000")
    broken, repaired = json.loads(result.outputs["json"][0])
    assert broken["structure"]["penultimate"]["cka"] < 0.9
    assert all(one["angle"] == 0 for one in repaired["blocks"])
    again = host.run(files | compared(repaired=["original", 0], picture="weights by block", read_point="pooled"))
    assert again.status == "success", again.error
    assert "broken at pooled" in again.outputs["compare"][0]
    assert json.loads(again.outputs["json"][0]) == [broken, repaired]


def test_captioned_pictures_are_drawn_with_their_captions(host, files):
    world = {
        "world": node("GmPDemoWorld", pictures=64),
        "join": node("GmPReassembleCLIP", text_encoder=["world", 0], vision_tower=["world", 1]),
    }
    given = {"gmp_clip": ["join", 0], "dataset": ["world", 2], "picture": "pictures and captions"}
    result = host.run(files | world | compared(**given))
    assert result.status == "success", result.error
    check(newest(host, "compared"))
    assert all(document["vision"] for document in json.loads(result.outputs["json"][0]))


@pytest.mark.parametrize("picture", ["distributions", "by block"])
@pytest.mark.parametrize("alone", [True, False])
def test_r_and_theta_are_drawn(host, files, picture, alone):
    given = {"text_encoder": ["broken", 0], "picture": picture} | ({} if alone else {"original": ["original", 0]})
    prompt = files | {
        "look": node("GmPInspectGmP", **given),
        "save": node("SaveImage", images=["look", 0], filename_prefix="looked"),
    }
    result = host.run(prompt)
    assert result.status == "success", result.error
    check(newest(host, "looked"))
    words = result.outputs["look"][0]
    assert "mlp.in: r 0." in words and ("theta turned by" in words) != alone


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"picture": "pictures and captions"}, "needs both a gmp_clip and a dataset"),
        ({"prompts": "a cat\na dog"}, "2 prompts are too few"),
        ({"umap": True}, "umap-learn"),
        ({"broken": ["tiny", 0]}, "width 32 against 64"),
    ],
)
def test_what_cannot_be_drawn_is_named(host, files, changes, words):
    tiny = {
        "clip": node("GmPTestTinyCLIP", kind="sdxl"),
        "tiny": node("GmPTextEncoderFromCLIP", clip=["clip", 0], member="clip_l"),
    }
    result = host.run(files | (tiny if "broken" in changes else {}) | compared(**changes))
    assert result.failed == "compare" and words in result.error, (result.failed, result.error)


def test_the_menu_lists_every_picture(nodes):
    assert nodes["GmPCompareCLIPs"]["input"]["required"]["picture"][1]["options"] == [
        *PICTURES,
        "recall and drift over steps",
    ]


def test_a_run_is_drawn_over_its_steps(host, nodes):
    """With the original as the full CLIP that a vision tower's socket carries."""
    graph = {
        "world": node("GmPDemoWorld", pictures=512),
        "joined": node("GmPReassembleCLIP", text_encoder=["world", 0], vision_tower=["world", 1]),
        "repair": node(
            "GmPRepair", gmp_clip=["joined", 0], dataset=["world", 2], preset="sd15", target="SD1 (last)",
            anchor_weight=0.3, epochs=2, batch=128, lr=0.0, seed=77, wait=True,
        ),
    }  # fmt: skip
    steps = {"original": ["world", 1], "broken": ["world", 0], "picture": "recall and drift over steps"}
    result = host.run(graph | compared(**steps, run=["repair", 0]))
    assert result.status == "success", result.error
    check(newest(host, "compared"))
    refused = host.run(graph | compared(**steps))
    assert refused.status == "error" and "needs a run of GmP Repair" in refused.error
