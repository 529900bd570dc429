"""Hugging Face transformers: q, k, v apart, projections as Linear weights, `text_model.` and `vision_model.`.

A vision tower's registers and gates have names in zer0int's fork of transformers only; they are read.

transformers from 5.6 on leaves the level out when it saves a bare CLIPTextModel or CLIPVisionModel
(huggingface/transformers#44431); files are written with it, since ComfyUI does not recognise the other form.
"""

from __future__ import annotations

from .canonical import REGISTERS, Piece, block_name
from .place import Place

_OUTSIDE = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' own spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    REGISTERS: "vision_model.embeddings.register_embeddings",
}
_BLOCK = {
    "ln_1": ("layer_norm1",),
    "attn.in_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out_proj": ("self_attn.out_proj",),
    "ln_2": ("layer_norm2",),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.c_proj": ("mlp.fc2",),
}
_STACK = {
    "transformer.resblocks": "text_model.encoder.layers",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
}
BUFFERS = ("position_ids",)


def piece(name: str) -> Piece:
    """Canonical name -> transformers' names."""
    if inside := block_name(name):
        stack, number, inner = inside
        module, leaf = inner[: -len("_weight")], "weight"
        if inner.endswith("bias"):
            module, leaf = inner[: -len("_bias")], "bias"
        return Piece(tuple(f"{_STACK[stack]}.{number}.{part}.{leaf}" for part in _BLOCK[module]))
    if name not in _OUTSIDE:  # a gate
        return Piece((name.replace("visual.transformer.", "vision_model.").replace("visual.", "vision_model."),))
    return Piece((_OUTSIDE[name],), transposed=name in ("text_projection", "visual.proj"))


PLACES = (
    Place("huggingface", "text", piece),
    Place("huggingface", "vision", piece),
    Place("huggingface", "text", piece, level="text_model."),
    Place("huggingface", "vision", piece, level="vision_model."),
)
