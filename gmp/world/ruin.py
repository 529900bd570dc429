"""Ruins the world's text encoder the way diffusion training does: `python -m gmp.world.ruin`.

A decoder that stands in for a diffusion model draws the picture from `penultimate`, all 77 rows. Decoder and text
encoder are trained together on few, narrow scenes at a rate that is far too high for the encoder. As with SDXL and
kohya's scripts, the last block, the final LayerNorm, the projection and the vision tower are left alone, and so is the
token table. Writes `ruined_text_encoder.safetensors` (clip_l's key names) and `ruined.log` into `assets/`.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clip import CLIP
from ..measure import drift
from ..tokenizer import Tokenizer
from .models import ASSETS, load_original, save_ruined
from .scenes import Scene, all_scenes, draw_scenes
from .train import CAPTIONS, draw, held_out_retrieval

DRAWN = 16  # side of the decoder's picture, pixels
PATCH = 2


class Decoder(nn.Module):
    """Draws a small picture by cross-attention to a text encoder's hidden states."""

    def __init__(self, width: int, generator: torch.Generator):
        super().__init__()
        self.queries = nn.Parameter(torch.empty((DRAWN // PATCH) ** 2, width))
        self.key_value = nn.Linear(width, 2 * width)
        self.ln = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 4 * width)
        self.out = nn.Linear(4 * width, 3 * PATCH * PATCH)
        with torch.no_grad():
            for parameter in (self.queries, self.key_value.weight, self.fc.weight, self.out.weight):
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            for bias in (self.key_value.bias, self.fc.bias, self.out.bias):
                bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:  # (B, L, W) -> (B, 3, DRAWN, DRAWN)
        key, value = self.key_value(hidden).chunk(2, dim=-1)
        query = self.queries.expand(len(hidden), -1, -1)
        seen = F.scaled_dot_product_attention(query, key, value)
        patches = self.out(F.gelu(self.fc(self.ln(query + seen))))  # (B, patches, 3 · PATCH²)
        return F.fold(patches.transpose(1, 2), DRAWN, PATCH, stride=PATCH)


def narrow(scene: Scene) -> bool:
    """Red and blue circles and squares only: the few concepts of a typical fine-tune."""
    things = (scene.first, scene.second)
    return all(thing.colour in ("red", "blue") and thing.shape in ("circle", "square") for thing in things)


def ruin(original: CLIP, steps: int, batch: int, lr: float, seed: int, log) -> CLIP:
    """Returns a copy of `original` whose text tower has been trained to death."""
    generator = torch.Generator().manual_seed(seed)
    clip = copy.deepcopy(original).requires_grad_(False)
    clip.transformer.resblocks[:-1].requires_grad_(True)
    clip.positional_embedding.requires_grad_(True)
    decoder = Decoder(clip.text_config.width, generator)
    every = len(all_scenes("train"))
    pixels, captions = draw(pair for pair in draw_scenes(every, seed) if narrow(pair[0]))
    targets = F.interpolate(pixels.float() / 127.5 - 1, size=DRAWN, mode="area")
    ids = Tokenizer()(captions).ids
    trained = [p for p in clip.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*trained, *decoder.parameters()], lr=lr, weight_decay=0.0)
    log(f"scenes {len(targets)} steps {steps} batch {batch} lr {lr} seed {seed}")
    for step in range(steps):
        pick = torch.randint(len(targets), (batch,), generator=generator)
        drawn = decoder(clip.penultimate(ids[pick * CAPTIONS]))
        loss = F.mse_loss(drawn, targets[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            log(f"step {step} reconstruction loss {loss.item():.4f}")
    return clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with open(options.out / "ruined.log", "w", encoding="utf-8") as file:

        def log(line: str) -> None:
            print(line, file=file, flush=True)
            print(line, flush=True)

        original = load_original(options.out)
        ruined = ruin(original, options.steps, options.batch, options.lr, options.seed, log)
        pixels, captions = draw(draw_scenes(1000, options.seed, "held_out"))
        ids = Tokenizer()(captions).ids
        for name, clip in (("original", original), ("ruined", ruined)):
            found = held_out_retrieval(clip, pixels, ids)
            log(
                f"{name}: held-out recall@1 text to image {found.text_to_image.recall_at_1:.3f}, "
                f"image to text {found.image_to_text.recall_at_1:.3f}"
            )
        for point, moved in drift(ruined, original, ids[:300]).items():
            log(f"drift at {point}: cosine {moved.cosine:.3f}, relative norm {moved.relative_norm:.3f}")
    save_ruined(ruined, options.out)


if __name__ == "__main__":
    main()
