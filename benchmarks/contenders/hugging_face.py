"""transformers' CLIPModel, its vision tower frozen: a plain training loop as its documentation would have it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gmp.clip import CLIPConfig
from gmp.layouts.huggingface import piece
from gmp.losses import info_nce

from .task import END, PADDED, START, Task, captions, pixels, weights

LR = 7e-6


def model(task: Task):  # -> CLIPModel
    from transformers import CLIPModel  # three seconds: for those who need it

    with torch.device("meta"):
        clip = CLIPModel(_config(task.shape))
    theirs: dict[str, Tensor] = {}
    for name, tensor in weights(task).items():
        there = piece(name)
        parts = tensor.chunk(len(there.keys)) if len(there.keys) > 1 else (tensor,)
        theirs |= {n: part.T if there.transposed else part for n, part in zip(there.keys, parts, strict=True)}
    clip.to_empty(device="cpu").load_state_dict(theirs, strict=True)
    for part in (clip.text_model, clip.vision_model):  # to_empty has emptied these, and no file holds them
        ids = part.embeddings.position_ids
        ids.copy_(torch.arange(ids.shape[1])[None])
    clip.vision_model.requires_grad_(False)
    clip.visual_projection.requires_grad_(False)
    return clip.to(task.device).train()


def _config(shape: CLIPConfig):  # -> transformers.CLIPConfig
    from transformers import CLIPConfig as Config

    text, vision = shape.text, shape.vision
    towers = {
        name: {
            "hidden_size": c.width, "intermediate_size": c.mlp_width, "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads, "hidden_act": c.activation, "projection_dim": c.embed_dim,
        }
        for name, c in (("text_config", text), ("vision_config", vision))
    }  # fmt: skip
    towers["text_config"] |= {
        "vocab_size": text.vocab_size, "max_position_embeddings": PADDED,
        "bos_token_id": START, "eos_token_id": END, "pad_token_id": END,
    }  # fmt: skip
    towers["vision_config"] |= {"image_size": vision.image_size, "patch_size": vision.patch_size}
    return Config(**towers, projection_dim=text.embed_dim)


def gradients(clip) -> dict[str, Tensor]:  # of a CLIPModel
    """Those of the text tower under OpenAI's names."""
    found = {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}
    names = ("token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias", "text_projection")
    inside = ("ln_1.weight", "ln_1.bias", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight")
    inside += ("attn.out_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias")
    inside += ("mlp.c_proj.weight", "mlp.c_proj.bias")
    blocks = clip.config.text_config.num_hidden_layers
    names += tuple(f"transformer.resblocks.{n}.{name}" for n in range(blocks) for name in inside)
    result = {}
    for name in (*names, "logit_scale"):
        there = piece(name)
        parts = [found[n] for n in there.keys]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        result[name] = whole.T if there.transposed else whole
    return result


def features(clip, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures and captions (B, E)."""
    with torch.no_grad():
        pictures = clip.visual_projection(clip.vision_model(images).pooler_output)
    return pictures, clip.text_projection(clip.text_model(ids).pooler_output)


def steps(task: Task) -> Iterator[int]:
    """Endless steps; each yields its pairs. Pictures are there already, decoded at no cost."""
    clip = model(task)
    optimizer = torch.optim.AdamW((p for p in clip.parameters() if p.requires_grad), lr=LR)
    ids = captions(task.pairs, task.tokens).to(task.device)
    images = pixels(task.pairs, task.shape.vision.image_size).to(task.device)
    while True:
        optimizer.zero_grad()
        with task.autocast:
            loss = info_nce(*features(clip, images, ids), clip.logit_scale)
        loss.backward()
        optimizer.step()
        loss.item()
        yield task.pairs
