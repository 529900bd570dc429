"""Trains the world's original CLIP from scratch: `python -m gmp.world.train`.

Writes `original.safetensors` (OpenAI's names) and `original.log` into `assets/`. The token table has CLIP's real 49,408
rows and would outweigh the rest of the model, so it is rounded to fp8 after two thirds of the training, and the rest of
the model learns with the rounded table.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..clip import CLIP, MAX_LOGIT_SCALE, CLIPConfig, TextConfig, VisionConfig, initialize
from ..data.images import normalize
from ..losses import info_nce
from ..measure import retrieval, text_features
from ..optim import parameter_groups, schedule, set_rates
from ..tokenizer import Tokenizer, lengths
from .models import ASSETS, save_original
from .scenes import IMAGE_SIZE, Scene, draw_scenes, render

CONFIG = CLIPConfig(
    TextConfig(64, 4, 1, 128, 77, 49408, 64, "quick_gelu"),
    VisionConfig(128, 3, 2, 256, 8, IMAGE_SIZE, 64, "quick_gelu"),
)
CAPTIONS = 3  # per scene


def draw(scenes: Iterable[tuple[Scene, random.Random]]) -> tuple[Tensor, list[str]]:
    """Pictures of N scenes as bytes (N, 3, 64, 64) and their captions, `CAPTIONS` in a row for each."""
    pixels, captions = [], []
    for scene, dice in scenes:
        pixels.append(torch.from_numpy(np.array(render(scene, dice))).permute(2, 0, 1))
        captions += scene.captions()
    return torch.stack(pixels), captions


def batches(count: int, batch: int, epochs: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures and one of the captions of each, in a fresh order every epoch; the last short batch is left out."""
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        choice = torch.randint(CAPTIONS, (count,), generator=generator)
        for start in range(0, count - batch + 1, batch):
            pictures = order[start : start + batch]
            yield pictures, pictures * CAPTIONS + choice[pictures]


@torch.no_grad()
def held_out_retrieval(clip: CLIP, pixels: Tensor, ids: Tensor):
    images = torch.cat([clip.encode_image(normalize(chunk)) for chunk in pixels.split(200)])
    return retrieval(images, text_features(clip, ids), [i // CAPTIONS for i in range(len(ids))])


def round_table(clip: CLIP) -> None:
    """Rounds the token table to what fp8 can hold and stops training it."""
    table = clip.token_embedding.weight.requires_grad_(False)
    table.copy_(table.to(torch.float8_e4m3fn).float())


def train(count: int, epochs: int, batch: int, lr: float, seed: int, log) -> CLIP:
    generator = torch.Generator().manual_seed(seed)
    clip = initialize(CLIP(CONFIG), generator)
    tokenizer = Tokenizer()
    pixels, captions = draw(draw_scenes(count, seed, "train"))
    held_pixels, held_captions = draw(draw_scenes(1000, seed, "held_out"))
    ids, held_ids = tokenizer(captions).ids, tokenizer(held_captions).ids
    length = lengths(ids).max()  # every caption of the world fits into this many tokens
    optimizer = torch.optim.AdamW(parameter_groups(clip, lr, {}, weight_decay=0.05), betas=(0.9, 0.98))
    total = epochs * (count // batch)
    warmup, round_at = total // 10, total * 2 // 3
    log(f"scenes {count} epochs {epochs} batch {batch} lr {lr} seed {seed} steps {total} config {CONFIG}")
    start = time.monotonic()
    for step, (pictures, sentences) in enumerate(batches(count, batch, epochs, generator)):
        if step == round_at:
            with torch.no_grad():
                round_table(clip)
        set_rates(optimizer, schedule("cosine", step, total, warmup))
        images = clip.encode_image(normalize(pixels[pictures]))
        texts = clip(ids[sentences][:, :length]).projected
        loss = info_nce(images, texts, clip.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        if step % 50 == 0 or step == total - 1:
            log(
                f"step {step} loss {loss.item():.4f} temperature {math.exp(-clip.logit_scale.item()):.4f} "
                f"seconds {time.monotonic() - start:.0f}"
            )
        if (step + 1) % (total // 10) == 0 or step == total - 1:
            found = held_out_retrieval(clip, held_pixels, held_ids)
            log(
                f"step {step} held-out recall@1 text to image {found.text_to_image.recall_at_1:.3f}, "
                f"image to text {found.image_to_text.recall_at_1:.3f}"
            )
    return clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--count", type=int, default=32000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with open(options.out / "original.log", "w", encoding="utf-8") as file:

        def log(line: str) -> None:
            print(line, file=file, flush=True)
            print(line, flush=True)

        clip = train(options.count, options.epochs, options.batch, options.lr, options.seed, log)
    save_original(clip, options.out)


if __name__ == "__main__":
    main()
