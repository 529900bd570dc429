"""The config.json of transformers and diffusers, and OpenCLIP's: what the tensors do not say, in their words."""

from __future__ import annotations

from typing import Any


def huggingface(config: dict[str, Any], projected: bool) -> dict[str, Any]:
    """transformers' config for a text encoder, with or without projection, or for both towers."""
    text = _text(config["text"])
    if "vision" not in config:
        kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
        return {"architectures": [kind], "model_type": "clip_text_model", **text, "torch_dtype": "float32"}
    vision = config["vision"]
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config["text"]["embed_dim"],
        "logit_scale_init_value": 2.6592,
        "text_config": {"model_type": "clip_text_model", **text},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision["width"],
            "intermediate_size": vision["mlp_width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["heads"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "projection_dim": vision["embed_dim"],
            "hidden_act": vision["activation"],
            "layer_norm_eps": 1e-5,
        },
    }


def _text(text: dict[str, Any]) -> dict[str, Any]:
    end = text["end_of_text"]
    return {
        "vocab_size": text["vocab_size"],
        "hidden_size": text["width"],
        "intermediate_size": text["mlp_width"],
        "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["context_length"],
        "projection_dim": text["embed_dim"],
        "hidden_act": text["activation"],
        "layer_norm_eps": 1e-5,
        "bos_token_id": text["vocab_size"] - 2 if end is None else end - 1,
        "eos_token_id": 2 if end is None else end,  # for 2, as in OpenAI's, transformers takes the largest id
        "pad_token_id": 1,  # as in OpenAI's; transformers does not use it
    }


def open_clip(config: dict[str, Any], projected: bool) -> dict[str, Any]:
    """OpenCLIP's config for both towers."""
    text, vision = config["text"], config["vision"]
    end = text["end_of_text"]
    pooled = {} if end in (None, text["vocab_size"] - 1) else {"pool_type": "eos", "eos_id": end}  # else the largest id
    return {
        "model_cfg": {
            "embed_dim": text["embed_dim"],
            "quick_gelu": text["activation"] == "quick_gelu",
            "vision_cfg": {
                "image_size": vision["image_size"],
                "layers": vision["layers"],
                "width": vision["width"],
                "head_width": vision["width"] // vision["heads"],
                "mlp_ratio": _ratio(vision),
                "patch_size": vision["patch_size"],
            },
            "text_cfg": {
                "context_length": text["context_length"],
                "vocab_size": text["vocab_size"],
                "width": text["width"],
                "heads": text["heads"],
                "layers": text["layers"],
                "mlp_ratio": _ratio(text),
                **pooled,
            },
        },
        "preprocess_cfg": {
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
        },
    }


def _ratio(tower: dict[str, Any]) -> float:
    """MLP width over width, such that OpenCLIP's `int(width * ratio)` gives the MLP width back."""
    width, mlp_width = tower["width"], tower["mlp_width"]
    exact = mlp_width / width
    return exact if int(width * exact) == mlp_width else (mlp_width + 0.5) / width
