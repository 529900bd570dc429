"""OpenCLIP's names where they differ from OpenAI's: `text.` before the text tower, `module.` in training."""

from __future__ import annotations

from .openai import piece
from .place import Place

PLACES = (
    Place("open_clip", "text", piece, prefix="text."),
    Place("open_clip", "text", piece, prefix="module.", root="module."),
    Place("open_clip", "text", piece, prefix="module.text.", root="module."),
    Place("open_clip", "vision", piece, root="module."),
)
