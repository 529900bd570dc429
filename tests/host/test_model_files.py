"""Files of ComfyUI's model folders: listed, told apart before anything is queued, and read."""

from __future__ import annotations

import json
import urllib.parse

import pytest
import torch
from safetensors.torch import load_file, save_file

from gmp.layouts import read_text, write_clip, write_text
from tests.host import models
from tests.host.graphs import node
from tests.host.models import CONFIG


@pytest.fixture(scope="module")
def states():
    return {"clip_l": models.canonical(1), "clip_g": models.canonical(2), "whole": models.canonical(3)}


@pytest.fixture(scope="module")
def placed(host, states):
    """Every container and layout in the folder where ComfyUI keeps its kind."""
    root = host.base / "models"
    for kind in ("checkpoints", "clip", "diffusers/pipe/unet", "loras", "diffusion_models", "gmp", "text_encoders/sub"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    clip_l, clip_g = (models.text_part(states[name]) for name in ("clip_l", "clip_g"))
    torch.save(models.text_part(states["clip_l"], lent=True), root / "text_encoders/sub/openai names.pt")
    vision = {name: tensor for name, tensor in states["whole"].items() if name.startswith("visual.")}
    torch.save(vision, root / "clip_vision" / "vision.pt")
    damaged = states["whole"] | {"ln_final.bias": torch.full((64,), torch.nan)}
    save_file({name: t.contiguous() for name, t in damaged.items()}, root / "clip_vision" / "damaged text.safetensors")
    models.sdxl_checkpoint(root / "checkpoints" / "small_xl.safetensors", clip_l, clip_g)
    write_text(clip_l, root / "diffusers" / "alone", layout="huggingface_folder", config=CONFIG.text)
    (root / "diffusers/pipe/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (root / "diffusers/pipe/unet/diffusion_pytorch_model.safetensors").write_bytes(b"")
    write_text(clip_g, root / "diffusers/pipe/text_encoder", layout="huggingface_folder", config=CONFIG.text)
    write_clip(states["whole"], root / "text_encoders" / "whole.safetensors", layout="openai", config=CONFIG)
    prefixed = {f"cond_stage_model.transformer.{name}": t for name, t in models.hugging(clip_l).items()}
    rest = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4, 3, 3)}
    torch.save({"state_dict": prefixed | rest, "global_step": 7}, root / "checkpoints" / "small_sd1.ckpt")
    torch.save(models.hugging(clip_g), root / "clip" / "legacy.bin", _use_new_zipfile_serialization=False)
    models.lora(root / "loras" / "style.safetensors")
    models.unet(root / "diffusion_models" / "unet.safetensors")
    models.picture(root / "text_encoders" / "picture.safetensors")
    return root


def told(host, role: str, name: str) -> dict:
    query = urllib.parse.urlencode({"role": role, "name": name})
    return host.get(f"/gmp/file?{query}")


def taken(host, **inputs: object) -> tuple[dict[str, torch.Tensor], str]:
    """What Load Text Encoder reads, and what it shows."""
    load = node("GmPLoadTextEncoder", **{"member": "auto"} | inputs)
    result = host.run({"load": load, "dump": node("GmPTestDump", value=["load", 0], name="taken")})
    assert result.status == "success", result.error
    return load_file(host.output / "taken.safetensors"), result.outputs["load"][0]


def test_menus_list_all_relevant_folders(host, placed):
    text = models.choices(host, "GmPLoadTextEncoder", "file")
    assert {"sub/openai names.pt", "whole.safetensors", "legacy.bin"} <= set(text)
    assert {"checkpoints/small_xl.safetensors", "checkpoints/small_sd1.ckpt"} <= set(text)
    assert [name for name in text if name.startswith("diffusers/")] == ["diffusers/alone", "diffusers/pipe"]
    vision = models.choices(host, "GmPLoadVisionTower", "file")
    assert {"vision.pt", "text_encoders/whole.safetensors", "checkpoints/small_xl.safetensors"} <= set(vision)
    both = models.choices(host, "GmPInspectFile", "file")
    wanted = {"loras/style.safetensors", "diffusion_models/unet.safetensors", "clip_vision/vision.pt", "diffusers/pipe"}
    assert wanted | {"picture.safetensors"} <= set(both)


@pytest.mark.parametrize(
    "file, member, state, half",
    [
        ("checkpoints/small_xl.safetensors", "clip_l", "clip_l", True),
        ("checkpoints/small_xl.safetensors", "clip_g", "clip_g", True),
        ("checkpoints/small_xl.safetensors", "auto", "clip_l", True),
        ("diffusers/alone", "auto", "clip_l", False),
        ("diffusers/pipe", "clip_l", "clip_g", False),
        ("whole.safetensors", "auto", "whole", False),
        ("sub/openai names.pt", "auto", "clip_l", False),
        ("checkpoints/small_sd1.ckpt", "clip_l", "clip_l", False),
        ("legacy.bin", "auto", "clip_g", False),
    ],
)
def test_a_text_encoder_is_read_from(host, placed, states, file, member, state, half):
    seen, text = taken(host, file=file, member=member)
    lent = file in ("whole.safetensors", "sub/openai names.pt")
    wanted = models.text_part(states[state], lent=lent)
    wanted = {name: t.half().float() if half else t for name, t in wanted.items()}
    assert seen.keys() == wanted.keys()
    assert all(torch.equal(seen[name], tensor) for name, tensor in wanted.items())
    assert str(host.base) not in text


def test_a_member_that_is_not_there_is_named(host, placed):
    load = node("GmPLoadTextEncoder", file="checkpoints/small_xl.safetensors", member="clip_h")
    result = host.run({"load": load, "show": node("PreviewAny", source=["load", 0])})
    assert result.failed == "load" and "clip_h" in result.error and "clip_l" in result.error


@pytest.mark.parametrize(
    "file, lends, anchor",
    [
        ("vision.pt", "no text tower in it: nothing is lent", "anchor: none"),
        ("damaged text.safetensors", "its text tower is not used: damaged text.safetensors: ", "anchor: none"),
        ("text_encoders/whole.safetensors", "its text tower lends and anchors", "anchor ← whole.safetensors"),
    ],
)
def test_a_vision_tower_is_read_from(host, placed, file, lends, anchor):
    prompt = {
        "text": node("GmPLoadTextEncoder", file="sub/openai names.pt", member="auto"),
        "vision": node("GmPLoadVisionTower", file=file),
        "join": node("GmPReassembleCLIP", text_encoder=["text", 0], vision_tower=["vision", 0]),
        "show": node("PreviewAny", source=["join", 0]),
    }
    result = host.run(prompt)
    assert result.status == "success", result.error
    assert lends in result.outputs["vision"][0] and anchor in result.outputs["join"][0]


def test_another_original_can_lend_and_anchor(host, placed):
    prompt = {
        "text": node("GmPLoadTextEncoder", file="checkpoints/small_xl.safetensors", member="clip_l"),
        "vision": node("GmPLoadVisionTower", file="text_encoders/whole.safetensors"),
        "original": node("GmPLoadTextEncoder", file="sub/openai names.pt", member="auto"),
        "join": node(
            "GmPReassembleCLIP", text_encoder=["text", 0], vision_tower=["vision", 0], original=["original", 0]
        ),
        "show": node("PreviewAny", source=["join", 0]),
    }
    result = host.run(prompt)
    assert result.status == "success", result.error
    lines = dict(line.removeprefix("· ").split(" ← ") for line in result.outputs["join"][0].split("\n") if "←" in line)
    assert lines["text tower"].startswith("small_xl.safetensors:")
    assert lines["text_projection"].startswith("openai names.pt: lent by the original")
    assert lines["logit_scale"].startswith("openai names.pt:")
    assert lines["vision tower"].startswith("whole.safetensors:") and lines["anchor"] == "openai names.pt"


def test_a_file_is_told_before_anything_is_queued(host, placed):
    seen = told(host, "text", "checkpoints/small_xl.safetensors")
    assert seen["fits"] and seen["sentence"].startswith("checkpoint: clip_l (") and "clip_g" in seen["sentence"]
    assert seen["lines"][0].startswith("checkpoints/small_xl.safetensors: checkpoint")
    assert told(host, "text", "diffusers/pipe")["fits"]
    for name, word in (("sub/openai names.pt", "clip_l"), ("whole.safetensors", "full CLIP")):
        seen = told(host, "text", name)
        assert seen["fits"] and word in seen["sentence"], seen
    seen = told(host, "vision", "checkpoints/small_xl.safetensors")
    assert not seen["fits"] and seen["sentence"].endswith("no vision tower in it")
    seen = told(host, "text", "picture.safetensors")
    assert not seen["fits"] and seen["sentence"].startswith("picture.safetensors is a PNG picture")


def test_a_file_that_changes_is_told_anew(host, placed):
    path = placed / "text_encoders" / "changing.safetensors"
    models.lora(path)
    assert told(host, "text", path.name)["sentence"].startswith("LoRA")
    models.unet(path)
    assert told(host, "text", path.name)["sentence"].startswith("diffusion model")
    path.unlink()
    assert models.answer(host, f"/gmp/file?role=text&name={path.name}")[0] == 404


@pytest.mark.parametrize("name", ["config.json", "open_clip_config.json"])
def test_a_file_is_read_and_told_anew_when_the_config_beside_it_changes(host, placed, states, name):
    folder = placed / "text_encoders" / name.removesuffix(".json")
    folder.mkdir()
    file = f"{folder.name}/model.safetensors"
    save_file(models.hugging(models.text_part(states["clip_l"])), folder / "model.safetensors")
    load = node("GmPLoadTextEncoder", file=file, member="auto")
    prompt = {"load": load, "show": node("PreviewAny", source=["load", 0])}
    assert host.run(prompt).status == "success"
    assert "load" in host.run(prompt).cached
    assert ", 1 head, " in json.dumps(told(host, "text", file))
    for heads in (4, 8):
        if name == "config.json":
            config = {"model_type": "clip_text_model", "num_attention_heads": heads, "projection_dim": 16}
        else:
            config = {"model_cfg": {"embed_dim": 16, "quick_gelu": True, "text_cfg": {"heads": heads}}}
        (folder / name).write_text(json.dumps(config))
        assert "load" not in host.run(prompt).cached
        assert f", {heads} heads, quick_gelu" in json.dumps(told(host, "text", file))
    (folder / name).write_text(json.dumps(config).replace("8", "7"))
    result = host.run(prompt)
    assert result.failed == "load" and "7 attention heads do not divide" in result.error


def test_a_longer_vocabulary_has_its_end_of_text(host, placed, states):
    state = models.text_part(states["clip_l"])
    generator = torch.Generator().manual_seed(8)
    state["token_embedding.weight"] = torch.randn(49_410, 64, generator=generator)
    save_file(models.hugging(state), placed / "text_encoders" / "extended.safetensors")
    load = node("GmPLoadTextEncoder", file="extended.safetensors", member="auto")
    prompt = {
        "load": load,
        "save": node(
            "GmPSaveTextEncoder",
            text_encoder=["load", 0],
            filename_prefix="extended",
            dtype="fp32",
            layout="huggingface",
        ),
    }
    for asked, wanted in (({}, None), ({"end_of_text": 0}, None), ({"end_of_text": 49_407}, 49_407)):
        load["inputs"] |= asked
        result = host.run(prompt)
        assert result.status == "success", result.error
        assert ("end-of-text assumed" in result.outputs["load"][0]) == (wanted is None)
        saved = read_text(host.base / result.outputs["save"][0].split("\n")[0])
        assert saved.config.end_of_text == wanted


def test_the_route_tells_of_listed_files_only(host, placed):
    inside = "whole.safetensors"
    assert models.answer(host, f"/gmp/file?role=text&name={inside}")[0] == 200
    real = placed / "text_encoders" / inside
    secret = host.base / "models" / "secret.safetensors"
    secret.write_bytes(real.read_bytes())
    names = [
        str(real), str(secret), "../secret.safetensors", "sub/../whole.safetensors", "./whole.safetensors",
        "../text_encoders/whole.safetensors", "checkpoints/../../secret.safetensors", "diffusers/../secret.safetensors",
        "diffusers/..", "diffusers/pipe/text_encoder", "..", ".", "", "/", "/etc/passwd", "(none found)",
        "%2e%2e%2fsecret.safetensors", "..%2fsecret.safetensors", "..\\secret.safetensors", "whole.safetensors\0",
        "file:///etc/passwd", "loras/style.safetensors", "style.safetensors", "small_xl.safetensors",
        "WHOLE.SAFETENSORS",
    ]  # fmt: skip
    for name in names:
        for written in {urllib.parse.quote(name, safe=""), urllib.parse.quote(name, safe="/%")}:
            status, text = models.answer(host, f"/gmp/file?role=text&name={written}")
            assert (status, text) == (404, "no menu lists such a file"), name
    for query in ("", "role=text", f"name={inside}", f"role=loras&name={inside}", f"role=../text&name={inside}"):
        assert models.answer(host, f"/gmp/file?{query}")[0] == 404
    assert host.post(f"/gmp/file?role=text&name={inside}", {})[0] == 405


def test_no_answer_names_a_folder_of_the_host(host, placed):
    (placed / "text_encoders" / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    (placed / "text_encoders" / "empty.pt").write_bytes(b"")
    (placed / "diffusers" / "broken").mkdir()
    (placed / "diffusers" / "broken" / "model.safetensors").write_bytes(b"nothing")
    for role, name in (("text", "GmPLoadTextEncoder"), ("vision", "GmPLoadVisionTower"), ("any", "GmPInspectFile")):
        listed = models.choices(host, name, "file")
        assert len(listed) > 8
        for file in listed:
            text = json.dumps(told(host, role, file))
            assert str(host.base) not in text and "/tmp" not in text and "/home" not in text, text
    assert "0 bytes" in told(host, "text", "empty.pt")["sentence"]


@pytest.mark.parametrize(
    "file, words",
    [
        ("loras/style.safetensors", "is a LoRA, not a text encoder"),
        ("diffusion_models/unet.safetensors", "is a diffusion model without a text encoder"),
        ("picture.safetensors", "is a PNG picture, not a model"),
        ("checkpoints/small_xl.safetensors", "clip_g: 2 blocks"),
        ("diffusers/alone", "Hugging Face names"),
    ],
)
def test_inspect_file_tells_what_any_file_is(host, placed, file, words):
    prompt = {"inspect": node("GmPInspectFile", file=file)}
    result = host.run(prompt)  # it can be queued alone
    assert result.status == "success", result.error
    text = result.outputs["inspect"][0]
    assert words in text and str(host.base) not in text
    result = host.run(prompt | {"show": node("PreviewAny", source=["inspect", 0])})
    assert [line.strip() for line in result.outputs["show"][0].split("\n")] == text.split("\n· ")
