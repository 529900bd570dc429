"""Small model files for the host tests: CLIPs that are read but never run, and files that are no CLIP."""

from __future__ import annotations

import struct
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gmp.clip import CLIP, CLIPConfig, TextConfig, VisionConfig, initialize
from gmp.layouts import huggingface
from gmp.layouts.canonical import take_apart

# As small as a CLIP gets whose number of heads the width tells.
CONFIG = CLIPConfig(
    TextConfig(64, 2, 1, 96, 20, 50, 16, "quick_gelu"),
    VisionConfig(64, 1, 1, 96, 16, 32, 16, "quick_gelu"),
)


def canonical(seed: int) -> dict[str, Tensor]:
    return initialize(CLIP(CONFIG), torch.Generator().manual_seed(seed)).state_dict()


def text_part(state: dict[str, Tensor], lent: bool = False) -> dict[str, Tensor]:
    """lent: with projection and logit scale."""
    skipped = () if lent else ("text_projection", "logit_scale")
    return {name: t for name, t in state.items() if not name.startswith("visual.") and name not in skipped}


def hugging(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Canonical tensors under Hugging Face's names."""
    return {key: part for name, t in state.items() for key, part in take_apart(huggingface.piece(name), t).items()}


def sdxl_checkpoint(path: Path, clip_l: dict[str, Tensor], clip_g: dict[str, Tensor]) -> None:
    """Both text encoders where SDXL keeps them, in fp16, and something of the rest."""
    dice = torch.Generator().manual_seed(9)
    rest = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.randn(4, 4, 3, 3, generator=dice).half(),
        "first_stage_model.encoder.conv_in.weight": torch.randn(8, 3, 3, 3, generator=dice),
        "denoiser.sigmas": torch.randn(7, generator=dice).double(),
    }
    encoders = {f"conditioner.embedders.0.transformer.{name}": t.half() for name, t in hugging(clip_l).items()}
    encoders |= {f"conditioner.embedders.1.model.{name}": t.half() for name, t in clip_g.items()}
    save_file({name: t.contiguous() for name, t in (rest | encoders).items()}, path, {"modelspec.title": "small"})


def lora(path: Path) -> None:
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{name}.lora_up.weight": torch.ones(64, 4), f"{name}.lora_down.weight": torch.ones(4, 32)}
    save_file(tensors | {f"{name}.alpha": torch.tensor(4.0)}, path)


def unet(path: Path) -> None:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(12, 4), "img_in.weight": torch.ones(4, 4)}, path)


def picture(path: Path) -> None:
    """A PNG of one pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0\xff\0\0")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def choices(host, node: str, name: str) -> list[str]:
    """What a node's menu lists now."""
    sections = host.get(f"/object_info/{node}")[node]["input"].values()
    kind, *rest = next(section[name] for section in sections if name in section)
    return kind if isinstance(kind, list) else rest[0]["options"]


def answer(host, path: str) -> tuple[int, str]:
    """Status and text of a GET, whatever it is."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{host.port}{path}", timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
