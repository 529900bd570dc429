"""What is known of the CLIPs in circulation and stands in no tensor: names, heads, activations. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

ACTIVATIONS = ("quick_gelu", "gelu")
# Every published CLIP text tower has heads of 64 channels.
TEXT_HEADS = {512: 8, 768: 12, 1024: 16, 1280: 20}
# Heads of OpenAI's and LAION's vision towers; `width // 64` is wrong for H, g, bigG and e.
VISION_HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16}
# The widest towers that OpenAI published, all with quick_gelu; wider ones are LAION's, with gelu.
OPENAI_WIDTHS = {"text": 768, "vision": 1024}
LONG_CONTEXT = 248  # Long-CLIP's positions
LONG_KEPT = 20  # the first rows of Long-CLIP's table that stay CLIP's own (arXiv 2403.15378)

# Width and blocks. ViT-H/14 and ViT-g/14 have text towers of the same shape.
_TEXT = {(512, 12): "ViT-B", (768, 12): "ViT-L/14", (1024, 24): "ViT-H/14 or ViT-g/14", (1280, 32): "ViT-bigG/14"}
# Width, blocks and patch.
_VISION = {
    (768, 12, 32): "ViT-B/32",
    (768, 12, 16): "ViT-B/16",
    (1024, 24, 14): "ViT-L/14",
    (1280, 32, 14): "ViT-H/14",
    (1408, 40, 14): "ViT-g/14",
    (1664, 48, 14): "ViT-bigG/14",
}
DEPTHS = {width: blocks for width, blocks in _TEXT}


def text_name(sizes: Mapping[str, int], blocks: int) -> str | None:
    """What a text tower is called, None for one that nobody has published."""
    name = _TEXT.get((sizes.get("width"), blocks))
    if sizes.get("width") == 1024 and blocks == DEPTHS[1024] - 1:
        name = "ViT-H/14 without its last block"
    return f"Long-CLIP {name}" if name and sizes.get("context") == LONG_CONTEXT else name


def vision_name(sizes: Mapping[str, int], blocks: int) -> str | None:
    """What a vision tower is called, None for one that nobody has published."""
    name = _VISION.get((sizes.get("width"), blocks, sizes.get("patch")))
    pixels = image_size(sizes)
    if name and pixels not in (224, None):
        name = f"{name} at {pixels} pixels"
    if name and (count := sizes.get("registers")):
        name = f"{name} with {count} registers" + (f" and {sizes['gates']} gates" if "gates" in sizes else "")
    return name


def image_size(sizes: Mapping[str, int]) -> int | None:
    """Edge of the pictures that a vision tower takes, in pixels.

    Its positions are one more than its patches, and as many more as it has registers.
    """
    if "rows" not in sizes or "patch" not in sizes:
        return None
    return math.isqrt(max(sizes["rows"] - 1 - sizes.get("registers", 0), 0)) * sizes["patch"]
