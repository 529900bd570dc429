"""What Save Text Encoder writes: where it lies, who lists it, and that it is what was connected."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gmp.join import join
from gmp.layouts import read_text, read_vision, write_text
from gmp.world.models import ASSETS, ORIGINAL, RUINED
from tests.host import models
from tests.host.graphs import node

TEXT = "a red circle"
PLACES = {
    "huggingface": "clip",
    "openai": "clip",
    "open_clip": "clip",
    "huggingface_folder": "diffusers",
    "open_clip_folder": "diffusers",
    "gmp": "gmp",
    "checkpoint": "checkpoints",
    "lora": "loras",
}
LOADERS = {
    "clip": [("CLIPLoader", "clip_name"), ("DualCLIPLoader", "clip_name1"), ("DualCLIPLoader", "clip_name2")],
    "checkpoints": [("CheckpointLoaderSimple", "ckpt_name")],
    "loras": [("LoraLoader", "lora_name")],
    "diffusers": [],
    "gmp": [],
}


def save(layout: str, prefix: str, source: str = "encoder", **inputs: object) -> dict:
    return node(
        "GmPSaveTextEncoder",
        **{"text_encoder": [source, 0], "filename_prefix": prefix, "dtype": "fp32", "layout": layout} | inputs,
    )


def tiny(kind: str = "sdxl", member: str = "clip_l") -> dict:
    """A CLIP, its broken text encoder, and a repaired one."""
    return {
        "clip": node("GmPTestTinyCLIP", kind=kind),
        "broken": node("GmPTextEncoderFromCLIP", clip=["clip", 0], member=member),
        "encoder": node("GmPTestPerturb", text_encoder=["broken", 0], layers=0),
    }


def run(host, prompt: dict, saver: str = "save") -> list[str]:
    result = host.run(prompt)
    assert result.status == "success", (result.failed, result.error)
    return result.outputs[saver][0].split("\n")


def everyone(host) -> dict[tuple[str, str], list[str]]:
    return {one: models.choices(host, *one) for group in LOADERS.values() for one in group}


def metadata(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("layout", ["huggingface", "openai", "open_clip", "huggingface_folder", "gmp"])
def test_a_text_encoder_comes_back_from_every_layout(host, layout):
    before = everyone(host)
    dump = node("GmPTestDump", value=["encoder", 0], name="saved")
    lines = run(host, tiny() | {"dump": dump, "save": save(layout, f"clip/back_{layout}")})
    name = f"back_{layout}_00001_" + ("" if layout.endswith("_folder") else ".safetensors")
    assert lines[0] == f"output/{PLACES[layout]}/{name}" and (host.base / lines[0]).exists()
    assert f"clip_l, layout {layout}, fp32" in lines[1]
    listed = name if PLACES[layout] == "clip" else f"{PLACES[layout]}/{name}"
    assert listed in models.choices(host, "GmPLoadTextEncoder", "file") and listed in lines[-1]
    found = {one for one, names in everyone(host).items() if set(names) - set(before[one])}
    assert found == set(LOADERS[PLACES[layout]])

    load = node("GmPLoadTextEncoder", file=listed, member="auto")
    result = host.run({"load": load, "dump": node("GmPTestDump", value=["load", 0], name="loaded")})
    assert result.status == "success", result.error
    wanted, seen = (load_file(host.output / f"{one}.safetensors") for one in ("saved", "loaded"))
    assert seen.keys() == wanted.keys()
    for key, tensor in wanted.items():  # r and theta are rounded once more than the weights
        torch.testing.assert_close(seen[key], tensor, rtol=1e-6 if layout == "gmp" else 0, atol=0)


def test_a_gmp_file_holds_r_and_theta(host):
    lines = run(host, tiny() | {"save": save("gmp", "radius", dtype="fp16")})
    assert lines[1] == "· clip_l, layout gmp, fp32 as always"
    state = load_file(host.base / lines[0])
    name = "transformer.resblocks.0.mlp.c_fc"
    assert f"{name}.r" in state and f"{name}.weight" not in state
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def world() -> dict:
    return {"world": node("GmPDemoWorld", pictures=64)}


@pytest.mark.parametrize(
    "layout", ["huggingface", "openai", "open_clip", "gmp", "huggingface_folder", "open_clip_folder"]
)
def test_with_a_vision_tower_the_whole_clip_is_written(host, layout):
    saver = save(layout, "whole", "world", vision_tower=["world", 1])
    lines = run(host, world() | {"save": saver})
    assert lines[0].startswith(f"output/{PLACES[layout]}/whole_0000")
    assert f"clip_l and vision tower, layout {layout}, fp32" in lines[1]
    assert any("text_projection ←" in line and "lent by the original" in line for line in lines)
    path = host.base / lines[0]
    text, vision = read_text(path), read_vision(path)
    wanted = join(read_text(ASSETS / RUINED), read_vision(ASSETS / ORIGINAL), read_text(ASSETS / ORIGINAL))
    assert (text.config, vision.config) == (wanted.config.text, wanted.config.vision)
    found = text.state | vision.state
    assert found.keys() == wanted.state.keys()
    for name, tensor in wanted.state.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6 if layout == "gmp" else 0, atol=0)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision(host, dtype):
    lines = run(host, tiny() | {"save": save("huggingface", "half", dtype=dtype)})
    kinds = {tensor.dtype for tensor in load_file(host.base / lines[0]).values()}
    assert kinds == {{"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]}


@pytest.mark.parametrize(
    "layout, words",
    [
        ("lora", "connect the text encoder"),
        ("checkpoint", "choose one below"),
        ("open_clip_folder", "connect vision_tower"),
    ],
)
def test_a_missing_link_is_named(host, layout, words):
    before = sorted(host.output.rglob("missing*"))
    result = host.run(tiny() | {"save": save(layout, "missing")})
    assert result.failed == "save" and f"Layout {layout} " in result.error and words in result.error
    assert sorted(host.output.rglob("missing*")) == before


def test_prefixes_and_folders(host):
    nodes = tiny()
    for prefix, save_in, wanted in (
        ("plain", "output", "output/clip/plain_00001_.safetensors"),
        ("./plain", "output", "output/clip/plain_00002_.safetensors"),
        ("clip/plain", "output", "output/clip/plain_00003_.safetensors"),
        ("loras/plain", "output", "output/clip/plain_00004_.safetensors"),
        ("mine/deep/plain", "output", "output/clip/mine/deep/plain_00001_.safetensors"),
        ("mine\\plain", "output", "output/clip/mine/plain_00001_.safetensors"),
        ("text_encoders/plain", "models", "models/text_encoders/plain_00001_.safetensors"),
    ):
        lines = run(host, nodes | {"save": save("huggingface", prefix, save_in=save_in)})
        assert lines[0] == wanted and (host.base / wanted).is_file()
        assert lines[-1].rpartition(": ")[2] in models.choices(host, "CLIPLoader", "clip_name")
    before = sorted(host.base.rglob("*.safetensors"))
    for prefix in ("../out", "/tmp/out", "clip/../../out", "clip/..", "", "clip/"):
        result = host.run(nodes | {"save": save("huggingface", prefix)})
        assert result.failed == "save" and "names no file below output" in result.error, prefix
    assert sorted(host.base.rglob("*.safetensors")) == before


@pytest.mark.parametrize(
    "kind, member", [("sdxl", "clip_l"), ("sdxl", "clip_g"), ("flux", "clip_l"), ("sd2", "clip_h")]
)
def test_the_repair_as_a_lora_is_the_repair(host, kind, member):
    """On the broken CLIP at strength 1 it gives what Apply to CLIP gives; both run in ComfyUI."""
    prefix = f"repair_{kind}_{member}"
    nodes = tiny(kind, member)
    lines = run(host, nodes | {"save": save("lora", prefix, broken=["broken", 0], rank=32)})
    name = f"{prefix}_00001_.safetensors"
    assert lines[0] == f"output/loras/{name}" and lines[-1] == f"· Load LoRA: {name}"
    assert f"LoRA for {member}, rank 32, fp32" in lines[1] and "keeps 100.0% of the change" in lines[2]
    assert name in models.choices(host, "LoraLoader", "lora_name")
    lora = {"model": ["none", 0], "clip": ["clip", 0], "lora_name": name, "strength_model": 1.0, "strength_clip": 1.0}
    prompt = nodes | {
        "none": node("GmPTestNoModel"),
        "lora": node("LoraLoader", **lora),
        "apply": node("GmPApplyToCLIP", clip=["clip", 0], text_encoder=["encoder", 0], member="auto", strength=1.0),
    }
    for one in ("clip", "lora", "apply"):
        prompt[f"text {one}"] = node("CLIPTextEncode", clip=[one, 1 if one == "lora" else 0], text=TEXT)
        prompt[f"dump {one}"] = node("GmPTestDump", value=[f"text {one}", 0], name=f"lora_{one}")
    result = host.run(prompt)
    assert result.status == "success", (result.failed, result.error)
    seen = {one: load_file(host.output / f"lora_{one}.safetensors") for one in ("clip", "lora", "apply")}
    changed = [key for key in seen["clip"] if not torch.allclose(seen["clip"][key], seen["apply"][key], atol=1e-2)]
    assert changed, "the repair changes nothing"
    read = {"cond"} if kind == "sd2" else {"cond", "pooled"}  # SD2 reads no pooled vector
    for key in read:
        torch.testing.assert_close(seen["lora"][key], seen["apply"][key], atol=1e-4, rtol=1e-3)


def test_a_lora_of_low_rank_tells_how_much_it_keeps(host):
    lines = run(host, tiny() | {"save": save("lora", "low", broken=["broken", 0], rank=2, dtype="bf16")})
    assert "rank 2, bf16" in lines[1]
    kept = json.loads(metadata(host.base / lines[0])["gmp_repair_lora"])["kept"]
    assert 0.05 < kept < 0.95 and f"keeps {kept:.1%} of the change" in lines[2]


def test_a_lora_between_encoders_that_do_not_fit_is_refused(host):
    nodes = tiny() | {"other": node("GmPTextEncoderFromCLIP", clip=["clip", 0], member="clip_g")}
    result = host.run(nodes | {"save": save("lora", "misfit", broken=["other", 0])})
    assert result.failed == "save" and "clip_l" in result.error and "clip_g" in result.error


def test_a_checkpoint_keeps_all_but_its_encoder(host):
    folder = host.base / "models" / "checkpoints"
    folder.mkdir(exist_ok=True)
    encoders = [models.text_part(models.canonical(seed)) for seed in (4, 5)]
    models.sdxl_checkpoint(folder / "to_repair.safetensors", *encoders)
    prompt = {
        "broken": node("GmPLoadTextEncoder", file="checkpoints/to_repair.safetensors", member="clip_l"),
        "encoder": node("GmPTestPerturb", text_encoder=["broken", 0], layers=0),
        "dump": node("GmPTestDump", value=["encoder", 0], name="inserted"),
        "save": save("checkpoint", "fixed", checkpoint="to_repair.safetensors", dtype="bf16"),
    }
    lines = run(host, prompt)
    assert lines[0] == "output/checkpoints/fixed_00001_.safetensors"
    assert "to_repair.safetensors with another clip_l: 36 tensors" in lines[1]
    assert "fixed_00001_.safetensors" in models.choices(host, "CheckpointLoaderSimple", "ckpt_name")
    before, after = load_file(folder / "to_repair.safetensors"), load_file(host.base / lines[0])
    assert before.keys() == after.keys()
    part = "conditioner.embedders.0."
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        same = torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8))
        assert same != name.startswith(part), name
    assert metadata(host.base / lines[0])["modelspec.title"] == "small"

    file = "checkpoints/fixed_00001_.safetensors"
    assert file in models.choices(host, "GmPLoadTextEncoder", "file")
    load = node("GmPLoadTextEncoder", file=file, member="clip_l")
    result = host.run({"load": load, "dump": node("GmPTestDump", value=["load", 0], name="reread")})
    assert result.status == "success", result.error
    wanted, seen = (load_file(host.output / f"{one}.safetensors") for one in ("inserted", "reread"))
    assert seen.keys() == wanted.keys()
    assert all(torch.equal(seen[name], tensor.half().float()) for name, tensor in wanted.items())


def test_what_a_checkpoint_does_not_take_is_told(host):
    """clip_l's projection has no place in it; what of a pickle is no tensor is not copied."""
    folder = host.base / "models" / "checkpoints"
    folder.mkdir(exist_ok=True)
    broken, repaired = (models.text_part(models.canonical(seed), lent=seed == 7) for seed in (6, 7))
    state = {f"cond_stage_model.transformer.{name}": tensor for name, tensor in models.hugging(broken).items()}
    state["model.diffusion_model.input_blocks.0.0.weight"] = torch.ones(4, 4, 3, 3)
    torch.save({"state_dict": state, "global_step": 7}, folder / "pickled.ckpt")
    write_text(
        repaired,
        host.base / "models" / "text_encoders" / "to insert.safetensors",
        layout="openai",
        config=models.CONFIG.text,
    )
    prompt = {
        "encoder": node("GmPLoadTextEncoder", file="to insert.safetensors", member="auto"),
        "save": save("checkpoint", "told", checkpoint="pickled.ckpt"),
    }
    lines = run(host, prompt)
    assert "pickled.ckpt with another clip_l: 36 tensors" in lines[1]
    assert "· logit_scale, text_projection: pickled.ckpt has no place for it" in lines
    assert any("global_step" in line and "not read" in line for line in lines), lines
    after = load_file(host.base / lines[0])
    assert after.keys() == state.keys()
    assert all(
        torch.equal(after[f"cond_stage_model.transformer.{name}"], tensor)
        for name, tensor in models.hugging(models.text_part(models.canonical(7))).items()
    )


def test_an_encoder_with_another_activation_is_refused(host):
    folder = host.base / "models" / "checkpoints"
    folder.mkdir(exist_ok=True)
    models.sdxl_checkpoint(folder / "quick.safetensors", *[models.text_part(models.canonical(seed)) for seed in (4, 5)])
    prompt = {
        "encoder": node("GmPLoadTextEncoder", file="checkpoints/quick.safetensors", member="clip_l", activation="gelu"),
        "save": save("checkpoint", "other activation", checkpoint="quick.safetensors"),
    }
    result = host.run(prompt)
    assert result.failed == "save" and "its activation is gelu and not quick_gelu" in result.error
    assert not list(host.output.rglob("other activation*"))


def test_the_workflow_and_the_source_are_in_every_file(host):
    for layout in ("huggingface", "gmp", "lora"):
        prompt = tiny() | {"save": save(layout, f"sourced_{layout}", broken=["broken", 0])}
        entries = metadata(host.base / run(host, prompt)[0])
        assert json.loads(entries["prompt"])["save"]["inputs"]["layout"] == layout
        assert len(json.loads(entries["gmp_source"])["sha256"]) == 64
        assert str(host.base) not in json.dumps(entries)
