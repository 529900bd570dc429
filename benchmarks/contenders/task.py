"""What a contender is given: shapes, weights, captions and pictures, the same for all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from gmp.clip import CLIP, CLIPConfig, TextConfig, VisionConfig, initialize

START, END, PADDED = 49406, 49407, 77
SPREAD = 0.2  # of the logarithm of a caption's length; COCO's own captions of 13.6 tokens spread like that
WEIGHTS = "weights.safetensors"
PICTURE = (640, 480)  # pixels, as in COCO
LARGE = CLIPConfig(  # OpenAI's ViT-L/14
    TextConfig(768, 12, 12, 3072, PADDED, 49408, 768, "quick_gelu"),
    VisionConfig(1024, 24, 16, 4096, 14, 224, 768, "quick_gelu"),
)
SMALL = CLIPConfig(  # to see in seconds that everything runs
    TextConfig(256, 3, 4, 1024, PADDED, 49408, 256, "quick_gelu"),
    VisionConfig(256, 2, 4, 1024, 32, 224, 256, "quick_gelu"),
)


@dataclass(frozen=True)
class Task:
    """One contender's turn."""

    contender: str
    device: str
    precision: str  # fp32 or bf16
    pairs: int  # of one optimizer step
    tokens: int  # of a caption on average, start and end included
    folder: str  # with weights and pictures
    small: bool  # SMALL towers in place of LARGE
    seconds: float  # steps are timed for this long, and one step at least

    @property
    def shape(self) -> CLIPConfig:
        return SMALL if self.small else LARGE

    @property
    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.precision == "bf16")


def write(folder: Path, shape: CLIPConfig, pictures: int) -> None:
    """Random weights under OpenAI's names, and JPEG files: smooth colours with noise, 100 kB each."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        clip = CLIP(shape)
    state = initialize(clip.to_empty(device="cpu"), generator).state_dict()
    save_file(state | {"logit_scale": torch.tensor(math.log(1 / 0.07))}, folder / WEIGHTS)
    random = np.random.default_rng(0)
    for number in range(pictures):
        colours = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(PICTURE, Image.BICUBIC)
        noise = random.integers(-12, 13, (PICTURE[1], PICTURE[0], 3))
        pixels = (np.asarray(colours) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04}.jpg", quality=85)


def weights(task: Task) -> dict[str, Tensor]:
    return load_file(Path(task.folder) / WEIGHTS)


def picture_paths(task: Task) -> list[Path]:
    return sorted(Path(task.folder).glob("*.jpg"))


def captions(count: int, tokens: int) -> Tensor:
    """Random ids (count, 77); the lengths' logarithm is normal, their mean `tokens`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, START, (count, PADDED), generator=generator)
    stretch = torch.exp(SPREAD * torch.randn(count, generator=generator) - SPREAD**2 / 2)
    lengths = (tokens * stretch).round().long().clamp(3, PADDED)
    ids[:, 0] = START
    return torch.where(torch.arange(PADDED)[None] < lengths[:, None] - 1, ids, END)


def pixels(count: int, size: int) -> Tensor:
    """Normalised random pictures (count, 3, size, size): decoding them costs those who get them nothing."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))
