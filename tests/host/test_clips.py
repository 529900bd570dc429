"""Text encoders into and out of ComfyUI's CLIP objects, made of random tiny weights; and data sets from the graph."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gmp.clip import TextTower, text_config_from
from gmp.tokenizer import END_ID, Tokenizer
from tests.host.graphs import node

TEXT = "a red circle"


def swapped(kind: str, strength: float = 1.0, member: str = "clip_l") -> dict:
    """A CLIP, and the same with another text encoder of the same shape in it."""
    return {
        "clip": node("GmPTestTinyCLIP", kind=kind),
        "encoder": node("GmPTextEncoderFromCLIP", clip=["clip", 0], member=member),
        "other": node("GmPTestPerturb", text_encoder=["encoder", 0], layers=0),
        "apply": node("GmPApplyToCLIP", clip=["clip", 0], text_encoder=["other", 0], member="auto", strength=strength),
        "before": node("CLIPTextEncode", clip=["clip", 0], text=TEXT),
        "after": node("CLIPTextEncode", clip=["apply", 0], text=TEXT),
        "again": node("GmPTextEncoderFromCLIP", clip=["apply", 0], member=member),
        **{f"dump {n}": node("GmPTestDump", value=[n, 0], name=n) for n in ("before", "after", "other", "again")},
    }


def dumps(host, prompt: dict) -> dict[str, dict[str, torch.Tensor]]:
    result = host.run(prompt)
    assert result.status == "success", (result.failed, result.error)
    names = [entry["inputs"]["name"] for entry in prompt.values() if entry["class_type"] == "GmPTestDump"]
    return {name: load_file(host.output / f"{name}.safetensors") for name in names}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)


def test_sdxl_keeps_its_clip_g(host):
    seen = dumps(host, swapped("sdxl"))
    before, after = seen["before"]["cond"], seen["after"]["cond"]
    assert not torch.allclose(before[..., :32], after[..., :32], atol=1e-2)
    assert torch.equal(before[..., 32:], after[..., 32:])
    assert torch.equal(seen["before"]["pooled"], seen["after"]["pooled"])
    same(seen["again"], seen["other"])
    assert after.isfinite().all()  # clip_l's uninitialised projection is not touched
    config = text_config_from(seen["other"], heads=2, activation="quick_gelu")
    tower = TextTower(config)
    tower.load_state_dict(seen["other"] | {"text_projection": torch.eye(32)})
    with torch.no_grad():
        penultimate = tower(Tokenizer()([TEXT]).ids).penultimate
    torch.testing.assert_close(after[..., :32], penultimate, atol=1e-4, rtol=1e-4)


def test_sdxl_takes_a_clip_g_with_its_projection(host):
    seen = dumps(host, swapped("sdxl", member="clip_g"))
    before, after = seen["before"]["cond"], seen["after"]["cond"]
    assert torch.equal(before[..., :32], after[..., :32])
    assert not torch.allclose(before[..., 32:], after[..., 32:], atol=1e-2)
    assert not torch.allclose(seen["before"]["pooled"], seen["after"]["pooled"], atol=1e-3)
    assert "text_projection" in seen["other"]
    same(seen["again"], seen["other"])


def test_sd2_takes_a_clip_h(host):
    seen = dumps(host, swapped("sd2", member="clip_h"))
    assert not torch.allclose(seen["before"]["cond"], seen["after"]["cond"], atol=1e-2)
    assert seen["after"]["cond"].isfinite().all()
    assert "text_projection" not in seen["other"]  # most files lack it, which leaves uninitialised memory
    same(seen["again"], seen["other"])


@pytest.mark.parametrize("kind, member", [("sdxl", "clip_l"), ("sd2", "clip_h")])
def test_a_projection_that_files_lack_is_not_patched(host, kind, member):
    """An encoder with a projection of its own goes into a CLIP whose projection is uninitialised."""
    prompt = {
        "clip": node("GmPTestTinyCLIP", kind=kind),
        "encoder": node("GmPTextEncoderFromCLIP", clip=["clip", 0], member=member),
        "other": node("GmPTestPerturb", text_encoder=["encoder", 0], layers=0, projection=True),
        "apply": node("GmPApplyToCLIP", clip=["clip", 0], text_encoder=["other", 0], member="auto", strength=1.0),
        "patches": node("GmPTestPatches", clip=["apply", 0]),
    }
    result = host.run(prompt)
    assert result.status == "success", (result.failed, result.error)
    patched = set(result.outputs["patches"])
    assert f"{member}.transformer.text_model.final_layer_norm.weight" in patched
    assert not [name for name in patched if "text_projection" in name]


@pytest.mark.parametrize("projection, words", [("zeros", "is all zeros"), ("NaN", "holds NaN or infinity")])
def test_a_projection_of_clip_g_that_cannot_be_a_trained_one_is_left_out(host, projection, words):
    prompt = {
        "clip": node("GmPTestTinyCLIP", kind="sdxl", projection=projection),
        "encoder": node("GmPTextEncoderFromCLIP", clip=["clip", 0], member="clip_g"),
        "dump": node("GmPTestDump", value=["encoder", 0], name="unprojected"),
    }
    result = host.run(prompt)
    assert result.status == "success", (result.failed, result.error)
    assert "text_projection" not in load_file(host.output / "unprojected.safetensors")
    lines = result.outputs["encoder"][0].split("\n· ")
    assert f"its text_projection {words} and is not used" in lines
    assert "not in it: text_projection, logit_scale" in lines


def test_flux_keeps_its_t5(host):
    seen = dumps(host, swapped("flux"))
    assert torch.equal(seen["before"]["cond"], seen["after"]["cond"])
    assert not torch.allclose(seen["before"]["pooled"], seen["after"]["pooled"], atol=1e-2)


def test_strength_blends_the_weights(host):
    whole, half, none = (dumps(host, swapped("sdxl", strength)) for strength in (1.0, 0.5, 0.0))
    assert torch.equal(none["after"]["cond"], none["before"]["cond"])
    middle = {n: (whole["again"][n] + none["again"][n]) / 2 for n in whole["again"]}
    same(half["again"], middle)


def test_a_lora_is_baked_in_once_whether_the_clip_is_loaded_or_not(host):
    prompt = {
        "clip": node("GmPTestTinyCLIP", kind="sdxl"),
        "lora": node("GmPTestLora", clip=["clip", 0]),
        "bare": node("GmPTextEncoderFromCLIP", clip=["clip", 0], member="clip_l"),
        "fresh": node("GmPTextEncoderFromCLIP", clip=["lora", 0], member="clip_l"),
        "use": node("CLIPTextEncode", clip=["lora", 0], text=TEXT),
        "dump use": node("GmPTestDump", value=["use", 0], name="use"),
        **{f"dump {n}": node("GmPTestDump", value=[n, 0], name=n) for n in ("bare", "fresh")},
    }
    seen = dumps(host, prompt)
    prompt["fresh"]["inputs"]["member"] = "auto"  # executes again, now that the CLIP is loaded and patched
    prompt["bare"]["inputs"]["member"] = "auto"
    loaded = dumps(host, prompt)
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    for one in (seen, loaded):
        torch.testing.assert_close(one["fresh"][name], one["bare"][name] + 0.5)
        others = [key for key in one["bare"] if key != name]
        assert all(torch.equal(one["fresh"][key], one["bare"][key]) for key in others)


def test_captions_are_read_as_comfyui_reads_prompts(host):
    texts = [TEXT, "Ünï — 你好 🦊 it's 42!", "", "a\t\n  b", "<|endoftext|> hidden", "word " * 100, "(weighted:1.2)"]
    for member, pad in (("clip_l", END_ID), ("clip_g", 0)):
        prompt = {"1": node("GmPTestTokens", texts=json.dumps(texts), member=member)}
        found = json.loads(host.run(prompt).outputs["1"][0])
        wanted = Tokenizer(pad_id=pad)(texts)
        assert found["ids"] == wanted.ids.tolist()
        assert (found["truncated"], found["specials"]) == (wanted.truncated, wanted.specials) == (1, 1)
        assert found["prompt"] == found["ids"][0]


@pytest.mark.parametrize(
    "changes, failed, words",
    [
        ({"clip": node("GmPTestTinyCLIP", kind="t5")}, "encoder", "holds no CLIP text encoder, only t5xxl"),
        ({"other": node("GmPTestPerturb", text_encoder=["encoder", 0], layers=9)}, "apply", "layers 9 against 3"),
        (
            {
                "world": node("GmPDemoWorld", pictures=64),
                "apply": node(
                    "GmPApplyToCLIP", clip=["clip", 0], text_encoder=["world", 0], member="auto", strength=1.0
                ),
            },
            "apply",
            "width 64 against 32",
        ),
        (
            {"encoder": node("GmPTextEncoderFromCLIP", clip=["clip", 0], member="clip_g")},
            "encoder",
            "has no clip_g; it holds clip_l, t5xxl",
        ),
    ],
    ids=["t5 alone", "layers", "width", "member"],
)
def test_what_does_not_fit_is_named(host, changes, failed, words):
    result = host.run(swapped("flux") | changes)
    assert result.failed == failed and words in result.error, (result.failed, result.error)


def test_towers_that_do_not_belong_together_are_refused(host):
    prompt = {
        "world": node("GmPDemoWorld", pictures=64),
        "clip": node("GmPTestTinyCLIP", kind="sdxl"),
        "encoder": node("GmPTextEncoderFromCLIP", clip=["clip", 0], member="clip_l"),
        "join": node("GmPReassembleCLIP", text_encoder=["encoder", 0], vision_tower=["world", 1]),
        "dump": node("PreviewAny", source=["join", 0]),
    }
    result = host.run(prompt)
    assert result.failed == "join" and "do not belong together" in result.error


def test_pictures_come_from_comfyuis_own_nodes(host):
    folder = host.base / "input" / "fruits"
    folder.mkdir()
    for name, colour in (("apple", "red"), ("pear", "green"), ("plum", "blue")):
        Image.new("RGB", (40, 30), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {colour} {name}")
    before = sorted(path.name for path in folder.iterdir())
    prompt = {
        "load": node("LoadImageTextDataSetFromFolder", folder="fruits"),
        "lists": node("GmPDatasetFromLists", images=["load", 0], texts=["load", 1]),
        "folder": node("GmPCaptionDataset", folder="fruits", captions="text files beside the pictures"),
        "a": node("PreviewAny", source=["lists", 0]),
        "b": node("PreviewAny", source=["folder", 0]),
    }
    result = host.run(prompt)
    assert result.status == "success", result.error
    for name in ("lists", "folder"):
        assert result.outputs[name][0].startswith("3 pictures with 3 captions"), result.outputs
    assert sorted(path.name for path in folder.iterdir()) == before
    kept = list((host.base / "user" / "__gmp" / "pictures").glob("*.png"))
    assert len(kept) == 3 and Image.open(kept[0]).size == (40, 30)


def test_files_are_chosen_from_comfyuis_model_folders(host, nodes):
    from gmp.world.models import ASSETS, ORIGINAL, RUINED

    (host.base / "models" / "text_encoders" / RUINED).write_bytes((ASSETS / RUINED).read_bytes())
    (host.base / "models" / "clip_vision" / ORIGINAL).write_bytes((ASSETS / ORIGINAL).read_bytes())
    prompt = {
        "text": node("GmPLoadTextEncoder", file=RUINED, member="auto"),
        "vision": node("GmPLoadVisionTower", file=ORIGINAL),
        "join": node("GmPReassembleCLIP", text_encoder=["text", 0], vision_tower=["vision", 0]),
        "show": node("PreviewAny", source=["join", 0]),
        "wrong": node("GmPLoadVisionTower", file=f"text_encoders/{RUINED}"),
        "see": node("PreviewAny", source=["wrong", 0]),
    }
    result = host.run({name: prompt[name] for name in ("text", "vision", "join", "show")})
    assert result.status == "success", result.error
    assert "lent by the original" in result.outputs["join"][0]
    result = host.run({name: prompt[name] for name in ("wrong", "see")})
    assert result.failed == "wrong" and "no vision tower" in result.error


def test_a_caption_file_that_leads_out_of_its_folder_is_refused_without_telling_where_folders_lie(host):
    (host.base / "input" / "inside").mkdir()
    (host.base / "input" / "outside.json").write_text('{"../../secret.png": ["a secret"]}')
    host.get("/object_info/GmPCaptionDataset")
    prompt = {"data": node("GmPCaptionDataset", folder="inside", captions="outside.json")}
    result = host.run(prompt | {"see": node("PreviewAny", source=["data", 0])})
    assert result.failed == "data" and "outside.json names 1 pictures outside" in result.error, result.error
    assert str(host.base) not in result.error
