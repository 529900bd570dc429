"""What is this file? Every kind is named, with what it is for here and what to do next."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gmp.clip import CLIP as Clip
from gmp.clip import CLIPConfig, TextConfig, VisionConfig, initialize
from gmp.errors import InputError
from gmp.geometric import split_mlps
from gmp.inspection import inspect, lines, sentence
from gmp.layouts import write_clip, write_text

ROOT = Path(__file__).parents[1]
CONFIG = CLIPConfig(TextConfig(64, 2, 1, 96, 20, 64, 32), VisionConfig(128, 1, 2, 64, 16, 32, 32))


@pytest.fixture(scope="module")
def state():
    return dict(initialize(Clip(CONFIG), torch.Generator().manual_seed(0)).state_dict())


def text_of(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("visual.")}


def told(path) -> str:
    return "\n".join(lines(inspect(path)))


def test_a_full_clip(tmp_path, state):
    write_clip(state, tmp_path / "clip.safetensors", config=CONFIG)
    seen = inspect(tmp_path / "clip.safetensors")
    text, vision = seen.towers
    assert (seen.kind, seen.layout, seen.problems) == ("clip", "huggingface", ())
    assert (text.member, text.heads, text.activation, text.layers) == ("clip_l", 1, "quick_gelu", 2)
    assert (vision.heads, vision.sizes["width"], vision.missing) == (2, 128, ())
    assert text.parameters + vision.parameters == sum(tensor.numel() for tensor in state.values())
    assert any("lends the projection and is the anchor" in use for use in seen.uses)
    assert seen.next_step.startswith("give it as --vision clip.safetensors")


def test_a_text_encoder_tells_what_it_lacks_and_which_original_it_needs(tmp_path, state):
    config = TextConfig(768, 1, 12, 8, 77, 10, 768)
    wide = initialize(
        Clip(CLIPConfig(config, VisionConfig(64, 1, 1, 8, 16, 32, 768))), torch.Generator().manual_seed(0)
    )
    lacking = {n: t for n, t in text_of(wide.state_dict()).items() if n not in ("text_projection", "logit_scale")}
    write_text(lacking, tmp_path / "te.safetensors", config=config, dtype="fp16")
    answer = told(tmp_path / "te.safetensors")
    assert "text encoder: clip_l (1 block of width 768); Hugging Face names" in answer
    assert "lacks text_projection, logit_scale: the original CLIP lends it" in answer
    assert "Flux (pooled)" in answer and "stored as 20 F16" in answer
    assert "give it as --text te.safetensors" in answer


def test_what_had_to_be_assumed_is_said_with_the_option_that_sets_it(tmp_path, state):
    save_file({n: t.contiguous() for n, t in text_of(state).items()}, tmp_path / "a.safetensors")
    assert "activation quick_gelu assumed" in told(tmp_path / "a.safetensors")
    assert "for LAION models set gelu (--activation)" in told(tmp_path / "a.safetensors")
    assert "set heads otherwise (--heads)" in told(tmp_path / "a.safetensors")


def test_a_gmp_file_says_that_comfyui_cannot_read_it_and_how_to_fold_it(tmp_path, state):
    write_text(split_mlps(text_of(state)), tmp_path / "a.safetensors", layout="gmp", config=CONFIG.text)
    answer = told(tmp_path / "a.safetensors")
    assert "r and theta in place of weights" in answer and "ComfyUI's own loaders cannot read them" in answer
    command = re.search(r"python -m gmp (convert .*\.safetensors) folds", answer)[1].split()
    done = subprocess.run(
        [sys.executable, "-m", "gmp", *[str(tmp_path / w) if "safetensors" in w else w for w in command]], cwd=ROOT
    )
    assert done.returncode == 0 and inspect(tmp_path / "a_plain.safetensors").layout == "huggingface"


def test_half_a_tower_is_said_to_be_damaged(tmp_path, state):
    half = {n: t.contiguous() for n, t in state.items() if n != "ln_final.bias"}
    save_file(half, tmp_path / "a.safetensors")
    seen = inspect(tmp_path / "a.safetensors")
    assert seen.towers[0].problems == ("tensors are missing: ln_final.bias",)
    assert not any("--text" in use for use in seen.uses) and any("--vision" in use for use in seen.uses)
    assert " · tensors are missing: ln_final.bias · " in sentence(seen)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"], "LoRA"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "T5 text encoder"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "checkpoint"),
        (["double_blocks.0.img_attn.qkv.weight"], "diffusion model"),
        (["decoder.conv_in.weight"], "VAE"),
        (["body.0.rdb1.conv1.weight"], "upscaler"),
        (["emb_params"], "textual inversion embedding"),
        (["model.layers.0.self_attn.q_proj.weight"], "language model"),
        (["something.weight"], "no model that is known here"),
    ],
)
def test_other_models_are_named_with_what_to_give_instead(tmp_path, names, what):
    save_file(dict.fromkeys(names, torch.zeros(2)), tmp_path / "a.safetensors")
    seen = inspect(tmp_path / "a.safetensors")
    assert seen.what == what and seen.towers == () and len(seen.problems) == 1
    assert told(tmp_path / "a.safetensors").count("\n") == 1


def test_what_is_no_model_is_refused_by_name(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InputError, match="is a GGUF file"):
        inspect(tmp_path / "a.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is a folder without a model"):
        inspect(tmp_path / "empty")


def test_an_answer_is_json(tmp_path, state):
    write_clip(state, tmp_path / "clip.safetensors", config=CONFIG)
    done = subprocess.run(
        [sys.executable, "-m", "gmp", "inspect", tmp_path / "clip.safetensors", "--json"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    answer = json.loads(done.stdout.splitlines()[-1])[0]
    assert answer["towers"][0]["sizes"] == {"vocab": 64, "width": 64, "context": 20, "embed": 32, "mlp": 96}
