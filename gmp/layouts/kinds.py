"""What a file is when it is no CLIP: told by the names of its tensors, and said with what to do instead."""

from __future__ import annotations

import re
from collections.abc import Iterable

# The first kind with a pattern that any name has is the file's. The order matters: a checkpoint holds a VAE too.
_SIGNS = (
    ("lora", r"lora_(down|up|A|B)\b|lora\.(down|up)\.|\.(hada|lokr)_w\d|\.dora_scale|^lora_"),
    ("ip_adapter", r"^ip_adapter\.|^image_proj\."),
    ("controlnet", r"^control_model\.|^controlnet_|\.zero_convs\.|^input_hint_block\."),
    ("checkpoint", r"^model\.diffusion_model\."),
    (
        "diffusion_model",
        r"^(model\.)?(diffusion_model|double_blocks|joint_blocks|transformer_blocks|down_blocks|input_blocks)\.",
    ),
    ("embedding", r"^emb_params$|^string_to_param\b|^(clip_[lg]|t5xxl)$"),
    ("siglip", r"^(vision_model\.)?head\.(attention|layernorm|mlp)\b|^(text_model\.)?head\.(weight|bias)$"),
    ("t5", r"(^|\.)encoder\.block\.\d+\.layer\.\d+\.|^shared\.weight$"),
    (
        "language_model",
        r"(^|\.)(model|language_model)\.(\w+\.){0,3}layers\.\d+\.(self_attn|mlp)\.|(^|\.)embed_tokens\.weight$",
    ),
    ("bert", r"(^|\.)encoder\.layer\.\d+\.attention\.self\."),
    ("vae", r"^(first_stage_model\.|vae\.|(en|de)coder\.(conv_in|conv_out|mid|mid_block|down|up)\b)"),
    (
        "upscaler",
        r"^(params(_ema)?\.)?(RRDB_trunk|conv_first|body\.\d+\.rdb\d|model\.1\.sub\.\d+|layers\.\d+\.residual_group)\b",
    ),
)
_PATTERNS = tuple((kind, re.compile(pattern)) for kind, pattern in _SIGNS)

NAMES = {
    "clip": "full CLIP",
    "text_encoder": "text encoder",
    "vision_tower": "vision tower",
    "checkpoint": "checkpoint",
    "diffusion_model": "diffusion model",
    "vae": "VAE",
    "lora": "LoRA",
    "ip_adapter": "IP-Adapter",
    "controlnet": "ControlNet",
    "embedding": "textual inversion embedding",
    "siglip": "SigLIP",
    "t5": "T5 text encoder",
    "language_model": "language model",
    "bert": "BERT text encoder",
    "upscaler": "upscaler",
    "unknown": "no model that is known here",
}
ADVICE = {
    "lora": "is a LoRA, not a text encoder: apply it in ComfyUI and use Text Encoder from CLIP, "
    "or give the base model's encoder",
    "ip_adapter": "is an IP-Adapter, not a text encoder; give a CLIP text encoder or a checkpoint that holds one",
    "controlnet": "is a ControlNet, not a text encoder; give a CLIP text encoder or a checkpoint that holds one",
    "checkpoint": "is a checkpoint without a text encoder; give one with it, or the text encoder's own file",
    "diffusion_model": "is a diffusion model without a text encoder; give the text encoder's own file",
    "embedding": "is a textual inversion embedding, not a text encoder; give clip_l or clip_g",
    "siglip": "is a SigLIP, which has another architecture; give a CLIP",
    "t5": "is a T5 text encoder; only CLIP text encoders can be repaired: give clip_l or clip_g",
    "language_model": "is a language model, not a CLIP; only CLIP text encoders can be repaired: give clip_l or clip_g",
    "bert": "is a BERT text encoder; only CLIP text encoders can be repaired: give clip_l or clip_g",
    "vae": "is a VAE, not a text encoder; give a CLIP text encoder or a checkpoint that holds one",
    "upscaler": "is an upscaler, not a text encoder; give a CLIP text encoder or a checkpoint that holds one",
}


def kind_of(names: Iterable[str]) -> str:
    """One of the kinds, "unknown" for a CLIP too: its towers are found by their blocks."""
    found = {kind for name in names for kind, pattern in _PATTERNS if pattern.search(name)}
    return next((kind for kind, _ in _PATTERNS if kind in found), "unknown")
