"""OpenAI's names, which are the canonical ones; OpenCLIP's plain models use them too."""

from __future__ import annotations

from .canonical import Piece
from .place import Place

# Numbers and buffers that OpenAI's and OpenCLIP's files carry beside the weights; none of them is learnt.
BUFFERS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def piece(name: str) -> Piece:
    """Canonical name -> the same name."""
    return Piece((name,))


PLACES = tuple(Place("openai", tower, piece) for tower in ("text", "vision"))
