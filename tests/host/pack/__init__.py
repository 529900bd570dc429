"""Nodes for the host tests only: they make CLIPs of random tiny weights and write down what reached them."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
import comfy.text_encoders.flux
import comfy.text_encoders.sd2_clip
import comfy.text_encoders.sd3_clip
import folder_paths
import torch
from safetensors.torch import save_file
from server import PromptServer

import nodes

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
T5 = {"d_model": 32, "d_ff": 64, "num_heads": 2, "d_kv": 16, "num_layers": 2}
KINDS = {
    "sdxl": (comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer),
    "flux": (comfy.text_encoders.flux.flux_clip(), comfy.text_encoders.flux.FluxTokenizer),
    "sd2": (comfy.text_encoders.sd2_clip.SD2ClipModel, comfy.text_encoders.sd2_clip.SD2Tokenizer),
    "t5": (
        comfy.text_encoders.sd3_clip.sd3_clip(clip_l=False, clip_g=False, t5=True),
        comfy.text_encoders.sd3_clip.SD3Tokenizer,
    ),
}


class Node:
    CATEGORY = "test"
    FUNCTION = "run"
    RETURN_TYPES: tuple[str, ...] = ()
    INPUTS: dict[str, tuple] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, object]:
        return {"required": cls.INPUTS}


class TinyCLIP(Node):
    """A CLIP object with random weights. The projections of clip_l and clip_h are NaN, as uninitialised memory may be.

    projection: clip_g's.
    """

    INPUTS = {"kind": (list(KINDS),)}
    RETURN_TYPES = ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, object]:
        return super().INPUT_TYPES() | {"optional": {"projection": (["random", "zeros", "NaN"],)}}

    def run(self, kind: str, projection: str = "random"):
        class Target:
            clip, tokenizer = KINDS[kind]
            params: dict[str, object] = {}

        options = {
            "dtype": torch.float32,
            "clip_l_model_config": TINY,
            "clip_g_model_config": TINY | {"num_hidden_layers": 4},
            "clip_h_model_config": TINY,
            "t5xxl_model_config": T5,
        }
        clip = comfy.sd.CLIP(Target, model_options=options)
        dice = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in clip.cond_stage_model.named_parameters():
                weight.copy_(torch.randn(weight.shape, generator=dice) * 0.1)
                if name in [f"{member}.transformer.text_projection.weight" for member in ("clip_l", "clip_h")]:
                    weight.fill_(torch.nan)
                if name == "clip_g.transformer.text_projection.weight" and projection != "random":
                    weight.fill_(0 if projection == "zeros" else torch.nan)
        return (clip,)


class Perturb(Node):
    """Another text encoder of the same shape, or one of so many layers, or with a projection too."""

    INPUTS = {"text_encoder": ("GMP_TEXT_ENCODER",), "layers": ("INT", {"default": 0})}
    RETURN_TYPES = ("GMP_TEXT_ENCODER",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, object]:
        return super().INPUT_TYPES() | {"optional": {"projection": ("BOOLEAN", {"default": False})}}

    def run(self, text_encoder, layers: int, projection: bool = False):
        dice = torch.Generator().manual_seed(1)
        state = {n: t + 0.05 * torch.randn(t.shape, generator=dice) for n, t in text_encoder.state.items()}
        config = replace(text_encoder.config, layers=layers or text_encoder.config.layers)
        if projection:
            state["text_projection"] = torch.randn(config.width, config.embed_dim, generator=dice) * 0.1
        return (replace(text_encoder, state=state, config=config),)


class Patches(Node):
    """The names of the tensors that a CLIP object patches."""

    INPUTS = {"clip": ("CLIP",)}
    OUTPUT_NODE = True

    def run(self, clip):
        return {"ui": {"text": sorted(clip.patcher.patches)}}


class Lora(Node):
    """Patches one weight of clip_l, as a LoRA does."""

    INPUTS = {"clip": ("CLIP",)}
    RETURN_TYPES = ("CLIP",)

    def run(self, clip):
        clip = clip.clone()
        key = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
        shape = clip.cond_stage_model.state_dict()[key].shape
        clip.add_patches({key: ("diff", (torch.ones(shape),))}, 0.5)
        return (clip,)


class PooledOnly(Node):
    """As CLIPTextEncode, of clip_l alone: a T5 beside it is not computed."""

    INPUTS = {"clip": ("CLIP",), "text": ("STRING", {})}
    RETURN_TYPES = ("CONDITIONING",)

    def run(self, clip, text: str):
        clip.load_model()
        _, pooled = clip.cond_stage_model.clip_l.encode_token_weights(clip.tokenize(text)["l"])
        return ([[torch.empty(0), {"pooled_output": pooled}]],)


class NoModel(Node):
    """Stands for the diffusion model where only the CLIP matters."""

    RETURN_TYPES = ("MODEL",)

    def run(self):
        return (None,)


class TinyModel(Node):
    """A diffusion model of SD1's kind with random weights, for conditioning of any width."""

    INPUTS = {"context_dim": ("INT", {"default": 64})}
    RETURN_TYPES = ("MODEL",)

    def run(self, context_dim: int):
        shape = {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
            "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_middle": 1,
            "transformer_depth_output": [1, 1, 1, 1], "use_spatial_transformer": True, "context_dim": context_dim,
            "num_heads": 4, "use_linear_in_transformer": False, "legacy": False, "dtype": torch.float32,
        }  # fmt: skip
        config = comfy.supported_models.SD15(shape)
        device = comfy.model_management.get_torch_device()
        model = config.get_model({}, "", device=torch.device("cpu"))
        dice = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in model.diffusion_model.parameters():
                weight.copy_(torch.randn(weight.shape, generator=dice) * 0.1)
        return (comfy.model_patcher.ModelPatcher(model, device, torch.device("cpu")),)


class LoopLag(Node):
    """The longest that the server's event loop stood still since the last call, in seconds: but for Python's garbage
    collections, which stop the whole process and grow with all that ComfyUI has imported; and the longest of these."""

    OUTPUT_NODE = True
    beat: asyncio.Task | None = None
    stalls: list[tuple[float, float]] = []  # begin and end
    collections: list[tuple[float, float]] = []
    began = 0.0

    @classmethod
    def IS_CHANGED(cls) -> float:
        return float("nan")

    @classmethod
    async def watch(cls) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            cls.stalls.append((before, time.monotonic() - 0.005))

    @classmethod
    def collecting(cls, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            cls.began = time.monotonic()
        elif time.monotonic() - cls.began > 0.01:
            cls.collections.append((cls.began, time.monotonic()))

    @classmethod
    def without_collections(cls, stall: tuple[float, float]) -> float:
        shared = [min(stall[1], end) - max(stall[0], begin) for begin, end in cls.collections]
        return stall[1] - stall[0] - sum(length for length in shared if length > 0)

    def run(self):
        cls = type(self)
        if cls.beat is None:
            gc.callbacks.append(cls.collecting)
            cls.beat = asyncio.run_coroutine_threadsafe(cls.watch(), PromptServer.instance.loop)
        worst = max(map(cls.without_collections, cls.stalls), default=0.0)
        longest = max((end - begin for begin, end in cls.collections), default=0.0)
        cls.stalls, cls.collections = [], []
        return {"ui": {"text": [str(worst), str(longest)]}}


class Dump(Node):
    """Writes CONDITIONING, LATENT, or a text encoder's state, to output/NAME.safetensors."""

    INPUTS = {"value": ("*",), "name": ("STRING", {"default": "dump"})}
    OUTPUT_NODE = True

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: dict[str, str]) -> bool:
        return True

    def run(self, value, name: str):
        if isinstance(value, list):
            tensors = {"cond": value[0][0], "pooled": value[0][1].get("pooled_output")}
            tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
        elif isinstance(value, dict):
            tensors = {"samples": value["samples"]}
        else:
            tensors = value.state
        plain = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        save_file(plain, Path(folder_paths.get_output_directory()) / f"{name}.safetensors")
        return {}


class Tokens(Node):
    """Token ids of the pack's training tokenizer, and of ComfyUI's prompts, as JSON."""

    INPUTS = {"texts": ("STRING", {}), "member": (["clip_l", "clip_g"],)}
    OUTPUT_NODE = True

    def run(self, texts: str, member: str):
        root = nodes.NODE_CLASS_MAPPINGS["GmPRepair"].__module__.removesuffix(".nodes.repair")
        host = importlib.import_module(root + ".nodes.host")
        tokens = host.tokenizer(member, 77)(json.loads(texts))
        prompt = comfy.sdxl_clip.SDXLTokenizer().tokenize_with_weights("a red circle")[member[-1]][0]
        found = {"ids": tokens.ids.tolist(), "truncated": tokens.truncated, "specials": tokens.specials}
        return {"ui": {"text": [json.dumps(found | {"prompt": [token for token, _ in prompt]})]}}


class Threads(Node):
    """The names of the training threads."""

    OUTPUT_NODE = True

    @classmethod
    def IS_CHANGED(cls) -> float:
        return float("nan")

    def run(self):
        return {"ui": {"text": [t.name for t in threading.enumerate() if t.name.startswith("gmp ")]}}


NODE_CLASS_MAPPINGS = {
    f"GmPTest{kind.__name__}": kind
    for kind in (TinyCLIP, Perturb, Patches, Lora, PooledOnly, NoModel, TinyModel, LoopLag, Dump, Tokens, Threads)
}
