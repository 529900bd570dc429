"""A repair small enough to be run hundreds of times: two towers of width 32, 26 pictures, a vocabulary of 64 words."""

from __future__ import annotations

import copy
import errno
import itertools
import zlib
from collections.abc import Callable

import torch

from gmp.clip import CLIP, CLIPConfig, TextConfig, VisionConfig, initialize
from gmp.tokenizer import Tokens

VOCAB, CONTEXT, PICTURES = 64, 20, 26
SMALL = CLIPConfig(
    TextConfig(32, 2, 2, 64, CONTEXT, VOCAB, 16, "quick_gelu"),
    VisionConfig(32, 1, 2, 64, 16, 32, 16, "quick_gelu"),
)


def small_clip(seed: int = 0) -> CLIP:
    return initialize(CLIP(SMALL), torch.Generator().manual_seed(seed))


def tokenize(captions: list[str]) -> Tokens:
    """Each word is one token, told by its hash; 62 starts a caption, 63 ends and pads it."""
    ids = torch.full((len(captions), CONTEXT), VOCAB - 1)
    truncated = 0
    for row, caption in enumerate(captions):
        words = [zlib.crc32(word.encode()) % 61 + 1 for word in caption.split()]
        truncated += len(words) > CONTEXT - 2
        words = [VOCAB - 2, *words[: CONTEXT - 2]]
        ids[row, : len(words)] = torch.tensor(words)
    return Tokens(ids, truncated, 0)


def disturbed(clip: CLIP, amount: float = 0.05, seed: int = 7) -> CLIP:
    """A copy with noise on its text tower, as a stand-in for a ruined one."""
    clip, generator = copy.deepcopy(clip), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if not name.startswith("visual.") and name != "logit_scale":
                parameter += amount * torch.randn(parameter.shape, generator=generator)
    return clip


def full_disk(call: int) -> Callable[[int], None]:
    """An `os.fsync` for a disk that is full from the given call on."""
    calls = itertools.count(1)

    def fsync(descriptor: int) -> None:
        if next(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device")

    return fsync
