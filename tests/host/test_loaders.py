"""Saved text encoders in ComfyUI's own loaders, which take the published sizes only: clip_l, clip_g and T5-XXL.

The files hold random weights in fp16 and are deleted afterwards. A ComfyUI of its own loads them, and gives the memory
back when it ends.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gmp.clip import CLIP, CLIPConfig, initialize
from gmp.files import Pending, write_safetensors
from gmp.layouts import huggingface
from gmp.layouts.canonical import expected
from tests.host import models
from tests.host.conftest import COMFYUI, Host
from tests.host.graphs import node

TEXT = "a red fox in the snow, oil on canvas"
DISK, MEMORY = 15 * 10**9, 16 * 10**9  # bytes
SIZES = {  # layers, width, MLP width
    "clip_l": (12, 768, 3072),
    "clip_g": (32, 1280, 5120),
}


def available() -> int:
    """Bytes of memory that programs can have now."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def shapes(layers: int, width: int, mlp: int) -> dict[str, tuple[int, ...]]:
    """A text encoder's tensors under Hugging Face's names."""
    sizes = {"width": width, "mlp": mlp, "3 width": 3 * width, "vocab": 49408, "context": 77}
    result = {}
    for name, dimensions in expected("text", range(layers)).items():
        shape = tuple(sizes.get(one, one) for one in dimensions)
        if not all(isinstance(size, int) for size in shape) or name == "logit_scale":
            continue
        keys = huggingface.piece(name).keys
        result |= {key: (shape[0] // len(keys), *shape[1:]) for key in keys}
    return result


def random_tensor(noise: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """Cut out of one block of noise, from another place for each name."""
    count = torch.Size(shape).numel()
    start = zlib.crc32(name.encode()) % len(noise)
    values = noise.repeat(-(-(start + count) // len(noise)))[start : start + count].view(shape)
    return 1 + values if "norm" in name and name.endswith("weight") else values


def write_clip(path: Path, member: str) -> None:
    noise = (torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)) * 0.03).half()
    tensors = shapes(*SIZES[member])
    if member == "clip_g":
        tensors["text_projection.weight"] = (1280, 1280)
    pending = {
        name: Pending("F16", shape, partial(random_tensor, noise, name, shape)) for name, shape in tensors.items()
    }
    write_safetensors(pending, path)


def write_vision(path: Path) -> None:
    """A small vision tower that embeds as clip_g does."""
    text, vision = models.CONFIG.text, models.CONFIG.vision
    clip = CLIP(CLIPConfig(replace(text, embed_dim=1280), replace(vision, embed_dim=1280)))
    state = initialize(clip, torch.Generator().manual_seed(0)).state_dict()
    write_safetensors({name: tensor for name, tensor in state.items() if name.startswith("visual.")}, path)


def write_t5(path: Path) -> None:
    """T5-XXL with all weights zero, in fp8: a header, and a hole in the file that takes no disk."""
    tensors = {"shared.weight": (32128, 4096), "encoder.final_layer_norm.weight": (4096,)}
    tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
    for block in (f"encoder.block.{number}.layer" for number in range(24)):
        tensors |= {f"{block}.0.SelfAttention.{name}.weight": (4096, 4096) for name in "qkvo"}
        tensors |= {f"{block}.1.DenseReluDense.{name}.weight": (10240, 4096) for name in ("wi_0", "wi_1")}
        tensors[f"{block}.1.DenseReluDense.wo.weight"] = (4096, 10240)
        tensors |= {f"{block}.{layer}.layer_norm.weight": (4096,) for layer in (0, 1)}
    header, end = {}, 0
    for name, shape in tensors.items():
        begin, end = end, end + torch.Size(shape).numel()
        header[name] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Iterator[Host]:
    """A ComfyUI with a clip_l, a clip_g and a T5-XXL of the published sizes."""
    if not (COMFYUI / "main.py").exists():
        pytest.skip(f"no ComfyUI in {COMFYUI}; set COMFYUI_DIR")
    base = tmp_path_factory.mktemp("big")
    if shutil.disk_usage(base).free < DISK:
        pytest.skip(f"files of the published sizes need {DISK / 1e9:.0f} GB of free disk")
    if not Path("/proc/meminfo").exists() or available() < MEMORY:
        pytest.skip(f"models of the published sizes need {MEMORY / 1e9:.0f} GB of free memory")
    host = Host(base)
    try:
        for member in SIZES:
            write_clip(base / "models" / "text_encoders" / f"{member}.safetensors", member)
        write_vision(base / "models" / "clip_vision" / "small.safetensors")
        write_t5(base / "models" / "text_encoders" / "t5xxl.safetensors")
        host.start()
        yield host
    finally:
        host.kill()
        for folder in ("models", "output"):
            shutil.rmtree(base / folder, ignore_errors=True)


def loader(kind: str, **files: str) -> dict:
    """The loader of a kind of CLIP, with some of its files replaced."""
    if kind == "stable_diffusion":
        return node("CLIPLoader", clip_name=files.get("clip_l", "clip_l.safetensors"), type=kind)
    names = [files.get(name, f"{name}.safetensors") for name in ("clip_l", "clip_g" if kind == "sdxl" else "t5xxl")]
    return node("DualCLIPLoader", clip_name1=names[0], clip_name2=names[1], type=kind)


def encoded(host: Host, prompt: dict, **clips: str) -> list[dict[str, Tensor]]:
    """What the prompt's CLIPs make of the text; clips: name of the CLIP -> the node that encodes with it."""
    for clip, encode in clips.items():
        prompt[f"text {clip}"] = node(encode, clip=[clip, 0], text=TEXT)
        prompt[f"dump {clip}"] = node("GmPTestDump", value=[f"text {clip}", 0], name=clip)
    result = host.run(prompt, 400)
    assert result.status == "success", (result.failed, result.error)
    return [load_file(host.output / f"{clip}.safetensors") for clip in clips]


@pytest.mark.parametrize(
    "kind, member, inputs, changes",
    [
        ("stable_diffusion", "clip_l", {"layout": "openai"}, {"cond", "pooled"}),
        ("sdxl", "clip_l", {"layout": "huggingface"}, {"cond"}),
        ("sdxl", "clip_g", {"layout": "huggingface", "vision_tower": ["vision", 0]}, {"cond", "pooled"}),
        ("flux", "clip_l", {"layout": "huggingface"}, {"pooled"}),
    ],
    ids=["sd1", "sdxl, clip_l", "sdxl, clip_g as a whole CLIP", "flux"],
)
def test_a_saved_encoder_in_comfyuis_loader_is_the_applied_one(big, kind, member, inputs, changes):
    """Broken file -> Apply to CLIP at strength 1, against the saved file in the same loader."""
    prefix = f"{kind}_{member}"
    prompt = {
        "broken": loader(kind),
        "encoder": node("GmPLoadTextEncoder", file=f"{member}.safetensors", member="auto"),
        "repaired": node("GmPTestPerturb", text_encoder=["encoder", 0], layers=0),
        "applied": node(
            "GmPApplyToCLIP", clip=["broken", 0], text_encoder=["repaired", 0], member="auto", strength=1.0
        ),
        "save": node(
            "GmPSaveTextEncoder",
            text_encoder=["repaired", 0],
            filename_prefix=f"clip/{prefix}",
            dtype="fp16",
            **inputs,
        ),
        "vision": node("GmPLoadVisionTower", file="small.safetensors"),
    }
    short = "GmPTestPooledOnly" if kind == "flux" else "CLIPTextEncode"  # T5 takes half a minute
    broken, applied = encoded(big, prompt, broken=short, applied="CLIPTextEncode")
    name = f"{prefix}_00001_.safetensors"
    assert name in models.choices(big, "CLIPLoader", "clip_name")
    assert name in models.choices(big, "DualCLIPLoader", "clip_name1")
    assert name in models.choices(big, "DualCLIPLoader", "clip_name2")
    (loaded,) = encoded(big, {"loaded": loader(kind, **{member: name})}, loaded="CLIPTextEncode")
    assert loaded.keys() == applied.keys() == {"cond", "pooled"}
    for key, tensor in applied.items():
        size = tensor.abs().max().item()
        torch.testing.assert_close(loaded[key], tensor, rtol=0, atol=1e-4 * size)
        if len(broken[key]):
            far = (tensor - broken[key]).abs().max().item() > 0.1 * size
            assert far == (key in changes), (key, size)
    big.post("/free", {"unload_models": True, "free_memory": True})
