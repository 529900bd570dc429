"""open_clip with its image tower locked (`--lock-image`), as `open_clip_train` steps."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from gmp.clip import MAX_LOGIT_SCALE

from .task import Task, captions, pixels, weights

STAND_INS = Path(__file__).parents[2] / "tests" / "peers"  # torchvision, which open_clip imports and does not need here
LR = 7e-6


def library() -> ModuleType | None:
    """open_clip, None where it does not import."""
    sys.path.append(str(STAND_INS))  # last: a torchvision that is installed comes first
    try:
        return importlib.import_module("open_clip")
    except (ImportError, RuntimeError):  # RuntimeError: a torchvision for another torch
        return None


def steps(task: Task) -> Iterator[int]:
    """Endless steps; each yields its pairs. Pictures are there already, decoded at no cost."""
    open_clip = library()
    text, vision = task.shape.text, task.shape.vision
    clip = open_clip.CLIP(
        embed_dim=text.embed_dim,
        quick_gelu=True,
        text_cfg={
            "context_length": text.context_length, "vocab_size": text.vocab_size, "width": text.width,
            "heads": text.heads, "layers": text.layers,
        },
        vision_cfg={
            "image_size": vision.image_size, "patch_size": vision.patch_size, "width": vision.width,
            "head_width": vision.width // vision.heads, "layers": vision.layers,
        },
    )  # fmt: skip
    clip.load_state_dict(weights(task))
    clip.lock_image_tower()
    clip.to(task.device).train()
    trained = {name: p for name, p in clip.named_parameters() if p.requires_grad}
    plain = [p for name, p in trained.items() if p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name]
    decayed = [p for p in trained.values() if not any(p is other for other in plain)]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-6)
    loss_of = open_clip.ClipLoss()
    ids = captions(task.pairs, task.tokens).to(task.device)
    images = pixels(task.pairs, task.shape.vision.image_size).to(task.device)
    while True:
        optimizer.zero_grad()
        with task.autocast:
            loss = loss_of(*clip(images, ids))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        loss.item()
        yield task.pairs
