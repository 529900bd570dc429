"""The world's shipped models: where they lie, how they are written and read."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..clip import CLIP
from ..files import read_header, read_tensors, write_safetensors
from ..join import join
from ..layouts import read_text, read_vision, write_clip, write_text

ASSETS = Path(__file__).parent / "assets"
ORIGINAL = "original.safetensors"
RUINED = "ruined_text_encoder.safetensors"


def save_original(clip: CLIP, folder: Path) -> None:
    """The whole CLIP, OpenAI's names, small dtypes."""
    write_clip(clip.state_dict(), folder / ORIGINAL, layout="openai", dtype="fp16", config=clip.config)
    _shrink(folder / ORIGINAL)


def save_ruined(clip: CLIP, folder: Path) -> None:
    """The text encoder alone, clip_l's key names; without projection and logit scale, which SDXL files lack too."""
    state = {
        name: tensor
        for name, tensor in clip.state_dict().items()
        if not name.startswith("visual.") and name not in ("text_projection", "logit_scale")
    }
    write_text(state, folder / RUINED, layout="huggingface", dtype="fp16", config=clip.text_config)
    _shrink(folder / RUINED)


def _shrink(path: Path) -> None:
    """Stores the token table in fp8, which it has been rounded to: exact, and a third of the file."""
    header = read_header(path)
    tensors = read_tensors(header, header.tensors)
    table = next(name for name in tensors if name.endswith("token_embedding.weight"))
    tensors[table] = tensors[table].to(torch.float8_e4m3fn)
    write_safetensors(tensors, path, header.metadata)


def load_original(folder: Path | str | os.PathLike[str] = ASSETS) -> CLIP:
    path = Path(folder) / ORIGINAL
    text = read_text(path)
    return join(text, read_vision(path), text).build()
