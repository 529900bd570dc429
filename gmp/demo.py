"""The demo: ruin, repair and proof in the shipped small world, with no download."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F

from .config import RepairConfig
from .data.captions import first_captions, read_index
from .features import embed_index
from .join import join, text_tower
from .layouts import TowerFile, read_text, read_vision
from .measure import measure_tower, text_features
from .plots import plot_nearest
from .run import RESULT, Inputs, repair
from .tokenizer import Tokenizer
from .world.models import ASSETS, ORIGINAL, RUINED
from .world.write import write_world

PICTURES = 8000
HELD_OUT = 1000
SHOWN = 6  # captions in the picture of what each encoder finds
NEAREST = "nearest.png"
CONFIG = RepairConfig(epochs=3, batch=200)
MEASURED = (
    "recall_at_1_text_to_image",
    "recall_at_1_image_to_text",
    "median_rank_text_to_image",
    "median_rank_image_to_text",
    "drift",
)


def demo(out: Path, device: torch.device) -> Generator[dict[str, object], None, dict[str, object]]:
    """Repairs the world's ruined text encoder below `out`; yields events, returns the figures.

    `ruined`, `repaired` and `original` are measured on scenes that no one was trained on, the repaired one as it was
    read back from its file. A demo that was interrupted goes on where it stopped.
    """
    start = time.monotonic()
    text, vision, original = (
        read_text(ASSETS / RUINED),
        read_vision(ASSETS / ORIGINAL),
        read_text(ASSETS / ORIGINAL),
    )
    pictures = out / "pictures"
    captions = yield from write_world(pictures, PICTURES, seed=1)
    inputs = Inputs(text, vision, original, read_index(pictures, captions), Tokenizer())
    run = out / "run"
    yield from repair(inputs, CONFIG, run, cache=out / "cache", device=device)
    encoders = {"original": original, "ruined": text, "repaired": read_text(run / RESULT)}
    figures = yield from measure_encoders(encoders, vision, original, out, device)
    return figures | {"seconds": round(time.monotonic() - start, 1), "run": str(run)}


def measure_encoders(
    encoders: dict[str, TowerFile], vision: TowerFile, original: TowerFile, out: Path, device: torch.device
) -> Generator[dict[str, object], None, dict[str, object]]:
    """Every text encoder against the same held-out pictures, seen by the original vision tower."""
    held_out = out / "held_out"
    captions = yield from write_world(held_out, HELD_OUT, seed=2, split="held_out")
    index = read_index(held_out, captions)
    joined = join(original, vision, original)
    index, features, _ = yield from embed_index(joined.build_vision().to(device), index, out / "cache")
    pictures = features[:]
    ids = Tokenizer()(index.captions()).ids
    reference = text_tower(original, joined).to(device)
    first = first_captions(index.caption_counts)[:SHOWN]
    figures, found = {}, {}
    for name, file in encoders.items():
        tower = text_tower(file, joined).to(device)
        measured = measure_tower(tower, pictures, ids, index.owners(), reference)
        figures[name] = {key: measured[key] for key in MEASURED}
        scores = F.normalize(text_features(tower, ids[first]), dim=-1) @ F.normalize(pictures, dim=-1).T
        found[name] = [index.paths[i] for i in scores.argmax(dim=1).tolist()]
    captions = [picture.captions[0] for picture in index.pictures[:SHOWN]]
    plot_nearest(captions, {name: found[name] for name in _order(found)}, out / NEAREST)
    return figures


def _order(names: Iterable[str]) -> list[str]:
    """Before, after, original."""
    between = [name for name in names if name not in ("ruined", "original")]
    return ["ruined", *between, "original"]


def table(figures: dict[str, object]) -> str:
    """Before, after and original, in both worlds: what contrastive training sees, what a diffusion model reads."""
    lines = [
        "                 recall@1              median rank           cosine to the original, where a model reads",
        "                 text→image image→text  text→image image→text  penultimate   last  pooled  projected",
        "                                                               (SDXL)        (SD1) (Flux)",
    ]
    for name in _order(figures):
        one = figures[name]
        cosines = {point: one["drift"][point]["cosine"] for point in one["drift"]}
        lines.append(
            f"{name:<15}  {one['recall_at_1_text_to_image']:>10.3f} {one['recall_at_1_image_to_text']:>10.3f}"
            f"  {one['median_rank_text_to_image']:>10} {one['median_rank_image_to_text']:>10}"
            f"  {cosines['penultimate']:>11.3f} {cosines['last']:>6.3f} {cosines['pooled']:>7.3f}"
            f" {cosines['projected']:>10.3f}"
        )
    return "\n".join(lines)
