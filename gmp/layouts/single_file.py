"""Checkpoints that hold a whole image model: where each family keeps its text encoders.

SD 1.x, SD 2.x, SDXL base and refiner, SD3, Flux bundles and what ComfyUI saves; diffusers' folders, whose tensors go
by the component's folder. The family also settles the activation: CLIP-L is OpenAI's, CLIP-G and CLIP-H are LAION's.
"""

from __future__ import annotations

from . import huggingface, openai
from .place import Place

_L = {"layout": "single_file", "tower": "text", "member": "clip_l", "activation": "quick_gelu"}
_G = {"layout": "single_file", "tower": "text", "member": "clip_g", "activation": "gelu"}
_H = {"layout": "single_file", "tower": "text", "member": "clip_h", "activation": "gelu"}
_NESTED = ("text_encoders.", "")  # SD3 and Flux checkpoints; ComfyUI's own tree

_PREFIXES = (
    ("cond_stage_model.transformer.", "cond_stage_model.transformer.", huggingface.piece, _L),  # SD 1.x
    ("cond_stage_model.model.", "cond_stage_model.model.", openai.piece, _H),  # SD 2.x
    ("conditioner.embedders.0.transformer.", "conditioner.embedders.0.", huggingface.piece, _L),  # SDXL
    ("conditioner.embedders.1.model.", "conditioner.embedders.1.model.", openai.piece, _G),  # SDXL
    ("conditioner.embedders.0.model.", "conditioner.embedders.0.model.", openai.piece, _G),  # SDXL refiner
    *((f"{outer}clip_l.transformer.", f"{outer}clip_l.", huggingface.piece, _L) for outer in _NESTED),
    *((f"{outer}clip_g.transformer.", f"{outer}clip_g.", huggingface.piece, _G) for outer in _NESTED),
    *((f"{outer}clip_h.transformer.", f"{outer}clip_h.", huggingface.piece, _H) for outer in _NESTED),
)
# SD 2.1 unCLIP; Stable Video Diffusion; zero123
_SEEING = ("embedder.model.", "conditioner.embedders.0.open_clip.model.", "cond_stage_model.model.")
_FOLDERS = ("text_encoder/", "text_encoder_2/", "text_encoder_3/")

PLACES = (
    *(
        Place(piece=piece, prefix=prefix, root=root, level=level, **kind)
        for prefix, root, piece, kind in _PREFIXES
        for level in (("", "text_model.") if piece is huggingface.piece else ("",))
    ),
    *(
        Place("single_file", "vision", piece, root=root, activation="gelu")
        for outer in _SEEING
        for root, piece in ((outer, openai.piece), (f"{outer}visual.", huggingface.piece))  # as ComfyUI saves it
    ),
    *(
        Place("diffusers", "text", huggingface.piece, prefix=folder, root=folder, level=level)
        for folder in _FOLDERS
        for level in ("", "text_model.")
    ),
    *(
        Place("diffusers", "vision", huggingface.piece, root="image_encoder/", level=level)
        for level in ("", "vision_model.")
    ),
)
