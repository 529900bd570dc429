"""The published CLIPs at their real sizes: a header with real shapes, and a hole in the file that takes no disk."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers.models.clip.configuration_clip import CLIPConfig as HFConfig
from transformers.models.clip.modeling_clip import CLIPModel

from gmp.inspection import inspect
from gmp.layouts import open_text, open_vision
from tests.formats import prefixed
from tests.open_clip_peer import open_clip

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Published:
    """text and vision: blocks, width, heads, MLP width. Tensors in OpenAI's layout, parameters in millions."""

    name: tuple[str, str]  # of the text tower, of the vision tower
    open_clip: str
    text: tuple[int, int, int, int]
    vision: tuple[int, int, int, int]
    patch: int
    size: int
    embed: int
    tensors: tuple[int, int]  # text with logit scale, vision
    millions: tuple[float, float, float]  # text with projection, vision, both
    bare: float  # text without projection and logit scale
    context: int = 77


B, L, H, G = (12, 512, 8, 2048), (12, 768, 12, 3072), (24, 1024, 16, 4096), (32, 1280, 20, 5120)
SEES_B, SEES_L = (12, 768, 12, 3072), (24, 1024, 16, 4096)
MODELS = {
    "B/32": Published(("ViT-B", "ViT-B/32"), "ViT-B-32", B, SEES_B, 32, 224, 512, (150, 152),
                      (63.43, 87.85, 151.28), 63.17),
    "B/16": Published(("ViT-B", "ViT-B/16"), "ViT-B-16", B, SEES_B, 16, 224, 512, (150, 152),
                      (63.43, 86.19, 149.62), 63.17),
    "L/14": Published(("ViT-L/14", "ViT-L/14"), "ViT-L-14", L, SEES_L, 14, 224, 768, (150, 296),
                      (123.65, 303.97, 427.62), 123.06),
    "L/14-336": Published(("ViT-L/14", "ViT-L/14 at 336 pixels"), "ViT-L-14-336", L, SEES_L, 14, 336, 768, (150, 296),
                          (123.65, 304.29, 427.94), 123.06),
    "H/14": Published(("ViT-H/14 or ViT-g/14", "ViT-H/14"), "ViT-H-14", H, (32, 1280, 16, 5120), 14, 224, 1024,
                      (294, 392), (354.03, 632.08, 986.11), 352.98),
    "g/14": Published(("ViT-H/14 or ViT-g/14", "ViT-g/14"), "ViT-g-14", H, (40, 1408, 16, 6144), 14, 224, 1024,
                      (294, 488), (354.03, 1012.65, 1366.68), 352.98),
    "bigG/14": Published(("ViT-bigG/14", "ViT-bigG/14"), "ViT-bigG-14", G, (48, 1664, 16, 8192), 14, 224, 1280,
                         (390, 584), (694.66, 1844.91, 2539.57), 693.02),
    "Long-CLIP L": Published(("Long-CLIP ViT-L/14", "ViT-L/14"), "ViT-L-14", L, SEES_L, 14, 224, 768, (150, 296),
                             (123.78, 303.97, 427.75), 123.19, context=248),
}  # fmt: skip
# OpenAI's widths are taken for OpenAI's; wider ones nobody but LAION has published with its names.
QUICK = ("B/32", "B/16", "L/14", "L/14-336", "Long-CLIP L")


def openai_shapes(model: Published) -> Shapes:
    """Of OpenCLIP's model, which has OpenAI's names."""
    config = open_clip().get_model_config(model.open_clip)
    config["text_cfg"]["context_length"] = model.context
    with torch.device("meta"):
        return shapes(open_clip().CLIP(**config))


def huggingface_config(model: Published) -> HFConfig:
    fields = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    activation = {"hidden_act": "gelu", "projection_dim": model.embed}
    text = {**dict(zip(fields, model.text, strict=True)), "max_position_embeddings": model.context, **activation}
    seen = {"patch_size": model.patch, "image_size": model.size}
    vision = {**dict(zip(fields, model.vision, strict=True)), **seen, **activation}
    return HFConfig(text_config=text, vision_config=vision, projection_dim=model.embed)


def huggingface_shapes(model: Published) -> Shapes:
    with torch.device("meta"):
        return shapes(CLIPModel(huggingface_config(model)))


def shapes(model: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def text_part(tensors: Shapes) -> Shapes:
    return {name: shape for name, shape in tensors.items() if not name.startswith(("visual", "vision_model."))}


def hollow(path: Path, tensors: Shapes) -> Path:
    """A safetensors file in fp16 of which only the header takes disk."""
    entries, end = {}, 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert getattr(path.stat(), "st_blocks", 0) * 512 < 2_000_000
    return path


def check(path: Path, model: Published, activation: str, assumed: bool) -> None:
    """What `inspect` says of a whole CLIP, and the configs that its towers would be built with."""
    found = inspect(path)
    assert found.kind == "clip" and found.problems == ()
    text, vision = found.towers
    assert (text.architecture, vision.architecture) == model.name
    member = {1024: "clip_h", 1280: "clip_g"}.get(model.text[1], "clip_l")
    assert (text.member, vision.member) == (member, None)
    assert text.missing == vision.missing == text.unexpected == vision.unexpected == ()
    for tower, sizes in ((text, model.text), (vision, model.vision)):
        assert (tower.layers, tower.sizes["width"], tower.heads, tower.sizes["mlp"]) == sizes
        assert tower.activation == activation
        assert [sentence.split()[:3] for sentence in tower.assumptions] == [
            ["activation", activation, "assumed:"]
        ] * assumed
        assert tower.sizes["embed"] == model.embed
    millions = (text.parameters / 1e6, vision.parameters / 1e6, (text.parameters + vision.parameters) / 1e6)
    assert [round(number, 2) for number in millions] == list(model.millions)

    config, seen = open_text(path).config, open_vision(path).config
    assert (config.layers, config.width, config.heads, config.mlp_width) == model.text
    assert (config.context_length, config.vocab_size, config.embed_dim) == (model.context, 49408, model.embed)
    assert (seen.layers, seen.width, seen.heads, seen.mlp_width) == model.vision
    assert (seen.patch_size, seen.image_size, seen.embed_dim) == (model.patch, model.size, model.embed)
    assert config.activation == seen.activation == activation


@pytest.mark.parametrize("name", MODELS)
def test_openais_layout(tmp_path, name):
    model = MODELS[name]
    tensors = openai_shapes(model)
    assert (len(text_part(tensors)), len(tensors) - len(text_part(tensors))) == model.tensors
    path = hollow(tmp_path / "model.safetensors", tensors)
    check(path, model, "quick_gelu" if name in QUICK else "gelu", assumed=True)


@pytest.mark.parametrize("name", MODELS)
def test_open_clips_folder_says_heads_and_activation(tmp_path, name):
    """LAION's L/14 has OpenAI's shapes and another activation: the config decides."""
    model = MODELS[name]
    hollow(tmp_path / "open_clip_model.safetensors", openai_shapes(model))
    config = {"model_cfg": open_clip().get_model_config(model.open_clip)}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    check(tmp_path, model, "gelu", assumed=False)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_layout(tmp_path, name):
    """16 tensors for a block where q, k and v are apart; 196 of a clip_l, and 590 of L/14."""
    model = MODELS[name]
    tensors = huggingface_shapes(model)
    text = 4 + 16 * model.text[0]
    assert len(tensors) == text + 7 + 16 * model.vision[0] + 3
    assert len([each for each in tensors if each.startswith("text_model.")]) == text
    assert name != "L/14" or (text, len(tensors)) == (196, 590)
    path = hollow(tmp_path / "clip.safetensors", tensors)
    check(path, model, "quick_gelu" if name in QUICK else "gelu", assumed=True)
    path.rename(tmp_path / "model.safetensors")
    huggingface_config(model).save_pretrained(tmp_path)
    check(tmp_path, model, "gelu", assumed=False)


@pytest.mark.parametrize("name", MODELS)
def test_a_text_encoder_by_itself(tmp_path, name):
    """As image models have it: clip_l in fp16 is 246 MB."""
    model = MODELS[name]
    tensors = {each: s for each, s in huggingface_shapes(model).items() if each.startswith("text_model.")}
    path = hollow(tmp_path / "encoder.safetensors", tensors)
    found = inspect(path)
    (tower,) = found.towers
    assert found.kind == "text_encoder" and tower.architecture == model.name[0]
    assert tower.missing == ("text_projection", "logit_scale")
    assert tower.heads == model.text[2] and round(tower.parameters / 1e6, 2) == model.bare
    if name == "L/14":
        assert tower.parameters == 123_060_480


@pytest.mark.parametrize(
    "prefix, name, activation",
    [
        ("cond_stage_model.model.", "H/14", "gelu"),
        ("conditioner.embedders.1.model.", "bigG/14", "gelu"),
        ("conditioner.embedders.0.model.", "bigG/14", "gelu"),
    ],
)
def test_in_a_checkpoint_nothing_is_assumed(tmp_path, prefix, name, activation):
    model = MODELS[name]
    tensors = prefixed(text_part(openai_shapes(model)), prefix)
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = (320, 4, 3, 3)
    (tower,) = inspect(hollow(tmp_path / "checkpoint.safetensors", tensors)).towers
    assert (tower.architecture, tower.heads, tower.activation) == (model.name[0], model.text[2], activation)
    assert tower.assumptions == tower.missing == ()


def test_sd2_without_its_last_block(tmp_path):
    """Programs that export SD 2 leave out what it never reads; the original lends the block."""
    tensors = prefixed(text_part(openai_shapes(MODELS["H/14"])), "cond_stage_model.model.")
    lost = ("text_projection", "logit_scale")
    tensors = {name: s for name, s in tensors.items() if "resblocks.23." not in name and not name.endswith(lost)}
    (tower,) = inspect(hollow(tmp_path / "sd21.safetensors", tensors)).towers
    assert tower.architecture == "ViT-H/14 without its last block" and tower.member == "clip_h"
    assert tower.missing == (*lost, "transformer.resblocks.23")
    assert tower.heads == 16 and tower.assumptions == ()


def test_long_clips_own_file_has_two_tables_of_positions(tmp_path):
    model = MODELS["Long-CLIP L"]
    tensors = openai_shapes(model) | {"positional_embedding_res": (248, 768)}
    found = inspect(hollow(tmp_path / "longclip-L.safetensors", tensors))
    assert found.towers[0].architecture == "Long-CLIP ViT-L/14"
    assert (
        found.towers[0].unexpected == () and open_text(tmp_path / "longclip-L.safetensors").config.context_length == 248
    )
