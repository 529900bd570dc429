"""Checkpoints that hold a whole image model: where each family keeps its text encoders.

SD 1.x, SDXL base and refiner, SD3 and what ComfyUI saves. The family also settles the activation: its CLIP-L
is OpenAI's, its CLIP-G is LAION's bigG.
"""

from __future__ import annotations

from . import huggingface, openai
from .place import Place

_L = {"layout": "single_file", "tower": "text", "member": "clip_l", "activation": "quick_gelu"}
_G = {"layout": "single_file", "tower": "text", "member": "clip_g", "activation": "gelu"}
_NESTED = ("text_encoders.", "")  # SD3 and Flux checkpoints; ComfyUI's own tree

_PREFIXES = (
    ("cond_stage_model.transformer.", "cond_stage_model.transformer.", huggingface.piece, _L),  # SD 1.x
    ("conditioner.embedders.0.transformer.", "conditioner.embedders.0.", huggingface.piece, _L),  # SDXL
    ("conditioner.embedders.1.model.", "conditioner.embedders.1.model.", openai.piece, _G),  # SDXL
    ("conditioner.embedders.0.model.", "conditioner.embedders.0.model.", openai.piece, _G),  # SDXL refiner
    *((f"{outer}clip_l.transformer.", f"{outer}clip_l.", huggingface.piece, _L) for outer in _NESTED),
    *((f"{outer}clip_g.transformer.", f"{outer}clip_g.", huggingface.piece, _G) for outer in _NESTED),
)

PLACES = tuple(
    Place(piece=piece, prefix=prefix, root=root, level=level, **kind)
    for prefix, root, piece, kind in _PREFIXES
    for level in (("", "text_model.") if piece is huggingface.piece else ("",))
)
